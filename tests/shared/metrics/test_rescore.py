"""One file under several protocols: the numbers, how far apart, which samples; and a clear line for every bad file."""

import json
import re

import pytest
from tests_common import ROOT

from shared.cli import main
from shared.core.errors import UserError
from shared.metrics import caption_scores, vqa_accuracy
from shared.metrics.rescore import MOST, protocols, read_predictions, rescore

ANSWERS = [["stop"] * 10, ["stop"] * 10, ["red"] * 9 + ["dark red"], ["two"] * 5 + ["2"] * 5]
SAID = ["stop", "Stop.", "Red.", "two"]


@pytest.fixture
def write(tmp_path):
    def write(*records, name="predictions.jsonl"):
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def record(id, prediction, references):
    return {"id": id, "prediction": prediction, "references": references}


def vqa_file(write):
    return write(*(record(i, said, right) for i, (said, right) in enumerate(zip(SAID, ANSWERS, strict=True))))


def test_the_report_gives_each_score_the_gap_and_the_samples_that_make_it(write):
    text = rescore(vqa_file(write), ["vqa/acc@official", "vqa/acc@always", "vqa/acc@exact"])
    # official: 1, 0 (ten equal answers, a period), 1 ("Red." normalised), 1; always: 1 each; exact: 1, 0, 0, 1
    assert "4 samples, scores x 100" in text
    assert re.search(r"vqa/acc@official \| +75\.00\n", text) and re.search(r"vqa/acc@always +\| 100\.00\n", text)
    assert "vqa/acc: scoring alone moves the number by 50.00, from 50.00 (vqa/acc@exact) to 100.00" in text
    assert "2 of 4 samples differ; the most:" in text
    assert 'id 1: official 0.0, always 100.0, exact 0.0; "Stop." for "stop" (+9)' in text
    assert 'id 2: official 100.0, always 100.0, exact 0.0; "Red." for "red" (+9)' in text


def test_the_scores_are_those_of_the_metrics(write):
    captions = ["A dog runs.", "two cats", ""]
    references = [["a dog is running", "a dog runs"], ["two cats sleep"], ["a red bird"]]
    path = write(*(record(f"x{i}", *pair) for i, pair in enumerate(zip(captions, references, strict=True))))
    for way in ("treebank", "raw-split"):
        for name, scored in caption_scores(captions, references, way).items():
            assert re.search(rf"{re.escape(name)} \| +{100 * scored.score:.2f}\n", rescore(path, [name]))
    official = vqa_accuracy(SAID, ANSWERS, "official")["vqa/acc@official"].score
    assert f"{100 * official:.2f}" in rescore(vqa_file(write), ["vqa/acc@official"])


def test_metrics_are_compared_with_their_own_kind_alone(write):
    path = write(record("a", "A dog.", ["a dog"]), record("b", "a cat", ["a cat"]))
    text = rescore(path, ["caption/rouge_l@treebank", "caption/rouge_l@raw-split", "caption/bleu1@treebank"])
    assert "caption/rouge_l: scoring alone moves the number by 50.00" in text and "1 of 2 samples differ" in text
    assert "caption/bleu1: one protocol only, so nothing to compare" in text


def test_no_difference_is_said_to_be_none(write):
    text = rescore(write(record("a", "dog", ["dog"])), ["vqa/acc@exact", "caption/rouge_l@raw-split"])
    assert text.count("one protocol only") == 2
    text = rescore(write(record("a", "dog", ["dog"])), ["caption/rouge_l@treebank", "caption/rouge_l@raw-split"])
    assert "moves the number by 0.00\n0 of 1 samples differ" in text


def test_pope_comes_with_f1_yes_ratio_and_parse_failures(write):
    replies = [("yes", "yes"), ("NO", "no"), ("I see none", "no"), ("no", "no")]
    path = write(*(record(i, said, [label]) for i, (said, label) in enumerate(replies)))
    text = rescore(path, ["pope/acc@official", "pope/acc@strict"])
    assert re.search(r"pope/acc@official \| +50\.00   f1 50\.00, yes 75\.0 %, not parsed 25\.0 %\n", text)
    assert re.search(r"pope/acc@strict   \| +75\.00   f1 100\.00, yes 25\.0 %, not parsed 25\.0 %\n", text)
    assert '1: official 0.0, strict 100.0; "NO" for "no"' in text


def test_no_more_samples_are_listed_than_can_be_read(write):
    path = write(*(record(i, "A dog.", ["a dog"]) for i in range(50)))
    text = rescore(path, ["caption/rouge_l@treebank", "caption/rouge_l@raw-split"])
    assert "50 of 50 samples differ" in text and text.count("  id ") == MOST


def test_a_line_of_the_report_is_a_line_whatever_a_model_wrote(write):
    path = write(record("a\u2028b", "Dog.\n\x1b[31m" + "x" * 500, ["dog\r\n", "\ud800"]))
    text = rescore(path, ["vqa/acc@exact", "caption/rouge_l@treebank", "caption/rouge_l@raw-split"])
    assert "\x1b" not in text and "\u2028" not in text and "\r" not in text
    assert all(len(line) < 400 for line in text.splitlines()) and text.encode("utf-8")


def test_lines_end_at_a_newline_alone_and_empty_ones_are_passed_over(write):
    path = write(
        '\ufeff{"id": 1, "prediction": "a\u2028b", "references": ["c"]}\r', "", "  ", record("2", "", ["d"]), ""
    )
    samples = read_predictions(path)
    assert [(s.id, s.prediction, s.references, s.line) for s in samples] == [
        ("1", "a\u2028b", ["c"], 1),
        ("2", "", ["d"], 4),
    ]


GOOD = {"id": "a", "prediction": "x", "references": ["y"]}


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([], "no predictions in it; give a file with one JSON object a line"),
        (["", " "], "no predictions in it"),
        ([GOOD, "{"], "line 2 is not JSON"),
        ([GOOD, "[" * 100_000], "line 2 is not JSON"),
        (["1" * 5000], "line 1 is not JSON: nested too deep, or a number too long"),
        ([[1]], "line 1 is a list, expected an object with id, prediction and references"),
        ([{"id": 1, "prediction": "x"}], "line 1 has no 'references'"),
        ([{"id": 1, "references": ["x"]}], "line 1 has no 'prediction'"),
        ([GOOD | {"references": []}], r"line 1: references are \[\], expected a list of strings, not empty"),
        ([GOOD | {"references": "y"}], "line 1: references are y, expected a list of strings"),
        ([GOOD | {"references": [1]}], r"line 1: references are \[1\], expected a list of strings"),
        ([GOOD | {"prediction": None}], "line 1: prediction is None, expected a string"),
        ([GOOD | {"id": True}], "line 1: id is True, expected a string or an integer"),
        ([GOOD, "", GOOD], "line 3: id a stands on line 1 already"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(write, lines, problem):
    with pytest.raises(UserError, match=problem) as error:
        rescore(write(*lines), ["vqa/acc@exact"])
    assert "predictions.jsonl: " in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: No such file or directory; give a file"):
        rescore(tmp_path / "nowhere.jsonl", ["vqa/acc@exact"])
    with pytest.raises(UserError, match="Is a directory"):
        rescore(tmp_path, ["vqa/acc@exact"])
    (tmp_path / "x").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(UserError, match="x: is not UTF-8"):
        rescore(tmp_path / "x", ["vqa/acc@exact"])


def test_what_a_protocol_needs_is_asked_of_every_sample(write):
    path = write(record("a", "yes", ["yes"] * 10), record("b", "yes", ["yes"]))
    with pytest.raises(UserError, match="line 2, id b: 1 references, needs 10 answers for vqa/acc@official"):
        rescore(path, ["vqa/acc@official"])
    with pytest.raises(UserError, match=r"line 1, id a: references are .*, needs one, yes or no for pope/acc@strict"):
        rescore(path, ["pope/acc@strict"])


def test_an_unknown_protocol_is_answered_with_the_nearest(write):
    path = write(GOOD)
    with pytest.raises(UserError, match="no protocol 'vqa/acc@oficial'; did you mean 'vqa/acc@official'"):
        rescore(path, ["vqa/acc@oficial"])
    with pytest.raises(UserError, match="no protocol 'zzz'; there are: vqa/acc@official, vqa/acc@always"):
        rescore(path, ["zzz"])
    with pytest.raises(UserError, match="--protocols: name one or more, separated by commas: vqa/acc@official"):
        rescore(path, [])


def test_every_protocol_scores(write):
    path = write(record("a", "yes", ["yes"]), record("b", "no", ["no"]))
    ten = write(*(record(i, "yes", ["yes"] * 10) for i in range(2)), name="ten.jsonl")
    for name, protocol in protocols().items():
        source = path if protocol.lacks(["yes"]) is None else ten
        assert re.search(rf"{re.escape(name)} \| +\d+\.\d\d", rescore(source, [name])), name


def test_the_verb_prints_the_report_and_ends_with_2_on_a_mistake(write, capsys):
    def run(protocols):
        with pytest.raises(SystemExit) as ended:
            main(ROOT / "papers", "papers", ["rescore", str(vqa_file(write)), "--protocols", protocols])
        return ended.value.code, *capsys.readouterr()

    code, said, error = run("vqa/acc@official, vqa/acc@always")
    assert code == 0 and "scoring alone moves the number by 25.00" in said and error == ""
    code, said, error = run("vqa")
    assert code == 2 and error.startswith("papers: no protocol 'vqa'") and error.count("\n") == 1 and said == ""
