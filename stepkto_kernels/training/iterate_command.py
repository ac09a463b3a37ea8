"""`stepkto iterate`: rounds of sampling, labelling and training, from a YAML file and flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stepkto_kernels.training.label_command import add_reward_arguments

DESCRIPTION = "Train in rounds: the last model samples, rewards label, the next model learns."
EPILOG = """\
RUN/round_t has samples.jsonl, labelled.jsonl, selected.jsonl, model, evaluation, metrics.json and
log_ratios.jsonl; RUN/round_0 the evaluation of the first model. A run that was stopped at any point
goes on where it was, with the same options.

Settings that are not listed are options of `stepkto train`; flags win over the file.

examples:
  stepkto iterate --config run.yaml --output RUN
  stepkto iterate --output RUN --model M0 --problems train.jsonl --eval-problems test.jsonl \\
      --method kto --outcome exact --learning-rate 1e-6 --balance-outcomes 1.33

A file:
  model: M0
  problems: train.jsonl
  eval_problems: test.jsonl
  method: step_kto
  rounds: 3
  num_samples: 8
  balance_outcomes: 1.33
  rewards: {outcome: math-verify, process: judge, judge_url: URL, judge_model: NAME}
  training: {learning_rate: 1.0e-6, per_device_train_batch_size: 8, bf16: true}
"""
HELP = {
    "model": "folder or hub name of the first model",
    "problems": "file of problems to train on, or a set on the hub; see stepkto sample",
    "eval_problems": "those that are held out",
    "layout": "the set whose fields a file of --problems has",
    "eval_layout": "the same of --eval-problems",
    "method": "step_kto (default), kto: outcomes only, sft: samples with the right answer",
    "rounds": "default 3; may grow in a run that stands",
    "problems_per_round": "default: all, each time",
    "num_samples": "of a problem and round, default 8",
    "temperature": "of samples, default 1",
    "max_new_tokens": "longest completion, default 1024",
    "batch_size": "sequences decoded at once, default 64",
    "chunk": "problems sampled, and lost by a kill, together; default 64",
    "prompt": "plain (default), steps: the paper's, or steps-text: that without a chat template",
    "backend": "what samples: transformers (default) or vllm",
    "eval_num_samples": "of a held-out problem, default 8",
    "eval_temperature": "default 1",
    "deduplicate": "true: of solutions that differ in whitespace only, train on the first",
    "per_problem": "train on so many solutions of a problem, as many right as wrong; default all",
    "fill": "true: where right or wrong ones are too few, on more of the others",
    "balance_outcomes": "right answers' weight, in all, over wrong ones'; 1.33 is KTO's advice",
    "log_ratios": "rows a round with log-ratios, default all",
    "num_processes": "of training and sampling, each on a GPU of its own; default 1",
    "equal": "of answers in Maj@k: text (default) or math-verify",
    "resamples": "of the bootstrap, default 2000",
    "accelerate_config": "file of `accelerate config` to start training with",
    "seed": "default 0",
    "device": "of sampling, default: a GPU where there is one",
    "dtype": "of the model there, default: as it was saved",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_settings(parser, HELP)
    parser.set_defaults(takes_more=True)


def add_settings(parser: argparse.ArgumentParser, told: Mapping[str, str]) -> None:
    """--output, --config, a flag for each of these settings, and those of the rewards."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s --config FILE --output FOLDER [options]"
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="to work in")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    for name, help_ in told.items():
        parser.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help=help_)
    add_reward_arguments(parser)
    # what is not given is the file's
    parser.set_defaults(**dict.fromkeys(reward_names()))


def reward_names() -> list[str]:
    """Of all flags of the rewards."""
    scratch = argparse.ArgumentParser(add_help=False)
    add_reward_arguments(scratch)
    return sorted(vars(scratch.parse_args([])))


def run(args: argparse.Namespace) -> int:
    """Do what of the rounds is not done.

    Raises:
        ValueError: a setting does not fit, or the folder is of another run.
        OSError: a file cannot be read or written, or training failed.
        ImportError: an extra that is needed is not installed.
    """
    from stepkto_kernels.training.iterate import Run
    from stepkto_kernels.training.iterate_config import IterateConfig, from_mapping

    config = from_mapping(IterateConfig, gather(args, HELP))
    Run(args.output, config, say=lambda line: print(line, flush=True))()
    return 0


def gather(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Settings of the file and then of the flags; names: of flags that are settings themselves.

    Raises:
        ValueError: the file is no mapping, or `rewards` or `training` in it is none.
    """
    from stepkto_kernels import checks
    from stepkto_kernels.training.command import read_flags, read_yaml

    given = {} if args.config is None else read_yaml(args.config)
    flags = {name: getattr(args, name) for name in names}
    given |= {name: value for name, value in flags.items() if value is not None}
    rewards = {name: getattr(args, name) for name in reward_names()}
    rewards = {name: value for name, value in rewards.items() if value is not None}
    nested = {"rewards": rewards} | ({"training": read_flags(args.more)} if args.takes_more else {})
    for name, flags in nested.items():
        in_file = given.get(name) or {}
        checks.require(isinstance(in_file, dict), name, "`option: value` lines", in_file)
        given[name] = {str(k).replace("-", "_"): v for k, v in in_file.items()} | flags
    return given
