"""Collects every parity comparison as a row, so that `make reproduce` reports the differences these tests measured."""

import json
from pathlib import Path

import pytest
import torch

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--rows", default=None, help="write the measured differences to this JSON file")


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_sessionfinish(session):
    path = session.config.getoption("--rows", default=None)
    if path:
        Path(path).write_text(json.dumps(session.config.stash[ROWS], indent=1))


@pytest.fixture
def agree(request):
    """agree(id, what, ours, theirs): the largest absolute difference over all pairs is at most 1e-5 (fp32)."""

    def check(id: str, what: str, ours, theirs, tolerance: float = 1e-5) -> None:
        difference = largest_difference(ours, theirs)
        row = {"id": id, "what": what, "difference": difference, "tolerance": tolerance}
        request.config.stash[ROWS].append(row)
        assert difference <= tolerance, f"{what}: differs by {difference:.3g}"

    return check


@pytest.fixture
def count(request):
    """count(id, what, found, expected): an exact number, such as the mutants that were caught."""

    def check(id: str, what: str, found: int, expected: int) -> None:
        request.config.stash[ROWS].append({"id": id, "what": what, "found": found, "expected": expected})
        assert found == expected, f"{what}: {found} of {expected}"

    return check


def largest_difference(ours, theirs) -> float:
    """Over two tensors, or two mappings of tensors with the same keys."""
    if isinstance(ours, torch.Tensor):
        ours, theirs = {"": ours}, {"": theirs}
    assert ours.keys() == theirs.keys(), f"keys differ: {sorted(ours.keys() ^ theirs.keys())[:8]}"
    for key in ours:
        assert ours[key].shape == theirs[key].shape, f"{key}: {tuple(ours[key].shape)} and {tuple(theirs[key].shape)}"
    return max(float((ours[key].detach().double() - theirs[key].detach().double()).abs().max()) for key in ours)


@pytest.fixture(scope="session")
def perturb():
    """perturb(module): move every parameter and running statistic off its initial value (gains, biases, zeros too)."""

    def move(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            statistics = [(n, b) for n, b in module.named_buffers() if "running_" in n]
            for name, tensor in [*module.named_parameters(), *statistics]:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(0.05 * (noise.abs() if "running_var" in name else noise))
        return module.eval()

    return move
