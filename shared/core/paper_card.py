"""A paper's reported figures as data: papers/<name>/paper.yaml read into frozen dataclasses, strictly.

A row with an unknown or missing key, a wrong type, a repeated id, no source or no tolerance is refused by name:
what a report compares with must be right before anything runs. PyYAML is all it imports: `list` and `cite` stay quick.
(pydantic would add half to their time, and its errors need as much code to become these lines as the reader has.)
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from shared.core.errors import UserError, nearest
from shared.core.strict_yaml import read_yaml

# What one unit of a structure row stands for: divide the measured count by it before comparing with `reported`.
UNITS = {"parameters": 1.0, "M parameters": 1e6, "B parameters": 1e9, "GFLOPs": 1e9, "count": 1.0}

_PRIVATE_SOURCE = re.compile(r"\bidx:|(?:^|\s)/\w")  # somebody's own index, an absolute path
_METRIC = re.compile("{0}/{0}@{0}".format("[A-Za-z0-9][A-Za-z0-9_.+-]*"))  # as shared.metrics.names spells it


@dataclass(frozen=True, kw_only=True)
class Dataset:
    name: str
    bibtex: str


@dataclass(frozen=True, kw_only=True)
class Paper:
    key: str  # the folder's name, and the first part of every row's id
    title: str
    authors: tuple[str, ...]  # "Given Family", in the printed order
    year: int
    venue: str
    arxiv: str
    code: str
    bibtex: str
    hurdle: str
    datasets: tuple[Dataset, ...]  # the evaluation sets that rows name
    base_weights: tuple[str, ...]  # pretrained weights that training starts from; empty: from scratch


@dataclass(frozen=True, kw_only=True)
class StructureRow:
    """One figure of the full-size network. `tolerance` is absolute, in `unit`; `reason` says where it comes from."""

    id: str
    variant: str
    part: str
    reported: float
    unit: str  # a key of UNITS
    tolerance: float
    reason: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ClaimRow:
    """One argument of the paper and how the small scale tests it.

    `reported` is in `unit`, the unit of the small-scale effect, or None where the paper prints nothing in it;
    `reported_as` is what the paper prints. `margin` (same unit) belongs to direction "equal"; a negative one makes of
    "greater" a claim of being no worse: the effect exceeds it.
    """

    id: str
    statement: str
    reported: float | None
    reported_as: str | None
    unit: str
    direction: Literal["greater", "equal"]
    margin: float | None
    margin_reason: str | None = None
    metric: str
    treatment: str
    baseline: str
    protocol_small: str
    scale_caveat: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Remeasured:
    """The same weights and data measured by somebody else, in percent."""

    value: float
    by: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a metrics row cannot run without: a manifest id, and an adapter with its layout."""

    weights: str
    data: str


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One printed score, in percent; `tolerance` in points. `reported` None: only `remeasured` exists."""

    id: str
    variant: str
    dataset: str
    split: str
    metric: str  # task/measure@protocol
    reported: float | None
    remeasured: Remeasured | None
    tolerance: float
    source: str
    need: Need

    @property
    def compared_with(self) -> float:
        """The printed number, without one the re-measured; load_paper refuses a row that has neither."""
        if self.reported is not None:
            return self.reported
        assert self.remeasured is not None
        return self.remeasured.value


@dataclass(frozen=True, kw_only=True)
class Pitfall:
    what: str
    where: str
    handling: str


@dataclass(frozen=True, kw_only=True)
class PaperCard:
    paper: Paper
    structure: tuple[StructureRow, ...]
    claims: tuple[ClaimRow, ...]
    metrics: tuple[MetricRow, ...]
    pitfalls: tuple[Pitfall, ...]


def load_paper(path: str | Path) -> PaperCard:
    """Read and check one paper.yaml; every fault is a UserError that names the file, the row and the key."""
    path = Path(path)
    card: PaperCard = _build(PaperCard, read_yaml(path, "paper card"), _Place(str(path)))
    _check(card, _Place(str(path)))
    return card


def bibtex(card: PaperCard) -> str:
    """The entries that a user of this paper's rows should cite: the paper first, then its evaluation sets."""
    entries = [card.paper.bibtex, *(dataset.bibtex for dataset in card.paper.datasets)]
    return "\n\n".join(entry.strip() for entry in entries) + "\n"


# ---- reading


class _Place:
    """Where in the file we are, for messages: file, section, row, key."""

    def __init__(self, text: str):
        self.text = text

    def __truediv__(self, part: str) -> _Place:
        return _Place(f"{self.text}: {part}")

    def fail(self, message: str) -> NoReturn:
        raise UserError(f"{self.text}: {message}")


def _build(kind: Any, value: Any, place: _Place) -> Any:
    """A mapping -> the dataclass `kind`: every key known, every field there and of its type."""
    if not isinstance(value, dict):
        place.fail(f"needs a mapping with the keys {', '.join(f.name for f in fields(kind))}, not {_shown(value)}")
    types_of, optional = _schema(kind)
    for key in value:
        if key not in types_of:
            place.fail(f"unknown key {key!r} ({nearest(str(key), types_of)})")
    for name in types_of:
        if name not in value and name not in optional:
            place.fail(f"missing key {name!r}")
    return kind(**{name: _convert(types_of[name], item, place / name) for name, item in value.items()})


@cache
def _schema(kind: type) -> tuple[dict[str, Any], frozenset[str]]:
    optional = (f.name for f in fields(kind) if f.default is not MISSING)
    return get_type_hints(kind), frozenset(optional)


def _convert(wanted: Any, value: Any, place: _Place) -> Any:
    origin = get_origin(wanted)
    if origin in (types.UnionType, Union):
        return None if value is None else _convert(get_args(wanted)[0], value, place)
    if origin is tuple:
        if not isinstance(value, list):
            place.fail(f"needs a list, not {_shown(value)}")
        item = get_args(wanted)[0]
        return tuple(_convert(item, v, place / _row_name(v, i)) for i, v in enumerate(value, start=1))
    if origin is Literal:
        if value not in get_args(wanted):
            place.fail(f"needs one of {', '.join(get_args(wanted))}, not {_shown(value)}")
        return value
    if is_dataclass(wanted):
        return _build(wanted, value, place)
    if wanted is str:
        if not isinstance(value, str):
            place.fail(f"needs a text, not {_shown(value)} (quote it)" if value is not None else "is empty")
        if not value.strip():
            place.fail("is empty")
        return value.strip()
    number = not isinstance(value, bool) and isinstance(value, int if wanted is int else (int, float))
    if not number or not math.isfinite(value):
        place.fail(f"needs {'a whole number' if wanted is int else 'a finite number'}, not {_shown(value)}")
    return wanted(value)


def _row_name(value: Any, index: int) -> str:
    name = value.get("id", value.get("name")) if isinstance(value, dict) else None
    return repr(name) if isinstance(name, str) else f"row {index}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


# ---- what the types do not say


def _check(card: PaperCard, file: _Place) -> None:
    first_place: dict[str, str] = {}
    for section, row in _rows(card):
        place = file / section / repr(row.id)
        if row.id in first_place:
            place.fail(f"the id is taken by a row of {first_place[row.id]}; ids are unique in a file")
        first_place[row.id] = section
        if not row.id.startswith(f"{card.paper.key}."):
            place.fail(f"the id must start with the paper's key, '{card.paper.key}.'")
        _check_source(row.source, place / "source")
    for row in card.structure:
        place = file / "structure" / repr(row.id)
        if row.unit not in UNITS:
            (place / "unit").fail(f"unknown unit {row.unit!r} ({nearest(row.unit, UNITS)})")
        if row.tolerance < 0:
            (place / "tolerance").fail(f"needs zero or more, not {row.tolerance:g}")
    for row in card.claims:
        _check_claim(row, file / "claims" / repr(row.id))
    for row in card.metrics:
        _check_metric(row, file / "metrics" / repr(row.id))
    if not card.paper.code.startswith("https://"):
        (file / "paper" / "code").fail(f"needs an https:// address, not {card.paper.code!r}")
    _check_bibtex(card.paper.bibtex, file / "paper" / "bibtex")
    for dataset in card.paper.datasets:
        _check_bibtex(dataset.bibtex, file / "paper" / "datasets" / repr(dataset.name) / "bibtex")


def _rows(card: PaperCard) -> Iterator[tuple[str, Any]]:
    for section in ("structure", "claims", "metrics"):
        for row in getattr(card, section):
            yield section, row


def _check_source(source: str, place: _Place) -> None:
    if _PRIVATE_SOURCE.search(source):
        place.fail(f"{source!r} is not something a reader can look up; name the table, section or file")


def _check_claim(row: ClaimRow, place: _Place) -> None:
    if row.reported is not None and row.reported_as is None:
        (place / "reported_as").fail("is empty, but `reported` is a number: say what the paper prints")
    if row.direction == "greater" and row.margin is not None and row.margin >= 0:
        (place / "margin").fail("of direction 'greater' is null, or negative where the claim is to be no worse")
    if row.direction == "equal" and (row.margin is None or row.margin <= 0):
        (place / "margin").fail(f"direction 'equal' needs a margin above zero, in {row.unit}")
    if row.margin is not None and row.margin_reason is None:
        (place / "margin_reason").fail("is empty; say why effects within the margin do not count")
    if row.margin is None and row.margin_reason is not None:
        (place / "margin_reason").fail("gives a reason for no margin; set it to null")


def _check_metric(row: MetricRow, place: _Place) -> None:
    if row.reported is None and row.remeasured is None:
        (place / "reported").fail("is empty, and so is 'remeasured': the row has nothing to compare with")
    if row.tolerance <= 0:
        (place / "tolerance").fail(f"needs a number of points above zero, not {row.tolerance:g}")
    if not _METRIC.fullmatch(row.metric):
        (place / "metric").fail(f"{row.metric!r} does not name its protocol; write task/measure@protocol")
    if row.remeasured is not None:
        _check_source(row.remeasured.source, place / "remeasured" / "source")


def _check_bibtex(entry: str, place: _Place) -> None:
    if not entry.startswith("@") or entry.count("{") != entry.count("}"):
        place.fail("needs one BibTeX entry, from '@' to its closing brace")
