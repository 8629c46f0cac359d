"""The command line as a person uses it: fast answers, one clear line for every mistake, commands that exist."""

import re
import subprocess
import sys
import time

import pytest
from tests_common import ROOT
from verbs import run

from shared.cli import parse, parser


@pytest.mark.parametrize("verb", ["list", "cite"])
def test_list_and_cite_answer_without_heavy_imports(verb):
    code = (
        "import sys, pathlib; from shared.cli import main\n"
        f"try: main(pathlib.Path('papers'), 'papers', ['{verb}'])\n"
        "except SystemExit: pass\n"
        "sys.exit(' '.join(m for m in ('torch', 'lightning', 'mlflow', 'numpy') if m in sys.modules) or 0)"
    )
    started = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    assert "Natural Language Supervision" in ran.stdout
    assert time.perf_counter() - started < 5, "a second on a quiet machine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reproduce", "clyp"], "no paper 'clyp'; did you mean 'clip'?"),
        (["reproduce", "clip", "--scale", "mimi"], "no scale 'mimi'; did you mean 'mini'?"),
        (["reproduce", "clip", "stepz=3"], "unknown key 'stepz' (did you mean 'steps'?)"),
        (["reproduce", "clip", "steps=three"], "steps: Value 'three'"),
        (["reproduce", "clip", "model=clip-vit-b-31"], "no variant 'clip-vit-b-31'; did you mean 'clip-vit-b-32'?"),
        (["reproduce", "clip", "claims=[clip.scaling.log]"], "did you mean 'clip.scaling.loglog'?"),
        (["reproduce", "clip", "rungs=[claims]", "data=cifar10"], "set data_root"),
        (["reproduce", "clip", "rungs=[claims]", "data=cifar10", "data_root=/nowhere"], "no /nowhere"),
        (["reproduce", "clip", "rungs=[claims]", "data=cifar11"], "no data 'cifar11': choose emoji"),
        (["reproduce", "steps=3"], "name the paper before steps=3"),
        (["report"], "name a paper: albef, blip, blip2, clip"),
        (["cite", "blip9"], "no paper 'blip9'"),
        (["fetch", "emoji-gogle"], "did you mean 'emoji-google'?"),
        (["zeroshot", "x.jpg", "--labels", "one"], "--labels needs at least two"),
        (["zeroshot", "x.jpg", "--labels", "a, b ,a"], "--labels: 'a' is given twice"),
        (["zeroshot", "x.jpg", "--labels", "a,b", "--template", "plain"], "no {} where the label goes"),
        (["zeroshot", "x.jpg", "--labels", "a,b", "--model", "clip-vit-b-33"], "did you mean 'clip-vit-b-32'?"),
        (["zeroshot", "/no/x.jpg", "--labels", "a,b"], "/no/x.jpg: no such file or folder"),
        (["convert", "/no/x.pt", "y", "--variant", "clip-tiny"], "/no/x.pt: no such file"),
        (["bench", "clip", "speed=9"], "'speed=9' is not one of"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(place, capsys, words, message):
    assert run(place, *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("papers: ")


def test_ctrl_c_ends_with_130_and_one_line(place, capsys, monkeypatch):
    import shared.cli

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shared.cli, "list_papers", interrupted)
    assert run(place, "list") == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_starts_nothing(place, capsys):
    before = sorted(place.rglob("report.json"))
    assert run(place, "reproduce", "clip", "--dry", "--seeds", "2") == 0
    plan = capsys.readouterr().out
    for part in ("seeds: 2", "parameters", "emoji-google", "sha256", "clip.scaling.loglog", "estimate", "GB"):
        assert part in plan, part
    assert sorted(place.rglob("report.json")) == before


def readme_commands():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    cards = [path.read_text() for path in sorted((ROOT / "papers").glob("*/README.md"))]
    blocks += [block for card in cards for block in re.findall(r"```sh\n(.*?)```", card, re.S)]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("make", "python -m papers"))]


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_of_the_readme_and_the_cards_is_one_that_exists(line):
    if line.startswith("make"):
        ran = subprocess.run(
            ["bash", "-c", line.replace("make", "make -n", 1)], cwd=ROOT, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        return
    import shlex

    words = shlex.split(line.removeprefix("python -m papers"))
    if "--help" in words:
        assert f"  {words[0]} " in parser().format_help()
        return
    assert parse(words).verb == words[0]
