"""What a run takes of another paper: made once from its recipe, found again, mended where damaged, and reported."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from shared.core.errors import UserError
from shared.core.paper_package import PaperPackage
from shared.experiments import pretrained_parts
from shared.experiments.pretrained_parts import SEAL, pretrained_part
from shared.report.text import data_lines

FEW = ["data=shapes", "pairs=24", "test_pairs=8", "batch=6", "steps=2", "model=clip-tiny", "accelerator=cpu"]


def clip(cache, *overrides, **options):
    return pretrained_part("clip:vision", "smoke", [*FEW, *overrides], 7, cache=cache, **options)


def pictures():
    return torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    said = []
    return cache, clip(cache, say=said.append), said


def test_a_missing_artifact_is_trained_and_then_found(made):
    cache, first, said = made
    assert first.fresh and "it is being trained" in said[0]
    again = clip(cache, say=said.append)
    assert not again.fresh and len(said) == 1
    assert (again.folder, again.digest, again.known) == (first.folder, first.digest, first.known)
    assert set(first.known) == {"zero-shot accuracy"}


def test_it_loads_as_an_encoder_of_the_layer_asked_for(made):
    _, one, _ = made
    encoders = [one.load(layer=layer) for layer in ("second-last", "last")]
    assert [len(encoder.module.blocks) for encoder in encoders] == [2, 3]
    second, last = (encoder(pictures()) for encoder in encoders)
    assert second.shape == last.shape == (5, encoders[0].tokens, encoders[0].width)
    torch.testing.assert_close(encoders[1].module.blocks[2](second), last)  # the same weights, one block further
    assert encoders[0].digest != encoders[1].digest == one.load(layer="last").digest


def test_another_recipe_seed_or_code_makes_another_but_code_draws_no_other_numbers(made, monkeypatch):
    cache, first, _ = made
    other_seed = pretrained_part("clip:vision", "smoke", FEW, 8, cache=cache)
    monkeypatch.setattr(pretrained_parts, "code_digest", lambda root, folders: "changed")
    other_code = clip(cache)
    names = {one.folder.name for one in (first, clip(cache, "steps=1"), other_seed, other_code)}
    assert len(names) == 4
    assert other_code.fresh and other_code.digest == first.digest != other_seed.digest


def test_what_does_not_change_a_training_does_not_make_another(made):
    cache, first, _ = made
    assert clip(cache, "jobs=3", "seeds=4", "workers=1").folder == first.folder


def test_the_code_that_counts_is_shared_and_the_other_papers_own(made, monkeypatch):
    cache, first, _ = made
    asked = []
    digest = pretrained_parts.code_digest
    monkeypatch.setattr(
        pretrained_parts, "code_digest", lambda root, folders: asked.append(folders) or digest(root, folders)
    )
    assert clip(cache).folder == first.folder and asked == [("shared", "papers/clip")]


@pytest.mark.parametrize("file", ["vision.safetensors", SEAL])
def test_a_damaged_artifact_is_made_anew_with_one_warning(made, capsys, file):
    cache, first, _ = made
    path = first.folder / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    again = clip(cache)
    assert again.fresh and again.digest == first.digest
    assert capsys.readouterr().err.count("damaged; clip:vision is made anew") == 1


def test_of_several_that_ask_at_once_one_trains_and_the_others_wait(tmp_path, monkeypatch):
    def build(part, recipe, seed, folder):
        time.sleep(0.3)
        (folder / "vision.safetensors").write_text(f"{part} {seed}")
        return {}

    monkeypatch.setattr(PaperPackage, "parts", SimpleNamespace(PARTS=("vision",), build=build))
    with ThreadPoolExecutor(3) as several:  # each opens the lock for itself, as processes do
        found = list(several.map(lambda _: clip(tmp_path), range(3)))
    assert sorted(one.fresh for one in found) == [False, False, True] and len({one.digest for one in found}) == 1


def test_the_report_lists_it_with_its_hash_and_where_it_came_from(made):
    cache, first, _ = made
    line = clip(cache).line
    accuracy = first.known["zero-shot accuracy"]
    title = f"clip:vision ({' '.join(first.changes)})"
    assert "steps=2" in first.changes, "two of one kind are told apart by what their recipes change"
    assert line == f"{title} {first.digest[:12]}, from the cache, zero-shot accuracy {accuracy:g}"
    assert first.line.startswith(f"{title} {first.digest[:12]}, built in ")
    data = {"name": "emoji", "artifacts": [line], "credits": ["who drew it"]}
    assert data_lines(data) == [("name", "emoji"), ("artifact", line), ("credit", "who drew it")]


def test_the_digest_is_of_the_files(made):
    _, first, _ = made
    seal = json.loads((first.folder / SEAL).read_text())
    assert set(seal["files"]) == {"vision.safetensors"} and len(first.digest) == 64


@pytest.mark.parametrize(
    ("name", "overrides", "fault"),
    [
        ("clip", [], "artifact 'clip': name paper and part, such as clip:vision"),
        ("clap:vision", [], r"no paper 'clap'; did you mean 'clip'\?"),
        ("clip:text", [], "clip has no text; it has vision"),
        ("albef:vision", [], "papers/albef has no parts.py"),
        ("clip:vision", ["stpes=3"], r"unknown key 'stpes' \(did you mean 'steps'\?\)"),
    ],
)
def test_a_wrong_name_is_an_error_that_tells_the_right_ones(tmp_path, name, overrides, fault):
    with pytest.raises(UserError, match=fault):
        pretrained_part(name, "smoke", overrides, cache=tmp_path)
    assert not list(tmp_path.rglob(SEAL))
