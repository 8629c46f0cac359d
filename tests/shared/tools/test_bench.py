"""The benchmark's arithmetic, its refusal of contestants that differ, its memory meter, what it writes and prints."""

import json
import os
from dataclasses import replace

import pytest
import torch
from bench_child import held_and_freed

from papers.clip.config import VARIANTS
from papers.clip.evidence import bench as clip
from shared.core.errors import UserError
from shared.tools import bench, bench_core, bench_output, bench_setup
from shared.tools.bench_output import Job, Sweep, save, table
from shared.tools.bench_timing import in_child, memory_rows, race, rows_of

PEAKS = [{"precision": "fp32", "flops_per_second": 1e11, "shape": [8, 8, 8]}]
SETUP = bench_setup.Setup("cpu", "fp32", 3, 60.0, PEAKS)
SETTINGS = {"sweep": "demo", "device": "cpu", "precision": "fp32"}


def demo_rows() -> list[dict]:
    rows = rows_of({"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 12.0]}, items=6, unit="pictures/s")
    return [{"setting": "batch 6", "batch": 6, **row} for row in rows]


# ---- races


def test_ratios_are_medians_over_the_pairs_of_a_round_not_ratios_of_medians():
    ours, theirs = rows_of({"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 12.0]}, items=6, flops=2e9, peak=1e10)
    assert (ours["ratio"], ours["ratio_low"], ours["ratio_high"]) == (1, 1, 1)
    assert (theirs["ratio"], theirs["ratio_low"], theirs["ratio_high"]) == (2.0, 1.5, 2.5)  # pairs: 2, 1, 3
    assert (theirs["median_s"], theirs["value"]) == (2.0, 3.0)
    assert ours["share_of_peak"] == theirs["share_of_peak"] == 0.1


def test_contestants_take_turns_and_the_first_place_moves_on():
    called = []
    rows = race({name: lambda name=name: called.append(name) or 1.0 for name in "abc"}, 4)
    assert "".join(called) == "abc" + "abc" + "bca" + "cab" + "abc"  # the first is the warm-up
    assert [len(row["seconds"]) for row in rows] == [4, 4, 4]


def test_a_race_over_its_time_still_runs_three_rounds():
    rows = race({"a": lambda: 1.0, "b": lambda: 1.0}, 9, seconds=0)
    assert [len(row["seconds"]) for row in rows] == [3, 3]


def test_quick_calls_are_repeated_until_they_can_be_timed():
    counts = {"a": 0, "b": 0}

    def call(name: str) -> float:
        counts[name] += 1
        return 1.0

    race({name: lambda name=name: call(name) for name in counts}, 3, at_least=0.001)
    assert counts["a"] == counts["b"] > 3 * 10


@pytest.mark.parametrize("wrong", [1.1, float("nan"), torch.ones(2)])
def test_a_contestant_that_computes_something_else_is_refused(wrong):
    with pytest.raises(UserError, match="theirs"):
        race({"ours": lambda: 1.0, "theirs": lambda: wrong}, 3, tolerance=1e-3)


def test_the_second_part_of_an_output_counts_too():
    with pytest.raises(UserError, match="theirs does not compute what ours does"):
        race({"ours": lambda: (1.0, torch.ones(3)), "theirs": lambda: (1.0, torch.tensor([1.0, 1.0, 2.0]))}, 3)


def test_contestants_that_drift_apart_after_the_warm_up_are_refused():
    calls = []

    def drifting() -> float:
        calls.append(1)
        return 1.0 + 0.01 * (len(calls) - 1)

    with pytest.raises(UserError, match="drifting does not compute"):
        race({"steady": lambda: 1.0, "drifting": drifting}, 3)


def test_the_share_of_the_peak_is_of_the_products_of_the_first_contestant():
    x = torch.ones(8, 8)
    rows = race({"one": lambda: x @ x, "two": lambda: (x @ x + x @ x) / 2}, 3, peak=1e9)
    assert [row["share_of_peak"] for row in rows] == [
        pytest.approx(2 * 8**3 / row["median_s"] / 1e9, rel=1e-3) for row in rows
    ]
    assert "share_of_peak" not in race({"one": lambda: x @ x}, 3)[0]


# ---- memory


def test_a_child_sees_what_was_held_at_once_and_forgets_it_at_a_reset():
    hog = torch.ones(300 * 2**18)  # what the parent holds is not the child's
    whole, nothing, half = (peak / 2**20 for peak in in_child(held_and_freed, 192))
    assert 190 <= whole < 192 + 24  # the kernel counts pages of each core in batches
    assert nothing < 24
    assert 94 <= half < 96 + 24
    assert hog.numel() > 0


def test_a_child_that_was_killed_is_one_clear_error():
    with pytest.raises(UserError, match=r"process of _exit\(9,\) was ended from outside.*smaller batch="):
        in_child(os._exit, 9)


def test_memory_is_told_in_mebibytes_and_as_a_ratio_to_the_first():
    ours, theirs = memory_rows({"ours": 100 * 2**20, "theirs": 150 * 2**20})
    assert (ours["value"], ours["unit"], ours["ratio"]) == (100, "MiB", 1)
    assert (theirs["value"], theirs["ratio"]) == (150, 1.5)


# ---- what is written and printed


def test_a_result_file_says_what_ran_where_and_what_came_out(tmp_path):
    sweep = Sweep("demo", "DEMO, nothing", [])
    path = save(sweep, demo_rows(), SETTINGS, tmp_path, PEAKS)
    result = json.loads(path.read_text())
    assert path.name == "demo-cpu-fp32.json"
    keys = {"name", "title", "settings", "machine", "commit", "dirty", "date", "peaks", "rows"}
    assert result.keys() == keys
    assert result["settings"] == SETTINGS and result["peaks"] == PEAKS
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["cores"] >= 1
    assert result["rows"] == demo_rows()
    assert (tmp_path / "figures" / "demo-cpu-fp32.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_figure_is_drawn_over_its_axis(tmp_path):
    rows = [{**row, "setting": f"{batch}", "batch": batch} for batch in (4, 8) for row in demo_rows()]
    sweep = Sweep("demo", "DEMO", [], x="batch", x_label="pictures")
    assert bench_output.figure(sweep, rows, {"gpus": [], "cpu": "a", "cores": 2, "torch": "2"}).startswith(b"\x89PNG")


def test_the_table_has_one_line_a_setting_with_our_value_and_their_ratios():
    lines = table(Sweep("demo", "DEMO", []), demo_rows()).splitlines()
    assert lines[0] == "DEMO"
    assert lines[1].split() == ["ours", "theirs", "takes"]
    assert lines[3].split("  ")[0] == "batch 6"
    assert "3 pictures/s" in lines[3] and lines[3].endswith("2.00 x [1.50, 2.50]")


def test_a_run_measures_every_job_and_keeps_its_setting(tmp_path, capsys):
    jobs = [Job(name, demo_rows) for name in ("small", "large")]
    jobs[1] = replace(jobs[1], run=lambda: [{k: v for k, v in row.items() if k != "setting"} for row in demo_rows()])
    bench.run_sweeps([Sweep("demo", "DEMO", jobs)], SETTINGS, tmp_path, PEAKS)
    rows = json.loads((tmp_path / "demo-cpu-fp32.json").read_text())["rows"]
    assert [row["setting"] for row in rows] == ["batch 6", "batch 6", "large", "large"]  # a row's own comes first
    out, err = capsys.readouterr()
    assert "DEMO" in out and "[2/2]" in err and "left" in err and "GFLOP/s" in err


@pytest.mark.parametrize(
    "error", [UserError("not the same"), RuntimeError("CUDA error: unspecified launch failure\nmore")]
)
def test_a_job_that_fails_costs_its_own_rows_only_and_is_told_at_the_end(tmp_path, error):
    def fail() -> list[dict]:
        raise error

    sweeps = [Sweep("demo", "DEMO", [Job("bad", fail), Job("good", demo_rows)]), Sweep("none", "NONE", [])]
    with pytest.raises(UserError, match=f"^demo: bad: .*{str(error).splitlines()[0]}$"):
        bench.run_sweeps(sweeps, SETTINGS, tmp_path, PEAKS)
    assert len(json.loads((tmp_path / "demo-cpu-fp32.json").read_text())["rows"]) == 2
    assert not (tmp_path / "none-cpu-fp32.json").exists()


def test_an_interrupted_run_keeps_what_was_measured_before(tmp_path):
    def interrupt() -> list[dict]:
        raise KeyboardInterrupt

    jobs = [Job("good", demo_rows), Job("late", interrupt)]
    with pytest.raises(KeyboardInterrupt):
        bench.run_sweeps([Sweep("demo", "DEMO", jobs)], SETTINGS, tmp_path, PEAKS)
    assert len(json.loads((tmp_path / "demo-cpu-fp32.json").read_text())["rows"]) == 2


def test_layers_that_are_compiled_train_as_they_did(monkeypatch):
    compile_layer = torch.nn.Module.compile
    seen = []
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **how: seen.append(self) or compile_layer(self, backend="aot_eager", **how),
    )
    config = replace(VARIANTS["clip-tiny"](), vision_layers=2, text_layers=3)
    data = clip.inputs(config, 3, "cpu")
    plain, quick = (clip.contestants(config, "cpu")["ours"] for _ in range(2))
    bench_setup.compiled(quick.model)
    assert len(seen) == 5
    steps = [bench_setup.stepper(entry.model, entry.loss, "fp32") for entry in (plain, quick)]
    for _ in range(3):
        expected, found = (step(*data) for step in steps)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


# ---- CLIP's contestants


def test_features_of_all_three_are_equal():
    config = VARIANTS["clip-tiny"]()
    pixels, tokens = clip.inputs(config, 3, "cpu")
    one = clip.contestants(config, "cpu")
    for what, data in (("images", pixels), ("texts", tokens)):
        expected = getattr(one["ours"], what)(data)
        for name in ("open_clip", "transformers"):
            torch.testing.assert_close(getattr(one[name], what)(data), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sweep", [bench_core.attention, bench_core.patches])
def test_the_contestants_of_the_core_agree(sweep):
    [made] = sweep(SETUP)
    jobs = made.jobs
    for job in (jobs[0], jobs[-3]):  # without and with gradients
        rows = job.run()
        assert len(rows) >= 2 and all(row["ratio"] > 0 for row in rows)
