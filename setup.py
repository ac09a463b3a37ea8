"""Builds the C++ and CUDA kernels; pyproject.toml holds the metadata.

Both extensions are optional: where one cannot be built the package works without it, and
stepkto_kernels.available_backends() says so. They do not link against torch.

CUDA needs nvcc: in CUDA_HOME, CUDA_PATH or PATH. STEPKTO_CUDA=0 leaves it out, STEPKTO_CUDA=1 makes
it an error not to have it.
"""

import glob
import os
import shutil
import subprocess
import sysconfig

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ARCHITECTURES = (80, 90, 100, 120)  # A100, H100 and H200, B200, RTX 50
HEADERS = sorted(glob.glob("csrc/*.h"))

native = Pybind11Extension(
    "stepkto_kernels._native",
    ["csrc/bindings.cpp", "csrc/rows_cpu.cpp", "csrc/segments_cpu.cpp"],
    depends=HEADERS,
    cxx_std=17,
    # no contraction into fused multiply-add: every instruction set gives the same bits
    extra_compile_args=[
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fopenmp",
    ],
    extra_link_args=["-fopenmp"],
    optional=True,
)

cuda_wanted = os.environ.get("STEPKTO_CUDA", "if there is nvcc")
cuda = Extension(
    "stepkto_kernels._cuda",
    ["csrc/bindings_cuda.cpp", "csrc/step_kto_cuda.cu"],
    depends=HEADERS,
    optional=cuda_wanted != "1",
)


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    in_homes = (shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes)
    return next(filter(None, in_homes), None) or shutil.which("nvcc")


nvcc = None if cuda_wanted == "0" else find_nvcc()
if cuda_wanted == "1" and nvcc is None:
    raise SystemExit("STEPKTO_CUDA=1: no nvcc in CUDA_HOME, CUDA_PATH or PATH")


class BuildExt(build_ext):
    """Lets nvcc compile and link the CUDA extension: it finds its own static runtime."""

    def run(self) -> None:
        if nvcc is None:  # only now: a source distribution has the file all the same
            self.extensions.remove(cuda)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext is not cuda:
            super().build_extension(ext)
            return
        assert nvcc is not None
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            listed = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
            codes = [code for code in ARCHITECTURES if f"sm_{code}" in listed]
            options = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
            # PTX, for later GPUs
            options.append(f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}")
            includes = (pybind11.get_include(), sysconfig.get_paths()["include"])
            options += [f"-I{path}" for path in includes]
            # -fmad=false: as -ffp-contract=off above
            options += ["-std=c++17", "-O3", "-fmad=false", "-cudart=static", "-shared"]
            options += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xlinker=--exclude-libs=ALL"]
            subprocess.run([nvcc, *options, *ext.sources, "-o", target], check=True)
        except (OSError, IndexError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{nvcc}: {error!r}") from error


setup(ext_modules=[native, cuda], cmdclass={"build_ext": BuildExt})
