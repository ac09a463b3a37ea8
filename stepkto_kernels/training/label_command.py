"""`stepkto label`: sampled solutions become training rows, with outcome and step labels."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepkto_kernels import files
from stepkto_kernels.training import label_rollouts
from stepkto_kernels.training.label import NAMES, Labeller, count_labels, label_into
from stepkto_kernels.training.records import RowWriter, read_problems, read_samples
from stepkto_kernels.training.rewards.base import AFTER_ERROR, OutcomeReward, ProcessReward
from stepkto_kernels.training.rewards.rollouts import MonteCarlo
from stepkto_kernels.training.steps import STYLES

DESCRIPTION = "Cut sampled solutions into steps and label answers and steps."
EPILOG = """\
A run that was stopped at any point goes on where it was, with the same options and --output.

examples:
  stepkto label --samples samples.jsonl --problems problems.jsonl --output labelled.jsonl
  stepkto label --samples s.jsonl --problems p.jsonl --output l.jsonl \\
      --process prm --prm PRM_FOLDER --prm-layout trl --after-error unlabelled
  stepkto label --samples s.jsonl --problems p.jsonl --output l.jsonl \\
      --process judge --judge-url http://localhost:8000/v1 --judge-model NAME --judge-key-env none
  stepkto label --samples s.jsonl --problems p.jsonl --output l.jsonl \\
      --process rollouts --rollout-model MODEL_FOLDER --after-error unlabelled

A line of --problems, of --samples, and of what is written:
  {"id": "7", "problem": "2 + 3 * 4 = ?", "answer": "14", "solution": null}
  {"problem_id": "7", "sample": 0, "prompt": "2 + 3 * 4 = ?\\n",
   "completion": "3 * 4 = 12\\n2 + 12 = 14\\nAnswer: 14", "finish": "stop"}
  {"problem_id": "7", "sample": 0, "prompt": "2 + 3 * 4 = ?\\n",
   "completions": ["3 * 4 = 12\\n", "2 + 12 = 14\\n", "Answer: 14"],
   "labels": [true, true, null], "label": true}
"""
OUTCOMES = ("math-verify", "exact", "none")
PROCESSES = ("arithmetic", "prm", "judge", "rollouts", "none")
# Flags of one process reward only: type, default, help. Those that do not decide what the labels
# are may differ between the runs that write a file.
PRM: dict[str, tuple[Any, Any, str]] = {
    "prm": (str, None, "folder or hub name of the process reward model"),
    "prm_layout": (str, "trl", "trl (default; a PRMTrainer checkpoint) or qwen"),
    "prm_threshold": (float, 0.5, "probability from which a step is right, default 0.5"),
    "prm_batch_size": (int, 8, "solutions at once, default 8"),
    "prm_device": (str, "cpu", "such as cuda, default cpu"),
    "prm_dtype": (str, "float32", "float32 (default), bfloat16 or float16"),
}
JUDGE: dict[str, tuple[Any, Any, str]] = {
    "judge_url": (str, None, "chat endpoint, up to where /chat/completions follows"),
    "judge_model": (str, None, "its name there"),
    "judge_key_env": (str, "OPENAI_API_KEY", "environment variable with the key, `none` for none"),
    "judge_cache": (str, None, "folder of verdicts, default: OUTPUT.judge"),
    "judge_concurrency": (int, 8, "requests at the same time, default 8"),
    "judge_per_minute": (float, None, "requests a minute at most, default any number"),
    "judge_timeout": (float, 120.0, "seconds of a request, default 120"),
    "judge_retries": (int, 5, "attempts after a failed one, default 5"),
    "judge_attempts": (int, 3, "answers that do not fit before a verdict is given up, default 3"),
}
TABLES = {"prm": PRM, "judge": JUDGE, "rollouts": label_rollouts.ROLLOUTS}
NEEDED = {
    "prm": ("prm",),
    "judge": ("judge_url", "judge_model"),
    "rollouts": ("rollout_model",),
}
DECIDING = (
    "prm",
    "prm_layout",
    "prm_threshold",
    "prm_dtype",
    "judge_model",
    *label_rollouts.DECIDING,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    for name, told in (
        ("samples", "JSON-lines file of sampled solutions"),
        ("problems", "JSON-lines file of their problems"),
        ("output", "JSON-lines file to write, or to go on with"),
    ):
        parser.add_argument(f"--{name}", required=True, type=Path, metavar="FILE", help=told)
    parser.add_argument("--chunk", type=int, default=64, help="samples at once, default 64")
    add_reward_arguments(parser)


def add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose both rewards: also those of `stepkto evaluate` and `iterate`."""
    parser.add_argument(
        "--outcome",
        choices=OUTCOMES,
        default="math-verify",
        help="judge of answers: symbolic equality (default), equal text, none",
    )
    parser.add_argument("--process", choices=PROCESSES, default="none", help="judge of steps")
    parser.add_argument(
        "--after-error",
        choices=AFTER_ERROR,
        default="keep",
        help="labels behind a first wrong step: kept (default), all wrong, or none",
    )
    parser.add_argument(
        "--style", choices=STYLES, default="auto", help="where a step starts, default auto"
    )
    parser.add_argument("--workers", type=int, default=2, help="answers at once, default 2")
    parser.add_argument(
        "--outcome-timeout", type=float, default=5.0, help="seconds of a comparison, default 5"
    )
    for process, table in TABLES.items():
        group = parser.add_argument_group(f"--process {process}")
        for name, (kind, _, told) in table.items():
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, type=kind, metavar="VALUE", help=told)
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that comes with the process reward model",
    )


def run(args: argparse.Namespace) -> int:
    """Label, and say how many labels of each kind there are.

    Raises:
        ValueError: an option or a line does not fit, or the output is of another run.
        OSError: a file cannot be read or written, or the judge cannot be reached.
        ImportError: an extra that the rewards need is not installed.
    """
    options = process_options(args)
    problems = {problem.id: problem for problem in read_problems(args.problems)}
    samples = read_samples(args.samples)
    with outcome_reward(args) as outcome:
        process = process_reward(args, options, outcome)
        labeller = Labeller(
            problems,
            outcome,
            process,
            after_error=args.after_error,
            style=args.style,
            workers=args.workers,
        )
        keep_settings(args.output, settings(args, options))
        with RowWriter(args.output) as writer:
            before = len(writer.rows)
            for rows in label_into(writer, samples, labeller, chunk=args.chunk):
                print(f"{rows}/{len(samples)}", flush=True)
        print(summary(args.output, writer.rows, before, outcome, process), end="")
    return 0


def process_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of the process reward that was chosen, with their defaults.

    Raises:
        ValueError: a flag of another one is given, or one that is needed is not.
    """
    found: dict[str, Any] = {}
    for process, table in TABLES.items():
        for name, (_, default, _) in table.items():
            value, flag = getattr(args, name), "--" + name.replace("_", "-")
            if args.process == process:
                found[name] = default if value is None else value
                if found[name] is None and name in NEEDED[process]:
                    raise ValueError(f"{flag}: want it with --process {process}, got none")
            elif value is not None:
                raise ValueError(f"{flag}: want --process {process} with it, got {args.process}")
    if args.process == "rollouts":
        label_rollouts.check_place(vars(args))
        if args.outcome == "none":
            raise ValueError("--outcome: want a judge of the rollouts' answers, got none")
    if args.trust_remote_code and args.process != "prm":
        raise ValueError(f"--trust-remote-code: want --process prm with it, got {args.process}")
    return found


@contextmanager
def outcome_reward(args: argparse.Namespace) -> Iterator[OutcomeReward | None]:
    if args.outcome == "math-verify":
        from stepkto_kernels.training.rewards.symbolic import MathVerify

        with MathVerify(timeout=args.outcome_timeout, workers=args.workers) as reward:
            yield reward
    elif args.outcome == "exact":
        from stepkto_kernels.training.rewards.answers import ExactMatch

        yield ExactMatch()
    else:
        yield None


def process_reward(
    args: argparse.Namespace, options: Mapping[str, Any], outcome: OutcomeReward | None
) -> ProcessReward | None:
    """The reward that --process names; `outcome` judges the answers of rollouts."""
    if args.process == "arithmetic":
        from stepkto_kernels.training.rewards.arithmetic_steps import ArithmeticSteps

        return ArithmeticSteps()
    if args.process == "prm":
        from stepkto_kernels.training.rewards.prm import load_prm

        return load_prm(
            options["prm"],
            options["prm_layout"],
            trust_remote_code=args.trust_remote_code,
            device=options["prm_device"],
            dtype=options["prm_dtype"],
            threshold=options["prm_threshold"],
            batch_size=options["prm_batch_size"],
        )
    if args.process == "judge":
        from stepkto_kernels.training.openai_client import ChatClient
        from stepkto_kernels.training.rewards.judge import LLMJudge

        key = options["judge_key_env"]
        client = ChatClient(
            options["judge_url"],
            options["judge_model"],
            api_key_env=None if key == "none" else key,
            timeout=options["judge_timeout"],
            concurrency=options["judge_concurrency"],
            retries=options["judge_retries"],
            per_minute=options["judge_per_minute"],
        )
        cache = options["judge_cache"] or f"{args.output}.judge"
        # an endpoint that is down must not leave a whole file without labels
        return LLMJudge(
            client, cache=cache, attempts=options["judge_attempts"], stop_when_down=True
        )
    if args.process == "rollouts":
        if outcome is None:
            raise ValueError("outcome: want a judge of the rollouts' answers, got none")
        # what follows an error gets no verdict of its own unless verdicts are kept
        stop = args.after_error != "keep"
        return label_rollouts.make_reward(options, outcome, stop_at_error=stop)
    return None


def settings(args: argparse.Namespace, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what the labels of a sample are."""
    found = {name: getattr(args, name) for name in ("outcome", "process", "after_error", "style")}
    found |= {name: options[name] for name in DECIDING if name in options}
    if args.process == "judge":
        from stepkto_kernels.training.rewards.judge import PROMPT_VERSION

        found["judge_prompt"] = PROMPT_VERSION
    return found


def keep_settings(output: Path, wanted: Mapping[str, Any]) -> None:
    """Write the settings beside a new output; a file has the labels of one kind of run only.

    Raises:
        ValueError: the output was made with others.
    """
    path = output.with_name(output.name + ".settings.json")
    if output.exists() and output.stat().st_size:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            raise ValueError(f"--output: want a new file, got {output} without {path}") from None
        other = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))
        if other:
            name, k = "--" + other[0].replace("_", "-"), other[0]
            raise ValueError(
                f"{name}: want {found.get(k)!r}, as {output} was made, got {wanted.get(k)!r}"
            )
        return
    files.write_text(path, json.dumps(wanted) + "\n")


def summary(
    output: Path,
    rows: list[dict[str, Any]],
    before: int,
    outcome: OutcomeReward | None,
    process: ProcessReward | None,
) -> str:
    outcomes, steps = count_labels(rows)
    listed = lambda counts: ", ".join(f"{counts[name]} {name}" for name in NAMES.values())
    lines = [
        f"{len(rows)} rows in {output}, {before} of them were there",
        f"answers: {listed(outcomes)}",
        f"steps: {listed(steps)}; lines that only state the answer are unlabelled",
    ]
    if outcome is not None and hasattr(outcome, "undecided"):
        lines.append(f"math-verify: {outcome.undecided} comparisons passed a limit")
    if process is not None and hasattr(process, "missing"):
        lines.append(f"process reward model: {process.missing} steps without a score")
    if isinstance(process, MonteCarlo):
        lines.append(f"rollouts: {process.drawn} drawn, {process.unknown} without an outcome")
    counts: Counter[str] | None = getattr(process, "counts", None)
    if counts is not None:
        names = ("asked", "cached", "missing", "bad answers", "unsure")
        lines.append("judge: " + ", ".join(f"{counts[name]} {name}" for name in names))
    return "\n".join(lines) + "\n"
