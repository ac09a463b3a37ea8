"""`stepkto inspect`: a run as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepkto_kernels import checks, files
from stepkto_kernels.training.inspect_page import render_page
from stepkto_kernels.training.inspect_run import read_runs, shown_and_left_out

DESCRIPTION = "Write a run, or several side by side, as one HTML page to look at."
EPILOG = """\
The page holds everything and asks the network for nothing: curves and a table of the metrics by
round, curves of the training, and solutions with the labels and log-ratios of their steps.

examples:
  stepkto inspect RUN                                   # writes RUN/report.html
  stepkto inspect runs/kto runs/step_kto --output both.html
  stepkto inspect labelled.jsonl                        # a file of `stepkto label`
"""
MOST_SOLUTIONS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of `stepkto iterate` or `stepkto evaluate`, or a file of labelled rows",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: report.html in the folder, FILE.html beside a file; needed for several",
    )
    parser.add_argument(
        "--solutions",
        type=int,
        default=MOST_SOLUTIONS,
        metavar="N",
        help=f"most solutions in the page, default {MOST_SOLUTIONS:,}; 0: none",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page, and say where it is.

    Raises:
        ValueError: a run or a file in it does not fit, or --output is needed.
        OSError: a file cannot be read or written.
    """
    checks.integer("--solutions", args.solutions, low=0)
    output = args.output or default_output(args.runs)
    in_place = any(output.resolve() == path.resolve() for path in args.runs)
    checks.require(not in_place, "--output", "another file than RUN", output)
    runs = read_runs(args.runs, solutions=args.solutions)
    files.write_text(output, render_page(runs))
    shown, left_out = shown_and_left_out(runs)
    print(f"{output}: {len(runs)} runs, {shown} solutions, {left_out} left out")
    return 0


def default_output(runs: list[Path]) -> Path:
    checks.require(len(runs) == 1, "--output", "a file to write, with several runs", "none")
    return runs[0] / "report.html" if runs[0].is_dir() else Path(f"{runs[0]}.html")
