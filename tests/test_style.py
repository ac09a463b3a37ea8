"""Lint, format and types of the whole repository."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_clean(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_core_imports_torch_and_nothing_heavier():
    code = """
import sys
import torch
before = set(sys.modules)
import stepkto_kernels
ours = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not ours & {"transformers", "datasets", "triton", "matplotlib", "tqdm", "numpy"}, ours
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
