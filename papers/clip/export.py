"""A CLIP of ours as a folder that transformers or open_clip loads by itself, with a model card of the evidence."""

from __future__ import annotations

import json
from pathlib import Path

from papers.clip.config import ClipConfig
from papers.clip.converter import OPENAI_RESNET, OPENAI_VIT, TRANSFORMERS
from papers.clip.pretrained import load_model
from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.core.files import sha256, whole_folder
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.clip import ClipTokenizer
from shared.tokenizers.load import for_transformers
from shared.weights.load import save_weights
from shared.weights.manifest import Entry, load_manifest
from shared.weights.weight_map import to_published

START, END = "<|startoftext|>", "<|endoftext|>"


def export(
    source: Path, folder: Path, variant: str, to: str, tokenizer: Path | None = None, catalog: Catalog | None = None
) -> None:
    """Write `source` (any names that converter.py knows) as a new folder of the library `to`: transformers | open_clip.

    tokenizer: the tokenizer.json of weights that were trained here (default: the one beside `source`). The folder
    appears whole or not at all. UserError: an unknown library, a ResNet for transformers, a folder that is not empty.
    """
    catalog = catalog or Catalog(Path(__file__).resolve().parents[1], __package__.split(".")[0])
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    if to not in LAYOUTS or folder.suffix in (".pt", ".pth", ".bin"):
        libraries = ", ".join(LAYOUTS)
        raise UserError(f"{folder}: --to {to} is written as *.safetensors; a folder of another name is for {libraries}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a new folder")
    manifest = catalog.root / "checkpoints_manifest.yaml"
    model, words = load_model(variant, source, tokenizer, manifest)
    if to == "transformers" and model.config.patch is None:
        raise UserError(f"{variant}: transformers' CLIPModel has no ResNet; use --to open_clip")
    with whole_folder(folder) as beside:
        LAYOUTS[to](beside, model.state_dict(), model.config, words)
        text = model_card(catalog, source, released(manifest, source), variant, to)
        (beside / "README.md").write_text(text, encoding="utf-8")


# ---- transformers


def write_transformers(folder: Path, state: dict, config: ClipConfig, words: Tokenizer) -> None:
    shared = {"hidden_act": config.activation, "layer_norm_eps": config.eps, "projection_dim": config.embed_width}
    text = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.text_width,
        "intermediate_size": 4 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context,
        "bos_token_id": words.start,
        "eos_token_id": words.end,
        "pad_token_id": words.end,
    }
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch,
    }
    pictures = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "resample": 3,  # Pillow's bicubic
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.mean,
        "image_std": config.std,
    }
    save_weights(to_published(state, TRANSFORMERS), folder / "model.safetensors")
    write_json(
        folder / "config.json",
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "dtype": "float32",
            "projection_dim": config.embed_width,
            "text_config": {"model_type": "clip_text_model"} | text | shared,
            "vision_config": {"model_type": "clip_vision_model"} | vision | shared,
        },
    )
    write_json(folder / "preprocessor_config.json", pictures)
    write_tokenizer(folder, words, config)


# ---- open_clip


def write_open_clip(folder: Path, state: dict, config: ClipConfig, words: Tokenizer) -> None:
    vision = {"image_size": config.image_size, "layers": config.vision_layers, "width": config.vision_width}
    if config.patch:
        vision |= {"patch_size": config.patch, "head_width": config.vision_width // config.vision_heads}
    else:
        vision |= {"head_width": 32 * config.vision_width // config.vision_heads}
    text = {
        "context_length": config.context,
        "vocab_size": config.vocabulary,
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
    }
    if not isinstance(words, ClipTokenizer):
        text["hf_tokenizer_name"] = "tokenizer.json"  # whatever the name, open_clip reads the files of this folder
        write_tokenizer(folder, words, config)
    weight_map = OPENAI_VIT if config.patch else OPENAI_RESNET
    save_weights(to_published(state, weight_map), folder / "open_clip_model.safetensors")
    write_json(
        folder / "open_clip_config.json",
        {
            "model_cfg": {
                "embed_dim": config.embed_width,
                "quick_gelu": config.activation == "quick_gelu",
                "vision_cfg": vision,
                "text_cfg": text,
            },
            "preprocess_cfg": {
                "mean": config.mean,
                "std": config.std,
                "interpolation": config.resize,
                "resize_mode": "shortest",
            },
        },
    )


LAYOUTS = {"transformers": write_transformers, "open_clip": write_open_clip}


# ---- tokenizers


def write_tokenizer(folder: Path, words: Tokenizer, config: ClipConfig) -> None:
    """The files from which transformers builds a tokenizer that gives our ids up to the end token, and the end token
    behind it: our padding, id 0, is an ordinary word there ("!" in the release), and what stands behind is not read."""
    settings = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(words, ClipTokenizer):
        learnt = json.loads(words._bpe.to_str())
        vocabulary = learnt["model"]["vocab"] | {START: words.start, END: words.end}
        write_json(folder / "vocab.json", vocabulary, indent=None)
        merges = [" ".join(pair) for pair in learnt["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        settings |= {"tokenizer_class": "CLIPTokenizer"}
    else:
        whole = for_transformers(words, {START: words.start, END: words.end}, (START, END))
        write_json(folder / "tokenizer.json", whole, indent=None)
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- the model card


def released(manifest: Path, source: Path) -> Entry | None:
    """The manifest's entry of this very file; None for any other."""
    digest = sha256(source)
    return next((entry for entry in load_manifest(manifest).values() if entry.sha256 == digest), None)


def model_card(catalog: Catalog, source: Path, entry: Entry | None, variant: str, to: str) -> str:
    """README.md of an exported folder: front matter as model hubs read it, origin, use, evidence, citation."""
    import yaml

    from shared.core.paper_card import bibtex
    from shared.core.provenance import commit_and_dirty
    from shared.report.evidence_table import evidence_table, results

    card = catalog.card("clip")
    paper = card.paper
    licence = identifier(entry)
    front = {
        "license": licence,
        **({"license_name": "not-stated"} if licence == "other" else {}),
        "library_name": to,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "vision-language", *([] if entry else ["not-a-release"])],
    }
    commit, dirty = commit_and_dirty(catalog.root)
    by = f"commit {commit}{', with changes that are not committed' if dirty else ''}" if commit else "an unknown commit"
    runs = []
    for path in results(catalog, "clip"):
        run = json.loads(path.read_text(encoding="utf-8"))
        seeds = max((row["seeds"] or 0 for row in run["rows"]), default=0)
        runs.append(
            f"- `{path.stem}`: `{run['command']}`, commit {run['commit'][:12]}, {seeds} paired seeds, "
            f"{run['seconds'] / 60:.0f} minutes"
        )
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {variant}",
        f"{paper.authors[0]} et al., *{paper.title}* ({paper.venue}, [arXiv:{paper.arxiv}]"
        f"(https://arxiv.org/abs/{paper.arxiv})), as {to} loads it by its own means.",
        USE[to].strip(),
        "## Where the weights come from",
        origin(source, entry) + f"\n- Converted by {by}. Names and layout change, and half precision becomes single; "
        "no value does.",
        "## Evidence for the implementation",
        "These rows are about the code that trained or converted the weights. *Structure* and *parity* hold for this "
        "architecture; *claims* were measured on small models, trained for that purpose, and say nothing of other "
        "weights; *metrics* are of the released weights.",
        evidence_table(catalog, "clip"),
        "\n".join(runs),
        "An effect is followed by its 95 % interval; its unit and the rule of its verdict stand in the paper's "
        "`paper.yaml`.",
        "## How to cite",
        f"```bibtex\n{bibtex(card).strip()}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def origin(source: Path, entry: Entry | None) -> str:
    file = f"- `{source.name}`, sha256 `{sha256(source)}`."
    if entry is None:
        return (
            f"{file} This is none of the released files that the manifest lists: who publishes this folder has to say "
            "what the weights were trained on, and under which licence they are."
        )
    return f"{file} It is {entry.what}, from {entry.origin}.\n- Licence: {entry.licence}."


def identifier(entry: Entry | None) -> str:
    """The licence as model hubs spell it: what the manifest's text begins with, where that is one they know."""
    first = entry.licence.split()[0].strip(",;").lower() if entry else ""
    return first if first in {"mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0"} else "other"


USE = {
    "transformers": """
```python
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained(".").eval(), CLIPProcessor.from_pretrained(".")
texts = ["a photo of a cat.", "a photo of a dog."]
inputs = processor(text=texts, images=Image.open("picture.jpg"), padding=True, truncation=True, return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(-1))
```

transformers does not repair broken characters or HTML entities in a text, as the released code does: such texts get
other tokens.
""",
    "open_clip": """
```python
import open_clip
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("local-dir:.")
tokens = open_clip.get_tokenizer("local-dir:.")(["a photo of a cat.", "a photo of a dog."])
image_features, text_features, scale = model.eval()(preprocess(Image.open("picture.jpg"))[None], tokens)
print((scale * image_features @ text_features.T).softmax(-1))
```
""",
}
