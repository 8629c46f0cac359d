"""Reads faults.txt: faults of the kind that spoil results in this field, one edit of a source file each, and the tests
that must fail."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    """One planted fault: in `file`, `old` becomes `new`; at least one test in the files `tests` has to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def read(text: str) -> tuple[Mutant, ...]:
    """`file < tests` begins a block, a line indented by two a fault; behind `- ` and `+ ` stands code as it is."""
    mutants: list[Mutant] = []
    file, tests = "", ()
    for line in text.splitlines():
        if line.startswith(("    - ", "    + ")):
            field, found = ("old", mutants[-1].old) if line[4] == "-" else ("new", mutants[-1].new)
            mutants[-1] = mutants[-1]._replace(**{field: f"{found}\n{line[6:]}" if found else line[6:]})
        elif line.startswith("  "):
            mutants.append(Mutant(line.strip(), file, "", "", tests))
        elif line and not line.startswith("#"):
            file, _, guards = line.partition(" < ")
            tests = tuple(f"tests/{guard}.py" for guard in guards.split())
    return tuple(mutants)


MUTANTS = read(Path(__file__).with_name("faults.txt").read_text(encoding="utf-8"))
