"""What `report --keep` takes for evidence: committed code and recipe, and nothing of where the data lay; and its
verdicts, taken anew."""

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.metrics.stats import Rule, verdict, verdict_of_interval
from shared.report.evidence_table import judge_results, keep_result


def a_report(folder, **changed):
    found = {
        "paper": "toy", "scale": "field", "dirty": False, "commit": "abc", "data": {"name": "karpathy"},
        "recipe": "data_root: /home/someone/set\n",
        "rows": [{"rung": "metrics", "need": "files in /home/someone/set/coco, PATH/other"}],
    }  # fmt: skip
    found["command"] = 'make reproduce PAPER=toy SCALE=field ARGS="data_root=/home/someone/set"'
    path = folder / "report.json"
    path.write_text(json.dumps(found | changed))
    return path


def kept(folder, **changed):
    return keep_result(Catalog(folder / "papers", "papers"), a_report(folder, **changed))


def test_where_the_data_lay_is_left_out_and_all_else_stays(tmp_path):
    path = kept(tmp_path)
    assert path == tmp_path / "results" / "toy" / "field-karpathy.json"
    found = json.loads(path.read_text())
    assert "someone" not in path.read_text()
    assert found["command"].endswith('ARGS="data_root=PATH"') and found["recipe"] == "data_root: PATH\n"
    assert found["rows"] == [{"rung": "metrics", "need": "files in PATH/coco, PATH/other"}] and found["paper"] == "toy"


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


def test_evidence_of_fewer_rungs_does_not_take_the_place_of_more(tmp_path):
    path = kept(tmp_path, rows=[{"rung": "claims"}, {"rung": "metrics"}])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"also has metrics; climb these too"):
        kept(tmp_path, rows=[{"rung": "claims"}, {"rung": "structure"}])
    assert path.read_bytes() == before
    kept(tmp_path, rows=[{"rung": "claims"}, {"rung": "metrics"}, {"rung": "structure"}])
    assert path.read_bytes() != before


# ---- verdicts by a rule that has changed


def test_a_verdict_from_the_stored_interval_is_that_of_the_effects():
    draw = random.Random(0)
    words = Counter()
    for seeds in (2, 3, 5, 9):
        for _ in range(300):
            effects = [draw.gauss(draw.choice((0, 2, -2)), 1.0) for _ in range(seeds)]
            for rule in (Rule(), Rule("greater", -1.0), Rule("equal", 3.0)):
                found = verdict(effects, rule)
                assert verdict_of_interval(found.mean, found.low, found.high, seeds, rule) == found.word
                words[found.word] += 1
    assert min(words.values()) > 20 and len(words) == 3
    for seeds in (6, 7):
        found = verdict([0.25] * seeds, Rule())
        assert verdict_of_interval(found.mean, found.low, found.high, seeds, Rule()) == found.word


def test_kept_verdicts_are_taken_anew_once_and_the_file_says_so(tmp_path, monkeypatch):
    rows = [
        {"id": "toy.thin", "rung": "claims", "what": "thin", "reproduced": 1.0, "low": 0.1, "high": 1.9, "seeds": 5},
        {"id": "toy.clear", "rung": "claims", "what": "clear", "reproduced": 1.0, "low": 0.9, "high": 1.1, "seeds": 5},
        {"id": "toy.none", "rung": "claims", "what": "none", "reproduced": None, "low": None, "high": None, "seeds": 5},
    ]
    path = tmp_path / "results" / "toy" / "mini-emoji.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"data": {"name": "emoji"}, "rows": [row | {"verdict": "reproduced"} for row in rows]}))
    claims = [SimpleNamespace(id=row["id"], direction="greater", margin=None) for row in rows]
    catalog = Catalog(tmp_path / "papers", "papers")
    monkeypatch.setattr(Catalog, "card", lambda self, name: SimpleNamespace(claims=claims))
    assert judge_results(catalog, "toy") == [path]
    found = json.loads(path.read_text())
    assert [row["verdict"] for row in found["rows"]] == ["inconclusive", "reproduced", "reproduced"]
    assert found["rows"][0]["what"] == "thin [reproduced by the rule of its day]"
    assert len(found["data"]["run"]) == 1 and judge_results(catalog, "toy") == []
