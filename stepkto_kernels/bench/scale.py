"""`stepkto doctor --plan` of a model on many GPUs: its flags, and what it prints."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from stepkto_kernels.checks import require
from stepkto_kernels.plan import MIB
from stepkto_kernels.scaling import (
    DEVICES,
    FILL,
    GB,
    HEADS,
    KLS,
    MODELS,
    REFERENCES,
    Device,
    Estimate,
    Job,
    Model,
    estimate,
)
from stepkto_kernels.training.report import markdown_table

DEVICE = "h200"
NOT_MEASURED = "On paper: no figure for a GPU was measured."
# Flag -> field of Device and its unit
RATES = {
    "gemm_tflops": ("gemm_flops", 1e12, "TFLOP/s that a large GEMM reaches"),
    "peak_tflops": ("peak_flops", 1e12, "TFLOP/s that --mfu is a share of"),
    "memory_gb_s": ("copy_bytes", GB, "GB/s read and written by a copy"),
    "capacity_gb": ("capacity", GB, "GB of memory"),
    "nvlink_gb_s": ("nvlink", GB, "GB/s to GPUs of the node, one direction"),
    "network_gb_s": ("network", GB, "GB/s a GPU to other nodes, one direction"),
    "mfu": ("mfu", 1.0, "share of peak that the backbone's operations reach"),
}
SIZES = {
    "hidden": "hidden size",
    "vocabulary": "tokens of the vocabulary",
    "layers": "layers",
    "intermediate": "inner width of the MLP (default 8/3 of hidden)",
    "heads": "attention heads (default hidden / 128)",
    "kv_heads": "heads of keys and values (default: all)",
    "parameters": "all parameters, where the shapes above do not tell",
}
COUNTS = {
    "gpus": "GPUs",
    "sequences": "sequences of a step, on all GPUs",
    "prompt": "tokens of a prompt",
    "completion": "tokens of a completion",
    "tensor": "GPUs that share matrices, and the vocabulary of the head",
    "context": "GPUs that share a sequence",
    "shard": "GPUs that share the state (FSDP; default: all; 1: replicas)",
    "micro_batch": "sequences at once on a data-parallel rank (default: what fits)",
    "lora_rank": "train adapters of this rank (default: every parameter)",
    "samples": "solutions sampled for each sequence that is trained on",
}
SWITCHES = {
    "drop_prompt": "only completions reach the head (default)",
    "checkpointing": "recompute activations in the backward pass (default)",
    "tied": "the embedding is the head",
}
CHOICES: dict[str, tuple[str, ...]] = {"reference": REFERENCES, "kl": KLS, "head": HEADS}
EXPLAINED = {
    "reference": "log-probs of the reference: computed, or cached for the batch's own sequences, "
    "or for mismatched pairs too",
    "kl": "reference point",
    "head": "mode of the policy's head (default fused, recompute where --tensor)",
}
FLAGS = ("model", "device", *SIZES, *COUNTS, *CHOICES, *SWITCHES, *RATES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing has a default here, so that what was given can be told."""
    group = parser.add_argument_group("--plan without numbers", "a step of a model on many GPUs")
    flag = lambda name: "--" + name.replace("_", "-")
    defaults = {field.name: field.default for field in fields(Job)}
    group.add_argument(
        "--model",
        metavar="MODEL",
        help=f"{', '.join(MODELS)}, or a transformers config.json or its directory",
    )
    for name, what in {**SIZES, **COUNTS}.items():
        default = f" (default {defaults[name]})" if defaults.get(name) is not None else ""
        group.add_argument(flag(name), type=int, metavar="N", help=what + default)
    for name, choices in CHOICES.items():
        group.add_argument(flag(name), choices=choices, help=EXPLAINED[name])
    for name, what in SWITCHES.items():
        action = argparse.BooleanOptionalAction
        group.add_argument(flag(name), action=action, default=None, help=what)
    group.add_argument("--device", choices=list(DEVICES), help=f"default {DEVICE}")
    for name, (_, _, what) in RATES.items():
        group.add_argument(flag(name), type=float, metavar="X", help=f"{what}; default: --device's")


def given_flags(args: argparse.Namespace) -> list[str]:
    """Flags of this form of --plan that were given, as they are written."""
    return ["--" + name.replace("_", "-") for name in FLAGS if getattr(args, name) is not None]


def report(args: argparse.Namespace) -> str:
    """What a step costs.

    Raises:
        ValueError, OSError: a size, a layout or a file does not fit.
    """
    device = _device(args)
    given = {name: getattr(args, name) for name in (*COUNTS, *CHOICES, *SWITCHES)}
    del given["tied"]
    if args.budget is not None:
        given["budget"] = args.budget * MIB
    if device.kind == "cpu" and given["gpus"] is None:
        given["gpus"] = 1
    job = Job(**{name: value for name, value in given.items() if value is not None})
    return describe(estimate(_model(args), job, device))


def _model(args: argparse.Namespace) -> Model:
    given = {name: getattr(args, name) for name in (*SIZES, "tied")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.model is None:
        want = "N H V, or --model, or --hidden, --vocabulary and --layers"
        for name in ("hidden", "vocabulary", "layers"):
            require(name in given, "--plan", want, f"no --{name}")
        return Model.of(**given)
    known = MODELS.get(args.model)
    if known is None:
        path = Path(args.model)
        path = path / "config.json" if path.is_dir() else path
        want = f"one of {', '.join(MODELS)}, or a config.json"
        require(path.is_file(), "--model", want, args.model)
        known = Model.from_config(_read_object(path))
    return replace(known, **given)


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: want JSON, got {error}") from None
    require(isinstance(config, dict), str(path), "a JSON object", type(config).__name__)
    return config


def _device(args: argparse.Namespace) -> Device:
    device = DEVICES[args.device or DEVICE]
    rates = {}
    for name, (field, unit, _) in RATES.items():
        value = getattr(args, name)
        if value is not None:
            require(math.isfinite(value) and value > 0, name, "a number > 0", value)
            rates[field] = value * unit
    if "gemm_flops" in rates and "peak_flops" not in rates:
        # a device that is faster or slower throughout
        rates["peak_flops"] = device.peak_flops * rates["gemm_flops"] / device.gemm_flops
    return replace(device, **rates)


def describe(found: Estimate) -> str:
    """Times, memory and links of a step."""
    model, job, device = found.model, found.job, found.device
    layout = f"tensor {job.tensor} x context {job.context} x data {job.ranks}"
    trained = "every parameter" if job.lora_rank is None else f"LoRA of rank {job.lora_rank}"
    points = f"{job.kl} reference point, reference {job.reference}"
    lines = [
        f"{_count(model.total_parameters)} parameters, {_count(model.head_parameters)} of them "
        f"the head, on {job.gpus} x {device.name}: {layout}, state over {job.tensor * job.shards}",
        f"{job.sequences} sequences of {job.prompt} + {job.completion} tokens, "
        f"{job.micro_batch} at once on a rank; {trained}, {job.head_mode} head, {points}",
    ]
    if device.kind != "cpu":
        lines.append(NOT_MEASURED)
    tables = [times_table(found), memory_table(found)]
    if found.links:
        tables.append(links_table(found))
    notes = [
        "Logits of the naive head, all tokens of the micro-batch: "
        f"{figure(found.naive_logits / GB)} GB; "
        f"here: {figure(found.memory['logits of the head'] / GB)} GB.",
    ]
    if not found.fits:
        notes.append(
            f"Does not fit: {figure(found.bytes / GB)} GB "
            f"of {figure(FILL * device.capacity / GB)} GB. "
            "Try more GPUs, --tensor, --context or --lora-rank."
        )
    if job.samples:
        notes.append(_sampling(found))
    return "\n".join(["\n".join(lines) + "\n", *tables, "\n".join(notes) + "\n"])


def times_table(found: Estimate) -> str:
    """Seconds a step by part, what takes none left out."""
    share = lambda seconds: f"{100 * seconds / found.seconds:.1f}"
    tera = lambda flops: figure(flops / 1e12) if flops else "-"
    rows = [
        [part.name, figure(part.seconds), share(part.seconds), tera(part.flops)]
        for part in found.parts
        if part.seconds
    ]
    flops = sum(part.flops for part in found.parts)
    rows.append(["step", figure(found.seconds), "100.0", tera(flops)])
    return markdown_table(["time of a GPU", "s", "%", "TFLOP"], rows)


def memory_table(found: Estimate) -> str:
    rows = [[name, figure(size / GB)] for name, size in found.memory.items()]
    rows.append(["all", figure(found.bytes / GB)])
    return markdown_table(["memory of a GPU", "GB"], rows)


def links_table(found: Estimate) -> str:
    """What a GPU sends in a step; times before any of it is hidden behind arithmetic."""
    rows = [[link.name, figure(link.moved / GB), figure(link.seconds)] for link in found.links]
    exposed = found.of("communication")
    rows.append(["of which the step waits for", "", figure(exposed)])
    return markdown_table(["links of a GPU", "GB sent", "s"], rows)


def _sampling(found: Estimate) -> str:
    if math.isinf(found.sampling):
        return "Sampling: the weights do not fit."
    solutions = found.job.samples * found.job.sequences
    return f"Sampling {solutions} solutions before the step: {figure(found.sampling)} s."


def figure(value: float) -> str:
    """Three digits, and no fewer than those before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} G" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"
