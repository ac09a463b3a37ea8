"""What the compiler makes of every Triton kernel, on any machine: no GPU is needed.

Each configuration is compiled for sm_80, sm_90 and sm_100; registers, stack (a spill or a local
array) and the instruction mix are read with the cuobjdump of the Triton package. Prints one JSON
object a line; exit status 1 if any configuration spills or does not fit.

    python benchmarks/compile_report.py [--sm 90] [--only TEXT] [--output FILE]

With --output, benchmarks/roofline.py then puts the summary into ROOFLINE.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has nothing to compile
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from stepkto_kernels.kernels import gemm_epilogue, rows  # noqa: E402

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
OPCODES = r"\b(HGMMA|UTCHMMA|HMMA|UTMALDG|UTMASTG|LDGSTS|LDG|STG|MUFU|STL|LDL|ATOM|RED)\b"
# Shared memory that one program may have, bytes: CUDA C++ programming guide, compute capabilities
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CAPABILITIES = tuple(SHARED)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

OPTIONS = ("HAS_BIAS", "HAS_SCALE", "HAS_SOFTCAP", "HAS_TEMPERATURE")
STATS = ("HAS_LOGIT_SUM", "HAS_MOMENT", "HAS_SQUARE")
GRADIENT = ("HAS_DLOGP", "HAS_ENTROPY")
# Flags switch code on: nothing, everything and each alone are compiled, not every mixture.
SCALARS = {"logit_scale": "fp32", "softcap": "fp32", "temperature": "fp32"}


class Config(NamedTuple):
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    capability: int
    num_warps: int
    num_stages: int
    label: str


def flags(names: tuple[str, ...], on: tuple[str, ...]) -> dict[str, bool]:
    return {name: name in on for name in names}


def gemm_configs(capability: int) -> Iterator[Config]:
    forward = [(), *((name,) for name in OPTIONS + STATS), OPTIONS + STATS]
    dlogits = [("HAS_DLOGP",), *(("HAS_DLOGP", name) for name in OPTIONS + ("HAS_ENTROPY",))]
    dlogits += [(), OPTIONS + GRADIENT]
    cases = [("bf16", False), ("fp16", False), ("fp32", False)]
    if capability >= 90:
        cases += [("bf16", True), ("fp16", True)]
    for dtype, descriptors in cases:
        if dtype == "fp16":  # the same instructions as bf16: the two ends suffice
            picked = [forward[0], forward[-1]], [dlogits[0], dlogits[-1]]
        elif dtype == "fp32":
            picked = [forward[-1]], [dlogits[-1]]
        else:
            picked = forward, dlogits
        for kernel, sets in zip(
            (gemm_epilogue._forward_kernel, gemm_epilogue._dlogits_kernel), picked, strict=True
        ):
            for on in sets:
                yield gemm_config(kernel, on, dtype, descriptors, capability)


def gemm_config(
    kernel: Any, on: tuple[str, ...], dtype: str, descriptors: bool, capability: int
) -> Config:
    is_forward = kernel is gemm_epilogue._forward_kernel
    heavy = set(STATS) | {"HAS_ENTROPY", "HAS_BIAS", "HAS_SOFTCAP"}
    kind = "narrow" if heavy & set(on) else "forward" if is_forward else "dlogits"
    shape = gemm_epilogue.tile_shape(capability, descriptors, DTYPES[dtype], kind)
    matrix = lambda block: (
        f"tensordesc<{dtype}[{block}, {shape.BLOCK_K}]>" if descriptors else f"*{dtype}"
    )
    signature = {"hidden": matrix(shape.BLOCK_M), "weight": matrix(shape.BLOCK_N)}
    signature |= {"target_ptr": "*i64", "bias_ptr": f"*{dtype}"}
    row = ["top_ptr", "sum_ptr", "logit_sum_ptr", "moment_ptr", "square_ptr", "target_logit_ptr"]
    if not is_forward:
        row = ["top_ptr", "logsum_ptr", "logp_ptr", "dlogp_ptr", "dentropy_ptr", "entropy_ptr"]
    signature |= dict.fromkeys(row, "*fp32")
    if not is_forward:
        signature["d_ptr"] = f"*{dtype}"
    sizes = ["n", "v", "H", "stride_hidden", "stride_weight"]
    sizes += [] if is_forward else ["v0", "stride_d"]
    signature |= dict.fromkeys(sizes, "i32") | SCALARS
    constants = flags(OPTIONS + (STATS if is_forward else GRADIENT), on)
    constants |= {"DESCRIPTORS": descriptors, "BLOCK_M": shape.BLOCK_M, "BLOCK_N": shape.BLOCK_N}
    constants |= {"BLOCK_K": shape.BLOCK_K, "GROUP_M": shape.GROUP_M}
    label = f"{dtype} {'descriptors' if descriptors else 'pointers'} {' '.join(on) or '-'}"
    return Config(
        kernel, signature, constants, capability, shape.num_warps, shape.num_stages, label
    )


def row_configs(capability: int) -> Iterator[Config]:
    tile = dict.fromkeys(("n", "v", "v0", "stride_x", "stride_d"), "i32") | SCALARS
    blocks = {"BLOCK_ROWS": 1, "BLOCK_V": rows.BLOCK_V}
    for dtype in DTYPES:
        for on in ((), OPTIONS + STATS + ("FROZEN",)):
            names = ("top", "sum", "logit_sum", "moment", "square", "target_logit", "running_top")
            signature = {"x_ptr": f"*{dtype}", "target_ptr": "*i64", "bias_ptr": "*fp32"}
            signature |= {f"{name}_ptr": "*fp32" for name in (*names, "rescale")}
            signature |= {"d_ptr": "*bf16"} | tile
            constants = flags(OPTIONS + STATS + ("FROZEN",), on) | blocks
            label = f"{dtype} {' '.join(on) or '-'}"
            yield Config(
                rows._fold_kernel, signature, constants, capability, rows.NUM_WARPS, 3, label
            )
        for on in ((), OPTIONS + GRADIENT):
            names = ("top", "logsum", "logp", "dlogp", "dentropy", "entropy")
            signature = {"x_ptr": f"*{dtype}", "target_ptr": "*i64", "bias_ptr": "*fp32"}
            signature |= {f"{name}_ptr": "*fp32" for name in names}
            signature |= {"d_ptr": "*bf16"} | tile
            constants = flags(OPTIONS + GRADIENT, on) | blocks
            label = f"{dtype} {' '.join(on) or '-'}"
            yield Config(
                rows._dlogits_kernel, signature, constants, capability, rows.NUM_WARPS, 3, label
            )
    for on in ((), STATS + ("HAS_TOP1",)):
        names = ("top", "sum", "logit_sum", "moment", "square", "target_logit", "logp", "out_top")
        names += ("logsum", "entropy", "mean_logit", "is_top1", "log_square")
        signature = {f"{name}_ptr": "*fp32" for name in names}
        signature |= dict.fromkeys(("n", "C", "vocabulary"), "i32")
        constants = flags(STATS + ("HAS_TOP1",), on)
        constants |= {"ROWS": rows.FINISH_ROWS, "CHUNKS": rows.FINISH_CHUNKS}
        yield Config(
            rows._finish_kernel, signature, constants, capability, 4, 3, " ".join(on) or "-"
        )


def inspect(config: Config) -> dict[str, Any]:
    """Compile, and read what came out. Pointers and sizes count as divisible by 16."""
    signature = config.signature | {name: "constexpr" for name in config.constants}
    names = config.kernel.arg_names
    divisible = lambda name: config.signature.get(name, "").startswith(("*", "i"))
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if divisible(name)}
    compiled = triton.compile(
        ASTSource(
            config.kernel,
            signature={name: signature[name] for name in names},
            constexprs=config.constants,
            attrs=attrs,
        ),
        target=GPUTarget("cuda", config.capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = lambda what: (
            subprocess.run(
                [BIN / "cuobjdump", what, file.name], capture_output=True, text=True, check=True
            ).stdout
        )
        usage, sass = dump("-res-usage"), dump("-sass")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "kernel": config.kernel.__name__,
        "config": config.label,
        "sm": config.capability,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "opcodes": dict(collections.Counter(re.findall(OPCODES, sass))),
    }


def problems(report: dict[str, Any]) -> list[str]:
    out = []
    if report["stack_bytes"]:
        out.append(f"{report['stack_bytes']} bytes of stack")
    if report["shared_bytes"] > SHARED[report["sm"]]:
        out.append(f"{report['shared_bytes']} bytes of shared memory")
    if "bf16" in report["config"] and "pointers" not in report["config"]:
        wanted = {90: "HGMMA", 100: "UTCHMMA"}.get(report["sm"])
        is_gemm = "descriptors" in report["config"]
        if is_gemm and wanted and wanted not in report["opcodes"]:
            out.append(f"no {wanted}")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="configurations whose name has this text")
    parser.add_argument("--sm", type=int, nargs="+", default=CAPABILITIES, choices=CAPABILITIES)
    parser.add_argument("--output", type=Path, help="JSON file for all reports")
    args = parser.parse_args()
    reports = []
    for capability in args.sm:
        for config in [*gemm_configs(capability), *row_configs(capability)]:
            name = f"{config.kernel.__name__} {config.label} sm_{capability}"
            if args.only not in name:
                continue
            report = inspect(config)
            report["problems"] = problems(report)
            reports.append(report)
            print(json.dumps(report), flush=True)
    if args.output:
        result = {"triton": triton.__version__, "reports": reports}
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(report["problems"] for report in reports))


if __name__ == "__main__":
    sys.exit(main())
