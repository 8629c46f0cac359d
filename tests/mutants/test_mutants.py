"""The runner tells a caught fault from what only looks like one; the real mutants fit, and two are caught."""

import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant
from run import ROOT, Mistake, chosen, copy, main, planted, run

CODE = "def double(x):\n    return 2 * x\n"
TEST = "from code_under_test import double\n\ndef test_double():\n    assert double(3) == 6\n"
BY_FIXTURE = """import pytest
from code_under_test import double

@pytest.fixture
def six():
    assert double(3) == 6
    return 6

def test_double(six):
    assert double(3) == six
"""


@pytest.fixture
def checkout(tmp_path):
    """A repository of one function, with a test that says what it does, one that does not, and one that is broken."""
    files = {
        "code_under_test.py": CODE,
        "test_good.py": TEST,
        "test_blind.py": TEST.replace("== 6", "is not None"),
        "test_red.py": TEST.replace("== 6", "== 7"),
        "test_fixture.py": BY_FIXTURE,
        "test_inside.py": "def test_double():\n    from code_under_test import double\n    assert double(3) == 6\n",
        "ignored.py": "",
        ".gitignore": "ignored.py\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def judged(checkout, old, new, *tests, timeout=60):
    (result,) = run([Mutant("m", "code_under_test.py", old, new, tests)], checkout, jobs=1, timeout=timeout)
    return result


def test_a_fault_that_a_test_denies_is_caught_by_name_and_the_source_stays_as_it_was(checkout):
    result = judged(checkout, "2 * x", "3 * x", "test_blind.py", "test_good.py")
    assert (result.word, result.told) == ("caught", "by test_double")
    assert (checkout / "code_under_test.py").read_text() == CODE


def test_a_fault_that_no_named_test_denies_survives(checkout):
    assert judged(checkout, "2 * x", "3 * x", "test_blind.py").word == "survived"


@pytest.mark.parametrize(
    ("new", "test", "told"),
    [
        ("import nowhere", "test_good.py", "exit code 2"),  # cannot be collected
        ("import nowhere", "test_inside.py", "No module named 'nowhere'"),
        ("return twice", "test_good.py", "name 'twice' is not defined"),
        ("return 3 * x", "test_fixture.py", "failed on setup"),
        ("while True: pass", "test_good.py", "no end within 3 s"),
    ],
)
def test_what_is_no_failure_of_a_test_catches_nothing(checkout, new, test, told):
    old = "def double(x):\n    " if new.startswith("import") else "    return 2 * x"
    timeout = 3 if "while" in new else 60
    result = judged(checkout, old, f"{new}\n{old}" if new.startswith("import") else f"    {new}", test, timeout=timeout)
    assert result.word == "broken" and told in result.told


@pytest.mark.parametrize(
    ("old", "new", "test", "told"),
    [
        ("x", "y", "test_good.py", "'x' stands 2 times in code_under_test.py, not once"),
        ("3 * x", "y", "test_good.py", "'3 * x' stands 0 times"),
        ("2 * x", "2 *", "test_good.py", "is no Python with it"),
        ("2 * x", "3 * x", "test_red.py", "test_red.py: not passed without any mutant (by test_double)"),
        ("2 * x", "3 * x", "test_none.py", "no test file test_none.py"),
    ],
)
def test_a_mutant_that_could_not_be_judged_is_a_mistake_in_one_line(checkout, old, new, test, told):
    with pytest.raises(Mistake) as mistake:
        judged(checkout, old, new, test)
    assert told in str(mistake.value) and "\n" not in str(mistake.value)


def test_every_mutant_fits_the_code_as_it_stands():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    for mutant in MUTANTS:
        assert planted(mutant, ROOT) != (ROOT / mutant.file).read_text(encoding="utf-8"), mutant.name
        assert mutant.tests and all((ROOT / test).is_file() for test in mutant.tests), mutant.name


def test_two_mutants_are_really_caught_and_counted(capsys):
    assert main(["--jobs", "2", "verdict-upside-down", "equal-if-either-bound-is"]) == 0
    assert capsys.readouterr().out.endswith("caught 2 of 2\n")


def test_a_survivor_is_the_exit_code(checkout, capsys, monkeypatch):
    import run as module

    sound = module.run
    monkeypatch.setattr(module, "run", lambda mutants, jobs, timeout: sound(mutants, checkout, jobs, timeout))
    survivor = Mutant("m", "code_under_test.py", "2 * x", "3 * x", ("test_blind.py",))
    monkeypatch.setattr(module, "MUTANTS", (survivor, survivor._replace(name="n", tests=("test_good.py",))))
    assert main(["--jobs", "1"]) == 1
    assert capsys.readouterr().out.endswith("caught 1 of 2\n")


def test_an_unknown_name_is_told_with_the_nearest(capsys):
    assert main(["verdict-upside-dawn"]) == 2
    assert "did you mean 'verdict-upside-down'?" in capsys.readouterr().err
    assert [mutant.name for mutant in chosen(["verdict-upside-down"] * 2)] == ["verdict-upside-down"]


def test_the_runner_is_a_command():
    script = Path(__file__).with_name("run.py")
    ran = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "--jobs" in ran.stdout


def test_a_copy_holds_what_git_tracks_or_would_track_and_nothing_else(checkout, tmp_path_factory):
    subprocess.run(["git", "-C", str(checkout), "add", "test_good.py"], check=True)
    (checkout / "test_red.py").unlink()
    target = tmp_path_factory.mktemp("copy")
    copy(checkout, target)
    assert {path.name for path in target.iterdir()} >= {"code_under_test.py", "test_good.py"}
    assert not {"ignored.py", "test_red.py", ".git"} & {path.name for path in target.iterdir()}
    with pytest.raises(Mistake, match="run this in a checkout"):
        copy(tmp_path_factory.mktemp("no checkout"), target)
