"""SmolLM2 from its GGUF file, converted once to safetensors in the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.backbones.hf_lm import freeze
from shared.core.errors import UserError
from shared.core.files import atomic, sha256
from shared.nn.causal_lm import (
    LanguageModel,
    SmallLanguageModel,
)
from shared.tokenizers.lm import LanguageTokenizer
from shared.weights.manifest import Entry

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
        sizes = dict(about["sizes"])
        model = SmallLanguageModel(mlp_width=sizes.pop("hidden"), **sizes)
    model.load_state_dict(weights, assign=True)
    pieces = tokenizers.Tokenizer.from_str(about["tokenizer"])
    return freeze(model), LanguageTokenizer(pieces, template=about["template"], **about["tokens"])


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
        weights = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in file.tensors}
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

    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
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
