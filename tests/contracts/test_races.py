"""The races of every paper: both sides compute the same, results are written, and what differs is refused."""

import json
from types import ModuleType

import pytest
import torch
from tests_common import CATALOG

from shared.core.errors import UserError
from shared.tools import bench

pytest.importorskip("transformers")

PAPERS = [name for name in CATALOG.names() if CATALOG.package(name).offers("evidence.bench", "SWEEPS")]
TINY = {"clip": "clip-tiny", "blip": "blip-tiny", "blip2": "opt-tiny"}
BATCH = {"clip": 3, "blip": 2, "blip2": 3}
PEAK = {"precision": "fp32", "flops_per_second": 1e11, "shape": [8, 8, 8]}


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    monkeypatch.setattr(bench, "matrix_peak", lambda device, precision: PEAK if precision == "fp32" else None)


def bench_of(paper: str) -> ModuleType:
    return CATALOG.package(paper).bench


def raced(paper: str, sweep: str, root) -> list[dict]:
    words = [f"sweep={sweep}", f"variant={TINY[paper]}", f"batch={BATCH[paper]}", "repeats=3"]
    bench.run(bench_of(paper), root, words)
    return json.loads((root / "results" / "bench" / f"{paper}-{sweep}-cpu-fp32.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("paper", "words", "message"),
    [
        ("clip", ["speed=9"], "'speed=9' is not one of sweep=, variant="),
        ("clip", ["sweep=stepp"], "no sweep 'stepp'; choose all, step, inference"),
        ("clip", ["sweep=step,losses"], "no sweep 'losses'; choose all, step, inference, memory"),
        ("clip", ["variant=clip-vit-b-31"], "no variant 'clip-vit-b-31'"),
        ("clip", ["variant=clip-rn50"], "transformers has no clip-rn50"),
        ("clip", ["batch=4;16"], "batch=4;16 is no list"),
        ("clip", ["batch=0"], "holds a batch of nothing"),
        ("clip", ["repeats=few"], "repeats=few is no whole number"),
        ("clip", ["repeats=0"], "repeats=0: give at least 1"),
        ("clip", ["precision=fp8"], "no precision 'fp8'"),
        ("clip", ["precision=bf16"], "bf16 products are slower than fp32 ones on this machine"),
        ("blip", ["sweep=captions"], "no sweep 'captions'; choose all, caption, step, inference"),
        ("blip", ["sweep=attention"], "no sweep 'attention'; choose all, caption, step, inference"),
        ("blip", ["variant=blip-huge"], "no variant 'blip-huge'; choose blip-base"),
        ("blip", ["beams=5"], "'beams=5' is not one of sweep=, variant="),
        ("blip2", ["sweep=caption"], "no sweep 'caption'; choose all, generate, step, stage1, tokens"),
        ("blip2", ["variant=opt-13b"], "no variant 'opt-13b'; choose opt-tiny, opt-125m"),
        ("blip2", ["sweep=generate", "variant=blip2-mini"], "blip2-mini has other parts"),
    ],
)
def test_a_wrong_word_is_one_clear_error(tmp_path, paper, words, message):
    with pytest.raises(UserError) as error:
        bench.run(bench_of(paper), tmp_path, words)
    assert message in str(error.value)


BOTH = ["ours", "transformers"]
WAYS = ["cached features", "encoder in each step"]
COUNTS = [f"{count} visual tokens" for count in (32, 1, 8, 64, 128, 257)]


@pytest.mark.parametrize(
    ("paper", "sweep", "settings", "facts"),
    [
        (
            "clip",
            "step",
            {
                "batch 3, captions of up to 16 tokens": ["ours", "open_clip", "transformers"],
                "batch 3, full texts, 24 tokens": ["ours", "open_clip", "transformers"],
            },
            # the longest of three captions; the full context
            {"batch": 3, "compiled": False, "tokens": 3 * [16] + 3 * [24]},
        ),
        ("blip", "caption", {"batch 2": BOTH}, {"batch": 2, "new_tokens": 20, "equal_tokens": 1.0}),
        (
            "blip",
            "step",
            {f"{what}, batch 2, captions of up to 16 tokens": BOTH for what in ("LM", "ITC, ITM and LM")},
            {"tokens": 16},
        ),
        (
            "blip",
            "inference",
            {
                "pictures to features, batch 2": BOTH,
                "matching 2 pictures with a text each": BOTH,
                "ranking 16 texts of one picture": BOTH,
            },
            {},
        ),
        (
            "blip2",
            "generate",
            {"fp32, batch 3": BOTH},
            {"batch": 3, "new_tokens": 20, "equal_tokens": 1.0, "precision": "fp32"},
        ),
        ("blip2", "step", {"opt-tiny, batch 3": WAYS}, {"variant": "opt-tiny"}),
        (
            "blip2",
            "stage1",
            {"ITC and ITM, batch 3": BOTH, "ITC, ITM and ITG, batch 3": ["ours", "repeated"]},
            {"tokens": 16},
        ),
        ("blip2", "tokens", {"opt-tiny, batch 3": COUNTS}, {"text": 16}),
    ],
)
def test_every_sweep_agrees_and_is_written(tmp_path, capsys, paper, sweep, settings, facts):
    rows = raced(paper, sweep, tmp_path)
    expected = [(setting, name) for setting, names in settings.items() for name in names]
    assert [(row["setting"], row["name"]) for row in rows] == expected
    for key, value in facts.items():
        assert [row[key] for row in rows] == (value if isinstance(value, list) else [value] * len(rows)), key
    assert all(len(row["seconds"]) == 3 for row in rows)
    assert (tmp_path / "results" / "bench" / "figures" / f"{paper}-{sweep}-cpu-fp32.png").exists()
    out = capsys.readouterr().out
    assert all(f"{name} takes" in out for names in settings.values() for name in names[1:])
    assert all(row.get("share_of_peak", 1) > 0 for row in rows)


def blip_with_other_weights(model):
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            layer.mlp.fc1.weight.mul_(2)


def unloaded(model):
    model.load_state_dict = lambda state: None  # stays as it was drawn


def other_words(qformer):
    qformer.word.weight.data.mul_(1.5)


def other_when_cached(encoder):
    """What is cached is of other weights than those that run."""
    first, calls = encoder.module.forward, []

    def forward(images):
        calls.append(1)
        return first(images).flip(2) if len(calls) == 1 else first(images)

    encoder.module.forward = forward


@pytest.mark.parametrize(
    ("paper", "sweep", "part", "spoil", "other"),
    [
        ("blip", "caption", "theirs_of", blip_with_other_weights, "transformers"),
        ("blip", "step", "theirs_of", blip_with_other_weights, "transformers"),
        ("blip", "inference", "theirs_of", blip_with_other_weights, "transformers"),
        ("blip2", "generate", "their_model", unloaded, "transformers"),
        ("blip2", "step", "frozen_encoder", other_when_cached, "encoder in each step"),
        ("blip2", "stage1", "TheirQFormer", other_words, "transformers"),
    ],
)
def test_a_side_with_other_weights_is_refused(tmp_path, monkeypatch, paper, sweep, part, spoil, other):
    honest = getattr(bench_of(paper), part)

    def dishonest(*arguments):
        made = honest(*arguments)
        spoil(made)
        return made

    monkeypatch.setattr(bench_of(paper), part, dishonest)
    with pytest.raises(UserError, match=f"{other} does not compute what"):
        raced(paper, sweep, tmp_path)


def configurations():
    from dataclasses import replace

    from papers.blip.config import tiny

    of_other_widths = replace(tiny(), text_width=48, text_heads=3, mlp_width=72, vision_layers=3)
    return {"blip": of_other_widths, "blip2": bench_of("blip2").config_of("opt-tiny")}


def written(paper: str, batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    module, config = bench_of(paper), configurations()[paper]
    pixels, prompts = module.inputs(config, batch, "cpu")[0], module.prompts(config, batch, "cpu")
    return [write(pixels, prompts) for write in module.writers(config, "cpu", dtype).values()]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("paper", "end"), [("blip", configurations()["blip"].end_token), ("blip2", 2)])
def test_both_write_the_same_new_tokens_as_many_for_every_picture(paper, end, batch):
    ours, theirs = written(paper, batch, torch.float32)
    assert ours.shape == (batch, bench_of(paper).NEW_TOKENS) and torch.equal(ours, theirs)
    assert (ours != end).all()
    # what is written is of the picture; BLIP's new weights say the same of all
    assert paper == "blip" or batch == 1 or len({tuple(row) for row in ours.tolist()}) > 1


@pytest.mark.parametrize("paper", ["blip", "blip2"])
def test_bf16_texts_are_as_long(paper):
    assert {tokens.shape for tokens in written(paper, 2, torch.bfloat16)} == {(2, bench_of(paper).NEW_TOKENS)}


def test_pretraining_with_their_networks_trains_the_same_parameters_to_the_same_losses():
    blip, config = bench_of("blip"), configurations()["blip"]
    torch.manual_seed(0)
    ours = blip.BlipPretraining(config)
    sizes = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, blip.TheirPretraining(ours))]
    assert sizes[0] == sizes[1]  # what encoder and decoder share is one tensor on both sides
    steps = blip.pretraining_steps(config, "cpu", "fp32")
    assert_equal_losses(steps, blip.inputs(config, 4, "cpu"), 3)


@pytest.mark.parametrize("kind", ["transformers", "repeated"])
def test_both_ways_through_stage_1_train_the_same_parameters_to_the_same_losses(kind):
    blip2, config = bench_of("blip2"), configurations()["blip2"]
    ours, other = (sum(p.numel() for p in m.parameters()) for m in blip2.stage1_models(config, kind).values())
    assert ours == other
    objectives = blip2.Objectives(itg=kind == "repeated")
    features = torch.randn(5, config.vision.tokens, config.vision.width)
    steps = blip2.stage1_steps(config, "cpu", "fp32", kind, objectives)
    assert_equal_losses(steps, (features, blip2.inputs(config, 5, "cpu")[1]), 3 if objectives.itg else 2)


def assert_equal_losses(steps, data, count):
    for _ in range(4):
        losses = [torch.stack(step(*data)) for step in steps.values()]
        assert losses[0].shape == (count,)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
