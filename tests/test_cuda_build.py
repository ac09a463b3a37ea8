"""What the CUDA build promises where there is no GPU: test_cuda.py has what the kernels compute."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from stepkto_kernels import cuda

ROOT = pathlib.Path(__file__).parent.parent
CUDA_HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
NVCC = CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin") or shutil.which("nvcc")
STATIC_SHARED = 48 * 1024  # what a kernel gets without asking


@pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME, CUDA_PATH or PATH")
@pytest.mark.parametrize("code", [80, 90, 100, 120])
def test_kernels_fit(code, tmp_path):
    """No register spills and no stack frame, which arrays indexed by a variable would need."""
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", "-cubin", f"-arch=sm_{code}"]
    command += ["-Xptxas", "-v", ROOT / "csrc/step_kto_cuda.cu", "-o", tmp_path / "out.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    if done.returncode and "Unsupported gpu architecture" in report:
        pytest.skip(f"this nvcc does not know sm_{code}")
    assert done.returncode == 0, report
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    assert len(kernels) == 5, report  # forward, sums, loss, read_sums, token_slopes
    frames = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
    assert len(frames) >= 3 * len(kernels) and set(frames) == {"0"}, report
    registers = re.findall(r"Used (\d+) registers", report)
    assert len(registers) == len(kernels) and max(map(int, registers)) <= 128, report
    assert all(int(size) <= STATIC_SHARED for size in re.findall(r"(\d+) bytes smem", report))


def python(*arguments, **environment):
    command, environment = [sys.executable, *arguments], os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_import_does_not_start_cuda():
    code = """
import torch
import stepkto_kernels
from stepkto_kernels import cuda
assert not torch.cuda.is_initialized()
assert "libcuda.so" not in open("/proc/self/maps").read()
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_package_works_without_the_extension():
    code = """
import sys
sys.modules["stepkto_kernels._cuda"] = None
import torch
from stepkto_kernels import cuda, segment_loss, step_kto
assert cuda.WHY_NOT.startswith("the CUDA extension is not there"), cuda.WHY_NOT
assert not cuda.serves(torch.device("cuda", 0))
assert step_kto.kernels("triton", torch.device("cuda", 0)) is segment_loss
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(cuda.WHY_NOT is not None, reason=str(cuda.WHY_NOT))
def test_extension_does_not_need_other_cuda_libraries():
    """The runtime is linked in, and the driver is looked for at the first call only."""
    if shutil.which("ldd") is None:
        pytest.skip("no ldd")
    done = subprocess.run(["ldd", cuda._cuda.__file__], capture_output=True, text=True, check=True)
    assert not re.search(r"libcuda|libcudart|libtorch|not found", done.stdout), done.stdout


def environment(tmp_path, wanted, with_nvcc):
    """Of a build, where nvcc is not installed or is a stand-in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if with_nvcc:
        (folder / "nvcc").write_text("#!/bin/sh\n")
        (folder / "nvcc").chmod(0o755)
    return {"STEPKTO_CUDA": wanted, "PATH": str(folder), "CUDA_HOME": "", "CUDA_PATH": ""}


@pytest.mark.parametrize(
    "wanted, with_nvcc, built",
    [
        ("", True, "optional"),
        ("", False, "no"),
        ("0", True, "no"),
        ("1", True, "required"),
    ],
)
def test_what_is_built(tmp_path, wanted, with_nvcc, built):
    pytest.importorskip("pybind11")
    code = """
import setuptools
import distutils.core
setup = distutils.core.run_setup("setup.py", stop_after="init")
build = setup.get_command_obj("build_ext")
build.ensure_finalized()
assert "csrc/step_kto_cuda.cu" in build.get_source_files()  # for a source distribution
build.build_extensions = lambda: None
build.run()
print([(extension.name, extension.optional) for extension in build.extensions])
"""
    done = python("-c", code, **environment(tmp_path, wanted, with_nvcc))
    assert done.returncode == 0, done.stderr
    assert "('stepkto_kernels._native', True)" in done.stdout
    expected = {"optional": "_cuda', True", "required": "_cuda', False", "no": None}[built]
    assert expected in done.stdout if expected else "_cuda" not in done.stdout


def test_required_without_nvcc_is_an_error(tmp_path):
    pytest.importorskip("pybind11")
    done = python("setup.py", "--version", **environment(tmp_path, "1", with_nvcc=False))
    assert done.returncode != 0
    assert "STEPKTO_CUDA=1: no nvcc in CUDA_HOME, CUDA_PATH or PATH" in done.stderr
