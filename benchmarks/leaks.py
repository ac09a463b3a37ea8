"""Ten thousand calls of each op and thousands of steps of training: does memory stay flat?

    python benchmarks/leaks.py    # some fifteen minutes on one core
    python benchmarks/leaks.py --quick    # the ops, as in the tests

Each case runs in a process of its own. Flat: see leaking/measure.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the package need not be installed
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402
from leaking import measure  # noqa: E402
from leaking.calls import CONTROLS, all_calls  # noqa: E402

from stepkto_kernels.bench.environment import environment  # noqa: E402

RESULT = ROOT / "benchmarks/results/leaks.json"
CALLS, WARM_UP, SAMPLES = 10_000, 500, 25
TRAININGS = ("StepKTOTrainer", "examples/custom_loop.py")
# of training, of which 4000 are looked at: as few as 1000 would hide 64 bytes a step in the pages
STEPS, WARM_UP_STEPS = 5000, 1000


def one_case(kind: str, name: str, calls: int) -> dict[str, Any]:
    """In this process; kind: "calls", "controls" or "trainings"."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    start = time.monotonic()
    if kind == "trainings":
        from leaking import trainings  # loads transformers

        with tempfile.TemporaryDirectory() as folder:
            found = trainings.TRAININGS[name](Path(folder), STEPS, WARM_UP_STEPS, SAMPLES)
        calls = STEPS - WARM_UP_STEPS
    else:
        make = all_calls()[name] if kind == "calls" else CONTROLS[name][0]
        found = measure.repeat(make(), calls, WARM_UP, SAMPLES)
    result = measure.judge(found, calls)
    return result | {"seconds": round(time.monotonic() - start, 1)}


def in_a_process(kind: str, name: str, calls: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--case", kind, name, "--calls", str(calls)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: exit status {done.returncode}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def quick(calls: int = 200, warm_up: int = 30, windows: int = 4) -> dict[str, dict[str, Any]]:
    """All ops in this process, few calls of each."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    found: dict[str, dict[str, Any]] = {"calls": {}, "controls": {}}
    makers = {"calls": all_calls(), "controls": {name: x[0] for name, x in CONTROLS.items()}}
    for kind, each in makers.items():
        for name, make in each.items():
            held = measure.repeat(make(), calls, warm_up, windows)
            found[kind][name] = measure.judge_few(held, calls)
    found["expected"] = {name: list(grows) for name, (_, grows) in CONTROLS.items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few calls of each, in one process")
    parser.add_argument("--only", nargs="+", help="cases whose names have one of these in them")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"default {CALLS}")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "NAME"), help="one, in this process")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(one_case(*args.case, args.calls)))
        return 0
    if args.quick:
        args.result.write_text(json.dumps(quick()) + "\n", encoding="utf-8")
        return 0
    kinds = {"controls": list(CONTROLS), "calls": list(all_calls()), "trainings": list(TRAININGS)}
    found: dict[str, dict[str, Any]] = {}
    failed = []
    for kind, names in kinds.items():
        wanted = [n for n in names if args.only is None or any(x in n for x in args.only)]
        for name in wanted:
            result = in_a_process(kind, name, args.calls)
            for more in (4, 16):
                if kind == "calls" and result["grew"]:
                    # Python maps and unmaps a MiB at a time: a leak grows on, such a step does not
                    result = in_a_process(kind, name, more * args.calls) | {"before": result}
            found.setdefault(kind, {})[name] = result
            grew = set(result["grew"])
            is_so = grew >= set(CONTROLS[name][1]) if kind == "controls" else not grew
            failed += [] if is_so else [name]
            print("as it should:" if is_so else "NOT SO:", name, json.dumps(result), flush=True)
    told = {
        "environment": environment("cpu", "python benchmarks/leaks.py"),
        "limits": measure.LIMITS,
        "failed": failed,
        **found,
    }
    args.result.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
