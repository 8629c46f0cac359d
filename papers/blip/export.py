"""A BLIP of ours as a folder that transformers loads by itself, with a model card of the evidence."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from papers.blip.config import BlipConfig
from papers.blip.converter import FORMATS, published_of
from papers.blip.model import Blip, copied
from papers.blip.pretrained import load_model
from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.core.files import sha256, whole_folder
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bert import BertTokenizer
from shared.tokenizers.load import for_transformers
from shared.weights.load import save_weights
from shared.weights.manifest import Entry, load_manifest

KINDS = {  # --to: what the weights have to be able to do, transformers' class, what it is listed under
    "transformers-captioning": ("caption", "BlipForConditionalGeneration", "image-to-text"),
    "transformers-retrieval": ("retrieval", "BlipForImageTextRetrieval", "zero-shot-image-classification"),
    "transformers-vqa": ("ask", "BlipForQuestionAnswering", "visual-question-answering"),
}


def export(
    source: Path, folder: Path, variant: str, to: str, tokenizer: Path | None = None, catalog: Catalog | None = None
) -> None:
    """Write `source` (any names that converter.py knows) as a new folder of one of KINDS, cut out where it can do more.

    tokenizer: the tokenizer.json of weights that were trained here (default: the one beside `source`). The folder
    appears whole or not at all. UserError: an unknown kind, weights that cannot do it, a folder that is not empty.
    """
    catalog = catalog or Catalog(Path(__file__).resolve().parents[1], __package__.split(".")[0])
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    if to not in KINDS or folder.suffix in (".pt", ".pth", ".bin"):
        kinds = ", ".join(KINDS)
        raise UserError(f"{folder}: --to {to} is written as *.safetensors; a folder of another name is for {kinds}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a new folder")
    manifest = catalog.root / "checkpoints_manifest.yaml"
    model, words = load_model(variant, source, tokenizer, manifest, KINDS[to][0])
    if to == "transformers-vqa" and model.config.vision_width != model.config.text_width:
        raise UserError(f"{variant}: transformers' VQA has pictures and texts of one width; only blip-base can be one")
    with whole_folder(folder) as beside:
        write(beside, model, words, to)
        entry = next((one for one in load_manifest(manifest).values() if one.sha256 == sha256(source)), None)
        (beside / "README.md").write_text(model_card(catalog, source, entry, variant, to), encoding="utf-8")


def write(folder: Path, model: nn.Module, words: Tokenizer, to: str) -> None:
    config: BlipConfig = model.config
    if isinstance(model, Blip):  # one that was trained with all objectives can do more than one class has room for
        model = copied(model, FORMATS[to].make(config))
    text = {
        "model_type": "blip_text_model",
        "vocab_size": config.vocabulary,
        "hidden_size": config.text_width,
        "encoder_hidden_size": config.vision_width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.positions,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "label_smoothing": config.label_smoothing,
        "pad_token_id": config.pad_token,
        "bos_token_id": config.decode_token,
        "eos_token_id": config.end_token,  # transformers calls what ends a text both
        "sep_token_id": config.end_token,
    }
    vision = {
        "model_type": "blip_vision_model",
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    save_weights(published_of(model.state_dict(), to), folder / "model.safetensors")
    write_json(
        folder / "config.json",
        {
            "architectures": [KINDS[to][1]],
            "model_type": "blip",
            "dtype": "float32",
            "image_text_hidden_size": config.embed_width,
            "text_config": text,
            "vision_config": vision,
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "BlipProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": config.image_size, "width": config.image_size},
            "resample": 3,  # Pillow's bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": config.mean,
            "image_std": config.std,
        },
    )
    write_tokenizer(folder, words, config)


def write_tokenizer(folder: Path, words: Tokenizer, config: BlipConfig) -> None:
    """From it transformers builds a tokenizer that gives our ids, [CLS] text [SEP] and padding. The first token of a
    mode is put there by whoever calls the model: transformers' generate does, its match does not."""
    pad = "[PAD]" if isinstance(words, BertTokenizer) else "<|pad|>"
    names = {"pad_token": pad, "cls_token": "[CLS]", "sep_token": "[SEP]", "bos_token": "[DEC]"}
    ids = {"[CLS]": words.start, "[SEP]": words.end, "[DEC]": words.decode_start, "[ENC]": words.encode_start}
    write_json(folder / "tokenizer.json", for_transformers(words, ids), indent=None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": isinstance(words, BertTokenizer),
        "additional_special_tokens": ["[ENC]"],
        "processor_class": "BlipProcessor",
    }
    write_json(folder / "tokenizer_config.json", settings | names)


def write_json(path: Path, content: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(catalog: Catalog, source: Path, entry: Entry | None, variant: str, to: str) -> str:
    """README.md of an exported folder: front matter as model hubs read it, origin, use, evidence, citation."""
    import yaml

    from shared.core.paper_card import bibtex
    from shared.core.provenance import commit_and_dirty
    from shared.report.evidence_table import evidence_table

    card = catalog.card("blip")
    paper = card.paper
    licence = "bsd-3-clause" if entry and entry.licence.startswith("BSD-3-Clause") else "other"
    front = {
        "license": licence,
        **({"license_name": "not-stated"} if licence == "other" else {}),
        "library_name": "transformers",
        "pipeline_tag": KINDS[to][2],
        "tags": ["blip", "vision-language", *([] if entry else ["not-a-release"])],
    }
    commit, dirty = commit_and_dirty(catalog.root)
    by = f"commit {commit}{', with changes that are not committed' if dirty else ''}" if commit else "an unknown commit"
    file = f"- `{source.name}`, sha256 `{sha256(source)}`."
    origin = (
        f"{file} It is {entry.what}, from {entry.origin}.\n- Licence: {entry.licence}."
        if entry
        else f"{file} This is none of the released files that the manifest lists: who publishes this folder has to say "
        "what the weights were trained on, and under which licence they are."
    )
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {variant}",
        f"{paper.authors[0]} et al., *{paper.title}* ({paper.venue}, [arXiv:{paper.arxiv}]"
        f"(https://arxiv.org/abs/{paper.arxiv})), as transformers' `{KINDS[to][1]}` loads it.",
        USE[to].strip(),
        "## Where the weights come from",
        f"{origin}\n- Converted by {by}. Names and layout change, no value does.",
        "## Evidence for the implementation",
        "These rows are about the code that trained or converted the weights. *Structure* and *parity* hold for this "
        "architecture; *claims* were measured on small models, trained for that purpose, and say nothing of other "
        "weights; *metrics* are of the released weights.",
        evidence_table(catalog, "blip"),
        "## How to cite",
        f"```bibtex\n{bibtex(card).strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


USE = {
    "transformers-captioning": """
```python
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

model, processor = BlipForConditionalGeneration.from_pretrained(".").eval(), BlipProcessor.from_pretrained(".")
inputs = processor(images=Image.open("picture.jpg"), text="a picture of", return_tensors="pt")
print(processor.decode(model.generate(**inputs, num_beams=3, max_length=20)[0], skip_special_tokens=True))
```
""",
    "transformers-retrieval": """
```python
from PIL import Image
from transformers import BlipForImageTextRetrieval, BlipProcessor

model, processor = BlipForImageTextRetrieval.from_pretrained(".").eval(), BlipProcessor.from_pretrained(".")
inputs = processor(images=Image.open("picture.jpg"), text="a cat on a mat", return_tensors="pt")
print(model(**inputs, use_itm_head=False).itm_score)
inputs["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]")  # as in training
print(model(**inputs).itm_score.softmax(-1)[:, 1])
```
""",
    "transformers-vqa": """
```python
from PIL import Image
from transformers import BlipForQuestionAnswering, BlipProcessor

model, processor = BlipForQuestionAnswering.from_pretrained(".").eval(), BlipProcessor.from_pretrained(".")
inputs = processor(images=Image.open("picture.jpg"), text="what is on the mat?", return_tensors="pt")
inputs["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]")  # as in training
print(processor.decode(model.generate(**inputs, num_beams=3, max_length=10)[0], skip_special_tokens=True))
```

transformers (5.23) does not mask a question's padding from the answer: ask one question at a time.
""",
}
