"""`stepkto train`: StepKTOTrainer from a YAML file, flags, or both."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stepkto_kernels import checks

if TYPE_CHECKING:
    from stepkto_kernels.training.arguments import StepKTOArguments

DESCRIPTION = "Train a causal language model on labelled solutions with Step-KTO."
EPILOG = """\
Every field of StepKTOArguments, and so of transformers.TrainingArguments, is a flag and a key of
the YAML file: --per-device-train-batch-size 8 is `per_device_train_batch_size: 8`. A flag wins over
the file. `stepkto train --list-options` prints them all.

examples:
  stepkto train --model M0 --data round_1.jsonl --output M1
  stepkto train --config run.yaml --learning-rate 5e-7 --dry-run
  stepkto train --model M0 --data d.jsonl --output A --lora-rank 16 --reference-point zero \\
      --precompute-ref-log-probs
  stepkto train --method sft --model BASE --data right.jsonl --output M0
  accelerate launch -m stepkto_kernels.cli train --config run.yaml

A line of the data:
  {"prompt": "2 + 3 * 4 = ?\\n", "completions": ["3 * 4 = 12\\n", "2 + 12 = 14\\n"],
   "labels": [true, true], "label": true}
`labels` are of the steps, `label` of the answer, null is unknown. Plain KTO rows ("prompt",
"completion", "label") work too.
"""
OWN: dict[
    str, dict[str, Any]
] = {  # flag -> what argparse is told; the keys of the YAML file are the same
    "model": {"help": "folder or hub name of the policy"},
    "data": {"help": "JSON-lines file with the training examples"},
    "output": {"help": "folder for checkpoints, the trained model and the metrics"},
    "eval-data": {"help": "JSON-lines file to evaluate on, by --eval-strategy"},
    "ref-model": {"help": "folder or hub name of the reference; default: the policy as it starts"},
    "method": {"help": "step_kto (default), kto: outcomes only, or sft: learn every row"},
    "lora-rank": {"type": int, "help": "train a LoRA adapter of this rank instead of the model"},
    "lora-alpha": {"type": float, "help": "scale of the adapter, default: twice the rank"},
    "lora-targets": {
        "nargs": "+",
        "help": "modules with an adapter, default: all linear ones but lm_head",
    },
    "resume": {
        "help": "a checkpoint folder, `last` for the newest whole one in --output, or `auto` for "
        "`last` where there is one"
    },
}
COMMON = {  # options of StepKTOArguments that --help shows
    "learning_rate": "of AdamW, default 1e-6",
    "per_device_train_batch_size": "sequences at once on a device, default 8",
    "gradient_accumulation_steps": "micro-batches an optimizer step, default 1",
    "num_train_epochs": "passes over the data, default 3",
    "max_steps": "optimizer steps, instead of epochs",
    "max_length": "most tokens of an example, default 2048; completions are cut to it",
    "bf16": "matrix products in bf16",
    "gradient_checkpointing": "less memory for activations, a third more time in the backbone",
    "padding_free": "pack a batch into one row instead of padding it",
    "beta": "slope of the outcome sigmoid a nat, default 0.1",
    "step_weight": "weight of the steps' loss, default 1; 0 is plain KTO",
    "step_reduction": "sequence_mean (default), mean or sum",
    "desirable_weight": "weight of right answers, default 1",
    "undesirable_weight": "weight of wrong answers, default 1",
    "reference_point": "KL reference point: mismatched (default), zero, matched, ema, or nats",
    "precompute_ref_log_probs": "run the reference model once, before training",
    "nonfinite": "rows whose log-probs are no finite numbers: stop (default), or skip them",
    "memory_budget": "bytes for the logits that the loss holds at once",
    "logging_steps": "optimizer steps a line of metrics, default 10 here",
    "save_steps": "optimizer steps a checkpoint, default 500",
    "seed": "of the data order and of new weights, default 42",
}
METHODS = ("step_kto", "kto", "sft")
REQUIRED = ("model", "data", "output")
Options = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.usage = "%(prog)s --model MODEL --data FILE --output DIR [options]"
    parser.add_argument("--config", type=Path, help="YAML file with any of these options")
    for name, options in OWN.items():
        parser.add_argument(f"--{name}", metavar=name.upper().replace("-", "_"), **options)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check model, data and options, print plan and memory, train nothing",
    )
    parser.add_argument("--list-options", action="store_true", help="print every option and stop")
    parser.set_defaults(takes_more=True)
    group = parser.add_argument_group("options of the loss and of the training loop, among others")
    for name, told in COMMON.items():
        # as text: types and defaults are StepKTOArguments', which is not imported for --help alone
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, nargs="?", const="true", metavar="VALUE", help=told)


DEFAULTS = {"logging_steps": 10, "report_to": "none"}  # where they differ from StepKTOArguments'


def run(args: argparse.Namespace) -> int:
    """Train, or with --dry-run only say what would be done.

    Raises:
        ValueError: an option, a model or a row of the data does not fit.
        OSError: a file cannot be read or written.
        ImportError: the extra `train` is not installed.
    """
    from stepkto_kernels.training.arguments import StepKTOArguments

    if args.list_options:
        print(options_table(StepKTOArguments), end="")
        return 0
    own, options = gather(args)
    arguments = parse(own, options)
    if own.get("dry_run"):
        if own.get("method") == "sft":
            raise ValueError("--dry-run: want --method step_kto or kto with it, got sft")
        from stepkto_kernels.training.dry_run import dry_run

        print(dry_run(own, arguments), end="")
        return 0
    train(own, arguments)
    return 0


def gather(args: argparse.Namespace) -> tuple[Options, Options]:
    """Our own options and StepKTOArguments', of the file and then of the flags.

    Raises:
        ValueError: an option is not known, or one that has to be is not given.
    """
    given = {} if args.config is None else read_yaml(args.config)
    known = {name.replace("-", "_") for name in (*OWN, "dry-run")}
    flags = {name: getattr(args, name) for name in (*known, *COMMON)}
    flags = {name: value for name, value in flags.items() if value not in (None, False)}
    given |= flags | read_flags(args.more)
    for name in REQUIRED:
        if given.get(name) is None:
            raise ValueError(f"--{name}: want it as a flag or in the file of --config, got none")
    own = {name: value for name, value in given.items() if name in known}
    return own, {name: value for name, value in given.items() if name not in known}


def read_yaml(path: Path) -> Options:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: want YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: want `option: value` lines, got {type(found).__name__}")
    return {str(name).replace("-", "_"): value for name, value in found.items()}


def read_flags(words: Sequence[str]) -> Options:
    """`--some-name value ...` as some_name: value; a flag without a value is true."""
    found: Options = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if has_value else []
        elif not name:
            raise ValueError(f"{word}: want flags, got a word before the first")
        else:
            found[name].append(word)
    short = lambda values: values[0] if len(values) == 1 else values or True
    return {name: short(values) for name, values in found.items()}


def parse(own: Options, options: Options) -> StepKTOArguments:
    """StepKTOArguments of names and values, text or what YAML makes of it.

    Raises:
        ValueError: a name is not known, or a value does not fit.
    """
    from transformers import HfArgumentParser

    from stepkto_kernels.training.arguments import StepKTOArguments

    class OptionParser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    known = [field.name for field in fields(StepKTOArguments) if field.init]
    method = own.get("method", "step_kto")
    checks.choice("method", method, METHODS)
    fixed: Options = {"step_weight": 0} if method == "kto" else {}
    for name, value in fixed.items():
        given = options.get(name)
        if given is not None and float(given) != value:
            raise ValueError(f"{name}: want {value} with method {method}, got {given}")
    words = ["--output_dir", str(own["output"])]
    for name, value in (DEFAULTS | options | fixed).items():
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *OWN], 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{name}: want an option that stepkto train has{hint}")
        words += as_words(name, value)
    kind: Any = StepKTOArguments
    (arguments,) = OptionParser(kind).parse_args_into_dataclasses(words)
    return arguments


def as_words(name: str, value: Any) -> list[str]:
    """An option as argparse takes it; none for null, which is the default."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [f"--{name}", json.dumps(value)]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]


def train(own: Options, arguments: StepKTOArguments) -> None:
    from transformers import PrinterCallback, ProgressCallback

    from stepkto_kernels.training import checkpoints
    from stepkto_kernels.training.completion_trainer import CompletionTrainer
    from stepkto_kernels.training.progress import progress
    from stepkto_kernels.training.trainer import StepKTOTrainer

    is_sft = own.get("method") == "sft"
    if is_sft and "ref_model" in own:
        raise ValueError("--ref-model: want none with --method sft, which compares with nothing")
    trainer = (CompletionTrainer if is_sft else StepKTOTrainer)(
        own["model"],
        ref_model=own.get("ref_model"),
        args=arguments,
        train_dataset=own["data"],
        eval_dataset=own.get("eval_data"),
        peft_config=lora_config(own),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(progress())
    resume = own.get("resume")
    if resume == "auto":
        resume = checkpoints.newest(Path(str(own["output"]))) and "last"
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"the model and trainer_state.json, with all metrics, are in {own['output']}")


def lora_config(own: Options) -> Any:
    """PEFT's config, None without --lora-rank."""
    rank = own.get("lora_rank")
    if rank is None:
        for name in ("lora_alpha", "lora_targets"):
            if name in own:
                raise ValueError(f"--{name.replace('_', '-')}: want --lora-rank with it, got none")
        return None
    from peft import LoraConfig

    alpha: Any = float(own.get("lora_alpha", 2 * int(rank)))
    targets = own.get("lora_targets", "all-linear")
    if isinstance(targets, str) and targets != "all-linear":
        targets = [targets]  # PEFT would take it for a pattern of whole names
    return LoraConfig(r=int(rank), lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")


def options_table(cls: type) -> str:
    """Name and help of every option."""
    lines = [f"  --{name}: {told['help']}" for name, told in OWN.items()]
    for field in fields(cls):
        if field.init:
            told = " ".join(str(field.metadata.get("help", "")).split())
            lines.append(f"  --{field.name.replace('_', '-')}: {told}")
    return "\n".join(lines) + "\n"
