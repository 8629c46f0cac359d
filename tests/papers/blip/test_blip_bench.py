"""BLIP's races: both sides compute the same, results are written, and what differs is refused."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from papers.blip.config import tiny
from papers.blip.evidence import bench as blip
from papers.blip.model import Blip
from shared.core.errors import UserError
from shared.tools import bench_timing

pytest.importorskip("transformers")

CONFIG = replace(
    tiny(), text_width=48, text_heads=3, mlp_width=72, vision_layers=3
)  # of other sizes than the pictures'


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    peak = {"precision": "fp32", "flops_per_second": 1e11, "shape": [8, 8, 8]}
    monkeypatch.setattr(bench_timing, "matrix_peak", lambda device, precision: peak if precision == "fp32" else None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep=captions"], "no sweep 'captions'; choose all, caption, step, inference"),
        (["variant=blip-huge"], "no variant 'blip-huge'; choose blip-base"),
        (["beams=5"], "'beams=5' is not one of sweep=, variant="),
    ],
)
def test_a_wrong_word_is_one_clear_error(tmp_path, words, message):
    with pytest.raises(UserError) as error:
        blip.run(tmp_path, words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("sweep", "settings", "facts"),
    [
        ("caption", ["batch 2"], {"batch": 2, "new_tokens": 20, "equal_tokens": 1.0}),
        (
            "step",
            [f"{what}, batch 2, captions of up to 16 tokens" for what in ("LM", "ITC, ITM and LM")],
            {"tokens": 16},
        ),
        (
            "inference",
            [
                "pictures to features, batch 2",
                "matching 2 pictures with a text each",
                "ranking 16 texts of one picture",
            ],
            {},
        ),
    ],
)
def test_every_sweep_agrees_and_is_written(tmp_path, capsys, sweep, settings, facts):
    blip.run(tmp_path, [f"sweep={sweep}", "variant=blip-tiny", "batch=2", "repeats=3"])
    folder = tmp_path / "results" / "bench"
    rows = json.loads((folder / f"blip-{sweep}-cpu-fp32.json").read_text())["rows"]
    assert [row["setting"] for row in rows] == [setting for setting in settings for _ in range(2)]
    assert [row["name"] for row in rows] == ["ours", "transformers"] * len(settings)
    assert all(row | facts == row and len(row["seconds"]) == 3 for row in rows)
    assert (folder / "figures" / f"blip-{sweep}-cpu-fp32.png").exists()
    assert "transformers takes" in capsys.readouterr().out


@pytest.mark.parametrize("sweep", ["caption", "step", "inference"])
def test_a_side_with_other_weights_is_refused(tmp_path, monkeypatch, sweep):
    honest = blip.theirs_of

    def dishonest(*given):
        model = honest(*given)
        with torch.no_grad():
            for layer in model.vision_model.encoder.layers:
                layer.mlp.fc1.weight.mul_(2)
        return model

    monkeypatch.setattr(blip, "theirs_of", dishonest)
    with pytest.raises(UserError, match="transformers does not compute what ours does"):
        blip.run(tmp_path, [f"sweep={sweep}", "variant=blip-tiny", "batch=2", "repeats=3"])


@pytest.mark.parametrize("batch", [1, 3])
def test_both_write_the_same_new_tokens_as_many_for_every_picture(batch):
    pixels, _ = blip.bytes_and_tokens(CONFIG, batch, "cpu")
    prompts = blip.prompts_of(CONFIG, batch, "cpu")
    ours, theirs = (write(pixels, prompts) for write in blip.captioners(CONFIG, "cpu", torch.float32).values())
    assert ours.shape == (batch, blip.NEW_TOKENS) and torch.equal(ours, theirs)
    assert (ours != CONFIG.end_token).all()


def test_bf16_captions_are_as_long():
    pixels, _ = blip.bytes_and_tokens(CONFIG, 2, "cpu")
    prompts = blip.prompts_of(CONFIG, 2, "cpu")
    shapes = {write(pixels, prompts).shape for write in blip.captioners(CONFIG, "cpu", torch.bfloat16).values()}
    assert shapes == {(2, blip.NEW_TOKENS)}


def test_pretraining_with_their_networks_trains_the_same_parameters_to_the_same_losses():
    torch.manual_seed(0)
    ours = blip.BlipPretraining(CONFIG)
    theirs = blip.TheirPretraining(ours)
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert sizes[0] == sizes[1]  # what encoder and decoder share is one tensor on both sides
    data = blip.bytes_and_tokens(CONFIG, 4, "cpu")
    steps = blip.pretraining_steps(CONFIG, "cpu", "fp32")
    for _ in range(4):
        losses = [torch.stack(step(*data)) for step in steps.values()]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_work_is_what_a_real_forward_pass_computes():
    model = Blip(CONFIG)
    pixels, _ = blip.bytes_and_tokens(CONFIG, 1, "cpu")
    _, tokens = blip.bytes_and_tokens(CONFIG, 5, "cpu")
    length = tokens.shape[1]

    def counted(call) -> int:
        with FlopCounterMode(display=False) as counter:
            call(model.encode_image(pixels))
        return counter.get_total_flops()

    picture = counted(lambda seen: None)
    alone = counted(lambda seen: model.text_features(tokens[:1]))
    match = counted(lambda seen: model.match(tokens, seen))
    write = counted(lambda seen: model.caption_logits(tokens[:1], seen))
    assert blip.work(CONFIG, length) == picture
    assert blip.work(CONFIG, length, ("alone",)) == alone
    assert blip.work(CONFIG, length, ("match",), 5) == match
    assert blip.work(CONFIG, length, ("write",)) == write
    keys = 2 * (1 + 16) * CONFIG.vision_width * 2 * CONFIG.text_width * CONFIG.text_layers  # of 16 patches, seen once
    all_three = blip.work(CONFIG, length, ("alone", "match", "write"), 5)
    assert all_three == alone + match + write - 2 * picture - keys
