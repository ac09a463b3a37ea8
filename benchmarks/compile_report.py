"""What the compiler makes of every Triton kernel, on any machine: no GPU is needed.

Each configuration is compiled for sm_80, sm_90 and sm_100; registers, stack (a spill or a local
array) and the instruction mix are read with the cuobjdump of the Triton package. Prints one JSON
object a line; exit status 1 if any configuration spills or does not fit.

    python benchmarks/compile_report.py [--sm 90] [--only TEXT] [--output FILE]
    python benchmarks/compile_report.py --all --jobs 2 [--share 0.5]    # mixtures of options
    python benchmarks/compile_report.py --candidates                    # tiles.CANDIDATES

--all compiles every mixture of options that can be asked for, some 3000 in half an hour of CPU
time, or a random share of them. Left out even there: vocabulary chunks of fewer than 4096 columns,
and sizes, strides or addresses that are no multiple of 16, which Triton compiles anew.
With --output, benchmarks/roofline.py then puts the summary into ROOFLINE.md.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has nothing to compile
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from stepkto_kernels.kernels import gemm_epilogue, rows, tiles  # noqa: E402
from stepkto_kernels.kernels.tiles import TileShape  # noqa: E402

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
OPCODES = r"\b(HGMMA|UTCHMMA|HMMA|UTMALDG|UTMASTG|LDGSTS|LDG|STG|MUFU|STL|LDL|ATOM|RED)\b"
# Shared memory that one program may have, bytes: CUDA C++ programming guide, compute capabilities
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CAPABILITIES = tuple(SHARED)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

OPTIONS = ("HAS_BIAS", "HAS_SCALE", "HAS_SOFTCAP", "HAS_TEMPERATURE")
STATS = ("HAS_LOGIT_SUM", "HAS_MOMENT", "HAS_SQUARE")
GRADIENT = ("HAS_DLOGP", "HAS_ENTROPY")
SOURCES = ("gemm_epilogue.py", "rows.py", "tiles.py")
SEED = 0  # of the order in which --all takes mixtures
SCALARS = {"logit_scale": "fp32", "softcap": "fp32", "temperature": "fp32"}


class Config(NamedTuple):
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    capability: int
    num_warps: int
    num_stages: int
    registers: int | None  # at most, a thread
    label: str


def flags(names: tuple[str, ...], on: tuple[str, ...]) -> dict[str, bool]:
    return {name: name in on for name in names}


def subsets(names: tuple[str, ...], most: int | None = None) -> list[tuple[str, ...]]:
    """All of them, or those of up to so many names and the whole."""
    sizes = range(len(names) + 1)
    found = [on for size in sizes for on in itertools.combinations(names, size)]
    return [on for on in found if most is None or len(on) <= most or len(on) == len(names)]


def gemm_configs(capability: int, everything: bool) -> Iterator[Config]:
    """Flags switch code on: none, each alone, each pair and all of them; or every mixture."""
    most = None if everything else 2
    forward = subsets(OPTIONS + STATS, most)
    dlogits = [("HAS_DLOGP", *on) for on in subsets((*OPTIONS, "HAS_ENTROPY"), most)]
    cases = [("bf16", False), ("fp16", False), ("fp32", False)]
    if capability >= 90:
        cases += [("bf16", True), ("fp16", True)]
    for dtype, descriptors in cases:
        if dtype == "fp32":  # the planner never takes it
            picked = [forward[-1:], dlogits[-1:]]
        elif dtype == "fp16" and not everything:  # the instructions of bf16: the two ends suffice
            picked = [[sets[0], sets[-1]] for sets in (forward, dlogits)]
        else:
            picked = [forward, dlogits]
        for kernel, sets in zip(
            (gemm_epilogue._forward_kernel, gemm_epilogue._dlogits_kernel), picked, strict=True
        ):
            for on in sets:
                yield gemm_config(kernel, on, dtype, descriptors, capability)


HEAVY = {*STATS, "HAS_ENTROPY", "HAS_BIAS", "HAS_SOFTCAP"}  # what makes a launch "narrow"


def gemm_config(
    kernel: Any,
    on: tuple[str, ...],
    dtype: str,
    descriptors: bool,
    capability: int,
    shape: TileShape | None = None,
) -> Config:
    """With a tile shape in place of the default one."""
    is_forward = kernel is gemm_epilogue._forward_kernel
    kind = "narrow" if HEAVY & set(on) else "forward" if is_forward else "dlogits"
    if shape is None:
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
        kernel,
        signature,
        constants,
        capability,
        shape.num_warps,
        shape.num_stages,
        gemm_epilogue.register_bound(kind, DTYPES[dtype]),
        label,
    )


def row_configs(capability: int, everything: bool) -> Iterator[Config]:
    """Nothing and everything; or every mixture that the head and token_logprobs launch."""
    fold_flags, gradient_flags = OPTIONS + STATS + ("FROZEN",), OPTIONS + GRADIENT
    finish_flags = STATS + ("HAS_TOP1",)
    if everything:
        # the head's logits are fp32, and entropy with a frozen head is taken by recompute
        options = subsets(OPTIONS)
        fold = [("fp32", "fp32", on) for on in subsets(OPTIONS + STATS)]
        fold += [
            ("fp32", out, (*on, "FROZEN"))
            for out in DTYPES
            for on in subsets((*OPTIONS, "HAS_LOGIT_SUM", "HAS_SQUARE"))
        ]
        dlogits = [
            ("fp32", out, (*on, *gradient))
            for out in DTYPES
            for on in options
            for gradient in (("HAS_DLOGP",), GRADIENT)
        ]
        # given logits have no bias, statistics or entropy
        given = [(x, on) for x in ("bf16", "fp16") for on in options if "HAS_BIAS" not in on]
        fold += [(x, x, on) for x, on in given]
        dlogits += [(x, x, ("HAS_DLOGP", *on)) for x, on in given]
        finish = subsets(finish_flags)
    else:
        fold = [(x, "bf16", on) for x in DTYPES for on in ((), fold_flags)]
        dlogits = [(x, "bf16", on) for x in DTYPES for on in (("HAS_DLOGP",), gradient_flags)]
        finish = [(), finish_flags]
    names = ("top", "sum", "logit_sum", "moment", "square", "target_logit", "running_top")
    for x, out, on in fold:
        yield row_config(
            rows._fold_kernel, (*names, "rescale"), x, out, flags(fold_flags, on), capability
        )
    names = ("top", "logsum", "logp", "dlogp", "dentropy", "entropy")
    for x, out, on in dlogits:
        yield row_config(rows._dlogits_kernel, names, x, out, flags(gradient_flags, on), capability)
    names = ("top", "sum", "logit_sum", "moment", "square", "target_logit", "logp", "out_top")
    names += ("logsum", "entropy", "mean_logit", "is_top1", "log_square")
    for on in finish:
        signature = {f"{name}_ptr": "*fp32" for name in names}
        signature |= dict.fromkeys(("n", "C", "vocabulary"), "i32")
        constants = flags(finish_flags, on)
        constants |= {"ROWS": rows.FINISH_ROWS, "CHUNKS": rows.FINISH_CHUNKS}
        label = " ".join(on) or "-"
        yield Config(
            rows._finish_kernel, signature, constants, capability, 4, 3, rows.MAX_REGISTERS, label
        )


def row_config(
    kernel: Any, names: tuple[str, ...], x: str, out: str, on: dict[str, bool], capability: int
) -> Config:
    signature = {"x_ptr": f"*{x}", "target_ptr": "*i64", "bias_ptr": "*fp32"}
    signature |= {f"{name}_ptr": "*fp32" for name in names}
    signature |= {"d_ptr": f"*{out}"}
    signature |= dict.fromkeys(("n", "v", "v0", "stride_x", "stride_d"), "i32") | SCALARS
    constants = on | {"BLOCK_ROWS": 1, "BLOCK_V": rows.BLOCK_V}
    most = rows.MAX_REGISTERS
    label = f"{x} to {out} {' '.join(name for name in on if on[name]) or '-'}"
    return Config(kernel, signature, constants, capability, rows.NUM_WARPS, 3, most, label)


def configs(capability: int, everything: bool) -> list[Config]:
    """Each once; of everything the usual ones first."""
    sets = (False, True) if everything else (False,)
    found = [
        config
        for whole in sets
        for config in (*gemm_configs(capability, whole), *row_configs(capability, whole))
    ]
    return list({name(config): config for config in found}.values())


def name(config: Config) -> str:
    return f"{config.kernel.__name__} {config.label} sm_{config.capability}"


def candidates(capability: int) -> list[Config]:
    """Those of `stepkto tune`, of every kind with all that it may have to hold, in bf16."""
    forward, dlogits = gemm_epilogue._forward_kernel, gemm_epilogue._dlogits_kernel
    cases = [
        ("forward", forward, ("HAS_SCALE", "HAS_TEMPERATURE")),
        ("dlogits", dlogits, ("HAS_SCALE", "HAS_TEMPERATURE", "HAS_DLOGP")),
        ("narrow", forward, OPTIONS + STATS),
        ("narrow", dlogits, OPTIONS + GRADIENT),
    ]
    found = []
    shapes = dict.fromkeys(replace(shape, GROUP_M=8) for shape in tiles.CANDIDATES)
    for shape in shapes:  # GROUP_M is only a number in the code
        words = "x".join(map(str, astuple(shape)[:-1]))
        for descriptors in (False, True) if capability >= 90 else (False,):
            for kind, kernel, on in cases:
                config = gemm_config(kernel, on, "bf16", descriptors, capability, shape)
                way = "descriptors" if descriptors else "pointers"
                found.append(config._replace(label=f"bf16 {way} {words} {kind}"))
    return found


def survivors(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each architecture and operands the candidates, and the kinds they are without fault for.

    A shape that does not compile at all has "failed" among its problems.
    """
    found: dict[tuple[Any, ...], dict[str, list[str]]] = {}
    for report in reports:
        dtype, way, words, kind = report["config"].split()
        kinds = found.setdefault((report["sm"], f"{dtype} {way}", words), {})
        kinds.setdefault(kind, []).extend(report["problems"])
    return [
        {
            **dict(zip(("sm", "operands", "tile"), key, strict=True)),
            "kinds": [kind for kind, wrong in kinds.items() if not wrong],
        }
        for key, kinds in found.items()
    ]


def sample(found: list[Config], usual: list[Config], share: float) -> list[Config]:
    """The usual ones, then some of the others: the first of them in an order fixed by SEED."""
    known = {name(config) for config in usual}
    rest = [config for config in found if name(config) not in known]
    random.Random(SEED).shuffle(rest)
    return usual + rest[: max(round(share * len(found)) - len(usual), 0)]


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
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": config.registers,
        },
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


def operands(report: dict[str, Any]) -> str:
    """What a configuration reads: a dtype, and for a GEMM through what."""
    dtype, *rest = report["config"].split()
    if dtype not in DTYPES:
        return "fp32"
    return f"{dtype} {rest[0]}" if rest[0] in ("pointers", "descriptors") else dtype


def most(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kernel, architecture and operands the number of configurations and their most."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for report in reports:
        key = report["kernel"], report["sm"], operands(report)
        groups.setdefault(key, []).append(report)
    return [
        {
            **dict(zip(("kernel", "sm", "operands"), key, strict=True)),
            "compiled": len(group),
            "with_problems": sum(bool(report["problems"]) for report in group),
            **{
                name: max(report[name] for report in group)
                for name in ("registers", "stack_bytes", "shared_bytes")
            },
        }
        for key, group in groups.items()
    ]


def sources() -> str:
    """SHA-256 of the kernels' files, by which a test sees that a result is of other kernels."""
    folder = Path(gemm_epilogue.__file__).parent
    text = b"".join((folder / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(text).hexdigest()


def each_report(found: list[Config], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        yield from map(checked, found)
        return
    global _shared  # kernels cannot be pickled; a fork has them
    _shared = found
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_checked_at, range(len(found)))


_shared: list[Config] = []


def _checked_at(i: int) -> dict[str, Any]:
    return checked(_shared[i])


def checked(config: Config) -> dict[str, Any]:
    report = inspect(config)
    return {**report, "problems": problems(report)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="configurations whose name has this text")
    parser.add_argument("--sm", type=int, nargs="+", default=CAPABILITIES, choices=CAPABILITIES)
    parser.add_argument("--all", action="store_true", help="every mixture of options")
    parser.add_argument("--share", type=float, default=1.0, help="of --all, the usual ones in it")
    parser.add_argument("--candidates", action="store_true", help="tile shapes of `stepkto tune`")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--output", type=Path, help="JSON file to bring up to date")
    args = parser.parse_args()
    pick = lambda configs_of: [
        config for sm in args.sm for config in configs_of(sm) if args.only in name(config)
    ]
    if args.candidates:
        found = pick(candidates)
    else:
        found = usual = pick(lambda sm: configs(sm, everything=False))
        mixtures = pick(lambda sm: configs(sm, everything=True))
        if args.all:
            found = sample(mixtures, usual, args.share)
    reports = []
    for report in each_report(found, args.jobs):
        reports.append(report)
        print(json.dumps(report), flush=True)
    if args.candidates:
        result = {"candidates": survivors(reports)}
    else:
        result = {"triton": triton.__version__, "reports": reports[: len(usual)]}
        if args.all:
            share = {"mixtures": len(mixtures), "compiled": len(reports), "seed": SEED}
            result["all"] = {**share, "sources": sources(), "most": most(reports)}
    if args.output:
        before = json.loads(args.output.read_text("utf-8")) if args.output.exists() else {}
        text = json.dumps(before | result, indent=1) + "\n"
        args.output.write_text(text, encoding="utf-8")
    if args.candidates:  # some are meant to be dropped
        return 0
    return int(any(report["problems"] for report in reports))


if __name__ == "__main__":
    sys.exit(main())
