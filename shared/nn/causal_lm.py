"""What BLIP-2 and the papers after it ask of a language model: embeddings in, hidden states out, text step by step.

`LanguageModel` is the protocol, `SmallLanguageModel` the house's own: Llama's layers (Touvron et al. 2023,
arXiv:2302.13971, Sec. 2.2), small enough to be trained in a minute, and in another size SmolLM2. Published models of
other forms answer the same protocol in shared/backbones/lm.py. Axes: B texts, T their tokens, S slots so far
(prefix, prompt and what followed, padding included), U answer tokens, R rows at work, W width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from shared.core.errors import UserError
from shared.nn.attention import Attention, KVCache
from shared.nn.bert import key_mask, positions_of

if TYPE_CHECKING:
    from shared.nn.generation import Decoding


class LanguageModel(Protocol):
    """A frozen one is in 16 bits as a rule: it casts what comes in, and gives logits in fp32."""

    kind: str  # "causal": one stack reads everything; "seq2seq": an encoder reads, a decoder answers
    width: int  # W, of its embeddings
    vocabulary: int  # V
    context: int  # the most slots of a text, prefix included

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> their embeddings (B, T, W), without any position."""

    def states(self, embeddings: Tensor, attention_mask: Tensor | None, targets: Tensor | None = None) -> Tensor:
        """Embeddings (B, S, W), attention_mask (B, S) bool False at padding on either side -> what `logits` reads.

        causal: the state at every slot (B, S, W); that of a slot says the token behind it. seq2seq: embeddings go to
        the encoder, and each state (B, U, W) says the target of its own place; targets (B, U), padded on the right.
        """

    def logits(self, states: Tensor) -> Tensor:
        """States (..., W) -> fp32 logits (..., V). Give only those that have a label: V is large."""

    def decoding(self, prefix: Tensor, attention_mask: Tensor | None = None) -> Decoding:
        """Text behind a prefix of embeddings (B, Q, W), attention_mask (B, Q): its prompts come behind the prefix."""


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight (Zhang and Sennrich 2019, arXiv:1910.07467), in fp32 inside."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x), without biases; gate and up in one matrix, [gate; up]. (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LanguageBlock(nn.Module):
    """Llama's layer: causal attention and a gated feed-forward, each behind a norm and added. (B, T, W) -> same."""

    def __init__(self, width: int, heads: int, kv_heads: int, mlp_width: int, eps: float):
        super().__init__()
        self.attention_norm = RMSNorm(width, eps)
        self.attention = Attention(width, heads, kv_heads=kv_heads, bias=False)
        self.mlp_norm = RMSNorm(width, eps)
        self.mlp = GatedMLP(width, mlp_width)

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Callable, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask=mask, causal=True, rotary=rotary, cache=cache)
        return x + self.mlp(self.mlp_norm(x))


class SmallLanguageModel(nn.Module):
    """A causal model with rotary positions and one table for embeddings and head. Answers LanguageModel.

    Its loss is `F.cross_entropy(model.logits(model.states(model.embed(tokens), present)[:, :-1][...]), ...)`.
    """

    kind = "causal"

    def __init__(
        self,
        vocabulary: int,
        context: int,
        width: int,
        layers: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        mlp_width: int | None = None,
        rotary_base: float = 10_000.0,
        eps: float = 1e-5,
    ):
        """kv_heads: as many as heads where None; hidden: 4 x width where None."""
        super().__init__()
        self.vocabulary, self.context, self.width = vocabulary, context, width
        self.head_width, self.rotary_base = width // heads, rotary_base
        if self.head_width % 2:
            raise UserError(f"language model: {heads} heads of {self.head_width} channels, rotary positions need even")
        self.word = nn.Embedding(vocabulary, width)
        mlp_width = mlp_width or 4 * width
        self.blocks = nn.ModuleList(
            LanguageBlock(width, heads, kv_heads or heads, mlp_width, eps) for _ in range(layers)
        )
        self.norm = RMSNorm(width, eps)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in cast(
            Iterable[LanguageBlock], self.blocks
        ):  # what is added to the stream, as in GPT-2: its size does not grow with depth
            for added in (block.attention.out, block.mlp.down):
                nn.init.normal_(added.weight, std=0.02 / (2 * layers) ** 0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> (B, T, W)."""
        return self.word(tokens)

    def states(self, embeddings: Tensor, attention_mask: Tensor | None, targets: Tensor | None = None) -> Tensor:
        """Embeddings (B, S, W), attention_mask (B, S) -> the state at every slot (B, S, W)."""
        refuse_targets(targets)
        return self.run(embeddings, *seen_and_positions(embeddings, attention_mask))

    def logits(self, states: Tensor) -> Tensor:
        """(..., W) -> fp32 (..., V)."""
        return F.linear(states, self.word.weight).float()

    def decoding(self, prefix: Tensor, attention_mask: Tensor | None = None) -> CausalDecoding:
        """Text behind a prefix (B, Q, W), attention_mask (B, Q)."""
        return CausalDecoding(self, prefix, attention_mask)

    def run(
        self, x: Tensor, attention_mask: Tensor | None, positions: Tensor, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """New slots (R, T, W) behind cached ones, attention_mask (R, S) of all slots where any is padding, positions
        (R or 1, T) of the new ones -> their states (R, T, W)."""
        x = x.to(self.word.weight.dtype)
        angles = self._angles(positions)
        rotary = _Turn(angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        mask = key_mask(attention_mask)
        for index, block in enumerate(self.blocks):
            x = block(x, mask, rotary, caches[index] if caches else None)
        return self.norm(x)

    def caches(self) -> list[KVCache]:
        return [KVCache() for _ in self.blocks]

    def _angles(self, positions: Tensor) -> Tensor:
        """(R, T) -> (R, 1, T, K/2) in fp32: bf16 cannot count beyond 256."""
        pair = torch.arange(0, self.head_width, 2, device=positions.device, dtype=torch.float32) / self.head_width
        return positions[:, None, :, None].float() * self.rotary_base**-pair


class _Turn:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) on channels (i, i + K/2), as Llama's published weights have
    them; shared/nn/positions.py turns neighbours. The tables are made once for all layers."""

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos, self.sin = cos, sin  # (R or 1, 1, T, K/2)

    def __call__(self, q: Tensor, k: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        return self._turned(q), self._turned(k)

    def _turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)  # (R, H, T, K/2) each
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)


def refuse_targets(targets: Tensor | None) -> None:
    if targets is not None:
        raise UserError("a causal language model takes no targets: put the answer behind the prompt")


def seen_and_positions(embeddings: Tensor, attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """What a causal stack has to know of the slots of embeddings (B, S, W): attention_mask (B, S), and positions
    (B or 1, S).

    Padding behind a text is seen by none of its tokens: then no mask is needed, and None comes back.
    """
    if attention_mask is None or attention_mask.is_meta or not _padded_before(attention_mask):
        return None, torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    return attention_mask, positions_of(attention_mask)


def _padded_before(attention_mask: Tensor) -> bool:
    """Whether padding stands before any token of its row."""
    return bool((~attention_mask[:, :-1] & attention_mask[:, 1:]).any())


def causal_mask(attention_mask: Tensor, new: int) -> Tensor:
    """attention_mask (R, S) -> who may attend to whom (R, 1, T, S) for the last `new` = T slots. Padding sees itself,
    or its softmax would be over nothing."""
    S = attention_mask.shape[1]
    before = torch.ones(new, S, dtype=torch.bool, device=attention_mask.device).tril(S - new)
    itself = torch.eye(S, dtype=torch.bool, device=attention_mask.device)[S - new :]
    return rearrange((before & attention_mask[:, None]) | itself, "r t s -> r 1 t s")


class CausalDecoding:
    """A causal model at work behind a prefix of embeddings: shared/nn/generation.py's protocol.

    Prefix and prompt are read once a picture; beams begin as copies of what was kept of them. As long as no picture
    leaves, beams that change places are copied from the end of the prompt on only: before it they are equal.
    """

    prefixed = True  # so a prompt may be empty

    def __init__(self, model: Any, prefix: Tensor, attention_mask: Tensor | None = None):
        """model: embed, run, logits, caches and context as SmallLanguageModel has them. prefix (B, Q, W)."""
        self.model, self.prefix, self.prefix_mask = model, prefix, attention_mask
        self.caches: list[KVCache] = model.caches()
        self.attention_mask: Tensor | None = None  # (R, S) where any slot is padding
        self.rows = self.start = self.length = 0  # start: slots of prefix and prompt; length: slots so far

    def prefill(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Prompts (B, T), T may be 0 where there is a prefix -> logits of the next token (B, V)."""
        if len(tokens) != len(self.prefix):
            raise ValueError(f"{len(tokens)} prompts for {len(self.prefix)} prefixes")
        before = self.prefix_mask
        if before is None:
            before = attention_mask.new_ones(self.prefix.shape[:2])
        attention_mask = torch.cat([before, attention_mask], dim=1)  # (B, S)
        x = torch.cat([self.prefix, self.model.embed(tokens)], dim=1)
        if not x.shape[1]:
            raise UserError("generation: neither a prefix nor a prompt; give at least a start token")
        self._lengthen(x.shape[1])
        self.rows, self.start = len(x), x.shape[1]
        states = self.model.run(x, *seen_and_positions(x, attention_mask), self.caches)
        self.attention_mask = None if bool(attention_mask.all()) else attention_mask
        if self.attention_mask is None:
            last = states[:, -1]
        else:
            places = torch.arange(x.shape[1], device=x.device)
            last = states[torch.arange(len(x), device=x.device), torch.where(attention_mask, places, -1).argmax(1)]
        return self.model.logits(last)

    def step(self, tokens: Tensor) -> Tensor:
        """One more token a row (R,) -> logits of the next (R, V)."""
        self._lengthen(1)
        if self.attention_mask is None:
            positions = torch.full((1, 1), self.length - 1, device=tokens.device)
        else:
            positions = self.attention_mask.sum(1, keepdim=True)  # (R, 1)
            self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.attention_mask[:, :1])], dim=1)
        states = self.model.run(self.model.embed(tokens[:, None]), self.attention_mask, positions, self.caches)
        return self.model.logits(states[:, 0])

    def select(self, rows: Tensor, contexts: Tensor | None = None) -> None:
        """Keep these rows, in this order (they may repeat); contexts: the prompts that stay, all where None."""
        since = self.start if contexts is None and len(rows) == self.rows else 0
        self.rows = len(rows)
        if self.attention_mask is not None and not since:
            self.attention_mask = self.attention_mask[rows]
        for cache in self.caches:
            cache.reorder(rows, since)

    def _lengthen(self, slots: int) -> None:
        self.length += slots
        if self.length > self.model.context:
            raise UserError(
                f"language model: a text of {self.length} tokens, the prefix included, but its context is "
                f"{self.model.context}; shorten the prompt or max_new_tokens"
            )
