"""The command `stepkto`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch

from stepkto_kernels import __version__, available_backends, cuda
from stepkto_kernels.bench import environment, plans, runner, scale, tune
from stepkto_kernels.bench.problems import DTYPES, Shape
from stepkto_kernels.kernels import tiles
from stepkto_kernels.plan import MIB
from stepkto_kernels.training import (
    command,
    evaluate_command,
    inspect_command,
    iterate_command,
    label_command,
    sample_command,
)
from stepkto_kernels.training.report import markdown_table

PROGRAM = "stepkto"
PLAN_BUDGET = 1024  # MiB


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class Command(NamedTuple):
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan",
        nargs="*",
        type=int,
        metavar="N H V",
        help="print how a head of N tokens, hidden size H and vocabulary V would run; without "
        "numbers: what a training step of a model costs, with the flags below",
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="of the plan of a head (default float32)"
    )
    parser.add_argument(
        "--budget",
        type=int,
        metavar="MiB",
        help="memory budget of the cached and the fused mode "
        f"(default {PLAN_BUDGET}; of a model's step, what they take by themselves)",
    )
    scale.add_arguments(parser)


def doctor(args: argparse.Namespace) -> int:
    """Print what is here: versions, devices, backends; or a plan where one is asked for.

    Raises:
        ValueError: what is asked of the plan does not fit.
    """
    if args.plan is not None:
        print(plan(args), end="")
        return 0
    given = scale.given_flags(args)
    if given:
        raise ValueError(f"{given[0]}: want --plan before it, got none")
    installed = environment.versions()
    print(f"stepkto_kernels {__version__}, commit {environment.commit()}")
    print(f"python {platform.python_version()}, torch {torch.__version__}")
    for name, version in installed.items():
        print(f"{name} {version}")
    print(f"\ncpu: {environment.device_name('cpu')}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(i).total_memory // MIB
            print(f"cuda:{i}: {torch.cuda.get_device_name(i)}, {memory} MiB")
    else:
        print("cuda: none")
    print()
    states = [*available_backends().items(), ("CUDA segment kernels", cuda.WHY_NOT or "built")]
    states.append(("Triton tile shapes", tiles.state()))
    print(markdown_table(["backend", "state"], states), end="")
    return 0


def plan(args: argparse.Namespace) -> str:
    """Of a head, or of a model's step where there are no numbers."""
    if not args.plan:
        if args.dtype is not None:
            raise ValueError("--dtype: want it with --plan N H V only, a step is in its device's")
        return scale.report(args)
    given = scale.given_flags(args)
    if given:
        raise ValueError(f"{given[0]}: want --plan without numbers, got --plan {args.plan}")
    if len(args.plan) != 3:
        raise ValueError(f"--plan: want N H V or no numbers, got {args.plan}")
    budget = PLAN_BUDGET if args.budget is None else args.budget
    if min(args.plan) < 1 or budget < 0:
        raise ValueError(f"--plan: want numbers > 0, got {args.plan}, budget {budget}")
    return plan_table(Shape(*args.plan), args.dtype or "float32", budget * MIB)


def plan_table(shape: Shape, dtype: str, budget: int) -> str:
    """What plan.py chooses for every path on cpu and cuda. budget: bytes."""
    header = ["device", "path", "mode", "units", "tile, tokens", "tile, vocabulary"]
    header += ["rows held", "workspace MiB"]
    rows = []
    for device in ("cpu", "cuda"):
        for path in plans.PLANNED_PATHS:
            plan = plans.describe(path, shape, DTYPES[dtype].itemsize, device, budget)
            rows.append(
                [
                    device,
                    path,
                    plan.mode,
                    f"{plan.units:.4g}",
                    plan.token_chunk,
                    plan.vocab_chunk,
                    plan.rows,
                    f"{plan.workspace / MIB:.1f}",
                ]
            )
    title = f"{shape} {dtype}, budget {budget // MIB} MiB for cached and fused\n\n"
    return title + markdown_table(header, rows)


COMMANDS = {
    "bench": Command(runner.DESCRIPTION, runner.add_arguments, runner.run),
    "tune": Command(tune.DESCRIPTION, tune.add_arguments, tune.run),
    "doctor": Command(
        "Show versions, devices and backends; with --plan, how a head or a step would run.",
        add_doctor_arguments,
        doctor,
    ),
    "train": Command(command.DESCRIPTION, command.add_arguments, command.run),
    "sample": Command(sample_command.DESCRIPTION, sample_command.add_arguments, sample_command.run),
    "label": Command(label_command.DESCRIPTION, label_command.add_arguments, label_command.run),
    "iterate": Command(
        iterate_command.DESCRIPTION, iterate_command.add_arguments, iterate_command.run
    ),
    "evaluate": Command(
        evaluate_command.DESCRIPTION, evaluate_command.add_arguments, evaluate_command.run
    ),
    "inspect": Command(
        inspect_command.DESCRIPTION, inspect_command.add_arguments, inspect_command.run
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 and one line on stderr for arguments that do not fit, 130 for Ctrl-C."""
    parser = Parser(prog=PROGRAM, description="Step-KTO losses on an lm_head.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, each in COMMANDS.items():
        sub = commands.add_parser(name, help=each.help, description=each.help, allow_abbrev=False)
        sub.set_defaults(takes_more=False)
        each.add_arguments(sub)
    args, more = parser.parse_known_args(argv)
    if more and not args.takes_more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    args.more = more
    try:
        return COMMANDS[args.command].run(args)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"{PROGRAM} {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {args.command}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
