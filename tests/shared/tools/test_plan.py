"""A plan against what can be measured here: bytes and FLOPs of real steps, the memory of a real process, print."""

import dataclasses
import functools
import os
import subprocess
import sys

import pytest
import torch
from tests_common import CATALOG, ROOT
from torch.utils.flop_counter import FlopCounterMode

import shared.tools.plan
from papers.clip.evidence.structure import forward_flops, measure, step
from papers.clip.losses import clip_loss
from papers.clip.model import ClipOutput
from shared.core.errors import UserError
from shared.losses.contrastive import chunked_contrastive_loss
from shared.nn.blocks import set_recompute
from shared.tools.footprint import count_encoders, count_objectives, free_gradients, run_pass, shapes_only
from shared.tools.hardware import GPUS, find_gpu
from shared.tools.plan import EFFICIENCY, LIVE, USABLE, Plan, estimate, make_plan, sent, span, states, text
from shared.training.optim import decay_groups

HALF = {"weights": torch.float32, "half": torch.bfloat16}
CAST = {"weights": torch.bfloat16, "half": None}
FULL = {"weights": torch.float32, "half": None}


def tiny(recompute=False):
    work = step("clip-tiny")
    work.model.train()
    set_recompute(work.model, recompute)
    return work


def standing(work, batch):
    return [*work.model.parameters(), *work.model.buffers(), *batch]


def encoders_pass(size, dtypes, recompute):
    """Of the device that stands around: real, or shapes alone."""
    work = tiny(recompute)
    free_gradients(work.model)
    batch = work.batch(size)
    return run_pass(standing(work, batch), lambda: work.encode(*batch), half=dtypes["half"], reads=work.reads)


@pytest.mark.parametrize("dtypes", [FULL, HALF, CAST], ids=["fp32", "autocast", "cast"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_bytes_and_flops_on_shapes_alone_are_those_of_a_real_pass_at_every_moment(dtypes, recompute):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtypes["weights"])
    try:
        real = encoders_pass(5, dtypes, recompute)
    finally:
        torch.set_default_dtype(before)
    counted = count_encoders(functools.partial(step, "clip-tiny"), **dtypes, recompute=recompute)
    found = (counted.kept(5), counted.peak(5), counted.forward(5), counted.backward(5))
    assert found == (real.kept, real.peak, real.forward, real.backward)


def test_what_is_kept_is_what_autograd_saves():
    work = tiny()
    batch = work.batch(6)
    known = {x.untyped_storage().data_ptr() for x in standing(work, batch)}
    saved = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = clip_loss(work.model(*batch))
    expected = sum(storage.nbytes() for storage in saved.values()) + loss.untyped_storage().nbytes()
    with shapes_only():
        fake = tiny()
        again = fake.batch(6)
        found = run_pass(standing(fake, again), lambda: (clip_loss(fake.model(*again)),), reads=fake.reads)
    # a scalar or two (the loss's mean, the scale) is alive without being saved, or saved and dead
    assert abs(found.kept - expected) <= 64 and expected > 1e6


def test_flops_are_those_of_torchs_own_counter_on_real_tensors_and_of_the_structure_rung():
    work = tiny()
    batch = work.batch(3)
    with FlopCounterMode(display=False) as forward:
        outputs = work.encode(*batch)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    counted = count_encoders(functools.partial(step, "clip-tiny"))
    assert counted.forward(3) == forward.get_total_flops()
    assert counted.backward(3) == backward.get_total_flops()
    assert counted.forward(1) == forward_flops("clip-tiny")


def test_weights_gradients_and_moments_are_exactly_those_of_a_real_optimizer():
    work = tiny()
    optimizer = torch.optim.AdamW(decay_groups(work.model, 0.2), lr=1e-3)
    clip_loss(work.model(*work.batch(4))).backward()
    optimizer.step()
    parameters = list(work.model.parameters())
    moments = [x for state in optimizer.state.values() for key, x in state.items() if key.startswith("exp_avg")]
    size = sum(p.numel() for p in parameters)
    held = states(size, size, "32-true", 0, 1)
    assert held.weights == sum(p.nbytes for p in parameters)
    assert held.gradients == sum(p.grad.nbytes for p in parameters)
    assert held.optimizer == sum(x.nbytes for x in moments)


@pytest.fixture(scope="module")
def objectives():
    return count_objectives(functools.partial(step, "clip-tiny"))


def objective_pass(function, size, width):
    with shapes_only():
        features = [torch.empty(size, width, requires_grad=True) for _ in range(2)]
        scale = torch.empty((), requires_grad=True)
        return run_pass([*features, scale], lambda: (function(*features, scale),))


def test_the_objective_is_counted_at_sizes_that_were_not_run(objectives):
    plain = objectives["plain"]
    for size in (1024, 3000):
        direct = objective_pass(step("clip-tiny").objectives["plain"], size, 48)
        assert plain.flops(size, size) == pytest.approx(direct.forward + direct.backward, rel=1e-9)
        assert plain.peak(size, size) == pytest.approx(direct.peak, rel=1e-6)


def test_the_chunked_loss_needs_less_of_both_and_its_in_place_products_count(objectives):
    width, batch = 48, 32_768
    # products of B x D x B: two forward and four backward, or one forward and three backward (losses/contrastive.py)
    assert objectives["plain"].flops(1, 1) == pytest.approx(6 * 2 * width)
    assert objectives["chunked"].flops(batch, batch) == pytest.approx(4 * 2 * width * batch**2, rel=1e-3)
    assert objectives["chunked"].peak(batch, batch) < 0.05 * objectives["plain"].peak(batch, batch)
    direct = objective_pass(chunked_contrastive_loss, 8192, width)
    assert objectives["chunked"].peak(8192, 8192) == pytest.approx(direct.peak, rel=0.15)


def test_the_first_objective_is_the_one_that_the_paper_trains_with(objectives):
    direct = objective_pass(lambda *x: clip_loss(ClipOutput(*x)), 2048, 48)
    first = next(iter(objectives.values()))
    assert first.peak(2048, 2048) == pytest.approx(direct.peak, rel=1e-6)
    assert first.flops(2048, 2048) == pytest.approx(direct.forward + direct.backward, rel=1e-9)


def test_what_ranks_send_of_a_sample_is_its_features():
    work = tiny()
    features = [x for x in work.encode(*work.batch(3)) if x.ndim]
    assert work.gathered == sum(x.nbytes for x in features) / 3 and len(features) == 2


def test_a_whole_step_needs_what_its_parts_say(a_plan):
    with shapes_only():
        work = tiny()
        free_gradients(work.model)
        batch = work.batch(64)
        whole = run_pass(standing(work, batch), lambda: (clip_loss(work.model(*batch)),), reads=work.reads)
    alone = dataclasses.replace(a_plan, gpus=1, recipe=dataclasses.replace(a_plan.recipe, batch=64))
    row = alone.row(0)
    assert row.micro == 64 and row.working == pytest.approx(whole.peak, rel=0.005)
    assert row.flops == pytest.approx(whole.forward + whole.backward, rel=0.005)


CHILD = """
import json, sys
import torch
from papers.clip.evidence.structure import step
from papers.clip.losses import clip_loss
from shared.training.optim import decay_groups

def resident(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

def train(variant, size):
    work = step(variant)
    optimizer = torch.optim.AdamW(decay_groups(work.model, 0.2), lr=1e-4, fused=True)
    batch = work.batch(size)
    for _ in range(2):  # in the second, gradients and moments stand while activations are made
        clip_loss(work.model.train()(*batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

torch.set_num_threads(2)
train("clip-tiny", 4)  # what the libraries take once
before = resident("VmRSS")
train(sys.argv[1], int(sys.argv[2]))
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's account of the process's memory")
def test_the_memory_of_a_real_training_process_is_what_was_estimated():
    """Measured over estimated: 1.003 for clip-small with a batch of 16 and for ViT-B/32 with 8, where the allocator
    returns every block at once, as here; 1.13 and 1.09 with glibc's own settings, which keep gaps."""
    command = [sys.executable, "-c", CHILD, "clip-small", "16"]
    returning = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run(command, cwd=ROOT, env=returning, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    settings = ["batch=16", "precision=32-true", "recompute=false"]
    (row,) = make_plan(CATALOG, "clip-small", zero=0, overrides=settings).rows
    assert row.working > row.states.total, "activations must be what is tested"
    assert 0.95 < int(ran.stdout) / (row.states.total + row.working) < 1.15


# ---- layout


@pytest.fixture(scope="module")
def a_plan() -> Plan:
    settings = ["batch=1024", "precision=32-true", "recompute=false"]
    return make_plan(CATALOG, "clip-tiny", gpus=16, gpu="a100", overrides=settings)


def test_zero_divides_what_it_says_it_divides():
    P, N = 1_000_000, 8
    assert states(P, P, "16-mixed", 0, N).total == 16 * P
    assert [states(P, P, "16-mixed", stage, 1).total for stage in (1, 2, 3)] == [16 * P] * 3
    assert states(P, P, "16-mixed", 1, N).total == 2 * P + 2 * P + 12 * P / N
    assert states(P, P, "16-mixed", 2, N).total == 2 * P + 14 * P / N
    large = 100 * int(LIVE)
    split = states(large, large, "16-mixed", 3, N)
    assert split.weights == pytest.approx(2 * large / N + 2 * LIVE * (1 - 1 / N))
    assert split.gradients == 2 * large / N and split.optimizer == 12 * large / N
    assert states(P, P // 2, "bf16-mixed", 0, N) == shared.tools.plan.States(4 * P, 2 * P, 4 * P), (
        "frozen weights have neither"
    )


def test_what_is_sent_is_what_rings_send():
    P, N = 1_000_000, 4
    share = (N - 1) / N
    assert all(sent(P, P, "16-mixed", stage, 1, 2, 1e9) == 0 for stage in range(4))
    assert sent(P, P, "16-mixed", 0, N, 3, 0) == share * 2 * 4 * P, "accumulated gradients travel once"
    assert sent(P, P, "16-mixed", 1, N, 3, 0) == share * 2 * 2 * P
    assert sent(P, P, "16-mixed", 2, N, 3, 0) == share * (3 + 1) * 2 * P
    assert sent(P, P, "16-mixed", 3, N, 1, 0) == 1.5 * sent(P, P, "16-mixed", 2, N, 1, 0)
    assert sent(P, P, "16-mixed", 1, N, 1, 700) - sent(P, P, "16-mixed", 1, N, 1, 0) == share * 3 * 700


def test_the_largest_micro_batch_is_the_last_that_fits(a_plan):
    small = dataclasses.replace(a_plan, gpu=dataclasses.replace(a_plan.gpu, memory=2e7))
    room = USABLE * small.gpu.memory - small.states(2).total
    largest = small.largest(2)
    assert 1 < largest < 64 and small.working(2, largest) <= room < small.working(2, largest + 1)
    row = small.row(2)
    assert row.micro <= largest and row.micro * row.parts >= 64 > row.micro * (row.parts - 1)
    assert "accumulate: each part" in text(small)


def test_a_step_takes_its_flops_at_the_stated_share_of_the_peak(a_plan):
    row = a_plan.row(0)
    assert row.compute == pytest.approx(row.flops / (19.5e12 * EFFICIENCY))
    assert row.communication == pytest.approx(row.sent / 200e9), "16 GPUs are more than a node"
    assert dataclasses.replace(a_plan, gpus=8).row(0).communication < row.communication, "within a node it is quicker"
    assert row.step == row.compute + row.communication + row.update
    alone = dataclasses.replace(a_plan, gpus=1).row(0)
    per_sample = a_plan.encoders[False, False]
    exact = 1024 * (per_sample.forward(1) + per_sample.backward(1)) + a_plan.objective.flops(1024, 1024)
    assert alone.flops == pytest.approx(exact) and 16 * row.flops == pytest.approx(exact)


def test_the_stated_efficiency_gives_the_printed_durations_of_clip():
    """Sec. 2.5: RN50x64 18 days on 592 V100, the largest ViT 12 days on 256. With gradient checkpointing: a forward
    pass, two for the backward, and the forward once more."""
    samples = 32_768 * 390_625
    for variant, gpus, printed in (("clip-vit-l-14", 256, 12), ("clip-rn50x64", 592, 18)):
        flops = 4 * forward_flops(variant) * samples
        days = flops / (gpus * GPUS["v100"].peak("16-mixed") * EFFICIENCY) / 86_400
        assert days == pytest.approx(printed, rel=0.1), variant


def test_the_text_names_every_stage_and_costs_only_with_a_price(a_plan):
    plain, priced = text(a_plan), text(a_plan, price=2.5)
    for part in ("clip-tiny on 16 x NVIDIA A100 SXM 80 GB", "batch 1,024", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3",
                 "chunked", "0.25 of the peak", "12 days on 256 V100", "fits", "left out"):  # fmt: skip
        assert part in plain, part
    assert "cost" not in plain and "2.5 a GPU-hour" in priced
    row = a_plan.rows[-1]
    hours = row.step * a_plan.recipe.steps * 16 / 3600
    last = next(line for line in priced.splitlines() if line.startswith("ZeRO-3") and span(row.step) in line)
    assert last.split()[-1] == f"{hours * 2.5:,.0f}"
    assert max(map(len, plain.splitlines())) <= 130


def test_what_does_not_fit_is_said_and_given_no_time(a_plan):
    full = text(dataclasses.replace(a_plan, gpu=dataclasses.replace(a_plan.gpu, memory=1e6)))
    assert full.count("too much") == full.count("does not fit") == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu": "h10"}, "no GPU 'h10'; did you mean 'h100'?"),
        ({"gpu": "v100", "overrides": ["precision=bf16-mixed"]}, "has no bf16 arithmetic; use precision=16-mixed"),
        ({"gpus": 0}, "--gpus is 0"),
        ({"gpus": 64, "batch": 32}, "less than a sample for each of 64 GPUs"),
        ({"efficiency": 40}, "--efficiency is 40"),
        ({"zero": 4}, "--zero is 4"),
        ({"overrides": ["stepz=3"]}, "did you mean 'steps'"),
        ({"variant": "clip-vit-l-15"}, "no variant 'clip-vit-l-15'; did you mean 'clip-vit-l-14'?"),
        ({"variant": "clap-vit-l-14"}, "no paper 'clap'; did you mean 'clip'?"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(settings, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        make_plan(CATALOG, **{"variant": "clip-tiny", **settings})


@pytest.mark.parametrize("variant", ["albef-tiny", "blip-tiny", "blip2-tiny", "blip2-tiny-small"])
def test_every_paper_is_planned_at_every_precision(variant):
    for given in ([], ["precision=bf16-mixed"], ["precision=32-true"]):
        assert make_plan(CATALOG, variant, gpus=16, gpu="a100", overrides=given).rows


def test_data_sheet_rates_are_dense_and_one_way():
    assert find_gpu("H100") is GPUS["h100"]
    for name, gpu in GPUS.items():
        assert gpu.fp32 < gpu.fp16 < 3e15 and gpu.memory < gpu.bandwidth, name
        assert gpu.between(gpu.node) == gpu.link >= gpu.between(gpu.node + 1), name


# ---- DRY=1


def test_the_estimate_counts_the_cores_that_this_process_may_use(monkeypatch):
    recipe = CATALOG.recipe("clip", "mini", [])
    monkeypatch.setattr(shared.tools.plan, "cores", lambda: 1)
    one = estimate(recipe, measure("clip-mini")["total"], forward_flops("clip-mini"), 10)
    monkeypatch.setattr(shared.tools.plan, "cores", lambda: 4)
    four = estimate(recipe, measure("clip-mini")["total"], forward_flops("clip-mini"), 10)
    assert one.processes == 1 and four.processes == 4
    assert four.seconds == one.seconds / 4 and four.memory == 4 * one.memory
    assert str(one).startswith(f"{10 * 5 * 400 * 32:,} samples")


@pytest.mark.parametrize(("scale", "rate"), [("mini", "CORE_FLOPS"), ("field", "GPU_FLOPS"), ("gpu", "GPU_FLOPS")])
def test_the_estimate_is_for_the_device_of_the_recipe(monkeypatch, scale, rate):
    monkeypatch.setattr(shared.tools.plan, "cores", lambda: 1)
    recipe = CATALOG.recipe("blip2", scale, [])
    found = estimate(recipe, 1, 1, 1)
    assert found.rate == getattr(shared.tools.plan, rate)
