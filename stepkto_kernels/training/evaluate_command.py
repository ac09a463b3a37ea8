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
NAMES = "model problems layout max_new_tokens batch_size chunk prompt backend"
NAMES += " eval_num_samples eval_temperature equal resamples seed num_processes device dtype"
TOLD = {name: HELP[name] for name in NAMES.split()}
TOLD |= {
    "model": "folder or hub name",
    "problems": "file, or a set on the hub; see stepkto sample",
    "num_processes": "each on a GPU of its own, default 1",
}


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
    from stepkto_kernels.training import evaluation_files as files
    from stepkto_kernels.training.drawing import derived_seed
    from stepkto_kernels.training.iterate_config import EvaluateConfig, from_mapping
    from stepkto_kernels.training.report import markdown_table
    from stepkto_kernels.training.run_folder import complete, lock

    config, folder = from_mapping(EvaluateConfig, gather(args, TOLD)), args.output
    problems = files.load("problems", config.problems, config.layout)
    files.keep_config(folder, config, {"problems": problems})
    labeller = partial(files.make_labeller, config.reward_arguments(folder / "rewards"), problems)
    seed = derived_seed(config.seed, "evaluate", 0)
    about: dict[str, Any] = {"model": config.model, "num_problems": len(problems)}
    about["num_samples"] = config.eval_num_samples
    make = lambda part: files.evaluate_into(part, config, config.model, problems, seed, labeller)
    with lock(folder):
        complete(folder / "evaluation", make)
        found = files.measure(folder / "evaluation", config)
        complete(folder / "metrics.json", lambda part: files.write_metrics(part, about, found))
    percent = lambda value: f"{100 * value:.1f}"
    rows = [(name, percent(e.value), percent(e.low), percent(e.high)) for name, e in found.items()]
    print(markdown_table(("metric, %", "value", "from", "to"), rows))
    return 0
