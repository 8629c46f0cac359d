"""Published weights in, ours out, and back: weight maps as data, total and strict. Files are read without running any
code of theirs: safetensors, torch archives with weights_only, and TorchScript archives (the form of OpenAI's CLIP)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.core.errors import UserError
from shared.core.text import shown
from shared.nn.positions import resample_square


@dataclass(frozen=True)
class Rule:
    """Our key, and what happens on the way, in both directions: `transpose` swaps the two dimensions of a matrix;
    the published tensor has `lead` axes of size one before ours; `without_keys`: the published bias is [q; k; v] with
    zeros on the keys, where one changes nothing, and ours [q; v]."""

    key: str
    transpose: bool = False
    lead: int = 0
    without_keys: bool = False


# published key, or a tuple of them (concatenated along dim 0) -> our key | Rule | None (dropped where present).
# `{}` stands for a layer number, the same numbers in the same order on both sides.
WeightMap = Mapping["str | tuple[str, ...]", "str | Rule | None"]


def to_ours(
    published: Mapping[str, Tensor],
    weight_map: WeightMap,
    expected: Mapping[str, Iterable[int]] | None = None,
) -> dict[str, Tensor]:
    """Published tensors under our names.

    `expected` is {our key: shape}; without it every row of the map has to be used. Every published key that no row
    names, every key that is missing on either side, and every other shape is listed in one UserError.
    """
    used: set[str] = set()
    ours: dict[str, Tensor] = {}
    missing: list[str] = []
    for sources, rule in _rows(weight_map):
        matches = [_matches(source, published) for source in sources]
        for numbers in sorted({n for found in matches for n in found}):
            keys = [found.get(numbers) for found in matches]
            for key in filter(None, keys):
                if key in used:
                    raise UserError(f"weight map: two rows name '{key}'; keep one")
                used.add(key)
            if rule is None:
                continue
            if None in keys:
                missing += [_fill(s, numbers) for s, key in zip(sources, keys, strict=True) if key is None]
                continue
            target = _fill(rule.key, numbers)
            if target in ours:
                raise UserError(f"weight map: two rows give '{target}'; keep one")
            parts = [_inwards(published[key], rule, key) for key in keys if key is not None]
            ours[target] = parts[0] if len(parts) == 1 else torch.cat(parts)
        if rule is not None and expected is None and not any(matches):
            missing += sources
    problems = [("published keys without a row in the map", [k for k in published if k not in used])]
    problems.append(("published keys missing", missing))
    if expected is not None:
        problems += _differences(ours, expected)
    _refuse("weights do not fit the map", problems)
    return ours


def to_published(ours: Mapping[str, Tensor], weight_map: WeightMap) -> dict[str, Tensor]:
    """Our tensors under the published names: the reverse of `to_ours`, as total and as strict (rows of None are not
    produced). A fused tensor is split into equal parts along dim 0."""
    used: set[str] = set()
    published: dict[str, Tensor] = {}
    missing: list[str] = []
    for sources, rule in _rows(weight_map):
        if rule is None:
            continue
        found = _matches(rule.key, ours)
        missing += [] if found else [rule.key]
        for numbers, key in found.items():
            if key in used:
                raise UserError(f"weight map: two rows take '{key}'; keep one")
            used.add(key)
            rows, count = ours[key].shape[0] if ours[key].ndim else 0, len(sources)
            if count > 1 and (rows == 0 or rows % count):
                raise UserError(f"{key}: {tuple(ours[key].shape)} does not split into {count} equal parts along dim 0")
            parts = ours[key].split(rows // count) if count > 1 else [ours[key]]
            for source, part in zip(sources, parts, strict=True):
                published[_fill(source, numbers)] = _outwards(part, rule, key)
    problems = [
        ("our keys without a row in the map", [k for k in ours if k not in used]),
        ("our keys missing", missing),
    ]
    _refuse("weights do not fit the map", problems)
    return published


def resample_plainly(table: Tensor, like: Tensor) -> Tensor:
    """Positions on another grid without anti-aliasing, as the official code of ALBEF and BLIP does (models/vit.py)."""
    return resample_square(table, like, antialias=False)


def carried_to(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    resample: Callable[[Tensor, Tensor], Tensor] = resample_plainly,
) -> dict[str, Tensor]:
    """Tensors under our names that fit `expected`, a state dict: positions for another picture size are interpolated.
    UserError: other names or shapes."""
    fitting = dict(tensors)
    for key, table in tensors.items():
        if key.endswith("positions.position") and key in expected:
            fitting[key] = resample(table, expected[key])
    return to_ours(fitting, {key: key for key in fitting}, {key: tensor.shape for key, tensor in expected.items()})


def _rows(weight_map: WeightMap) -> list[tuple[tuple[str, ...], Rule | None]]:
    """The map in one form. A row whose sides disagree on their layer numbers could not be reversed."""
    rows = []
    for sources, rule in weight_map.items():
        sources = (sources,) if isinstance(sources, str) else tuple(sources)
        rule = Rule(rule) if isinstance(rule, str) else rule
        counts = {key.count("{}") for key in (*sources, *([rule.key] if rule else []))}
        if len(counts) != 1:
            raise UserError(f"weight map: {sources} and '{rule.key if rule else None}' differ in their number of {{}}")
        rows.append((sources, rule))
    return rows


def _matches(pattern: str, keys: Iterable[str]) -> dict[tuple[int, ...], str]:
    """{layer numbers: key} of all keys that the pattern names."""
    if "{}" not in pattern:
        return {(): pattern} if pattern in keys else {}
    compiled = re.compile("(0|[1-9][0-9]*)".join(map(re.escape, pattern.split("{}"))))
    hits = ((compiled.fullmatch(key), key) for key in keys)
    return {tuple(map(int, hit.groups())): key for hit, key in hits if hit}


def _fill(pattern: str, numbers: tuple[int, ...]) -> str:
    return pattern.format(*numbers)


def _inwards(tensor: Tensor, rule: Rule, key: str) -> Tensor:
    if rule.without_keys and len(tensor) % 3 == 0:  # else its shape says that it does not fit
        of_q, _, of_v = tensor.chunk(3)
        tensor = torch.cat([of_q, of_v])
    return _transposed(_without_lead(tensor, rule, key), rule, key)


def _outwards(tensor: Tensor, rule: Rule, key: str) -> Tensor:
    if rule.without_keys:
        of_q, of_v = tensor.chunk(2)
        tensor = torch.cat([of_q, torch.zeros_like(of_q), of_v])
    return _transposed(tensor, rule, key)[(None,) * rule.lead]


def _transposed(tensor: Tensor, rule: Rule, key: str) -> Tensor:
    if not rule.transpose:
        return tensor
    if tensor.ndim != 2:
        raise UserError(f"{key}: transpose is for matrices, this has shape {tuple(tensor.shape)}; correct the map")
    return tensor.T.contiguous()


def _without_lead(tensor: Tensor, rule: Rule, key: str) -> Tensor:
    if set(tensor.shape[: rule.lead]) - {1} or tensor.ndim < rule.lead:
        raise UserError(
            f"{key}: {tuple(tensor.shape)} does not begin with {rule.lead} axes of size one; correct the map"
        )
    return tensor.reshape(tensor.shape[rule.lead :])


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Iterable[int]]) -> list[tuple[str, list[str]]]:
    shapes = {key: tuple(shape) for key, shape in expected.items()}
    other = [
        f"{key} {tuple(tensor.shape)} for {shapes[key]}"
        for key, tensor in found.items()
        if key in shapes and tuple(tensor.shape) != shapes[key]
    ]
    return [
        ("keys that the model lacks", [k for k in found if k not in shapes]),
        ("keys of the model without a weight", [k for k in shapes if k not in found]),
        ("other shapes", other),
    ]


def _refuse(what: str, problems: list[tuple[str, list[str]]]) -> None:
    message = "; ".join(f"{name}: {_listed(keys)}" for name, keys in problems if keys)
    if message:
        raise UserError(f"{what}: {message}")


def _listed(keys: list[str], show: int = 8) -> str:
    more = f", ... ({len(keys)} in all)" if len(keys) > show else ""
    return ", ".join(shown(key) for key in keys[:show]) + more
