"""What `report --keep` takes for evidence: committed code and recipe, and nothing of where the data lay."""

import json

import pytest

from shared.catalogue import Catalogue
from shared.errors import UserError
from shared.tables import keep_result


def a_report(folder, **changed):
    found = {
        "paper": "toy", "scale": "field", "dirty": False, "commit": "abc", "data": {"name": "karpathy"},
        "recipe": "data_root: /home/someone/set\n", "rows": [{"need": "files in /home/someone/set/coco, PATH/other"}],
    }  # fmt: skip
    found["command"] = 'make reproduce PAPER=toy SCALE=field ARGS="data_root=/home/someone/set"'
    path = folder / "report.json"
    path.write_text(json.dumps(found | changed))
    return path


def kept(folder, **changed):
    return keep_result(Catalogue(folder / "papers", "papers"), a_report(folder, **changed))


def test_where_the_data_lay_is_left_out_and_all_else_stays(tmp_path):
    path = kept(tmp_path)
    assert path == tmp_path / "results" / "toy" / "field-karpathy.json"
    found = json.loads(path.read_text())
    assert "someone" not in path.read_text()
    assert found["command"].endswith('ARGS="data_root=PATH"') and found["recipe"] == "data_root: PATH\n"
    assert found["rows"] == [{"need": "files in PATH/coco, PATH/other"}] and found["paper"] == "toy"


def test_without_such_a_place_the_file_is_the_report(tmp_path):
    command = "make reproduce PAPER=toy SCALE=field"
    assert kept(tmp_path, command=command).read_bytes() == (tmp_path / "report.json").read_bytes()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"dirty": True}, "uncommitted changes"),
        ({"commit": ""}, "uncommitted changes"),
        ({"scale": "smoke"}, "smoke proves only that it runs"),
        ({"command": 'make reproduce PAPER=toy ARGS="steps=3"'}, r"a changed recipe \(steps\)"),
    ],
)
def test_what_nobody_could_repeat_is_not_kept(tmp_path, changed, told):
    with pytest.raises(UserError, match=told):
        kept(tmp_path, **changed)
    assert not (tmp_path / "results").exists()
