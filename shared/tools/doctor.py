"""`doctor`: is this machine fit to reproduce a paper? One line a finding, with the way out; a block for an issue last.

No connection is opened, and nothing is changed but the cache's own stamps of verified files. torch.utils.collect_env is
not used: it adds a page of raw facts and seconds of subprocesses, and no finding with a way out.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from shared.core.catalog import Catalog
from shared.core.errors import UserError
from shared.core.files import cache_root, is_offline
from shared.core.provenance import commit_and_dirty, machine_description, machine_line
from shared.tools.hardware import bf16_slowdown

QUICK = 200e6  # bytes: larger files are hashed with --verify alone
LEAST_DISK, AMPLE_DISK = 1e9, 10e9  # bytes: a mini run writes some MB, the artwork and the environment 3 GB


@dataclass(frozen=True)
class Finding:
    """What was found, and if it is not `ok` what to do."""

    level: Literal["ok", "note", "problem"]
    what: str
    way_out: str = ""

    def __str__(self) -> str:
        return f"{self.level:8} {self.what}" + (f": {self.way_out}" if self.way_out else "")


def doctor(catalog: Catalog, paper: str | None = None, scale: str = "mini", verify: bool = False) -> int:
    """Print every finding as it is made, and the block; 1 where there is a problem, else 0."""
    if paper is not None:
        catalog.known(paper)
    catalog.recipe_path(catalog.names()[0], scale)  # a scale that there is
    findings = []
    for finding in examine(catalog, paper, scale, verify):
        print(finding, flush=True)
        findings.append(finding)
    print(f"\nto paste into an issue:\n\n{block(findings, catalog.root)}")
    return int(any(finding.level == "problem" for finding in findings))


def examine(catalog: Catalog, paper: str | None, scale: str, verify: bool) -> Iterator[Finding]:
    """All findings, one after the other; where a part cannot be examined, that is one."""
    root, names = catalog.root, [paper] if paper else catalog.names()
    parts = [
        code(root),
        versions(root),
        machine(),
        disks(root),
        network(),
        weights(catalog, verify),
        *(recipe(catalog, name, scale, estimated=paper is not None) for name in names),
    ]
    for part in parts:
        try:
            yield from part
        except (UserError, OSError) as error:
            yield Finding("problem", str(error))


# ---- code and versions


def code(root: Path) -> Iterator[Finding]:
    commit, dirty = commit_and_dirty(root)
    if commit is None:
        yield Finding("note", "no git checkout", "a report will name no commit; `git clone` rather than an archive")
    elif dirty:
        way_out = "a report from here is not kept as evidence; commit first"
        yield Finding("note", f"commit {commit[:12]} with uncommitted changes", way_out)
    else:
        yield Finding("ok", f"commit {commit[:12]}, nothing changed")


def versions(root: Path) -> Iterator[Finding]:
    """The libraries that pyproject.toml asks for: there, new enough, and as tested (constraints.txt)."""
    required, tested, differ = requirements(root), pins(root), []
    for name, least in required.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("problem", f"{name} is not installed", "make install")
            continue
        if least and _numbers(version) < _numbers(least):
            yield Finding("problem", f"{name} {version} is older than {least}", "make install")
        elif tested.get(name) != version.split("+")[0]:
            pin = f"tested: {tested[name]}" if name in tested else "no version of it in constraints.txt"
            differ.append(f"{name} {version} ({pin})")
    if differ:
        way_out = "make install takes the tested ones; others often work, but a difference may come from them"
        yield Finding("note", f"{len(differ)} of {len(required)} libraries not as tested, {', '.join(differ)}", way_out)
    elif required:
        yield Finding("ok", f"{len(required)} libraries, those installed all as tested (constraints.txt)")
    if not required:
        yield Finding("note", "no pyproject.toml with dependencies", "run in a checkout of the repository")
    if lacking := [name for name in ("pytest", "transformers") if not find_spec(name)]:
        yield Finding("note", f"{' and '.join(lacking)} not installed", "the parity rung would not run; make install")


def requirements(root: Path) -> dict[str, str]:
    """{distribution: least version or ""} of pyproject.toml's own dependencies."""
    found = re.search(r"^dependencies = \[(.*?)^\]", _text(root / "pyproject.toml"), re.M | re.S)  # tomllib needs 3.11
    return dict(re.findall(r'^\s*"([\w.-]+)(?:>=([\d.]+))?', found[1] if found else "", re.M))


def pins(root: Path) -> dict[str, str]:
    """{distribution: version} of constraints.txt, names as pyproject.toml spells them."""
    found = re.findall(r"^([\w.-]+)==(\S+)", _text(root / "constraints.txt"), re.M)
    return {name.lower(): version.split("+")[0] for name, version in found}


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8")
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


# ---- the machine


def machine() -> Iterator[Finding]:
    """Devices, cores and memory as a report would describe them, and whether bf16 pays."""
    try:
        described = machine_description()
    except Exception as error:  # a broken install raises anything: OSError, ImportError, RuntimeError of a driver
        yield Finding("problem", f"torch does not start ({type(error).__name__}: {error})", "make install")
        return
    free = available_memory()
    yield Finding("ok", machine_line(described) + (f"; {free / 1e9:.1f} GB of memory free" if free else ""))
    if described["cores"] < (there := os.cpu_count() or 1):
        yield Finding(
            "note", f"{described['cores']} of {there} cores for this process", "taskset or a container says so"
        )
    where = "cuda" if described["gpus"] else "cpu"
    slower = bf16_slowdown(where)
    what = f"bf16 takes {slower:.{0 if slower > 2 else 2}f} times as long as fp32 on this {where} (a small product)"
    yield Finding("note", what, "precision=32-true") if slower > 2 else Finding("ok", what)


def available_memory() -> float | None:
    """Bytes that a new process could take without swapping; None where the system does not say."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.M)
    if found:
        return 1024.0 * int(found[1])
    with suppress(AttributeError, ValueError, OSError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return None


def disks(root: Path) -> Iterator[Finding]:
    yield _writable("runs", root / "runs", "run in a folder of your own")
    yield _writable("cache", cache_root(), "set PAPERS_CACHE to a folder of your own")


def _writable(name: str, folder: Path, way_out: str) -> Finding:
    """Whether a file can be made in a folder, or where it would be made, and how much disk is left there."""
    # os.path: a folder that may not be looked into is not there for us, where Path.exists would raise
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Finding("problem", f"{name} folder {folder}: not writable ({error.strerror})", way_out)
    free = shutil.disk_usage(place).free
    what = f"{name} folder {folder}: writable, {free / 1e9:.1f} GB free"
    if free < AMPLE_DISK:
        return Finding("problem" if free < LEAST_DISK else "note", what, "make room, or another disk")
    return Finding("ok", what)


def network() -> Iterator[Finding]:
    """What the environment says of the network; nothing is asked of it."""
    names = [name for name in ("PAPERS_OFFLINE", "HF_HUB_OFFLINE") if os.environ.get(name)]
    if is_offline():
        yield Finding("note", f"offline by {' and '.join(names)}", "what is not in the cache cannot be fetched; unset")
    else:
        proxies = [name for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY") if os.environ.get(name)]
        yield Finding("ok", "network allowed" + (f", through {proxies[0]}" if proxies else "") + " (not tried)")
    if shutil.which("npm") is None:
        yield Finding("note", "npm not found", "the emoji artwork comes through it; drawn shapes stand in without")


# ---- weights and data


def weights(catalog: Catalog, verify: bool) -> Iterator[Finding]:
    """Every entry of the manifest that the cache has: the right size and hash, or named as a problem."""
    from shared.weights.fetch import cached
    from shared.weights.manifest import load_manifest

    manifest, root = load_manifest(catalog.root / "checkpoints_manifest.yaml"), cache_root()
    entries = [entry for entry in manifest.values() if entry.source["type"] != "path"]
    whole, sized = [], []
    for entry in entries:
        path = root / entry.id / entry.name
        try:
            if not path.exists():
                continue
            size = path.stat().st_size
            right_size = entry.size in (None, size)
            if right_size and size > QUICK and not verify:
                sized.append(entry.id)
            elif entry.sha256 is None:
                yield Finding("note", f"{entry.id}: in the cache, but its hash is not in the manifest", "pin it")
            elif right_size and cached(entry, verify=True):
                whole.append(entry.id)
            else:
                way_out = f"python -m papers fetch {entry.id} --verify"
                yield Finding("problem", f"{entry.id}: damaged in the cache", way_out)
        except (UserError, OSError) as error:
            yield Finding("problem", f"{entry.id}: {error}", "see what lies there, and remove it")
    checked = f"{len(whole)} of {len(entries)} files of the manifest in the cache by size and hash"
    yield Finding("ok", checked + (f" ({', '.join(whole)})" if whole else ""))
    if sized:
        way_out = "their hash: python -m papers doctor --verify"
        yield Finding("note", f"{len(sized)} more by size alone, being large ({', '.join(sized)})", way_out)


# ---- recipes


def recipe(catalog: Catalog, name: str, scale: str, estimated: bool) -> Iterator[Finding]:
    """What a recipe was measured to take, here or in the committed run, and (loading the paper) what it should take."""
    if estimated:
        yield _estimate(catalog, name, scale)
    here = sorted((catalog.root / "runs" / name / scale).glob("*/report.json"), key=lambda path: path.stat().st_mtime)
    committed = sorted((catalog.root / "results" / name).glob(f"{scale}-*.json"))
    for path in [*reversed(here), *committed]:
        try:
            report = json.loads(path.read_text())
            described, minutes, command = report["machine"], report["seconds"] / 60, report["command"]
            on = ", ".join(described["gpus"]) or f"{described['cores']} cores of {described['cpu']}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield Finding("note", f"{path}: not a report", "make reproduce writes another")
            continue
        which = "newest run here" if path in here else "committed run"
        measured = f"{minutes:.1f} minutes on {on}, its memory not recorded ({which}: {command})"
        yield Finding("ok", f"{name} {scale}, measured: {measured}")
        return
    yield Finding("note", f"{name} {scale}: never measured", f"make reproduce PAPER={name} SCALE={scale}")


def _estimate(catalog: Catalog, name: str, scale: str) -> Finding:
    from shared.tools.plan import claims_and_arms, estimate

    settings = catalog.recipe(name, scale, [])
    if "claims" not in settings.rungs:
        return Finding("ok", f"{name} {scale} trains nothing; for a training past this machine: python -m papers plan")
    _, arms = claims_and_arms(catalog, settings)
    structure = catalog.package(name).structure
    parameters, forward = structure.measure(settings.model)["total"], structure.forward_flops(settings.model)
    wanted, free = estimate(settings, parameters, forward, len(arms)), available_memory()
    what = f"{name} {scale}, estimated to a factor of two: {wanted}"
    if free and wanted.memory > free:
        return Finding("problem", f"{what}, more than is free", "ARGS=jobs=1 takes less")
    return Finding("ok", what)


# ---- the block


def block(findings: list[Finding], root: Path) -> str:
    """All findings, fenced, without names of people, machines or their folders."""
    lines = [hide(str(finding), root) for finding in findings]
    return "\n".join(["```text", "python -m papers doctor", *lines, "```"])


def hide(text: str, root: Path) -> str:
    """Paths below the checkout become relative to it, those below the home ~; user and host name are left out."""
    for path, short in ((root, "."), (Path(os.path.realpath(root)), "."), (_home(), "~")):
        if path and len(path.parts) > 1:
            text = re.sub(rf"(?<![\w.]){re.escape(str(path))}(?![\w-])", short, text)
    text = re.sub(r"(?<![\w.])(/home/[^\s/:,)]+|/Users/[^\s/:,)]+|/root(?![\w-]))", "~", text)  # of others
    for name, short in ((_user(), "USER"), (socket.gethostname(), "HOST")):
        if name and name != "root":  # the name of a folder and of an account, and nobody's own
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", short, text)
    return text.replace("```", "'''")


def _home() -> Path | None:
    with suppress(RuntimeError):
        return Path.home()
    return None


def _user() -> str:
    with suppress(Exception):  # a container's user without a name: KeyError, OSError or ImportError by version
        return getpass.getuser()
    return ""
