"""Batches follow from (seed, step) alone; the schedule, the decay groups and the callbacks do what their names say."""

import json

import pytest
import torch

from papers.clip.evidence import claims
from papers.clip.module import example
from papers.clip.recipe import ClipRecipe
from shared.core.device import device_for
from shared.core.recipe import digest, training_fields
from shared.data.loader import Batches, IndexedTensor
from shared.experiments.ablations import Job, Outcome
from shared.training.callbacks import EvalAtSteps, MetricRecorder
from shared.training.optim import decay_groups, optimizer_with_schedule, warmup_cosine, warmup_cosine_between
from shared.training.simple import fit_simple
from shared.training.trainer import make_trainer


def test_every_epoch_shows_every_row_once_in_a_new_order():
    batches = Batches((torch.arange(12),), batch=4, steps=6, seed=1)
    shown = torch.cat([batches[step][0] for step in range(6)])
    assert sorted(shown[:12].tolist()) == sorted(shown[12:].tolist()) == list(range(12))
    assert shown[:12].tolist() != shown[12:].tolist()


def test_a_batch_does_not_depend_on_what_was_read_before():
    first, second = (Batches((torch.arange(50),), batch=8, steps=30, seed=3) for _ in range(2))
    for step in range(30):
        first[step]
    assert torch.equal(first[17][0], second[17][0])


def test_rows_that_are_gathered_batch_by_batch_give_what_all_of_them_would():
    pictures, rows = torch.randn(5, 3), torch.randint(5, (12,))
    lazy, whole = (Batches((seen, rows), 4, 6, seed=1) for seen in (IndexedTensor(pictures, rows), pictures[rows]))
    for step in range(6):
        assert all(torch.equal(a, b) for a, b in zip(lazy[step], whole[step], strict=True))


def test_ranks_share_the_global_batch_without_overlap():
    whole = Batches((torch.arange(40),), 8, 5, seed=0)[2][0]
    parts = [Batches((torch.arange(40),), 8, 5, seed=0, rank=rank, ranks=2)[2][0] for rank in range(2)]
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist()) and len(parts[0]) == 4


@pytest.mark.parametrize(("rows", "batch", "ranks"), [(3, 4, 1), (8, 3, 2)])
def test_a_batch_that_cannot_be_filled_or_shared_is_refused(rows, batch, ranks):
    with pytest.raises(ValueError, match=r"do(es)? not"):
        Batches((torch.arange(rows),), batch, 1, 0, ranks=ranks)


@pytest.mark.parametrize(("there", "wanted"), [(True, ["cuda", "cuda", "cpu"]), (False, ["cpu"] * 3)])
def test_a_gpu_is_measured_on_where_there_is_one_and_the_recipe_lets_it(monkeypatch, there, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert [device_for(ClipRecipe(accelerator=name)).type for name in ("auto", "cuda", "cpu")] == wanted


def test_warm_up_rises_to_the_peak_and_the_cosine_falls_to_zero():
    recipe = ClipRecipe(steps=100, warmup_steps=10)
    shares = [warmup_cosine(step, recipe) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == shares[10] == 1.0
    assert shares[55] == pytest.approx(0.5) and shares[100] == pytest.approx(0.0, abs=1e-9)


def test_a_warm_up_begins_and_a_cosine_ends_where_told():
    recipe = ClipRecipe(steps=100, warmup_steps=10, learning_rate=1e-3)
    shares = [warmup_cosine_between(step, recipe, 2e-4, 1e-4) for step in range(101)]
    assert shares[0] == pytest.approx(0.2 + 0.8 * 0.1) and shares[9] == shares[10] == 1.0
    assert shares[55] == pytest.approx((1 + 0.1) / 2) and shares[100] == pytest.approx(0.1)
    plain = [warmup_cosine(step, recipe) for step in range(101)]
    assert [warmup_cosine_between(step, recipe, 0.0, 0.0) for step in range(101)] == plain


def test_the_optimizer_follows_the_recipes_schedule_and_groups_keep_their_own_decay():
    module, _ = example(2)
    recipe = ClipRecipe(steps=100, warmup_steps=10, learning_rate=1e-3, beta1=0.8, beta2=0.95, eps=1e-5)
    configured = optimizer_with_schedule(decay_groups(module, 0.3), recipe, 2e-4, 1e-4)
    optimizer, [share, _] = configured["optimizer"], configured["lr_scheduler"]["scheduler"].lr_lambdas
    assert [share(step) for step in range(101)] == [warmup_cosine_between(s, recipe, 2e-4, 1e-4) for s in range(101)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all((group["betas"], group["eps"]) == ((0.8, 0.95), 1e-5) for group in optimizer.param_groups)
    plain = optimizer_with_schedule(module.parameters(), recipe)["optimizer"]
    assert plain.param_groups[0]["weight_decay"] == recipe.weight_decay


@pytest.mark.parametrize("share", [None, lambda step: 1 - step / 40])
def test_the_small_loop_lowers_its_loss_and_ends_at_no_learning_rate(share):
    weight, steps = torch.nn.Parameter(torch.tensor([3.0, -2.0])), []

    def loss(step):
        steps.append((step, weight.detach().clone()))
        return weight.square().sum()

    losses = fit_simple(loss, [weight], 40, 0.2, betas=(0.9, 0.98), weight_decay=0.0, share=share)
    assert [step for step, _ in steps] == list(range(40)) and losses[0] == 13.0 and losses[-1] < 0.5
    assert (weight.detach() - steps[-1][1]).abs().max() < 0.1 * (steps[20][1] - steps[0][1]).abs().max()


def test_gains_biases_and_the_logit_scale_do_not_decay():
    module, _ = example(2)
    decayed, free = decay_groups(module, 0.2)
    assert decayed["weight_decay"] == 0.2 and free["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert any(p is module.model.logit_scale for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(module.parameters()))


def test_a_run_logs_its_curve_measures_where_asked_and_counts_samples(tmp_path):
    module, batch = example(16)
    recipe = ClipRecipe(model="clip-tiny", steps=6, batch=8, pairs=16, accelerator="cpu")
    module.recipe, counted = recipe, []
    module.model.logit_scale.data.fill_(9.0)
    curves = MetricRecorder(8, counted.append, every=2)
    at = EvalAtSteps([3, 6], 8, lambda: module.training)
    make_trainer(recipe, tmp_path, [curves, at]).fit(module, Batches(batch, 8, 6, 0).loader())
    assert at.values == [(24, False), (48, False)] and sum(counted) == 48
    assert [x for x, _ in curves.values["loss"]] == [16, 32, 48]
    assert float(module.model.logit_scale.detach().exp()) <= 100.01, "the cap is applied after every optimizer step"


def test_the_compile_switch_compiles_the_model(monkeypatch):
    module, _ = example(2)
    compiled = []
    monkeypatch.setattr(type(module.model), "compile", lambda self: compiled.append(self))
    module.configure_model()
    module.recipe.compile = True
    module.configure_model()
    assert compiled == [module.model]


def job(tmp_path, **changes):
    return Job("papers.clip", ClipRecipe(paper="clip", **changes), "contrastive", 7, tmp_path, False)


def test_a_finished_arm_is_taken_as_it_is_but_only_for_the_same_recipe(tmp_path):
    one = job(tmp_path)
    assert one.finished() is None
    outcome = {"arm": "contrastive", "seed": 7, "seconds": 1.0, "measured": {"x": 2.0}}
    one.file.write_text(json.dumps({"recipe": digest(training_fields(one.recipe)), "outcome": outcome}))
    assert one.finished() == Outcome("contrastive", 7, 1.0, {"x": 2.0})
    assert job(tmp_path, steps=99).finished() is None


def test_the_arms_of_a_seed_start_from_the_same_random_state_and_another_seed_from_its_own(tmp_path, monkeypatch):
    """Effects are paired by seed: what one seed draws must not depend on the arm."""

    def draws(context):
        return {"draw": torch.rand(3).tolist()}

    monkeypatch.setattr(claims, "ARMS", {"one": draws, "the_other_arm": draws})

    def drawn(arm, seed):
        recipe = ClipRecipe(paper="clip")
        return Job("papers.clip", recipe, arm, seed, tmp_path / f"{arm}-{seed}", False).run(print).measured["draw"]

    assert drawn("one", 7) == drawn("the_other_arm", 7) != drawn("one", 8)
