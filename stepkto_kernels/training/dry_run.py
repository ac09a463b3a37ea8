"""`stepkto train --dry-run`: what a run would do and hold, without weights or training."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from transformers import AutoConfig

from stepkto_kernels.bench import scale
from stepkto_kernels.scaling import DEVICES, KL, Device, Job, Model, estimate
from stepkto_kernels.training.arguments import StepKTOArguments
from stepkto_kernels.training.data import UNLABELLED
from stepkto_kernels.training.dataset import StepKTODataset, encode_dataset
from stepkto_kernels.training.models import load_tokenizer, trusts_code


def dry_run(own: dict[str, Any], args: StepKTOArguments) -> str:
    """Read config, tokenizer and data, and print what they make of a step.

    Raises:
        ValueError: something does not fit, as in training.
        OSError: a file cannot be read.
    """
    trusted = trusts_code(args)
    tokenizer = load_tokenizer(own["model"], trusted)
    config = AutoConfig.from_pretrained(own["model"], trust_remote_code=trusted)
    encoded = {}
    for name in ("data", "eval_data"):
        if own.get(name) is not None:
            encoded[name] = encode_dataset(
                own[name],
                tokenizer,
                max_length=args.max_length,
                step_separator=args.step_separator,
                add_eos=args.add_eos,
            )
    lines = [f"{own[name]}: {described(dataset)}" for name, dataset in encoded.items()]
    data = encoded["data"]
    lines += [schedule(data, args), "", cost(data, config, own, args)]
    return "\n".join(lines) + "\n"


def described(data: StepKTODataset) -> str:
    outcomes = [example.outcome_label for example in data.examples]
    steps = [label for example in data.examples for label in example.step_labels]
    count = lambda labels: (
        f"{labels.count(1)} right, {labels.count(0)} wrong, {labels.count(UNLABELLED)} unlabelled"
    )
    longest = max(len(example.input_ids) for example in data.examples)
    return (
        f"{len(data)} examples ({count(outcomes)}) with {len(steps)} steps ({count(steps)}), "
        f"{data.completion_tokens} completion tokens, the longest example {longest} tokens"
    )


def schedule(data: StepKTODataset, args: StepKTOArguments) -> str:
    batch = step_sequences(args)
    epoch = math.ceil(len(data) / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(epoch * args.num_train_epochs)
    return (
        f"{steps} optimizer steps of {batch} sequences, {epoch} an epoch; output {args.output_dir}"
    )


def step_sequences(args: StepKTOArguments) -> int:
    ranks = max(args.world_size, 1)
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks


def cost(data: StepKTODataset, config: Any, own: dict[str, Any], args: StepKTOArguments) -> str:
    """Time and memory of a step by the cost model (docs/SCALING.md), or why it does not say."""
    prompts = [example.completion_start for example in data.examples]
    lengths = [len(e.input_ids) - e.completion_start for e in data.examples]
    ranks = max(args.world_size, 1)
    point = args.step_kto_config()
    # "ema" has no pass of its own, as "zero"
    pass_for: dict[Any, KL] = {"mismatched": "mismatched", "matched": "matched"}
    fixed = point.fixed_reference_point is not None
    try:
        model = Model.from_config(config.get_text_config().to_dict())
        job = Job(
            gpus=ranks,
            sequences=step_sequences(args),
            prompt=round(statistics.mean(prompts)),
            completion=max(round(statistics.mean(lengths)), 1),
            shard=None if args.fsdp else 1,
            micro_batch=args.per_device_train_batch_size,
            lora_rank=own.get("lora_rank"),
            kl="zero" if fixed else pass_for.get(point.reference_point, "zero"),
            reference="cached" if args.precompute_ref_log_probs else "live",
            budget=args.memory_budget,
            checkpointing=args.gradient_checkpointing,
        )
        return scale.describe(estimate(model, job, device(args)))
    except ValueError as error:
        return f"no estimate of time and memory: {error}"


def device(args: StepKTOArguments) -> Device:
    """The one in the table that is here, an H200 for a GPU that is not in it."""
    if args.device.type == "cpu":
        return DEVICES["cpu"]
    name = torch.cuda.get_device_name(args.device).lower()
    return next((d for key, d in DEVICES.items() if key in name), DEVICES["h200"])
