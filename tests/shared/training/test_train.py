"""`train`: one model on one recipe ends in one file, goes on where it was stopped, and refuses what does not fit."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from tests_common import CATALOG, ROOT

import shared.training.tracking
from papers.clip import train as training
from papers.clip.module import ClipModule
from papers.clip.weights import load_model
from shared.cli import main
from shared.core.console import Console
from shared.core.errors import UserError
from shared.core.paper_package import PaperPackage
from shared.core.recipe import to_yaml
from shared.training.checkpointing import newest_valid
from shared.training.train import train

WORDS = ["checkpoint_every=3", "accelerator=cpu", "pairs=64", "test_pairs=16"]


@pytest.fixture(autouse=True)
def tracker(monkeypatch):
    """Stands for MLflow, and takes only what the real one takes."""
    made = mock.create_autospec(shared.training.tracking.Tracker)
    monkeypatch.setattr(shared.training.tracking, "Tracker", made)
    return made


def run(folder, *words):
    recipe = CATALOG.recipe("clip", "smoke", [*WORDS, *words])
    assert train(CATALOG, recipe, folder, Console()) == folder
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with mock.patch("shared.training.tracking.Tracker", mock.create_autospec(shared.training.tracking.Tracker)) as made:
        run(folder)
    return SimpleNamespace(folder=folder, tracked=made.call_args.kwargs)


def test_it_ends_in_weights_that_load_by_themselves_with_recipe_and_tokenizer(whole):
    recipe = CATALOG.recipe("clip", "smoke", WORDS)
    weights = whole.folder / "model.safetensors"
    model, words = load_model("clip-tiny", weights, whole.folder / "tokenizer.json", ROOT / "checkpoints_manifest.yaml")
    assert words.vocab_size == model.config.vocabulary and model.config.image_size == recipe.image_size
    assert (whole.folder / "recipe.yaml").read_text() == to_yaml(recipe)
    assert [samples for samples, _ in whole.tracked["curves"]["loss"]] == [5 * 32, 8 * 32]
    assert [step for step, _ in whole.tracked["curves"]["waited"]] == [8]
    assert whole.tracked["experiment"] == "clip" and whole.tracked["params"]["steps"] == 8
    fresh = training.prepare(recipe, 7).module.model.state_dict()
    assert any(not torch.equal(value, fresh[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopped_and_started_again_by_the_same_command_it_ends_in_the_same_bytes(
    whole, tmp_path, monkeypatch, accumulate
):
    class Stop(Exception):
        pass

    end = ClipModule.on_train_batch_end

    def stops(self, outputs, batch, index):
        end(self, outputs, batch, index)
        if index + 1 == 5 * accumulate:
            raise Stop

    words = [f"accumulate={accumulate}"]
    expected = run(tmp_path / "whole", *words) if accumulate > 1 else (whole.folder / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ClipModule, "on_train_batch_end", stops)
        with pytest.raises(Stop):
            run(tmp_path / "stopped", *words)
    assert newest_valid(tmp_path / "stopped" / "checkpoints").step == 3
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    assert run(tmp_path / "stopped", *words) == expected


def test_what_has_ended_is_not_trained_again(whole, monkeypatch):
    before = (whole.folder / "model.safetensors").read_bytes()

    def refuse(*_):
        raise AssertionError("it trains")

    monkeypatch.setattr(ClipModule, "training_step", refuse)
    assert run(whole.folder) == before


def test_other_settings_are_refused_and_leave_the_record_of_the_first_ones(whole):
    before = (whole.folder / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"begun with other settings \(recipe.learning_rate: 0.001 then, 0.5 now\)"):
        run(whole.folder, "learning_rate=0.5")
    assert (whole.folder / "recipe.yaml").read_text() == before and yaml.safe_load(before)["learning_rate"] == 0.001


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written \(Not a directory\); name another by --out$"):
        run(tmp_path / "file" / "run")


def test_a_paper_that_trains_in_its_claims_alone_is_told(tmp_path):
    catalog = SimpleNamespace(root=tmp_path, package=lambda name: PaperPackage("shared.core"))  # it has no train.py
    with pytest.raises(UserError, match=r"papers/clip has no train.py, .*make reproduce$"):
        train(catalog, CATALOG.recipe("clip", "smoke", WORDS), tmp_path / "run", Console())


def test_weights_beside_the_model_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    prepare = training.prepare

    def with_a_teacher(recipe, seed):
        trainable = prepare(recipe, seed)
        trainable.module.teacher = torch.nn.Linear(2, 2)
        return trainable

    monkeypatch.setattr(training, "prepare", with_a_teacher)
    with pytest.raises(UserError, match=r"papers/clip: teacher\.weight, teacher\.bias lie outside `model\.`"):
        run(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clyp"], "no paper 'clyp'; did you mean 'clip'?"),
        (["clip", "--scale", "smok"], "no scale 'smok'; did you mean 'smoke'?"),
        (["clip", "stepz=3"], "unknown key 'stepz' (did you mean 'steps'?)"),
        (["clip", "--scale", "smoke", "batch=33", "devices=2"], "batch 33 does not divide by devices x nodes"),
        (["clip", "--scale", "smoke", "strategy=zero9"], "strategy"),
        (["clip", "--scale", "smoke", "data=shards", "data_root=/nowhere"], "/nowhere: no shards (*.tar) there"),
        (["clip", "--scale", "smoke", "model=clip-rn50"], "choose a ViT variant"),
    ],
)
def test_a_mistake_is_one_clear_line(capsys, tmp_path, words, message):
    with pytest.raises(SystemExit) as ended:
        main(ROOT / "papers", "papers", ["train", *words, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("papers: ") and message in error
