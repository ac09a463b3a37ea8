"""`stepkto evaluate`: one model on held-out problems, with bootstrap intervals."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from stepkto_kernels.training.iterate_command import HELP, add_settings, gather

DESCRIPTION = "Sample held-out problems, judge the solutions, and measure them."
EPILOG = """\
FOLDER has evaluation/greedy.jsonl and sampled.jsonl, the judged solutions, and metrics.json. A run
that was stopped at any point goes on where it was, with the same options.

examples:
  stepkto evaluate --model M1 --problems test.jsonl --output E1
  stepkto evaluate --model M1 --problems test.jsonl --output E1 --eval-num-samples 64 \\
      --process prm --prm PRM_FOLDER --prm-layout trl
"""
NAMES = "model problems max_new_tokens batch_size chunk prompt backend eval_num_samples"
NAMES += " eval_temperature equal resamples seed device dtype"
TOLD = {name: HELP[name] for name in NAMES.split()}
TOLD |= {"model": "folder or hub name", "problems": "JSON-lines file"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_settings(parser, TOLD)


def run(args: argparse.Namespace) -> int:
    """Evaluate, or go on with it, and print the table of the metrics.

    Raises:
        ValueError: a setting does not fit, or the folder is of another evaluation.
        OSError: a file cannot be read or written.
        ImportError: an extra that is needed is not installed.
    """
    from dataclasses import asdict

    from stepkto_kernels.training import evaluation_files as files
    from stepkto_kernels.training.iterate_config import EvaluateConfig, from_mapping
    from stepkto_kernels.training.models import sampling_model
    from stepkto_kernels.training.records import read_problems
    from stepkto_kernels.training.report import markdown_table
    from stepkto_kernels.training.run_folder import complete, keep_settings, lock, settings_of

    config = from_mapping(EvaluateConfig, gather(args, TOLD))
    problems = read_problems(config.problems)
    if not problems:
        raise ValueError(f"problems: want at least one problem, got none in {config.problems}")
    folder = args.output
    keep_settings(folder / "config.yaml", settings_of(asdict(config), ("model", "problems")))
    sampler = partial(sampling_model, config, config.model)
    labeller = partial(files.make_labeller, config.reward_arguments(folder / "rewards"), problems)
    draws = files.evaluation_draws(config, files.derived_seed(config.seed, "evaluate", 0))
    about: dict[str, Any] = {"model": config.model, "num_problems": len(problems)}
    about["num_samples"] = config.eval_num_samples
    with lock(folder):
        complete(
            folder / "evaluation",
            lambda part: files.evaluate_into(part, problems, sampler, labeller, draws),
        )
        found = files.measure(folder / "evaluation", config)
        complete(folder / "metrics.json", lambda part: files.write_metrics(part, about, found))
    percent = lambda value: f"{100 * value:.1f}"
    rows = [(name, percent(e.value), percent(e.low), percent(e.high)) for name, e in found.items()]
    print(markdown_table(("metric, %", "value", "from", "to"), rows))
    return 0
