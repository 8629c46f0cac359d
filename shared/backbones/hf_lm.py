"""Language models of transformers behind the three-method protocol of nn.causal_lm."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.core.errors import UserError
from shared.nn.attention import KVCache
from shared.nn.bert import key_mask
from shared.nn.causal_lm import (
    CausalDecoding,
    LanguageModel,
    causal_mask,
    refuse_targets,
    seen_and_positions,
)
from shared.tokenizers.lm import LanguageTokenizer


@dataclass(frozen=True)
class Published:
    """repo: where a hub has the folder; changes: what BLIP-2's code changes in its configuration; stop: the text whose
    first token ends an answer, where that is not the tokenizer's own end; half: the 16 bits that it is read in on a
    GPU."""

    repo: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    stop: str | None = None
    half: torch.dtype = torch.bfloat16


# LAVIS reads FlanT5 in bfloat16 with the exact GELU, where its own configuration has the tanh form, and OPT in float16;
# it stops OPT at a newline (lavis/models/blip2_models/blip2_t5.py and blip2_opt.py).
PUBLISHED = {
    "opt-2.7b": Published("facebook/opt-2.7b", stop="\n", half=torch.float16),
    "opt-6.7b": Published("facebook/opt-6.7b", stop="\n", half=torch.float16),
    "flan-t5-xl": Published("google/flan-t5-xl", {"dense_act_fn": "gelu"}),
    "flan-t5-xxl": Published("google/flan-t5-xxl", {"dense_act_fn": "gelu"}),
}


def half_of(name: str) -> torch.dtype:
    """The 16 bits that a language model by name is best read in here: those of its release where there is a GPU, else
    bfloat16, which CPUs multiply faster and no sum overflows."""
    return PUBLISHED[name].half if name in PUBLISHED and torch.cuda.is_available() else torch.bfloat16


def freeze(model: Any) -> Any:
    """Its weights take no gradient; what comes in may. It stays in eval mode."""
    model.requires_grad_(False).eval()
    model.train = lambda mode=True: model  # BLIP-2's disabled_train
    return model


# ---- folders in transformers' form


def load_folder(
    folder: Path, dtype: torch.dtype = torch.bfloat16, published: Published | None = None
) -> tuple[LanguageModel, LanguageTokenizer]:
    """A model and its tokenizer from a folder as transformers' save_pretrained writes it: OPT, Llama or T5."""
    published = published or Published(str(folder))
    adapter, theirs = read_folder(folder, dtype, published)
    return adapter, _tokenizer_of(theirs, adapter.kind, published)


def read_folder(folder: Path, dtype: torch.dtype | str, published: Published) -> tuple[Any, Any]:
    """As load_folder, but transformers' own tokenizer, which whoever writes such a folder anew needs; dtype "auto": as
    it is stored."""
    transformers = _transformers(folder)
    local = {"local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        if config.model_type not in ADAPTERS:
            raise UserError(f"{folder}: a language model of type '{config.model_type}', known: {', '.join(ADAPTERS)}")
        for name, value in published.changes.items():
            setattr(config, name, value)
        adapter = ADAPTERS[config.model_type]
        kinds = {"causal": transformers.AutoModelForCausalLM, "seq2seq": transformers.AutoModelForSeq2SeqLM}
        model, found = kinds[adapter.kind].from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, **local
        )
        theirs = transformers.AutoTokenizer.from_pretrained(folder, **local)
    except UserError:
        raise
    except Exception as error:  # many kinds: the file system's, safetensors', pickle's, tokenizers'
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"{folder}: cannot be read as a language model: {first[0]}") from error
    if lacking := sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"])):
        raise UserError(f"{folder}: {len(lacking)} weights missing or of another size ({lacking[0]}, ...): get it anew")
    return adapter(model), theirs


def _transformers(what: object) -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import transformers
    except ImportError:
        raise UserError(f"{what}: needs transformers: python -m pip install transformers") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _tokenizer_of(theirs: Any, kind: str, published: Published) -> LanguageTokenizer:
    template = theirs.chat_template if isinstance(theirs.chat_template, str) else None
    pieces, seq2seq = theirs.backend_tokenizer, kind == "seq2seq"
    if theirs.eos_token_id is None:
        raise UserError(f"{published.repo}: its tokenizer has no end token")
    end = theirs.eos_token_id
    if published.stop is not None:
        end = pieces.encode(published.stop, add_special_tokens=False).ids[0]
    return LanguageTokenizer(
        pieces,
        start=None if seq2seq else theirs.bos_token_id,
        end=end,
        pad=theirs.pad_token_id,
        prompt_end=theirs.eos_token_id if seq2seq else None,
        template=template,
    )


class CausalAdapter(nn.Module):
    """transformers' OPT or Llama. Keys and values are kept in this house's caches."""

    kind = "causal"

    def __init__(self, theirs: Any):
        super().__init__()
        config = theirs.config
        self.theirs, self.table, self.head = theirs, theirs.get_input_embeddings(), theirs.get_output_embeddings()
        self.stack = theirs.get_decoder()
        self.vocabulary, self.width = self.table.weight.shape
        self.context, self.layers = config.max_position_embeddings, config.num_hidden_layers
        freeze(self)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)

    def states(self, embeddings: Tensor, attention_mask: Tensor | None, targets: Tensor | None = None) -> Tensor:
        refuse_targets(targets)
        return self.run(embeddings, *seen_and_positions(embeddings, attention_mask))

    def logits(self, states: Tensor) -> Tensor:
        return self.head(states).float()

    def decoding(self, prefix: Tensor, attention_mask: Tensor | None = None) -> CausalDecoding:
        return CausalDecoding(self, prefix, attention_mask)

    def run(
        self, x: Tensor, attention_mask: Tensor | None, positions: Tensor, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """As SmallLanguageModel.run."""
        mask = None if attention_mask is None else causal_mask(attention_mask, x.shape[1])
        kept = None if caches is None else _as_theirs(caches)
        return self.stack(
            inputs_embeds=x.to(self.table.weight.dtype),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=kept,
            use_cache=False,
        ).last_hidden_state

    def caches(self) -> list[KVCache]:
        return [KVCache() for _ in range(self.layers)]


class Seq2SeqAdapter(nn.Module):
    """transformers' T5: the encoder reads prefix and prompt, the decoder answers.

    T5 counts distances in slots, so what is present is moved together before the encoder reads it: padding, on either
    side and between prefix and prompt, changes nothing.
    """

    kind = "seq2seq"

    def __init__(self, theirs: Any):
        super().__init__()
        config = theirs.config
        self.theirs, self.table, self.head = theirs, theirs.get_input_embeddings(), theirs.get_output_embeddings()
        self.vocabulary, self.width = self.table.weight.shape
        self.context = getattr(config, "n_positions", None) or 512  # what it was trained with; distances have no end
        self.layers, self.first = config.num_decoder_layers, config.decoder_start_token_id
        self.scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        freeze(self)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)

    def states(self, embeddings: Tensor, attention_mask: Tensor | None, targets: Tensor | None = None) -> Tensor:
        """Targets (B, U), whatever at padding behind them -> the states that say them (B, U, W)."""
        if targets is None:
            raise UserError("an encoder-decoder needs targets: what its decoder is to say")
        context, seen = self.encode(embeddings, attention_mask)
        said = torch.cat([torch.full_like(targets[:, :1], self.first), targets[:, :-1].clamp_min(0)], dim=1)
        return self.decode(said, context, seen)

    def logits(self, states: Tensor) -> Tensor:
        return self.head(states * self.scale).float()

    def decoding(self, prefix: Tensor, attention_mask: Tensor | None = None) -> Seq2SeqDecoding:
        return Seq2SeqDecoding(self, prefix, attention_mask)

    def encode(self, embeddings: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, S, W) -> what the decoder looks at (B, S, W), and where it may (B, S), None: everywhere."""
        x = embeddings.to(self.table.weight.dtype)
        if attention_mask is not None and not attention_mask.is_meta and not bool(attention_mask.all()):
            order = (~attention_mask).long().argsort(dim=1, stable=True)  # (B, S)
            longest = int(attention_mask.sum(1).max())
            order, attention_mask = order[:, :longest], attention_mask.gather(1, order)[:, :longest]
            x = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
            attention_mask = None if bool(attention_mask.all()) else attention_mask
        else:
            attention_mask = None
        seen = None if attention_mask is None else key_mask(attention_mask)
        return self.theirs.encoder(inputs_embeds=x, attention_mask=seen).last_hidden_state, attention_mask

    def decode(self, tokens: Tensor, context: Tensor, seen: Tensor | None, kept: Any = None) -> Tensor:
        """The decoder's states (R, U, W) at tokens (R, U), behind those in the cache `kept`."""
        return self.theirs.decoder(
            input_ids=tokens,
            encoder_hidden_states=context,
            encoder_attention_mask=None if seen is None else key_mask(seen),
            past_key_values=kept,
            use_cache=False,
        ).last_hidden_state


ADAPTERS: dict[str, Any] = {"opt": CausalAdapter, "llama": CausalAdapter, "t5": Seq2SeqAdapter}


class Seq2SeqDecoding:
    """T5 at work behind a prefix in its encoder: nn/generation.py's protocol. The encoder runs once a picture."""

    prefixed = True

    def __init__(self, model: Seq2SeqAdapter, prefix: Tensor, attention_mask: Tensor | None = None):
        """prefix (B, Q, W), attention_mask (B, Q)."""
        from transformers.cache_utils import EncoderDecoderCache

        self.model, self.prefix, self.prefix_mask = model, prefix, attention_mask
        self.said = [KVCache() for _ in range(model.layers)]
        self.looked = [KVCache() for _ in range(model.layers)]
        self.kept = EncoderDecoderCache(_as_theirs(self.said), _as_theirs(self.looked))
        self.decoder_start, self.rows = model.first, 0

    def prefill(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Prompts (B, T) for the encoder -> logits of the answer's first token (B, V)."""
        if len(tokens) != len(self.prefix):
            raise ValueError(f"{len(tokens)} prompts for {len(self.prefix)} prefixes")
        before = self.prefix_mask
        if before is None:
            before = attention_mask.new_ones(self.prefix.shape[:2])
        x = torch.cat([self.prefix, self.model.embed(tokens)], dim=1)
        if not x.shape[1]:
            raise UserError("generation: neither a prefix nor a prompt; give at least a start token")
        self.context, self.seen = self.model.encode(x, torch.cat([before, attention_mask], dim=1))
        self.rows = len(x)
        return self.step(tokens.new_full((len(x),), self.model.first))

    def step(self, tokens: Tensor) -> Tensor:
        """One more token a row (R,) -> logits of the next (R, V)."""
        states = self.model.decode(tokens[:, None], self.context, self.seen, self.kept)
        return self.model.logits(states[:, 0])

    def select(self, rows: Tensor, contexts: Tensor | None = None) -> None:
        """Keep these rows, in this order; what they look at is copied only where rows come, or pictures leave."""
        still = contexts is None and len(rows) == self.rows
        self.rows = len(rows)
        for cache in self.said:
            cache.reorder(rows, since=1 if still else 0)  # behind the start token, equal in all rows
        if not still:
            self.seen = None if self.seen is None else self.seen[rows]
            for cache in self.looked:
                cache.reorder(rows)


def _as_theirs(caches: Sequence[KVCache]) -> Any:
    """This house's caches in the form in which transformers' layers ask for one."""
    from transformers.cache_utils import Cache

    return Cache(layers=[_layer_type()(cache) for cache in caches])


@functools.cache
def _layer_type() -> type:
    from transformers.cache_utils import CacheLayerMixin

    class Layer(CacheLayerMixin):
        is_sliding, is_initialized = False, True

        def __init__(self, cache: KVCache):
            self.cache = cache

        keys = property(lambda self: self.cache.keys_and_values()[0])
        values = property(lambda self: self.cache.keys_and_values()[1])

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return self.cache.append(key_states, value_states)

        def get_seq_length(self) -> int:
            return self.cache.length

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.cache.length + query_length, 0

        def get_max_length(self) -> int:
            return -1

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            pass

    return Layer
