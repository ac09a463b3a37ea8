"""The tables of docs/SCALING.md: the model beside what was measured, and what it says of GPUs.

benchmarks/scaling.py writes them. Letters: N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepkto_kernels.bench.options import Row
from stepkto_kernels.bench.scale import figure
from stepkto_kernels.bench.timing import GEMM_UNITS
from stepkto_kernels.plan import MIB
from stepkto_kernels.scaling import (
    DEVICES,
    FP32_BYTES,
    GB,
    KLS,
    MODELS,
    REFERENCES,
    Device,
    Estimate,
    Job,
    Model,
    estimate,
    head_cost,
    head_workspace,
    link_bytes_a_second,
    ring_bytes,
    sharded_head_bytes,
)
from stepkto_kernels.training.report import markdown_table

CPU, H200 = DEVICES["cpu"], DEVICES["h200"]
GPUS = (8, 64, 256, 1024)
STEP = Job(sequences=1024)  # 512 + 2048 tokens each
LORA = replace(STEP, lora_rank=16)
LONG = Job(sequences=128, completion=32768 - 512)
SMALL = {  # published shapes; their heads are tied
    "0.5B (Qwen 2.5)": Model.of(
        *(896, 151936, 24), intermediate=4864, heads=14, kv_heads=2, tied=True
    ),
    "1B (Llama 3.2)": Model.of(
        *(2048, 128256, 16), intermediate=8192, heads=32, kv_heads=8, tied=True
    ),
}
SIZES = {**SMALL, **{name.removeprefix("llama3-").upper(): m for name, m in MODELS.items()}}
LARGE = tuple(SIZES)[len(SMALL) :]


# ---- beside what was measured -----------------------------------------------------------------


def measured_times(results: Path) -> list[tuple[Row, str, float]]:
    """Our rows of head_cpu.json and loss_cpu.json, their mode, and the model's seconds.

    The rate of a GEMM is that of the bare GEMM that the row was timed in turns with.
    """
    found = []
    for suite in ("head", "loss"):
        rows = json.loads((results / f"{suite}_cpu.json").read_text(encoding="utf-8"))["rows"]
        key = lambda row: (row["path"], row["N"], row["H"], row["V"], row["dtype"])
        bare = {key(row): row["ms_best"] / 1e3 for row in rows if row["name"] == "gemm"}
        for row in rows:
            mode = row["path"] if suite == "head" else row["who"].split()[-1]
            dtype = row["dtype"] == "float32"
            if row["name"] != "ours" or row["backend"] != "native" or not row["ms_best"]:
                continue
            if mode not in ("forward", "frozen", "fused", "cached", "recompute") or not dtype:
                continue
            N, H, V = row["N"], row["H"], row["V"]
            device = replace(CPU, gemm_flops=2 * GEMM_UNITS * N * H * V / bare[key(row)])
            seconds = head_cost(device, mode, N, H, V).seconds
            if row["path"] == "kto+ref":
                seconds += head_cost(device, "forward", N, H, V).seconds
            found.append((row, mode, seconds))
    return found


def times_table(results: Path) -> str:
    rows = [
        [
            f"{row['path']}, {mode}" if row["suite"] == "loss" else mode,
            f"{row['N']}x{row['H']}x{row['V']}",
            f"{seconds:.2f}",
            f"{row['ms_best'] / 1e3:.2f}",
            f"{seconds / row['ms_best'] * 1e3:.2f}",
        ]
        for row, mode, seconds in measured_times(results)
    ]
    header = ["mode", "N x H x V", "predicted s", "measured s", "predicted / measured"]
    return markdown_table(header, rows)


def measured_memory(results: Path) -> list[tuple[Row, float]]:
    """Our rows of memory_cpu.json and the model's MiB."""
    rows = json.loads((results / "memory_cpu.json").read_text(encoding="utf-8"))["rows"]
    found = []
    for row in rows:
        if row["name"] != "ours" or row["backend"] != "native" or row["extra_mib"] is None:
            continue
        budget = None if row["budget_mib"] is None else row["budget_mib"] * MIB
        size = head_workspace(CPU, row["path"], row["N"], row["H"], row["V"], budget)
        found.append((row, size / MIB))
    return found


def memory_table(results: Path) -> str:
    rows = []
    for row, size in measured_memory(results):
        budget = "-" if row["budget_mib"] is None else row["budget_mib"]
        shape = f"{row['N']}x{row['H']}x{row['V']}"
        extra = row["extra_mib"]
        rows.append([row["path"], shape, budget, f"{size:.0f}", f"{extra:.0f}"])
        rows[-1].append(f"{size - extra:+.0f}")
    header = ["mode", "N x H x V", "budget MiB", "predicted MiB", "measured MiB", "difference"]
    return markdown_table(header, rows)


def small_step(result: dict[str, Any]) -> Estimate:
    """The model's step of step_cpu.json, at the rate of its own bare GEMM."""
    model = Model.of(
        *(result["hidden"], result["vocabulary"], result["layers"]),
        intermediate=result["intermediate"],
        heads=result["heads"],
    )
    scored = result["sequences"] * result["completion"]
    rate = 2 * scored * model.hidden * model.vocabulary / result["unit_s"]
    job = Job(
        gpus=1,
        sequences=result["sequences"],
        prompt=result["prompt"],
        completion=result["completion"],
        checkpointing=False,
    )
    return estimate(model, job, replace(CPU, gemm_flops=rate, peak_flops=rate))


def step_table(results: Path) -> str:
    """A whole step on the CPU: our modes as measured, and a trainer with the chunked head."""
    result = json.loads((results / "step_cpu.json").read_text(encoding="utf-8"))
    found = small_step(result)
    everything = found.seconds - found.of("optimizer")
    pairs = [
        ("our modes: step without optimizer", everything, result["step_s"]),
        ("our modes: backbones", found.of("backbone"), result["backbone_s"]),
        ("our modes: heads and loss", found.of("head"), result["step_s"] - result["backbone_s"]),
    ]
    rows = [[name, f"{p:.1f}", f"{m:.1f}", f"{p / m:.2f}"] for name, p, m in pairs]
    # What TRL 1.16's KTOTrainer took, by hand and on another day; all tokens reach its head. The
    # rate is that of that day's bare GEMM: three units of 2048 x 1024 x 32000 in 3.25 s.
    rate = 2 * 3 * 2048 * 1024 * 32000 / 3.25
    whole = replace(found.job, drop_prompt=False)
    that_day = replace(CPU, gemm_flops=rate, peak_flops=rate)
    trl = estimate(found.model, whole, that_day)
    unit = 2 * whole.sequences * whole.length * trl.model.head_parameters / rate
    rows.append(["TRL: a unit, all tokens", f"{unit:.1f}", "2.4", f"{unit / 2.4:.2f}"])
    backbone = trl.of("backbone")
    rows.append(["TRL: backbones", f"{backbone:.1f}", "3", f"{backbone / 3:.2f}"])
    # it recomputes: four units, and one for each of three forward passes
    gemms = 7 * unit + backbone
    rows.append(["TRL: step, its GEMMs alone", f"{gemms:.1f}", "62-65", f"{gemms / 63.5:.2f}"])
    ours = estimate(found.model, found.job, that_day)
    seconds = ours.seconds - ours.of("optimizer")
    rows.append(["the same step by our modes, that day", f"{seconds:.1f}", "-", "-"])
    return markdown_table(["8 x (80 + 192) tokens", "predicted s", "s", "predicted / s"], rows)


# ---- on GPUs ----------------------------------------------------------------------------------


def steps_table(job: Job, layouts: Sequence[tuple[str, int, int, int]]) -> str:
    """Model, GPUs, tensor and context of each row."""
    rows = []
    for name, gpus, tensor, context in layouts:
        found = estimate(SIZES[name], replace(job, gpus=gpus, tensor=tensor, context=context), H200)
        share = lambda seconds, found=found: f"{100 * seconds / found.seconds:.1f}"
        rest = sum(p.seconds for p in found.parts if p.name.startswith(("KL", "reference")))
        rows.append(
            [
                name,
                gpus,
                f"{tensor} x {context}",
                found.job.micro_batch,
                figure(found.seconds) if found.fits else "does not fit",
                share(found.of("policy backbone")),
                share(rest),
                share(found.of("head")),
                share(sum(link.seconds for link in found.links)),
                share(found.of("communication")),
                figure(found.bytes / GB),
                figure(found.naive_logits / GB),
                figure(found.memory["logits of the head"] / GB),
            ]
        )
    header = ["model", "GPUs", "tensor x context", "micro-batch", "step s", "policy backbone %"]
    header += ["reference and KL %", "all heads %", "links busy %", "waits for links %"]
    return markdown_table([*header, "GB", "naive logits GB", "our logits GB"], rows)


def full_table() -> str:
    layouts = [(name, gpus, 1, 1) for name in LARGE for gpus in GPUS]
    layouts += [(name, gpus, 8, 1) for name in LARGE[1:] for gpus in GPUS[1:]]
    return steps_table(STEP, layouts)


def lora_table() -> str:
    return steps_table(LORA, [(name, gpus, 1, 1) for name in LARGE for gpus in GPUS])


def long_table() -> str:
    layouts = [("8B", 8, 1, 1), ("8B", 64, 1, 1), ("8B", 256, 1, 8)]
    layouts += [("70B", 64, 1, 1), ("70B", 256, 8, 1), ("70B", 256, 1, 8), ("70B", 256, 8, 4)]
    layouts += [("405B", 256, 8, 8), ("405B", 1024, 8, 8), ("405B", 1024, 8, 16)]
    return steps_table(LONG, layouts)


def share_table() -> str:
    """The heads' share of a step by model and by what is trained, and of other choices."""
    cases: dict[str, dict[str, Any]] = {
        "full": {},
        "LoRA": {"lora_rank": 16},
        "zero KL, cached": {"kl": "zero", "reference": "cached"},
        "prompt scored": {"drop_prompt": False},
    }
    rows = []
    for name, model in SIZES.items():
        row = [name, model.layers, f"{100 * model.head_parameters / model.total_parameters:.1f}"]
        gpus = 1024 if name == "405B" else 64
        for changes in cases.values():
            found = estimate(model, replace(STEP, gpus=gpus, **changes), H200)
            row.append(f"{100 * found.of('head') / found.seconds:.1f}")
        rows.append(row)
    header = ["model", "layers", "head, % of parameters", *(f"{case}, %" for case in cases)]
    return markdown_table(header, rows)


def passes_table() -> str:
    """What reference and KL passes cost, of the 8B model on 64 GPUs."""
    rows = []
    slowest = 0.0
    for kl in KLS[:2]:
        for reference in REFERENCES if kl == "mismatched" else REFERENCES[:2]:
            job = replace(STEP, gpus=64, kl=kl, reference=reference)
            found = estimate(SIZES["8B"], job, H200)
            slowest = slowest or found.seconds
            with_lora = estimate(SIZES["8B"], replace(job, lora_rank=16), H200)
            row = [kl, reference, figure(found.seconds), f"{found.seconds / slowest:.2f}"]
            rows.append([*row, figure(with_lora.seconds)])
    header = ["reference point", "reference", "step s", "of the first", "LoRA step s"]
    return markdown_table(header, rows)


def sharding_table() -> str:
    """The head of a micro-batch of N tokens a GPU, all of V on each or an eighth of it.

    With an eighth, 8 GPUs work on the 8 N tokens of all of them.
    """
    rows = []
    gpus, tensor, moved = 256, 8, H200.itemsize + FP32_BYTES  # bytes of weight and of gradient
    for name in LARGE:
        H, V = SIZES[name].hidden, SIZES[name].vocabulary
        for N in (2048, 16384):
            row = [name, N, f"{1e3 * head_cost(H200, 'recompute', N, H, V).gemm:.0f}"]
            for t, tokens, mode in ((1, N, "fused"), (tensor, tensor * N, "recompute")):
                weight = moved * H * V / t
                held = weight + head_workspace(H200, mode, tokens, H, V // t)
                hidden = tokens * H * (H200.itemsize + FP32_BYTES)
                sent = ring_bytes(weight, gpus // t)
                gathers = sent / link_bytes_a_second(H200, gpus // t, t)
                row += [f"{(held + hidden) / GB:.1f}", f"{1e3 * gathers:.0f}"]
            sums = sharded_head_bytes(tensor * N, H, tensor, gradient=True)
            rows.append([*row, f"{1e3 * sums / link_bytes_a_second(H200, tensor, 1):.1f}"])
    header = ["model", "N", "4 units ms", "whole: GB held", "gather, scatter ms"]
    return markdown_table([*header, "eighth: GB held", "gather, scatter ms", "all-reduce ms"], rows)


def scratch_table() -> str:
    """What a larger block of the fused loss saves, by H."""
    rows = []
    for H in (2048, 4096, 8192, 16384):
        for gib in (1, 2, 4, 8):
            cost = head_cost(H200, "fused", 65536, H, 128256, gib * 1024 * MIB)
            rows.append(
                [
                    H,
                    gib,
                    gib * 1024 * MIB // (4 * 128256),
                    f"{100 * cost.rows / cost.gemm:.1f}",
                    f"{100 * cost.sums / cost.gemm:.1f}",
                    f"{cost.seconds / cost.gemm:.3f}",
                ]
            )
    header = ["H", "scratch GiB", "tokens at once", "rows, % of 3 units", "sums, %", "ratio"]
    return markdown_table(header, rows)


def sampling_table() -> str:
    """A step beside sampling what it trains on, one solution for each sequence."""
    rows = []
    for name, gpus in (("8B", 8), ("8B", 64), ("70B", 64), ("70B", 256), ("405B", 1024)):
        found = estimate(SIZES[name], replace(STEP, gpus=gpus, samples=1), H200)
        ratio = found.sampling / found.seconds
        rows.append([name, gpus, figure(found.seconds), figure(found.sampling), f"{ratio:.2f}"])
    return markdown_table(["model", "GPUs", "step s", "sampling s", "sampling / step"], rows)


def mfu_table() -> str:
    """How the heads' share hangs on the one assumption that matters most."""
    rows = []
    for name in LARGE:
        shares = []
        for mfu in (0.3, 0.45, 0.6):
            job = replace(STEP, gpus=1024 if name == "405B" else 64)
            found = estimate(SIZES[name], job, replace(H200, mfu=mfu))
            shares.append(f"{100 * found.of('head') / found.seconds:.2f}")
        rows.append([name, *shares])
    return markdown_table(["heads, % of a step", "mfu 0.3", "mfu 0.45", "mfu 0.6"], rows)


def devices_table() -> str:
    def row(device: Device) -> list[object]:
        rates = (device.peak_flops / 1e12, device.gemm_flops / 1e12, device.copy_bytes / 1e9)
        links = (device.capacity / GB, device.nvlink / GB, device.network / GB)
        return [device.name, *(figure(x) for x in (*rates, *links)), device.mfu]

    header = ["device", "peak TFLOP/s", "GEMM TFLOP/s", "copy GB/s", "GB", "NVLink GB/s"]
    return markdown_table([*header, "network GB/s", "mfu"], [row(d) for d in DEVICES.values()])


FROM_RESULTS: dict[str, Callable[[Path], str]] = {
    "times": times_table,
    "memory": memory_table,
    "step": step_table,
}
PREDICTED: dict[str, Callable[[], str]] = {
    "devices": devices_table,
    "full": full_table,
    "lora": lora_table,
    "long": long_table,
    "share": share_table,
    "mfu": mfu_table,
    "passes": passes_table,
    "sampling": sampling_table,
    "sharding": sharding_table,
    "scratch": scratch_table,
}
