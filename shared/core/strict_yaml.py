"""YAML from strangers: manifests, recipes and cards, read strictly. Nothing in a file can call code, grow on reading or
be said twice; a fault is one line with the file and the line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from shared.core.errors import UserError

LARGEST = 1 << 20  # bytes of one file
DEEPEST = 50  # mappings and lists inside each other
_SAFE = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"[-+.:_0-9a-fA-FxXoO]{101,}")  # YAML 1.1 reads 1:1:1... in time quadratic in its length


class _StrictLoader(_SAFE):  # type: ignore[misc, valid-type]
    """YAML keeps the last of two equal keys in silence; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> object:
    """The one document of a YAML file as plain types (None for an empty file).

    `what` names the kind of file in an error: 'manifest', 'paper card'. UserError for a file that is absent, larger
    than LARGEST or not UTF-8, for faulty YAML, a repeated key, an anchor or alias, a tag, and nesting below DEEPEST.
    """
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            content = stream.read(LARGEST + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: cannot be read: no such {what}; name an existing one") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a {what} ({error.strerror}); name a file that can") from None
    if len(content) > LARGEST:
        raise UserError(f"{path}: larger than {LARGEST:,} bytes, which no {what} is; name another file")
    try:
        text = content.decode("utf-8")
        _scan(text)
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:  # a date or a number that does not exist
        raise _fault(path, error) from None


def _scan(text: str) -> None:
    """Refuse, from the events alone, what would cost more to build than to read. An alias may stand for a whole tree,
    and ten lines of aliases for a billion of them."""
    depth = 0
    for event in yaml.parse(text, Loader=_SAFE):
        problem = None
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            problem = f"anchors and aliases (&{event.anchor}, *{event.anchor}) are not taken: write the value out"
        elif getattr(event, "tag", None):
            problem = f"tags ({event.tag}) are not taken: write the plain value"
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                problem = f"nested more than {DEEPEST} deep"
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _NUMBER.fullmatch(event.value):
            problem = f"a number of {len(event.value):,} characters"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _fault(path: Path, error: Exception) -> UserError:
    mark = getattr(error, "problem_mark", None)
    place = f" line {mark.line + 1}:" if mark else ""
    said = " ".join(str(getattr(error, "problem", None) or error).split())
    said = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in said[:300])  # the file's own words: any sign
    return UserError(f"{path}:{place} not valid YAML: {said}")
