"""Exported folders: both libraries load them by themselves, offline, and give our logits from our tensors and ids."""

import json
import re
import shutil
import socket
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pairs import loaded, normalised
from PIL import Image
from test_clip import RESNET
from test_clip import VIT as SMALL
from tests_common import CATALOG, ROOT

from papers.clip import config as configs
from papers.clip.config import ClipConfig
from papers.clip.model import Clip
from papers.clip.weights import FORMATS, convert, export
from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.core.paper_card import bibtex
from shared.data.images import square
from shared.report.evidence_table import evidence_table
from shared.tokenizers.clip import ClipTokenizer
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.weights.load import save_weights
from shared.weights.safe_load import read_tensors

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

VIT = replace(SMALL, context=77, vocabulary=49408, end_token=49407)
RESNET = replace(RESNET, context=77, vocabulary=49408, end_token=49407)
CASES = [
    ("ours", VIT, "transformers"),
    ("openai-vit", VIT, "transformers"),
    ("transformers", VIT, "transformers"),
    ("ours", VIT, "open_clip"),
    ("openai-vit", VIT, "open_clip"),
    ("transformers", VIT, "open_clip"),
    ("openai-resnet", RESNET, "open_clip"),
]
TEXTS = [
    "a photo of a cat.",
    "  Some   GRAPES & a dog\n",
    "",
    "!",
    "don't stop, it's 2026",
    "naïve café 日本語 🐼",
    "a " * 99,
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def made(tmp_path, perturb, monkeypatch):
    """made(names, config): (our model, its weights in a file under the names of a published format)."""

    def make(names: str, config: ClipConfig) -> tuple[Clip, Path]:
        monkeypatch.setitem(configs.VARIANTS, "clip-test", lambda: config)
        torch.manual_seed(0)
        model = perturb(Clip(config))
        state = model.state_dict()
        path = tmp_path / f"{names}.safetensors"
        save_weights(state if names == "ours" else FORMATS[names].to_published(state), path)
        return model, path

    return make


@pytest.fixture
def trained_here(tmp_path, perturb, monkeypatch):
    """A model of a small scale and its tokenizer, written as a run writes them."""
    words = SmallTokenizer.train(["a red panda on a mat", "some grapes & a dog"] * 5, 300)
    config = replace(VIT, vocabulary=words.vocab_size, end_token=words.end, context=19, tokenizer="small")
    monkeypatch.setitem(configs.VARIANTS, "clip-test", lambda: config)
    torch.manual_seed(0)
    model = perturb(Clip(config))
    save_weights(model, tmp_path / "model.safetensors")
    words.save(tmp_path / "tokenizer.json")
    return model, words, tmp_path / "model.safetensors"


def logits_of(library, folder, images, tokens):
    """Normalised pictures and ids -> the library's logits per image."""
    with torch.no_grad():
        if library == "transformers":
            return loaded("CLIPModel", folder)(pixel_values=images, input_ids=tokens).logits_per_image
        model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        image_features, text_features, scale = model.eval()(images, tokens)
        return scale * image_features @ text_features.T


def our_logits(model, images, tokens):
    with torch.no_grad():
        output = model(images, tokens)
        return output.logit_scale * output.image_features @ output.text_features.T


@pytest.mark.parametrize(("names", "config", "library"), CASES)
def test_the_library_loads_the_folder_gives_our_logits_and_gives_back_the_very_bytes(
    names, config, library, made, tmp_path, agree
):
    model, source = made(names, config)
    export(source, tmp_path / "folder", "clip-test", library)
    pixels = torch.randint(0, 256, (4, 3, config.image_size, config.image_size), dtype=torch.uint8)
    tokens = ClipTokenizer()(TEXTS, config.context)
    theirs = logits_of(library, tmp_path / "folder", normalised(pixels, config), tokens)
    assert theirs.std() > 0.1
    key = f"{library}.{names}".replace("-", "_")
    agree(f"clip.export.{key}", f"logits of {library}", our_logits(model, normalised(pixels, config), tokens), theirs)
    agree(f"clip.export.{key}.uint8", f"logits of {library}, our uint8", our_logits(model, pixels, tokens), theirs)
    (weights,) = (tmp_path / "folder").glob("*.safetensors")
    convert(weights, tmp_path / "back.safetensors", "clip-test", names)
    before, after = read_tensors(source), read_tensors(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(before[k].numpy().tobytes() == after[k].numpy().tobytes() for k in before)
    assert all(before[k].shape == after[k].shape and before[k].dtype == after[k].dtype for k in before)


def picture(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def levels_apart(ours, theirs, config):
    """The largest difference in steps of the 256 that a channel has."""
    return float(
        ((ours - torch.as_tensor(np.asarray(theirs))) * torch.tensor(config.std).view(3, 1, 1)).abs().max() * 255
    )


def test_both_libraries_prepare_pictures_as_we_do(made, tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    _, source = made("ours", VIT)
    for library in ("transformers", "open_clip"):
        export(source, tmp_path / library, "clip-test", library)
    _, prepare = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'open_clip'}")
    exact = CLIPImageProcessorPil.from_pretrained(tmp_path / "transformers")
    usual = transformers.CLIPProcessor.from_pretrained(tmp_path / "transformers").image_processor
    for size in ((30, 30), (64, 64), (90, 61), (61, 90), (33, 30), (200, 131)):
        image = picture(*size)
        ours = normalised(torch.from_numpy(np.asarray(square(image, 30)).copy()).permute(2, 0, 1), VIT)
        assert levels_apart(ours, prepare(image), VIT) < 1e-3, size
        if size in ((33, 30), (200, 131)):  # (90, 61) leaves 14 columns to crop, these an odd number:
            # transformers starts one pixel nearer to the corner than torchvision and the released code
            width = size[0] * 30 // min(size)
            left = (width - 30) // 2
            resized = image.resize((width, 30), Image.Resampling.BICUBIC) if size[1] != 30 else image
            shifted = np.asarray(resized.crop((left, 0, left + 30, 30))).copy()
            ours = normalised(torch.from_numpy(shifted).permute(2, 0, 1), VIT)
        assert levels_apart(ours, exact(image, return_tensors="pt").pixel_values[0], VIT) < 1e-3, size
        assert levels_apart(ours, usual(image, return_tensors="pt").pixel_values[0], VIT) < 1.001, size


def ids_until_the_end(batch, end):
    return [row[: row.index(end) + 1] for row in batch.tolist()]


def test_transformers_own_tokenizer_gives_the_released_ids(made, tmp_path):
    _, source = made("ours", VIT)
    export(source, tmp_path / "folder", "clip-test", "transformers")
    ours = ClipTokenizer()(TEXTS, 77)
    for kind in (transformers.CLIPTokenizer, transformers.AutoTokenizer):
        tokenizer = kind.from_pretrained(tmp_path / "folder")
        theirs = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert theirs.shape == ours.shape
        assert ids_until_the_end(theirs, 49407) == ids_until_the_end(ours, 49407)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    assert torch.equal(tokenizer(TEXTS), ours)


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_a_model_trained_here_goes_with_its_own_tokenizer(library, trained_here, tmp_path, agree):
    model, words, source = trained_here
    folder = tmp_path / "folder"
    export(source, folder, "clip-test", library)
    texts = ["a red panda", " Some\tgrapes & a dog ", "", "<|endoftext|> <|pad|> x", "日本 🐼", "a mat " * 20]
    if library == "transformers":
        texts.append("a\x1cdog\x85")  # white space to us; open_clip cleans control characters away beforehand
        tokenizer = transformers.CLIPProcessor.from_pretrained(folder).tokenizer
        theirs = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    else:
        theirs = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    ours = words(texts, model.config.context)
    assert theirs.shape == ours.shape
    assert ids_until_the_end(theirs, words.end) == ids_until_the_end(ours, words.end)
    images = torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    found = logits_of(library, folder, images, theirs)
    agree(f"clip.export.{library}.small", f"logits of {library}", our_logits(model, images, ours), found)


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_the_code_on_the_card_runs_and_prints_our_probabilities(library, made, tmp_path, monkeypatch, capsys):
    model, source = made("ours", VIT)
    folder = tmp_path / "folder"
    export(source, folder, "clip-test", library)
    picture(90, 61).save(folder / "picture.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    printed = [float(n) for n in re.findall(r"\d\.\d+(?:e-\d+)?", capsys.readouterr().out)]
    pixels = torch.from_numpy(np.asarray(square(Image.open(folder / "picture.jpg"), 30)).copy()).permute(2, 0, 1)
    tokens = ClipTokenizer()(["a photo of a cat.", "a photo of a dog."], 77)
    ours = our_logits(model, pixels[None], tokens).softmax(-1)[0].tolist()
    assert printed == pytest.approx(ours, abs=0.01)  # transformers resizes within a level of 256


def front_and_text(folder):
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_carries_the_evidence_the_origin_and_the_citation(made, tmp_path):
    _, source = made("ours", VIT)
    export(source, tmp_path / "folder", "clip-test", "open_clip")
    front, text = front_and_text(tmp_path / "folder")
    assert front["library_name"] == "open_clip" and "clip" in front["tags"]
    assert front["license"] == "other" and "none of the released files" in text
    assert sha256(source.read_bytes()).hexdigest() in text
    assert evidence_table(CATALOG, "clip") in text
    for path in (ROOT / "results" / "clip").glob("*.json"):
        run = json.loads(path.read_text())
        assert f"`{run['command']}`, commit {run['commit'][:12]}" in text
    assert bibtex(CATALOG.card("clip")).strip() in text


def test_a_released_file_brings_its_licence_from_the_manifest(made, tmp_path):
    """The manifest of a copy of the repository names our tiny file as a release."""
    _, source = made("openai-vit", VIT)
    root = tmp_path / "copy"
    (root / "papers" / "clip").mkdir(parents=True)
    shutil.copy(ROOT / "papers" / "clip" / "paper.yaml", root / "papers" / "clip")
    rows = yaml.safe_load((ROOT / "checkpoints_manifest.yaml").read_text())
    rows["clip-vit-b-32"] |= {"sha256": sha256(source.read_bytes()).hexdigest(), "size": source.stat().st_size}
    (root / "checkpoints_manifest.yaml").write_text(yaml.safe_dump(rows))
    catalog = Catalog(root / "papers", "papers")
    export(source, tmp_path / "folder", "clip-test", "transformers", catalog=catalog)
    front, text = front_and_text(tmp_path / "folder")
    assert front["license"] == "mit" and "not-a-release" not in front["tags"]
    assert rows["clip-vit-b-32"]["licence"] in text and rows["clip-vit-b-32"]["what"] in text
    assert "No committed run yet." in text


def test_what_cannot_be_exported_is_said_in_one_line_and_leaves_nothing(made, trained_here, tmp_path):
    _, _, small = trained_here
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        export(small, tmp_path / "new", "clip-test", "transformers")
    _, resnet = made("openai-resnet", RESNET)
    with pytest.raises(UserError, match="no ResNet; use --to open_clip"):
        export(resnet, tmp_path / "new", "clip-test", "transformers")
    _, source = made("ours", VIT)
    for place, to in (("new", "openai-vit"), ("new", "ours"), ("new.pt", "transformers")):
        with pytest.raises(
            UserError, match=rf"{place}: --to {to} is written as \*\.safetensors; a folder of another name is for"
        ):
            export(source, tmp_path / place, "clip-test", to)
    with pytest.raises(UserError, match=r"nothing\.pt: no such file$"):
        export(tmp_path / "nothing.pt", tmp_path / "new", "clip-test", "open_clip")
    before = sorted(tmp_path.iterdir())
    (full := tmp_path / "full").mkdir()
    (full / "mine.txt").write_text("x")
    for place in (full, full / "mine.txt"):
        with pytest.raises(UserError, match="is there already"):
            export(source, place, "clip-test", "open_clip")
    assert sorted(tmp_path.iterdir()) == sorted([*before, full]) and (full / "mine.txt").read_text() == "x"


def test_a_write_that_fails_leaves_no_folder(made, tmp_path, monkeypatch):
    from shared.weights import export as module

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    _, source = made("ours", VIT)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(module, "write_file", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        export(source, tmp_path / "new", "clip-test", "open_clip")
    assert sorted(tmp_path.iterdir()) == before
