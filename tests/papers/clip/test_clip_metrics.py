"""The metrics rung end to end: a tiny checkpoint in the published format, small sets in the published layouts."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from benchmark_rows import forget_scores, karpathy, made_row, manifest_entry
from PIL import Image
from timm.data import ImageNetInfo

from papers.clip import config as clip_config
from papers.clip.encode import classifier, image_features
from papers.clip.evidence import benchmarks as metrics
from papers.clip.inference import load_for_inference
from papers.clip.model import Clip
from papers.clip.recipe import ClipRecipe
from papers.clip.weights import OPENAI_VIT, convert, load_file, load_model, open_clip_config
from shared.core.console import Console
from shared.core.errors import UserError
from shared.core.files import sha256
from shared.inference.predict import look, picture_files, zeroshot_task
from shared.tokenizers.clip import ClipTokenizer
from shared.tokenizers.load import imagenet_classes
from shared.weights.load import save_weights
from shared.weights.safe_load import read_tensors
from shared.weights.weight_map import to_published

TINY = replace(
    clip_config.VARIANTS["clip-tiny"](), vocabulary=49_408, end_token=49_407, context=77, tokenizer="clip-bpe"
)
CLASSES = ("airplane", "automobile", "bird", "cat")


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A model under OpenAI's names, in a manifest that states its card; the variant stands for it in this test."""
    monkeypatch.setitem(clip_config.VARIANTS, "clip-vit-b-32", lambda: TINY)
    torch.manual_seed(0)
    model = Clip(TINY).eval()
    path = tmp_path / "tiny.safetensors"
    save_weights(to_published(model.state_dict(), OPENAI_VIT), path)
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"clip-vit-b-32": entry(path)}))
    forget_scores()
    return model, manifest


def entry(path, activation="quick_gelu"):
    source = {"type": "path", "path": str(path)}
    config = {"activation": activation, "norm_eps": 1e-5}
    return manifest_entry(TINY, path.name, source, sha256(path), context=77) | {"config": config}


def picture(seed, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def cifar10(folder, per_class=3):
    folder.mkdir(parents=True)
    for split, start in (("train", 100), ("test", 0)):
        labels = list(CLASSES) * per_class
        pictures = [picture(start + i) for i in range(len(labels))]
        table = pa.table({"key": [f"{split}{i}" for i in range(len(labels))], "image": pictures, "label": labels})
        pq.write_table(table, folder / f"{split}.parquet")


def row(dataset, metric):
    return made_row("clip", dataset, "test", metric, "clip-vit-b-32", "clip-vit-b-32")


def recipe(tmp_path, manifest):
    return ClipRecipe(paper="clip", scale="paper", data_root=str(tmp_path), manifest=str(manifest))


def test_cifar_is_scored_with_the_published_prompts(released, tmp_path):
    model, manifest = released
    cifar10(tmp_path / "cifar10")
    found = metrics.measure(row("CIFAR-10", "zeroshot/top1@openai-ensemble18"), recipe(tmp_path, manifest))
    names, templates = metrics.class_prompts("CIFAR-10", "openai-ensemble18")
    assert len(names) == 10 and len(templates) == 18
    pictures = [np.asarray(Image.open(io.BytesIO(picture(i)))) for i in range(12)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    answer = (image_features(model, images) @ classifier(model, ClipTokenizer(), names, templates).T).argmax(1)
    assert found == pytest.approx(100 * float((answer == torch.tensor([0, 1, 2, 3] * 3)).float().mean()))


SYNSETS = ImageNetInfo("imagenet-1k").label_names()


def test_imagenets_folders_are_synset_ids_in_whatever_order_they_come():
    numbers = metrics.imagenet_numbers(SYNSETS[::-1])
    assert [numbers[name] for name in ("n01440764", "n01443537", "n15075141")] == [0, 1, 999]


@pytest.mark.parametrize(("first", "name"), [(0, "{}"), (1, "{}"), (0, "{:04d}")])
def test_imagenets_numbers_count_by_value_and_the_first_is_said(first, name, capsys):
    folders = sorted(name.format(number) for number in range(first, first + 1000))
    numbers = metrics.imagenet_numbers(folders)
    assert [numbers[name.format(first + row)] for row in range(1000)] == list(range(1000))
    said = f"ImageNet: class folder {name.format(first)} is read as the first synset, n01440764\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("folders", "strange"),
    [
        (imagenet_classes(), "tench"),
        ([*SYNSETS[:-1], "n99999999"], "n99999999"),
        (SYNSETS[:-1], None),
        ([str(number) for number in range(2, 1002)], "2"),
    ],
    ids=["names", "another id", "one too few", "from 2"],
)
def test_other_folders_of_imagenet_are_refused(folders, strange):
    with pytest.raises(
        UserError, match=f"class folders in val{f', among them {strange}' if strange else ''}: they must"
    ):
        metrics.imagenet_numbers(folders)


def test_retrieval_reads_the_karpathy_layout(released, tmp_path):
    _, manifest = released
    karpathy(tmp_path / "flickr30k", [[f"caption {n} of picture {i}" for n in range(5)] for i in range(6)])
    scores = [
        metrics.measure(row("Flickr30k", f"retrieval/{way}_r{k}@hit-pessimistic"), recipe(tmp_path, manifest))
        for way in ("i2t", "t2i")
        for k in (1, 5, 10)
    ]
    assert all(0 <= score <= 100 for score in scores) and scores[2] >= scores[1] >= scores[0]
    assert scores[5] == 100.0, "six pictures: one of the first ten is always right"


def test_the_linear_probe_reads_train_and_test(released, tmp_path):
    _, manifest = released
    cifar10(tmp_path / "cifar10", per_class=5)
    found = metrics.measure(row("CIFAR-10", "probe/top1@lbfgs-pre-projection"), recipe(tmp_path, manifest))
    assert 0 <= found <= 100


def test_a_checkpoint_of_another_activation_is_refused_before_it_is_loaded(released, tmp_path):
    _, manifest = released
    cifar10(tmp_path / "cifar10")
    manifest.write_text(yaml.safe_dump({"clip-vit-b-32": entry(tmp_path / "tiny.safetensors", activation="gelu")}))
    with pytest.raises(UserError, match="activation is gelu in the manifest but quick_gelu"):
        metrics.measure(row("CIFAR-10", "zeroshot/top1@openai-ensemble18"), recipe(tmp_path, manifest))


def test_weights_of_open_clip_with_the_exact_gelu_are_refused(tmp_path):
    config = clip_config.VARIANTS["clip-tiny"]()
    save_weights(Clip(config), tmp_path / "open_clip.safetensors")
    described = {"model_cfg": open_clip_config(config), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    load_file(tmp_path / "open_clip.safetensors", config)
    del described["model_cfg"]["quick_gelu"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"another model than this variant: model_cfg\.quick_gelu is False, ours True"):
        load_file(tmp_path / "open_clip.safetensors", config)


def test_weights_trained_here_are_converted_with_the_words_that_they_have(tmp_path):
    model = Clip(replace(clip_config.VARIANTS["clip-tiny"](), vocabulary=412, end_token=411))
    save_weights(model, tmp_path / "own.safetensors")
    convert(tmp_path / "own.safetensors", tmp_path / "theirs.safetensors", "clip-tiny", "transformers")
    convert(tmp_path / "theirs.safetensors", tmp_path / "back.safetensors", "clip-tiny", "ours")
    back = read_tensors(tmp_path / "back.safetensors")
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


def test_a_changed_byte_of_the_weights_is_refused(released, tmp_path):
    _, manifest = released
    cifar10(tmp_path / "cifar10")
    weights = tmp_path / "tiny.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="sha256"):
        metrics.measure(row("CIFAR-10", "zeroshot/top1@openai-ensemble18"), recipe(tmp_path, manifest))


def loaded(manifest):
    return load_for_inference("clip-vit-b-32", manifest=manifest)


def classified(pictures, manifest, labels, template, capsys):
    """(exit code, lines on stdout, lines on stderr) of `zeroshot`."""
    code = look(picture_files(pictures), zeroshot_task(loaded(manifest), labels, template), 64, Console())
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), [line for line in printed.err.splitlines() if "skipped" in line]


def test_zeroshot_classifies_what_can_be_read_in_a_folder_and_names_the_rest(released, tmp_path, capsys):
    _, manifest = released
    mine = tmp_path / "mine"
    (mine / "x.jpg").mkdir(parents=True)  # a folder
    for place in ("0.jpg", "x.jpg/1.tif", "._0.jpg", "__MACOSX/0.jpg", ".ipynb_checkpoints/0.jpg"):
        (mine / place).parent.mkdir(exist_ok=True)
        (mine / place).write_bytes(picture(0, "TIFF" if place.endswith("tif") else "JPEG"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.png").write_bytes(picture(2))
    (mine / "linked").symlink_to(tmp_path / "elsewhere")
    (mine / "linked" / "round").symlink_to(mine)
    (mine / "cut.jpg").write_bytes(picture(0, "JPEG")[:300])
    (mine / "empty.jpg").write_bytes(b"")
    code, lines, skipped = classified([mine], manifest, ["a cat", "a dog"], "{} {", capsys)
    assert code == 1 and [line.split(":")[0] for line in lines] == [
        str(mine / place) for place in ("0.jpg", "linked/2.png", "x.jpg/1.tif")
    ]
    assert all("a cat" in line and "a dog" in line and "%" in line for line in lines)
    assert [line.partition(": skipped")[0] for line in skipped[:2]] == [str(mine / n) for n in ("cut.jpg", "empty.jpg")]
    assert skipped[2] == "2 of 5 pictures were skipped"


def test_labels_that_are_one_within_the_context_are_refused(released, tmp_path, capsys):
    _, manifest = released
    (tmp_path / "a.png").write_bytes(picture(0))
    long = "a very " * 80
    with pytest.raises(UserError, match="are one to the model, which reads 77 tokens"):
        classified([tmp_path / "a.png"], manifest, [f"{long} cat", f"{long} dog"], "{}", capsys)
    assert classified([tmp_path / "a.png"], manifest, ["a cat", "a dog"], "{} and {}", capsys)[0] == 0


def test_weights_trained_here_bring_their_own_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        save_weights({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        load_model("clip-tiny", tmp_path / "model.safetensors", None, tmp_path / "manifest.yaml")
