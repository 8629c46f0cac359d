"""What holds for every paper, found by listing the folder: a ninth paper is tested without a line here being edited."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tests_common import CATALOG, ROOT

from shared.core.errors import UserError
from shared.tools.plan import dry_run

PAPERS = CATALOG.names()
CONTRASTIVE = {"clip", "albef", "blip", "blip2"}  # trained by pairs against other pairs
pytestmark = pytest.mark.parametrize("name", PAPERS)


def example(name, pictures):
    torch.manual_seed(0)
    return CATALOG.package(name).module.example(pictures)


def loss_of(module, batch):
    module.log = lambda *args, **kwargs: None  # there is no trainer to log to
    return module.training_step(batch, 0)


def test_the_package_imports_alone_and_without_lightning_or_transformers(name):
    code = (
        f"import sys, papers.{name}; sys.exit(any(m in sys.modules for m in ('lightning', 'transformers', 'mlflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_tiny_step_gives_every_trained_parameter_a_finite_gradient(name):
    module, batch = example(name, 5)
    loss_of(module, batch).backward()
    trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
    assert [k for k, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_batch_of_one_is_refused_where_it_would_need_negatives_and_runs_elsewhere(name):
    module, batch = example(name, 1)
    try:
        loss = loss_of(module, batch)
    except UserError as error:
        assert str(error) == "matching: a batch of one pair has no negatives; raise batch"
    else:
        assert loss.ndim == 0 and loss.isfinite()


@pytest.mark.parametrize("parts", [{"batch": 1}, {"batch": 8, "accumulate": 8}], ids=str)
def test_a_recipe_that_leaves_pairs_alone_is_refused(name, parts):
    if name not in CONTRASTIVE:
        pytest.skip("its pairs learn alone")
    module, _ = example(name, 4)
    with pytest.raises(UserError, match="leaves a pair alone, without negatives"):
        type(module)(module.model, replace(module.recipe, **parts))


def test_one_batch_can_be_learned_by_heart(name):
    module, batch = example(name, 8)
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    losses = []
    for _ in range(60):
        loss = loss_of(module, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}"


def test_bf16_autocast_on_cpu_stays_close_to_fp32(name):
    module, batch = example(name, 5)
    plain = loss_of(module, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss_of(module, batch)
    assert float(half) == pytest.approx(float(plain), rel=0.03) and float(half) != float(plain)


def test_every_recipe_parses_against_the_real_schema_and_can_be_planned(name):
    paths = sorted((ROOT / "recipes" / name).glob("*.yaml"))
    assert {path.stem for path in paths} >= {"smoke", "mini", "gpu", "paper"}
    for path in paths:
        assert "would be downloaded" in dry_run(CATALOG, CATALOG.recipe(name, path.stem, []))


def test_every_claim_of_the_card_has_an_effect_and_every_effect_its_row(name):
    claims = CATALOG.package(name).claims
    assert set(claims.CLAIMS) == {row.id for row in CATALOG.card(name).claims}
    for id, claim in claims.CLAIMS.items():
        assert set(claim.arms) <= set(claims.ARMS), id


def test_every_structure_row_is_measured(name):
    measure = CATALOG.package(name).structure.measure
    rows = CATALOG.card(name).structure
    variant = rows[0].variant
    measured = measure(variant)
    assert [row.part for row in rows if row.variant == variant and row.part not in measured] == []
    shown = {row.part for row in rows}  # counting FLOPs takes seconds: what no row shows is left to forward_flops
    assert {part for part in measured if "flops" in part} <= shown
    assert CATALOG.package(name).structure.forward_flops(variant) > 0
