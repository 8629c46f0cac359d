"""Arms in processes of their own: what one process gives, a dead worker is told, and no worker outlives its parent."""

import contextlib
import io
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests_common import CATALOG, ROOT

from papers.clip.recipe import ClipRecipe
from shared.core.console import Console, Progress
from shared.core.errors import UserError
from shared.experiments import ablations, reproduce
from shared.experiments.ablations import _next, run_arms

TINY = {
    "paper": "clip", "model": "clip-tiny", "data": "shapes", "pairs": 64, "test_pairs": 16, "classes": 4, "batch": 16,
    "steps": 3, "measure_at": 1, "val_pictures": 8, "accelerator": "cpu", "seeds": 2,
}  # fmt: skip


def outcomes(folder, **changes):
    recipe = ClipRecipe(**TINY | changes)
    found = {(o.arm, o.seed): o.measured for o in run_arms("papers.clip", recipe, ["bow_prediction"], folder, print)}
    assert all(0 <= measured.pop("waited") < 1 for measured in found.values())
    assert len(found) == 2
    return found


def test_two_processes_give_what_one_gives_bit_for_bit(tmp_path):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert outcomes(tmp_path / "one", jobs=1) == outcomes(tmp_path / "two", jobs=2)
    finally:
        torch.set_num_threads(threads)


def test_a_mistake_in_a_worker_reaches_the_user_as_its_own_line(tmp_path):
    with pytest.raises(UserError, match="set data_root"):
        outcomes(tmp_path, jobs=2, data="cifar10")


def test_more_jobs_than_a_pipe_holds_are_all_done(tmp_path, monkeypatch):
    (tmp_path / "idle" / "evidence").mkdir(parents=True)
    (tmp_path / "idle" / "__init__.py").touch()
    (tmp_path / "idle" / "evidence" / "claims.py").write_text(
        "def nothing(context):\n    return {}\nARMS = {'nothing': nothing}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = ClipRecipe(**TINY | {"seeds": 60, "jobs": 2}, claims=["x" * 4096])  # 240 kB of jobs; a pipe holds 64
    found = list(run_arms("idle", recipe, ["nothing"], tmp_path / "arms", lambda samples: None))
    assert len({outcome.seed for outcome in found}) == 60


STAGED = """
import time
from pathlib import Path
from types import SimpleNamespace

def waits_for(name, context):
    folder = Path(context.folder).parent
    limit = time.monotonic() + 30
    while not (folder / name).exists():
        if time.monotonic() > limit:
            return {"met": False}
        time.sleep(0.05)
    return {"met": True}

def makes(context):
    folder = Path(context.folder).parent
    (folder / f"begun-{context.seed}").touch()
    found = waits_for(f"begun-{2001 - context.seed}", context)
    (folder / f"made-{context.seed}").touch()
    return found

def takes(context):
    return waits_for(f"made-{context.seed}", context)

ARMS = {"makes": makes} | {f"takes{number}": takes for number in range(4)}
"""


def test_each_seed_has_workers_of_its_own_and_begins_with_what_others_wait_for(tmp_path, monkeypatch):
    """Seeds 1000 and 1001 make their stage at the same time, since nobody waits for one while a seed is left alone."""
    (tmp_path / "staged" / "evidence").mkdir(parents=True)
    (tmp_path / "staged" / "__init__.py").touch()
    (tmp_path / "staged" / "evidence" / "claims.py").write_text(STAGED)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = ClipRecipe(**TINY | {"jobs": 4})
    arms = ["takes0", "takes1", "makes", "takes2", "takes3"]
    found = list(run_arms("staged", recipe, arms, tmp_path / "arms", lambda samples: None))
    assert len(found) == 10 and all(outcome.measured["met"] for outcome in found)


def test_no_worker_outlives_a_killed_parent(tmp_path):
    code = (
        "from pathlib import Path; from papers.clip.recipe import ClipRecipe\n"
        "from shared.experiments.ablations import run_arms\n"
        f"if __name__ == '__main__':\n"
        f"    recipe = ClipRecipe(**{TINY | {'steps': 100_000, 'jobs': 2}!r})\n"
        f"    list(run_arms('papers.clip', recipe, ['bow_prediction'], Path({str(tmp_path)!r}), lambda n: None))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=environment)
    try:
        children = wait_for(lambda: children_of(parent.pid), 60)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert wait_for(lambda: not [c for c in children if alive(c)], 30), "workers run on without their parent"
    finally:
        parent.kill()


def children_of(pid):
    """Two workers, once multiprocessing has started them (its resource tracker is no worker)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == pid and b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found if len(found) == 2 else None


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def wait_for(condition, seconds):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if found := condition():
            return found
        time.sleep(0.2)
    return None


def test_a_dead_worker_is_told_of_while_the_others_report_samples_but_no_result_is_lost():
    alive, dead = SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=-9)
    done = queue.Queue()
    for message in [("samples", 8), ("done", "an outcome"), ("samples", 8)]:
        done.put(message)
    assert _next(done, [alive, alive]) == ("samples", 8)
    assert _next(done, [alive, dead]) == ("done", "an outcome")
    with pytest.raises(UserError, match=r"ended with code -9"):
        _next(done, [alive, dead])


def test_the_progress_of_a_run_counts_trainings_and_ends_at_all_of_them(tmp_path, monkeypatch):
    """Arms of several stages see more samples than steps x batch: counted in samples, a run passed 100 %."""
    catalog, shown = CATALOG, io.StringIO()

    def trained(package, recipe, arms, folder, progress):
        for arm in arms:
            progress(10**9)
            yield ablations.Outcome(arm, 1000, 1.0, {})

    class Tracked(contextlib.nullcontext):
        def update(self): ...

    monkeypatch.setattr(ablations, "run_arms", trained)
    monkeypatch.setattr(reproduce, "Tracker", lambda *_, **__: Tracked())
    console, done = Console(shown), []
    monkeypatch.setattr(Progress, "close", lambda self: done.append((self.done, self.total)))
    run = SimpleNamespace(path=tmp_path, keep=lambda: None)
    recipe, data = catalog.recipe("clip", "smoke", []), {"name": "toy", "digest": "0"}
    rows, outcomes, _ = reproduce.run_claims(catalog, catalog.card("clip"), recipe, data, run, "command", console)
    assert done == [(len(outcomes[1000]), len(outcomes[1000]))] and len(outcomes[1000]) > 5 and len(rows) > 5
