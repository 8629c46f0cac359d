"""The doctor on healthy and on ailing machines: what it says, how it ends, and what its block keeps to itself."""

import hashlib
import json
import os
import shutil
import socket
import sys

import pytest
import yaml
from tests_common import ROOT

import shared.tools.doctor
from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.tools.doctor import Finding, doctor, hide, pins, requirements

CONTENT = b"weights, or something like them"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout of its own with one manifest entry, an empty cache, and nothing that forbids the network."""
    root = tmp_path / "somebodys checkout"
    for name in ("papers/clip", "recipes/clip"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    write_manifest(root, CONTENT)
    for name in ("PAPERS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PAPERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shared.tools.doctor, "bf16_slowdown", lambda device: 1.0)
    return Catalog(root / "papers", "papers")


def write_manifest(root, content):
    entry = {"what": "a test", "kind": "checkpoint", "source": {"type": "url", "urls": ["https://example.org/w.bin"]},
             "file": "w.bin", "sha256": hashlib.sha256(content).hexdigest(), "size": len(content),
             "licence": "none"}  # fmt: skip
    (root / "checkpoints_manifest.yaml").write_text(yaml.safe_dump({"some-weights": entry}))


def put(tmp_path, content):
    folder = tmp_path / "cache" / "some-weights"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "w.bin").write_bytes(content)


def said(capsys, catalog, *arguments, **options):
    """(exit code, {level: [lines]}, the block)."""
    code = doctor(catalog, *arguments, **options)
    lines, _, block = capsys.readouterr().out.partition("\nto paste into an issue:\n\n")
    levels = {level: [x for x in lines.splitlines() if x.startswith(level)] for level in ("ok", "note", "problem")}
    assert sum(map(len, levels.values())) == len(lines.splitlines()), lines
    return code, levels, block


def test_a_healthy_machine_has_no_problem_and_no_connection_is_opened(place, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    code, levels, block = said(capsys, place)
    assert code == 0 and levels["problem"] == []
    for part in ("Python 3", "libraries", "bf16", "cores", "runs folder", "cache folder", "network allowed",
                 "0 of 1 files of the manifest"):  # fmt: skip
        assert any(part in line for line in levels["ok"] + levels["note"]), part
    assert block.startswith("```text\npython -m papers doctor\n") and block.rstrip().endswith("```")
    for line in levels["ok"]:
        assert line.split()[1] in block


@pytest.mark.parametrize(
    ("dependency", "line"),
    [
        ('"no-such-library-anywhere>=2"', "no-such-library-anywhere is not installed: make install"),
        ('"numpy>=999.1"', "is older than 999.1: make install"),
    ],
)
def test_a_library_that_is_missing_or_too_old_is_a_problem(place, capsys, dependency, line):
    path = place.root / "pyproject.toml"
    path.write_text(path.read_text().replace('"numpy"', dependency))
    code, levels, _ = said(capsys, place)
    assert code == 1 and len(levels["problem"]) == 1 and line in levels["problem"][0]


def test_a_library_not_as_tested_or_not_pinned_is_a_note(place, capsys):
    path = place.root / "constraints.txt"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(("numpy==", "einops=="))]
    path.write_text("\n".join([*lines, "numpy==0.0.1"]) + "\n")
    code, levels, _ = said(capsys, place)
    (note,) = [line for line in levels["note"] if "libraries not as tested" in line]
    assert code == 0 and "(tested: 0.0.1)" in note and "einops" in note and "no version of it in constraints" in note


def test_the_dependencies_read_are_those_of_the_project():
    required, tested = requirements(ROOT), pins(ROOT)
    assert required["torch"] == "2.11" and required["numpy"] == "" and "pytest" not in required
    assert set(required) <= set(tested), "every dependency was tested at some version"


def test_a_torch_that_does_not_start_is_a_problem_and_not_a_crash(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, levels, _ = said(capsys, place)
    assert code == 1 and "torch does not start (ModuleNotFoundError" in levels["problem"][0]


def test_slow_bf16_is_noted(place, capsys, monkeypatch):
    monkeypatch.setattr(shared.tools.doctor, "bf16_slowdown", lambda device: 75.4)
    code, levels, _ = said(capsys, place)
    assert code == 0 and any("bf16 takes 75 times as long" in line for line in levels["note"])


def test_a_cache_that_cannot_be_written_is_a_problem(place, capsys, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("PAPERS_CACHE", str(tmp_path / "a file" / "cache"))
    code, levels, _ = said(capsys, place)
    assert code == 1 and any("not writable" in line and "set PAPERS_CACHE" in line for line in levels["problem"])


def test_a_full_disk_is_a_problem_before_it_is_full(place, capsys, monkeypatch):
    usage = shutil.disk_usage(place.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(5e8)))
    code, levels, _ = said(capsys, place)
    assert code == 1 and all("0.5 GB free: make room" in line for line in levels["problem"])


def test_offline_is_noted_with_the_variable_that_says_so(place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, levels, _ = said(capsys, place)
    assert code == 0 and any("offline by HF_HUB_OFFLINE" in line for line in levels["note"])
    assert not any("network allowed" in line for line in levels["ok"])


def test_a_file_in_the_cache_is_verified_and_a_damaged_one_named(place, capsys, tmp_path):
    put(tmp_path, CONTENT)
    code, levels, _ = said(capsys, place)
    assert code == 0 and any("1 of 1 files" in line and "(some-weights)" in line for line in levels["ok"])
    path = tmp_path / "cache" / "some-weights" / "w.bin"
    before = path.stat()
    for damaged in (CONTENT[:-1] + b"?", CONTENT[:-1]):
        put(tmp_path, damaged)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk's fault does not touch the time
        code, levels, _ = said(capsys, place)
        assert code == 1 and levels["problem"] == [
            "problem  some-weights: damaged in the cache: python -m papers fetch some-weights --verify"
        ]


def test_a_large_file_is_hashed_only_when_asked(place, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(shared.tools.doctor, "QUICK", len(CONTENT) - 1)
    put(tmp_path, CONTENT[:-1] + b"?")
    code, levels, _ = said(capsys, place)
    assert code == 0 and any("1 more by size alone" in line and "--verify" in line for line in levels["note"])
    code, levels, _ = said(capsys, place, verify=True)
    assert code == 1 and "some-weights: damaged" in levels["problem"][0]


def test_a_broken_manifest_is_one_problem_and_the_rest_is_still_examined(place, capsys):
    (place.root / "checkpoints_manifest.yaml").write_text("some-weights: {what: nothing else}\n")
    code, levels, _ = said(capsys, place)
    assert code == 1 and len(levels["problem"]) == 1 and "some-weights: lacks kind" in levels["problem"][0]
    assert any("clip mini: never measured" in line for line in levels["note"])


def write_report(path, seconds, when):
    path.parent.mkdir(parents=True)
    machine = {"cpu": "AMD EPYC", "cores": 3, "gpus": []}
    path.write_text(json.dumps({"seconds": seconds, "machine": machine, "command": "make reproduce PAPER=clip"}))
    os.utime(path, (when, when))


def test_the_newest_run_here_stands_before_the_committed_one(place, capsys):
    write_report(place.root / "results" / "clip" / "mini-emoji.json", 60, 300)
    _, levels, _ = said(capsys, place)
    assert any("measured: 1.0 minutes on 3 cores of AMD EPYC" in x and "committed run" in x for x in levels["ok"])
    write_report(place.root / "runs" / "clip" / "mini" / "1" / "report.json", 240, 200)
    write_report(place.root / "runs" / "clip" / "mini" / "2" / "report.json", 120, 100)
    _, levels, _ = said(capsys, place)
    assert any("measured: 4.0 minutes" in x and "newest run here: make reproduce" in x for x in levels["ok"])
    (place.root / "runs" / "clip" / "mini" / "1" / "report.json").write_text("{")
    _, levels, _ = said(capsys, place)
    assert any("not a report" in x for x in levels["note"]) and any("2.0 minutes" in x for x in levels["ok"])


def test_a_paper_named_is_estimated_and_must_fit(place, capsys, monkeypatch):
    _, levels, _ = said(capsys, place)
    assert not any("estimated" in line for line in levels["ok"])
    code, levels, _ = said(capsys, place, "clip")
    assert code == 0 and any("clip mini, estimated to a factor of two: 640,000 samples" in x for x in levels["ok"])
    monkeypatch.setattr(shared.tools.doctor, "available_memory", lambda: 1e9)
    code, levels, _ = said(capsys, place, "clip")
    assert code == 1 and "more than is free: ARGS=jobs=1 takes less" in levels["problem"][0]


def test_an_unknown_paper_or_scale_is_refused_by_name(place):
    with pytest.raises(UserError, match="did you mean 'clip'"):
        doctor(place, "clyp")
    with pytest.raises(UserError, match="did you mean 'mini'"):
        doctor(place, "clip", "mimi")


def test_the_block_names_no_home_no_user_no_host_and_no_checkout(place, capsys, monkeypatch, tmp_path):
    home = tmp_path / "home" / "nadja"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "nadja")
    monkeypatch.setattr(socket, "gethostname", lambda: "blackbird")
    monkeypatch.setenv("PAPERS_CACHE", str(home / "papers cache"))
    command = "make reproduce PAPER=clip ARGS=data_root=/home/otto/pictures"
    write_report(place.root / "results" / "clip" / "mini-emoji.json", 60, 300)
    path = place.root / "results" / "clip" / "mini-emoji.json"
    path.write_text(path.read_text().replace("make reproduce PAPER=clip", f"{command} on blackbird by nadja"))
    _, levels, block = said(capsys, place)
    assert any(str(home) in line for line in levels["ok"]), "who reads it here sees whole paths"
    for secret in (str(home), "nadja", "otto", "blackbird", str(tmp_path), "somebodys"):
        assert secret not in block, secret
    assert "cache folder ~/papers cache" in block and "runs folder ./runs" in block and "data_root=~/pictures" in block


def test_hiding_leaves_the_rest_of_a_line_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(shared.tools.doctor, "_user", lambda: "cli")
    monkeypatch.setattr(shared.tools.doctor, "_home", lambda: tmp_path)
    text = "clip, the client of cli: shared/root/x, /rootless and data_root=/root/x; ```"
    hidden = "clip, the client of USER: shared/root/x, /rootless and data_root=~/x; '''"
    assert hide(text, tmp_path / "x") == hidden
    assert str(Finding("problem", "it is so", "do this")) == "problem  it is so: do this"
