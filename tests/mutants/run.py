"""Plants the faults of faults.txt, one at a time, in a copy of the repository, and demands that the tests catch each.

python tests/mutants/run.py [--jobs 2] [--timeout SECONDS] [NAME ...]

The copy holds what git tracks or would track. A fault is caught if one of the test files that it names fails in a test:
a file that cannot be collected, a fixture that breaks, a name that is missing or a time-out catch nothing. The same
files must pass without the fault. Ends with `caught 60 of 60`; the exit code is 1 if any was not, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
NO_FAILURE_OF_A_TEST = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError")


class Mistake(Exception):
    """What must be put right before a mutant can be judged, in one line."""


class Result(NamedTuple):
    """`word` is caught | survived | broken; `told` is the test that caught it, or what is wrong."""

    mutant: Mutant
    word: str
    told: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.word:<8} {self.mutant.name:<48} {self.seconds:4.0f} s  {self.told}"


def planted(mutant: Mutant, root: Path) -> str:
    """The mutated text of the file; Mistake where the old text does not stand there exactly once."""
    path = root / mutant.file
    if not path.is_file():
        raise Mistake(f"{mutant.name}: no file {mutant.file}; name the one that its code moved to")
    text = path.read_text(encoding="utf-8")
    if (times := text.count(mutant.old)) != 1:
        raise Mistake(f"{mutant.name}: {mutant.old!r} stands {times} times in {mutant.file}, not once; write it anew")
    changed = text.replace(mutant.old, mutant.new)
    try:
        compile(changed, mutant.file, "exec")
    except SyntaxError as error:
        raise Mistake(f"{mutant.name}: {mutant.file} is no Python with it ({error.msg}, line {error.lineno})") from None
    return changed


def run(mutants: Sequence[Mutant], root: Path = ROOT, jobs: int = 2, timeout: float = 900) -> Iterator[Result]:
    """Judge the mutants, `jobs` at a time; yields as they are done. Mistake before anything runs if one does not fit,
    or if its tests fail without it."""
    for mutant in mutants:
        planted(mutant, root)
        for test in mutant.tests:
            if not (root / test).is_file():
                raise Mistake(f"{mutant.name}: no test file {test}")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        work = _Work(Path(folder), root, jobs, timeout)
        try:
            sound = [pool.submit(work.sound, tests) for tests in dict.fromkeys(mutant.tests for mutant in mutants)]
            for done in as_completed(sound):
                done.result()
            for done in as_completed([pool.submit(work.judge, mutant) for mutant in mutants]):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            work.stop()


class _Work:
    """Copies of the repository, one a worker, and the processes that run in them."""

    def __init__(self, folder: Path, root: Path, jobs: int, timeout: float):
        self.timeout, self.jobs = timeout, jobs
        self.copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self.running: set[subprocess.Popen] = set()
        for number in range(jobs):
            copy(root, folder / str(number))
            self.copies.put(folder / str(number))

    def sound(self, tests: tuple[str, ...]) -> None:
        place = self.copies.get()
        code, told = self.pytest(place, tests)
        self.copies.put(place)
        if code != 0:
            raise Mistake(f"{' '.join(tests)}: not passed without any mutant ({told}); mend that first")

    def judge(self, mutant: Mutant) -> Result:
        place, started = self.copies.get(), time.perf_counter()
        changed, path = planted(mutant, place), place / mutant.file
        sound = path.read_bytes()
        path.write_text(changed, encoding="utf-8")
        code, told = self.pytest(place, mutant.tests)
        path.write_bytes(sound)
        self.copies.put(place)
        word = {0: "survived", 1: "caught"}.get(code, "broken")
        return Result(mutant, word, told or f"passed: {' '.join(mutant.tests)}", time.perf_counter() - started)

    def pytest(self, place: Path, tests: tuple[str, ...]) -> tuple[int | None, str]:
        """(0, ""): passed; (1, the test that failed); (anything else, why that is no failure of a test)."""
        found = place / "found.xml"
        found.unlink(missing_ok=True)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", f"--junitxml={found}"]
        # no bytecode: a file of the same length, changed within a second, would be taken for the old one
        own = {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": str(self.threads())}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | own
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.running.add(process)
        try:
            output, _ = process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            return None, f"no end within {self.timeout:.0f} s"
        finally:
            self.end(process)
        if process.returncode == 0:
            return 0, ""
        lines = output.decode(errors="replace").strip().splitlines() or ["no output"]
        if process.returncode != 1:
            return process.returncode, f"exit code {process.returncode}: {lines[-1]}"
        return _first_failure(found)

    def threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.jobs)

    def end(self, process: subprocess.Popen) -> None:
        """The process and all that it started, which a test that was stopped may have left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.running.discard(process)

    def stop(self) -> None:
        for process in list(self.running):
            self.end(process)


def _first_failure(path: Path) -> tuple[int | None, str]:
    for case in ElementTree.parse(path).iter("testcase"):
        for kind in ("failure", "error"):
            if (fault := case.find(kind)) is not None:
                name, message = case.get("name", ""), fault.get("message", "").split("\n")[0]
                if kind == "error" or message.startswith(NO_FAILURE_OF_A_TEST):
                    return None, f"{name}: {message}"
                return 1, f"by {name}"
    return None, "exit code 1, but no test failed"


def copy(root: Path, target: Path) -> None:
    """Plain copies of the files that git tracks or would track."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        raise Mistake(f"{root}: git does not list its files ({listed.stderr.strip()}); run this in a checkout")
    for name in set(filter(None, listed.stdout.split("\0"))):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def chosen(names: Sequence[str]) -> list[Mutant]:
    """The mutants of these names, all of them without any."""
    known = {mutant.name: mutant for mutant in MUTANTS}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise Mistake(f"no mutant {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    return [known[name] for name in dict.fromkeys(names)] or list(MUTANTS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py", description="Plants faults and demands that the tests catch them.")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default: 2)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a mutant may take (default: 900)")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args(argv)
    caught = total = 0
    try:
        mutants = chosen(options.names)
        total = len(mutants)
        print(f"{total} mutants; their tests without them first", flush=True)
        for result in run(mutants, jobs=max(1, options.jobs), timeout=options.timeout):
            print(result, flush=True)
            caught += result.word == "caught"
    except Mistake as mistake:
        print(f"mutants: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; caught {caught} of {total} so far", file=sys.stderr)
        return 130
    print(f"caught {caught} of {total}")
    return 0 if caught == total else 1


if __name__ == "__main__":
    sys.exit(main())
