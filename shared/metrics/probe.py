"""Linear probe of frozen features, CLIP App. A.3: logistic regression by L-BFGS, at most 1000 iterations, no
augmentation; the L2 strength is sought on a validation split, then the fit is redone on train and validation together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.core.errors import UserError

# CLIP's grid: 1e-6 to 1e6 in 96 logarithmic steps, 8 to a decade; its search starts at every second decade.
_GRID = [10 ** (-6 + step / 8) for step in range(97)]
_COARSE = 16


@dataclass(frozen=True)
class Probe:
    """`accuracy` in 0..1 on the test split; `strength` is lambda (scikit-learn's C is 1 / lambda)."""

    accuracy: float
    strength: float
    predictions: Tensor  # (N,)
    validation: dict[float, float]  # strength -> validation accuracy, every one that was tried
    converged: bool


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    val_x: Tensor | None = None,
    val_y: Tensor | None = None,
    strengths: Sequence[float] | None = None,
    max_iter: int = 1000,
    seed: int = 0,
) -> Probe:
    """Features (N, D) and integer labels (N,), taken as they are (CLIP neither normalises nor scales them).

    Without a validation split a fifth of train is held out, by class. `strengths` tries exactly those values of lambda
    instead of CLIP's search (15 fits); a single one needs no validation split.
    """
    if (val_x is None) != (val_y is None):
        raise UserError("linear probe: only one of val_x and val_y is given, give both or neither")
    for name, labels in (("train", train_y), ("validation", val_y), ("test", test_y)):
        if labels is not None and len(labels) == 0:
            raise UserError(f"linear probe: the {name} split is empty")
    if strengths is not None and (not strengths or any(not (math.isfinite(s) and s > 0) for s in strengths)):
        raise UserError(f"linear probe: strengths are {list(strengths)}, give one or more positive numbers")

    all_x, all_y = train_x, train_y
    if val_x is not None and val_y is not None:
        all_x, all_y = torch.cat([train_x, val_x]), torch.cat([train_y, val_y])
    tried: dict[float, float] = {}
    if strengths is not None and len(strengths) == 1:
        best = strengths[0]
    else:
        if val_x is None or val_y is None:
            train, val = _holdout(train_y, seed)
            train_x, train_y, val_x, val_y = train_x[train], train_y[train], train_x[val], train_y[val]
        known_x, known_y = _array(val_x), val_y.cpu().numpy()

        def score(strength: float) -> float:
            if strength not in tried:
                model, _ = _fit(train_x, train_y, strength, max_iter)
                tried[strength] = float(model.score(known_x, known_y))
            return tried[strength]

        # of equals the strongest
        best = max(sorted(strengths, reverse=True), key=score) if strengths is not None else _coarse_to_fine(score)
    model, converged = _fit(all_x, all_y, best, max_iter)
    predictions = torch.from_numpy(model.predict(_array(test_x)))
    accuracy = (predictions == test_y.cpu()).double().mean().item()
    return Probe(accuracy, best, predictions, tried, converged)


def few_shot(labels: Tensor, k: int, seed: int) -> Tensor:
    """Indices of `k` examples of every class, in the order of `labels`; the choice for k is part of that for k + 1."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten().cpu()
        if not 0 < k <= len(members):
            raise UserError(f"few-shot: class {label} has {len(members)} examples, {k} were asked for")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:k]])
    return torch.cat(chosen).sort().values


def _coarse_to_fine(score: Callable[[float], float]) -> float:
    """App. A.3: every second decade, then halve the step around the peak down to 8 steps a decade."""
    step = _COARSE
    peak = max(range(len(_GRID) - 1, -1, -step), key=lambda place: score(_GRID[place]))
    while step := step // 2:
        near = [place for place in (peak, peak + step, peak - step) if 0 <= place < len(_GRID)]
        peak = max(near, key=lambda place: score(_GRID[place]))  # of equals the present peak
    return _GRID[peak]


def _fit(x: Tensor, y: Tensor, strength: float, max_iter: int):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by `converged`
        model = LogisticRegression(C=1 / strength, solver="lbfgs", max_iter=max_iter)
        model.fit(_array(x), y.cpu().numpy())
    return model, bool((model.n_iter_ < max_iter).all())


def _holdout(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A fifth of every class, at least one, for validation."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten().cpu()
        if len(members) < 2:
            raise UserError(f"linear probe: class {label} has one training example, so give val_x and val_y")
        held[members[torch.randperm(len(members), generator=generator)[: max(1, len(members) // 5)]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _array(x: Tensor):
    return x.detach().float().cpu().numpy()
