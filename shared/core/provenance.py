"""Where a number comes from: commit, code, machine and environment."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def commit_and_dirty(root: str | Path) -> tuple[str | None, bool | None]:
    """(commit, True if anything but results/ differs from it) of the checkout at `root`; (None, None) without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # results/ is what runs write, and no input of any
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ".", ":(exclude)results"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def machine_description() -> dict[str, Any]:
    """cpu, cores, memory_gib, gpus, system, python, torch: what a reader needs to judge a duration. No host name."""
    import torch

    from shared.core.device import cores

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": _memory_gib(),
        "gpus": [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def environment_text() -> str:
    """Interpreter, platform and every installed distribution, one `name==version` a line."""
    names = {(d.metadata["Name"] or "?", d.version) for d in metadata.distributions()}
    lines = sorted({f"{name}=={version}" for name, version in names}, key=str.lower)
    return "\n".join([f"# python {platform.python_version()} on {platform.platform()}", *lines]) + "\n"


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def machine_line(machine: Mapping[str, Any]) -> str:
    """One line from tracking.machine_description's keys, those that are there."""
    gpus = machine.get("gpus") or []
    parts = [
        *gpus,
        machine.get("cpu"),
        f"{machine['cores']} cores" if machine.get("cores") else None,
        f"{machine['memory_gib']} GiB memory" if machine.get("memory_gib") else None,
        "no GPU" if "gpus" in machine and not gpus else None,
        machine.get("system"),
        f"Python {machine['python']}" if machine.get("python") else None,
        f"torch {machine['torch']}" if machine.get("torch") else None,
    ]
    return ", ".join(str(part) for part in parts if part) or "not recorded"


def code_digest(root: Path, folders: Sequence[str] = ("papers", "shared")) -> str:
    """Sixteen hex digits over every Python file and card that a run executes or reads."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in (".py", ".yaml")):
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]
