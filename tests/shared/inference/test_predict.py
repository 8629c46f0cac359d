"""`caption` and `ask`: a user's own pictures, in batches, bad ones named, nothing that a terminal would obey."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tests_common import CATALOG

from papers.blip.config import SPECIALS, VARIANTS, with_tokenizer
from papers.blip.model import Blip
from papers.blip.tasks import BlipVqa
from shared.cli import main
from shared.core.console import Console
from shared.core.device import on_gpu_if_any
from shared.core.errors import UserError
from shared.core.text import one_line
from shared.inference.predict import Task, look, picture_files
from shared.tokenizers.small_bpe import SmallTokenizer
from shared.weights.load import save_weights


def picture(path, size=(40, 30), colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def means(images):
    return [f"red {int(image[0].float().mean())}" for image in images]


def test_files_and_folders_become_one_list(tmp_path):
    a, b = picture(tmp_path / "f" / "b.png"), picture(tmp_path / "f" / "deep" / "a.JPG")
    (tmp_path / "f" / "notes.txt").write_text("x")
    alone = picture(tmp_path / "alone.png")
    assert picture_files([alone, tmp_path / "f"]) == [alone, a, b]
    with pytest.raises(UserError, match="no such file or folder"):
        picture_files([tmp_path / "none.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in this folder"):
        picture_files([tmp_path / "empty"])


def test_a_line_a_picture_in_order_and_bad_ones_named_at_the_end(tmp_path, capsys):
    files = [picture(tmp_path / f"{i}.png", colour=(10 * i, 0, 0)) for i in range(5)]
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:40])
    (tmp_path / "text.png").write_text("no picture")
    sizes = []

    def answer(images):
        sizes.append(tuple(images.shape))
        return means(images)

    files[2:2] = [tmp_path / "cut.png", tmp_path / "text.png", tmp_path / "gone.png"]
    code = look(files, Task(answer, 8), 3, Console(io.StringIO()))
    said = capsys.readouterr()
    assert code == 1 and [line.split(": ")[1] for line in said.out.splitlines()] == [f"red {10 * i}" for i in range(5)]
    assert sizes == [(2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 8, 8)]
    errors = said.err.splitlines()
    assert len(errors) == 4 and errors[-1] == "3 of 8 pictures were skipped"
    assert "gone.png: skipped, No such file" in said.err and "text.png: skipped, no picture" in said.err


def test_nothing_but_words_reaches_the_terminal(tmp_path, capsys):
    path = picture(tmp_path / "a\nb\x1b.png")
    task = Task(lambda images: ["two\nlines \x1b[2J\u202e"], 8)
    assert look([path], task, 1, Console(io.StringIO())) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 and "\x1b" not in out and "\u202e" not in out
    assert out.endswith("two\\nlines \\x1b[2J\\u202e\n") and one_line("ä—字") == "ä—字"


def test_a_picture_is_squeezed_in_and_not_cut_to_the_middle(tmp_path, capsys):
    image = Image.new("RGB", (60, 20), (0, 0, 0))
    image.paste((255, 0, 0), (0, 0, 20, 20))  # the left third
    image.save(tmp_path / "wide.png")
    look([tmp_path / "wide.png"], Task(means, 12), 1, Console(io.StringIO()))
    assert int(capsys.readouterr().out.split()[-1]) == pytest.approx(85, abs=6)


# ---- BLIP through the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights and tokenizer as a run leaves them: a captioner's, and those of a VQA network."""
    folder = tmp_path_factory.mktemp("run")
    words = SmallTokenizer.train(["a picture of a red circle", "what colour is it? red", "blue"] * 3, 300, SPECIALS)
    words.save(folder / "tokenizer.json")
    torch.manual_seed(0)
    config = with_tokenizer(VARIANTS["blip-tiny"](), words)
    save_weights(Blip(config), folder / "model.safetensors")
    save_weights(BlipVqa(replace(config, sharing="none")), folder / "vqa.safetensors")
    return folder


def run(*words):
    with pytest.raises(SystemExit) as ended:
        main(CATALOG.folder, "papers", [str(word) for word in words])
    return ended.value.code


def test_captions_of_a_folder_by_weights_trained_here(trained, tmp_path, capsys):
    for i in range(3):
        picture(tmp_path / f"{i}.png", colour=(0, 80 * i, 0))
    picture(tmp_path / "dot.png", (1, 1))  # a picture of one pixel is one
    common = ["caption", tmp_path, "--model", "blip-tiny", "--weights", trained / "model.safetensors", "--batch", 3]
    assert run(*common) == 0
    beam = capsys.readouterr().out
    assert [line.split(": ")[0].split("/")[-1] for line in beam.splitlines()] == ["0.png", "1.png", "2.png", "dot.png"]
    assert "a picture of" not in beam
    sampled = []
    for seed, batch in ((1, 3), (1, 2), (2, 3)):
        assert run(*common[:-1], batch, "--nucleus", "0.9", "--seed", seed) == 0
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]


def test_answers_in_own_words_and_among_a_list(trained, tmp_path, capsys):
    path = picture(tmp_path / "a.png")
    common = ["ask", path, "what colour is it?", "--model", "blip-tiny", "--weights", trained / "vqa.safetensors"]
    assert run(*common) == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")
    (tmp_path / "answers.json").write_text('["red", "blue"]')
    assert run(*common, "--answers", tmp_path / "answers.json") == 0
    assert capsys.readouterr().out.split(": ")[-1].strip() in ("red", "blue")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption", "PICTURE", "--model", "blip-bass"], "did you mean 'blip-base'?"),
        (["caption", "PICTURE", "--model", "clip-vit-b-32"], "no model 'clip-vit-b-32' that speaks of pictures"),
        (["caption", "nowhere.png"], "nowhere.png: no such file or folder"),
        (["caption", "PICTURE", "--beams", "0"], "--beams 0: give at least 1"),
        (["caption", "PICTURE", "--nucleus", "1.5"], "--nucleus 1.5: give a share"),
        (["caption", "PICTURE", "--model", "blip-tiny"], "blip-tiny: no released weights to caption with"),
        (["caption", "PICTURE", "--weights", "none.pth"], "none.pth: no such file"),
        (["caption", "PICTURE", "--model", "blip-tiny", "--weights", "VQA"], "these weights cannot caption"),
        (["caption", "PICTURE", "--model", "blip-base"], "sha256 is null"),
        (["ask", "PICTURE", " ", "--model", "blip-tiny", "--weights", "VQA"], "the question is empty"),
        (["ask", "PICTURE", "what? " * 30, "--model", "blip-tiny", "--weights", "VQA"], "the context is 16: shorten"),
        (["ask", "PICTURE", "what?", "--answers", "nothing.json"], "nothing.json: cannot be read"),
        (["ask", "PICTURE", "what?", "--model", "blip-tiny", "--weights", "BLIP"], "these weights cannot ask"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(trained, tmp_path, capsys, words, message):
    places = {
        "PICTURE": picture(tmp_path / "p.png"), "VQA": trained / "vqa.safetensors",
        "BLIP": trained / "model.safetensors",
    }  # fmt: skip
    assert run(*(places.get(word, word) for word in words)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said


def test_an_empty_list_of_answers_is_refused(tmp_path, capsys):
    (tmp_path / "answers.json").write_text("[]")
    assert run("ask", picture(tmp_path / "p.png"), "what?", "--answers", tmp_path / "answers.json") == 2
    assert "no list of answers" in capsys.readouterr().err


def test_a_device_is_used_where_there_is_one(monkeypatch):
    moved = []

    class Model:
        def cuda(self):
            moved.append(1)
            return self

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu_if_any(Model())
    assert moved == [1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_gpu_if_any(Model())
    assert moved == [1]
