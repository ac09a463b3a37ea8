"""Step-KTO beside KTO and rejection sampling from the same M0, three rounds, ten seeds, two tasks.

    python benchmarks/reproduce.py               # an hour on two cores; goes on where it was
    python benchmarks/reproduce.py --report-only # tables and plot from the runs that are there

The tasks are in reproduction/task.py. Learning rates are chosen on seeds that are not reported, by
one rule for all methods (reproduction/study.py, chosen_rates). What was fixed before the reported
runs were made:

- H1: on each task Step-KTO has fewer step errors in correct solutions than KTO at M1, M2 and M3,
  with a paired p < 0.01 at M3 (t-test over ten seeds; the exact sign-flip test beside it), at no
  lower Pass@1 (mean difference at M3 not below 0, or its 95 % interval covers 0).
- H2: at matched accuracy (reproduction/statistics.py, matched_difference, on the share of sampled
  solutions that are right) Step-KTO has at least 2 points fewer errors, p < 0.01.
- Controls are described, not tested; H1 and H2 on two tasks are four tests, Holm-adjusted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the package need not be installed

from reproduction import report, study  # noqa: E402
from reproduction.task import TASKS  # noqa: E402

RESULT = ROOT / "benchmarks/results/reproduction.json"
QUICK = study.Size(problems=8, samples=2, held_out=8, sft_steps=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "out/reproduction")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, default 2")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["coded", "chain"])
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON file; a plot beside it")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs: want >= 1, got {args.jobs}")
    args.output.mkdir(parents=True, exist_ok=True)
    size, todo = study.Size(), lambda runs: [] if args.report_only else runs
    rows = study.execute(todo(study.tuning_runs(args.tasks)), args.output, size, args.jobs)
    rates = study.chosen_rates(rows, args.tasks)
    print({f"{task} {method}": rate for (task, method), rate in rates.items()}, flush=True)
    runs = study.reported_runs(args.tasks, rates)
    if study.CONTROL_TASK in args.tasks and not args.no_controls:
        runs += study.control_runs(rates)
    rows = study.execute(todo(runs), args.output, size, args.jobs)
    report.write(rows, rates, size, args.result)


if __name__ == "__main__":
    main()
