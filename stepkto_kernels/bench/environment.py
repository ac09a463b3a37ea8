"""Where and with what a result was measured."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence

import torch

import stepkto_kernels
from stepkto_kernels.bench.peers import version

PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "transformers", "triton", "numpy")


def environment(device: str, command: str = "") -> dict[str, object]:
    gpu = {"cuda": torch.version.cuda} if device == "cuda" else {}
    return {
        "device": device_name(device),
        **gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stepkto_kernels": stepkto_kernels.__version__,
        "versions": versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of those that are installed."""
    found = {name: version(name) for name in packages}
    return {name: value for name, value in found.items() if value is not None}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_model()}, {os.cpu_count()} cores"


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Of the checkout that the package is imported from, "unknown" for an installed package."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:  # a checkout on a machine without git
        return "unknown"
    return done.stdout.strip() or "unknown"
