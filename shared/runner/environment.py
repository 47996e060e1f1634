"""On what a run ran: commit, versions, processor, GPU. No host name, no user name, no path."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from shared.runner.paths import ROOT

# Where the code is an export, whoever exported it says which commit it is; that goes before what Git knows of the copy.
COMMIT_VARIABLE = "PAPERCHECK_COMMIT"
CORES = "PAPERCHECK_CORES"  # set by a launcher that runs several at a time
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "hydra-core", "scipy", "wandb")


@functools.cache
def environment() -> dict[str, Any]:
    """A JSON-like description of the code and the machine."""
    exported = os.environ.get(COMMIT_VARIABLE)
    commit = exported or _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    dirty: bool | None = None
    if commit:
        dirty = not exported and bool(_output("git", "-C", str(ROOT), "status", "--porcelain"))
    return {
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "num_cores": num_cores(),
        "gpu": ", ".join(gpu_names()) or None,
    }


def num_cores() -> int:
    """Cores this process may use (containers, job schedulers and our own launcher often grant fewer than the machine has)."""
    granted = os.environ.get(CORES) or os.environ.get("SLURM_CPUS_PER_TASK")
    if granted and granted.isdigit():
        return max(1, int(granted))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs of this machine, without importing torch."""
    if not shutil.which("nvidia-smi"):
        return []
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()


def version(package: str) -> str | None:
    """The installed version of a package, None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
