"""A BLIP-2 of ours as a folder that transformers loads by itself, with a model card of the evidence.

transformers keeps image encoder, Q-Former and (for generation) language model in one folder, so all of them have to be
at hand. It knows EVA's image encoder alone, and one epsilon for the encoder's norms and for the one over its features,
where the authors have 1e-6 and 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from papers.blip2.config import SPECIALS, VARIANTS, Blip2Config
from papers.blip2.converter import VISION, published_of, with_language
from papers.blip2.model import Blip2
from papers.blip2.pretrained import encoder_beside, load_encoder, load_file
from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.core.files import cache_root, sha256, whole_folder
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bert import BertTokenizer
from shared.tokenizers.load import for_transformers, load_tokenizer
from shared.weights.load import save_weights
from shared.weights.manifest import Entry, load_manifest


class Kind(NamedTuple):
    stage: int
    architecture: str  # transformers' class
    listed: str  # what a hub lists it under


KINDS = {
    "transformers-retrieval": Kind(1, "Blip2ForImageTextRetrieval", "zero-shot-image-classification"),
    "transformers-generation": Kind(2, "Blip2ForConditionalGeneration", "image-to-text"),
}
IMAGE_TOKEN = "<image>"


class Parts(NamedTuple):
    """model: of the stage of its kind. encoder: the image encoder's state dict. language: transformers' language model
    and its tokenizer, for generation. words: the Q-Former's tokenizer, for retrieval."""

    model: nn.Module
    encoder: dict[str, Tensor]
    language: tuple[Any, Any] | None
    words: Tokenizer | None


def export(
    source: Path,
    folder: Path,
    variant: str,
    to: str,
    tokenizer: Path | None = None,
    catalog: Catalog | None = None,
    language: Path | None = None,
) -> None:
    """Write `source` (any names that converter.py knows) as a new folder of one of KINDS.

    tokenizer: the Q-Former's tokenizer.json of weights that were trained here (default: the one beside `source`).
    language: the language model's folder in transformers' form, for generation (default: the variant's name beside
    `source`, else in the cache). The image encoder is taken from `source`, else from beside it or the cache. The folder
    appears whole or not at all. UserError: an unknown kind, a part that is missing, a folder that is not empty.
    """
    catalog = catalog or Catalog(Path(__file__).resolve().parents[1], __package__.split(".")[0])
    if to not in KINDS or folder.suffix in (".pt", ".pth", ".bin"):
        kinds = ", ".join(KINDS)
        raise UserError(f"{folder}: --to {to} is written as *.safetensors; a folder of another name is for {kinds}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a new folder")
    manifest = catalog.root / "checkpoints_manifest.yaml"
    parts = gathered(source, VARIANTS[variant](), to, tokenizer, manifest, language)
    with whole_folder(folder) as beside:
        write(beside, parts, to)
        seal = sha256(source) if source.is_file() else None
        entry = next((one for one in load_manifest(manifest).values() if seal and one.sha256 == seal), None)
        (beside / "README.md").write_text(model_card(catalog, source, seal, entry, variant, to), encoding="utf-8")


def gathered(
    source: Path, config: Blip2Config, to: str, tokenizer: Path | None, manifest: Path, language: Path | None
) -> Parts:
    """Everything that the folder has to hold; UserError for what is missing or cannot stand in it."""
    kind = KINDS[to]
    if config.vision.kind != "eva":
        raise UserError(
            f"transformers' BLIP-2 has EVA's image encoder alone, this variant one of kind {config.vision.kind}: it "
            "cannot be exported"
        )
    loaded = load_file(source, config)
    model = loaded.model
    if isinstance(model, Blip2) != (kind.stage == 2):
        raise UserError(f"{source}: weights of another stage than {to} needs, which is stage {kind.stage}")
    encoder = loaded.encoder
    if encoder is None:
        encoder = load_encoder(encoder_beside(source, config, manifest), model.config.vision)
    if kind.stage == 2:
        return Parts(model, encoder.module.state_dict(), language_of(source, model, language), None)
    if config.tokenizer == "bert-wordpiece":
        words: Tokenizer = BertTokenizer.uncased(specials=SPECIALS)
    else:
        place = tokenizer or source.with_name("tokenizer.json")
        if not place.is_file():
            raise UserError(f"{place}: no such file; --tokenizer takes the tokenizer.json written beside the weights")
        words = load_tokenizer(place)
    return Parts(model, encoder.module.state_dict(), None, words)


def language_of(source: Path, model: Blip2, language: Path | None) -> tuple[Any, Any]:
    """transformers' language model, in the precision of its folder, and its tokenizer."""
    from shared.backbones.hf_lm import PUBLISHED, Published, read_folder

    name = model.config.language.name
    places = [language] if language else [source.with_name(name), cache_root() / name]
    place = next((one for one in places if (one / "config.json").is_file()), None)
    published = PUBLISHED.get(name, Published(name))
    if place is None:
        raise UserError(
            f"{name}: {places[0]} has no config.json; get it with: hf download {published.repo} --local-dir {places[0]}"
        )
    adapter, tokenizer = read_folder(place, "auto", published)
    if adapter.width != model.projector.out_features:
        raise UserError(
            f"{place}: a language model of width {adapter.width}, but the weights speak to one of "
            f"{model.projector.out_features}"
        )
    return adapter.theirs, tokenizer


# ---- writing


def write(folder: Path, parts: Parts, to: str) -> None:
    model, config = parts.model, parts.model.config
    state = {**model.state_dict(), **{f"{VISION}{key}": tensor for key, tensor in parts.encoder.items()}}
    published = published_of(state, to, config.vision.kind)
    made = their_config(config, parts, to)
    processor: dict[str, Any] = {"processor_class": "Blip2Processor", "image_processor_type": "BlipImageProcessor"}
    if parts.language is not None:
        language, tokenizer = parts.language
        image_token = len(tokenizer)
        if image_token >= language.get_input_embeddings().num_embeddings:  # a row for the token that pictures stand for
            language.resize_token_embeddings(image_token + 1, mean_resizing=False)
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        made["text_config"] = language.config.to_dict()
        made["image_token_index"] = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        published = with_language(published, tied_once(language))
        tokenizer.save_pretrained(folder)
    else:
        write_tokenizer(folder, parts.words, config)
    save_weights(published, folder / "model.safetensors")
    write_json(folder / "config.json", made)
    write_json(
        folder / "processor_config.json",
        {"processor_class": "Blip2Processor", "num_query_tokens": config.queries if parts.language else None},
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            **processor,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": config.vision.image_size, "width": config.vision.image_size},
            "resample": 3,  # Pillow's bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": config.vision.mean,
            "image_std": config.vision.std,
        },
    )


def tied_once(language: Any) -> dict[str, Tensor]:
    """A language model's weights, a shared one under its first name, as transformers writes and reads it."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in language.state_dict().items():
        if tensor.data_ptr() not in seen:
            kept[name] = tensor
        seen.add(tensor.data_ptr())
    return kept


def their_config(config: Blip2Config, parts: Parts, to: str) -> dict[str, Any]:
    vision = config.vision
    mlp_width = parts.encoder["blocks.0.mlp.up.weight"].shape[0]
    return {
        "architectures": [KINDS[to].architecture],
        "model_type": "blip-2",
        "dtype": "float32",
        "num_query_tokens": config.queries,
        "image_text_hidden_size": config.embed_width,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": mlp_width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch,
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.eps,
            "qkv_bias": True,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "vocab_size": config.vocabulary,
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "max_position_embeddings": config.positions,
            "cross_attention_frequency": config.cross_every,
            "encoder_hidden_size": vision.width,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": config.pad_token,
            "use_qformer_text_input": parts.language is None,
        },
    }


def write_tokenizer(folder: Path, words: Tokenizer, config: Blip2Config) -> None:
    """The Q-Former's: [CLS] text [SEP] and padding, as ours."""
    pad = "[PAD]" if isinstance(words, BertTokenizer) else "<|pad|>"
    names = {"pad_token": pad, "cls_token": "[CLS]", "sep_token": "[SEP]", "bos_token": "[DEC]"}
    ids = {"[CLS]": words.start, "[SEP]": words.end, "[DEC]": words.decode_start}
    write_json(folder / "tokenizer.json", for_transformers(words, ids), indent=None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        "model_input_names": ["input_ids", "attention_mask"],
        "processor_class": "Blip2Processor",
    }
    write_json(folder / "tokenizer_config.json", settings | names)


def write_json(path: Path, content: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(catalog: Catalog, source: Path, seal: str | None, entry: Entry | None, variant: str, to: str) -> str:
    """README.md of an exported folder: front matter as model hubs read it, origin, use, evidence, citation."""
    import yaml

    from shared.core.paper_card import bibtex
    from shared.core.provenance import commit_and_dirty
    from shared.report.evidence_table import evidence_table

    card = catalog.card("blip2")
    paper, kind = card.paper, KINDS[to]
    licence = "bsd-3-clause" if entry and entry.licence.startswith("BSD-3-Clause") and kind.stage == 1 else "other"
    front = {
        "license": licence,
        **({"license_name": "not-stated"} if licence == "other" else {}),
        "library_name": "transformers",
        "pipeline_tag": kind.listed,
        "tags": ["blip-2", "vision-language", *([] if entry else ["not-a-release"])],
    }
    commit, dirty = commit_and_dirty(catalog.root)
    by = f"commit {commit}{', with changes that are not committed' if dirty else ''}" if commit else "an unknown commit"
    file = f"- `{source.name}`, {f'sha256 `{seal}`' if seal else 'a folder of several files'}."
    origin = (
        f"{file} It is {entry.what}, from {entry.origin}.\n- Licence: {entry.licence}."
        if entry
        else f"{file} This is none of the released files whose hash the manifest lists: who publishes this folder has "
        "to say what the weights were trained on, and under which licence they are."
    )
    frozen = "- The image encoder"
    frozen += " and the language model, which stand" if kind.stage == 2 else ", which stands"
    frozen += " in this folder too, kept their own licences."
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {variant}",
        f"{paper.authors[0]} et al., *{paper.title}* ({paper.venue}, [arXiv:{paper.arxiv}]"
        f"(https://arxiv.org/abs/{paper.arxiv})), as transformers' `{kind.architecture}` loads it.",
        USE[to].strip(),
        "## Where the weights come from",
        f"{origin}\n{frozen}\n- Converted by {by}. Names and layout change, no value does.",
        "## Evidence for the implementation",
        "These rows are about the code that trained or converted the weights. *Structure* and *parity* hold for this "
        "architecture; *claims* were measured on small models, trained for that purpose, and say nothing of other "
        "weights; *metrics* are of the released weights.",
        evidence_table(catalog, "blip2"),
        "## How to cite",
        f"```bibtex\n{bibtex(card).strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


USE = {
    "transformers-retrieval": """
```python
from PIL import Image
from transformers import AutoTokenizer, Blip2ForImageTextRetrieval, BlipImageProcessor

model = Blip2ForImageTextRetrieval.from_pretrained(".").eval()
pictures, words = BlipImageProcessor.from_pretrained("."), AutoTokenizer.from_pretrained(".")
inputs = {**pictures(Image.open("picture.jpg"), return_tensors="pt"), **words("a cat on a mat", return_tensors="pt")}
print(model(**inputs, use_image_text_matching_head=False).logits_per_image)
print(model(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(-1)[:, 1])
```
""",
    "transformers-generation": """
```python
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

model, processor = Blip2ForConditionalGeneration.from_pretrained(".").eval(), Blip2Processor.from_pretrained(".")
inputs = processor(images=Image.open("picture.jpg"), text="Question: what is on the mat? Answer:", return_tensors="pt")
told = model.generate(**inputs, num_beams=5, max_new_tokens=10, length_penalty=-1)
print(processor.decode(told[0], skip_special_tokens=True))
```
""",
}
