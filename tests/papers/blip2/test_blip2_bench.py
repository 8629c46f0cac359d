"""BLIP-2's races: both sides compute the same, results are written, and what differs is refused."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from papers.blip2.evidence import bench as blip2
from papers.blip2.evidence.cost import stage1_flops
from papers.blip2.model import Blip2, Blip2Qformer, Objectives
from shared.core.errors import UserError
from shared.tools import bench_timing

pytest.importorskip("transformers")

CONFIG = replace(blip2.opt_tiny(), dropout=0.0)


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    peak = {"precision": "fp32", "flops_per_second": 1e11, "shape": [8, 8, 8]}
    monkeypatch.setattr(bench_timing, "matrix_peak", lambda device, precision: peak if precision == "fp32" else None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep=caption"], "no sweep 'caption'; choose all, generate, step, stage1, tokens"),
        (["variant=opt-13b"], "no variant 'opt-13b'; choose opt-tiny, opt-125m"),
        (["sweep=generate", "variant=blip2-mini"], "blip2-mini has other parts"),
    ],
)
def test_a_wrong_word_is_one_clear_error(tmp_path, words, message):
    with pytest.raises(UserError) as error:
        blip2.run(tmp_path, words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("sweep", "names", "settings", "facts"),
    [
        (
            "generate",
            ["ours", "transformers"],
            ["fp32, batch 3"],
            {"batch": 3, "new_tokens": 20, "equal_tokens": 1.0, "precision": "fp32"},
        ),
        ("step", ["cached features", "encoder in each step"], ["opt-tiny, batch 3"], {"variant": "opt-tiny"}),
        (
            "stage1",
            [["ours", "transformers"], ["ours", "repeated"]],
            ["ITC and ITM, batch 3", "ITC, ITM and ITG, batch 3"],
            {"tokens": 16},
        ),
        (
            "tokens",
            [f"{count} visual tokens" for count in (32, 1, 8, 64, 128, 257)],
            ["opt-tiny, batch 3"],
            {"text": 16},
        ),
    ],
)
def test_every_sweep_agrees_and_is_written(tmp_path, capsys, sweep, names, settings, facts):
    blip2.run(tmp_path, [f"sweep={sweep}", "variant=opt-tiny", "batch=3", "repeats=3"])
    folder = tmp_path / "results" / "bench"
    rows = json.loads((folder / f"blip2-{sweep}-cpu-fp32.json").read_text())["rows"]
    names = names if isinstance(names[0], list) else [names]
    expected = [(setting, name) for setting, those in zip(settings, names, strict=True) for name in those]
    assert [(row["setting"], row["name"]) for row in rows] == expected
    assert all(row | facts == row and len(row["seconds"]) == 3 for row in rows)
    assert (folder / "figures" / f"blip2-{sweep}-cpu-fp32.png").exists()
    assert "takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sweep", "part", "other"),
    [
        ("generate", "their_model", "transformers"),
        ("step", "frozen_encoder", "encoder in each step"),
        ("stage1", "TheirQFormer", "transformers"),
    ],
)
def test_a_side_with_other_weights_is_refused(tmp_path, monkeypatch, sweep, part, other):
    honest = getattr(blip2, part)

    def dishonest(*given):
        made = honest(*given)
        if sweep == "generate":
            made.load_state_dict = lambda state: None  # stays as it was drawn
        elif sweep == "stage1":
            made.word.weight.data.mul_(1.5)
        else:  # what is cached is of other weights than those that run
            first = made.module.forward
            seen = []

            def forward(images):
                seen.append(1)
                return first(images).flip(2) if len(seen) == 1 else first(images)

            made.module.forward = forward
        return made

    monkeypatch.setattr(blip2, part, dishonest)
    with pytest.raises(UserError, match=f"{other} does not compute what"):
        blip2.run(tmp_path, [f"sweep={sweep}", "variant=opt-tiny", "batch=3", "repeats=3"])


@pytest.mark.parametrize("batch", [1, 4])
def test_both_write_the_same_new_tokens_as_many_for_every_picture(batch):
    pixels, _ = blip2.given(CONFIG, batch, "cpu")
    prompts = blip2.prompts_of(CONFIG, batch, "cpu")
    ours, theirs = (write(pixels, prompts) for write in blip2.writers(CONFIG, "cpu", torch.float32).values())
    assert ours.shape == (batch, blip2.NEW_TOKENS) and torch.equal(ours, theirs)
    assert (ours != 2).all()
    assert batch == 1 or len({tuple(row) for row in ours.tolist()}) > 1  # what is written is of the picture


def test_bf16_texts_are_as_long():
    pixels, _ = blip2.given(CONFIG, 2, "cpu")
    prompts = blip2.prompts_of(CONFIG, 2, "cpu")
    shapes = {write(pixels, prompts).shape for write in blip2.writers(CONFIG, "cpu", torch.bfloat16).values()}
    assert shapes == {(2, blip2.NEW_TOKENS)}


@pytest.mark.parametrize(("kind", "objectives"), [("transformers", Objectives(itg=False)), ("repeated", Objectives())])
def test_both_ways_through_stage_1_train_the_same_parameters_to_the_same_losses(kind, objectives):
    models = blip2.stage1_models(CONFIG, kind)
    ours, other = (sum(p.numel() for p in model.parameters()) for model in models.values())
    assert ours == other
    _, tokens = blip2.given(CONFIG, 5, "cpu")
    features = torch.randn(5, CONFIG.vision.tokens, CONFIG.vision.width)
    steps = blip2.stage1_steps(CONFIG, "cpu", "fp32", kind, objectives)
    for _ in range(4):
        losses = [torch.stack(step(features, tokens)) for step in steps.values()]
        assert losses[0].shape == (3 if objectives.itg else 2,)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_work_is_what_a_real_forward_pass_computes():
    torch.manual_seed(0)
    length = 9
    model = Blip2(CONFIG, blip2.language_model(CONFIG.language))
    encoder, stage1 = blip2.frozen_encoder(CONFIG.vision), Blip2Qformer(CONFIG)
    pixels, _ = blip2.given(CONFIG, 1, "cpu")
    tokens = torch.randint(3, 90, (1, length))

    def counted(call) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    features, found = encoder(pixels), blip2.work(CONFIG, length)
    assert found["encoder"] == counted(lambda: encoder(pixels))
    assert found["bridge"] == counted(lambda: model.prefix(features))
    both = counted(lambda: model(features, tokens, torch.ones_like(tokens, dtype=torch.bool)))
    one_slot = found["language"] - blip2.work(CONFIG, length - 1)["language"]
    assert both - found["bridge"] == pytest.approx(found["language"], abs=one_slot)  # nothing follows the last token
    tokens[:, 0] = CONFIG.start_token
    three = features.expand(2, -1, -1), tokens.expand(2, -1), torch.arange(2)
    assert 2 * stage1_flops(CONFIG, length) == pytest.approx(counted(lambda: stage1(*three)), rel=0.05)
