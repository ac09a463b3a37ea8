"""Builds the CPU kernels; pyproject.toml holds the metadata.

The extension is optional: where it cannot be built the package works without it, and
stepkto_kernels.available_backends() says so. It does not link against torch.
"""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

native = Pybind11Extension(
    "stepkto_kernels._native",
    ["csrc/bindings.cpp", "csrc/rows_cpu.cpp", "csrc/segments_cpu.cpp"],
    depends=["csrc/kto_math.h", "csrc/rows_cpu.h", "csrc/segments_cpu.h"],
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

setup(ext_modules=[native])
