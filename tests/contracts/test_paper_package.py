"""Every paper offers what shared/core/paper_package.py declares: the same names, functions that can be called so."""

import inspect
from typing import Protocol

import pytest
from tests_common import CATALOG

from shared.core import paper_package
from shared.core.errors import UserError
from shared.core.paper_package import PaperPackage

PARTS = {
    name: getattr(paper_package, value.fget.__annotations__["return"])
    for name, value in vars(PaperPackage).items()
    if isinstance(value, property) and name != "recipe_type"
}
OPTIONAL = {"inference", "parts", "bench"}  # a paper without them is still a paper
OPTIONAL_MEMBERS = {"pretrained_parts", "export"}


def members(part: type) -> dict[str, object]:
    """{name of a function or value: the declared function, or None for a value}"""
    functions = {name: value for name, value in vars(part).items() if inspect.isfunction(value) and name[0] != "_"}
    return dict.fromkeys(part.__annotations__) | {k: v for k, v in functions.items()}


def unlike(module, part: type) -> list[str]:
    """What the module lacks of the declared part, or offers in another form."""
    wrong = []
    for name, declared in members(part).items():
        if not hasattr(module, name):
            wrong += [] if name in OPTIONAL_MEMBERS else [f"no {name}"]
            continue
        if declared is None:
            continue
        wanted = [p for p in inspect.signature(declared).parameters.values() if p.name != "self"]
        try:
            inspect.signature(getattr(module, name)).bind(
                *(p.name for p in wanted if p.kind is not inspect.Parameter.VAR_KEYWORD)
            )
        except TypeError as error:
            wrong.append(f"{name}: {error}")
    return wrong


def test_the_contract_has_parts_and_each_is_a_protocol():
    assert len(PARTS) == 11 and all(Protocol in part.__mro__ for part in PARTS.values())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CATALOG.names())
def test_every_part_of_a_paper_is_as_declared(name, part):
    package = CATALOG.package(name)
    try:
        module = getattr(package, part)
    except UserError:
        assert part in OPTIONAL, f"papers/{name} lacks {part}"
        return
    assert unlike(module, PARTS[part]) == []


def test_a_part_of_another_form_is_noticed():
    class Wrong:
        @staticmethod
        def measure():
            return {}

    assert unlike(Wrong, paper_package.Structure) == [
        "measure: too many positional arguments",
        "no forward_flops",
        "no step",
    ]


def test_a_part_that_is_missing_and_one_that_cannot_be_imported_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").touch()
    (tmp_path / "toy" / "config.py").write_text("import a_library_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"toy has no evidence/claims.py"):
        _ = PaperPackage("toy").claims
    with pytest.raises(ModuleNotFoundError, match="a_library_that_nobody_has"):
        _ = PaperPackage("toy").config
    assert not PaperPackage("toy").offers("train", "prepare")
