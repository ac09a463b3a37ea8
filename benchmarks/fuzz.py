"""The property tests at length: random shapes, strides, dtypes, options and labels against fp64.

    python benchmarks/fuzz.py --cases 1500    # of each property, times its share; a quarter hour
    python benchmarks/fuzz.py --seed 123456   # the cases of an earlier run, which printed its seed

Counts the cases that ran to the end, by property and backend. A case that fails is shrunk and
printed; keep it as an @example of its property.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # the package need not be installed
os.environ["OMP_NUM_THREADS"] = "1"  # problems are tiny; here and in the tests

from stepkto_kernels.bench.environment import environment  # noqa: E402

RESULT = ROOT / "benchmarks/results/fuzz.json"
TESTS = sorted(ROOT.glob("tests/test_properties_*.py")) + [ROOT / "tests/test_bad_input.py"]


def failures(report: Path) -> list[dict[str, str]]:
    """Tests that failed, with the case that hypothesis shrunk."""
    found = []
    for test in ET.parse(report).iter("testcase"):
        for problem in (*test.iter("failure"), *test.iter("error")):
            text = (problem.text or problem.get("message") or "").replace(str(ROOT) + "/", "")
            lines = [line for line in text.splitlines() if line.startswith("E ")]
            found.append({"test": test.get("name", ""), "case": "\n".join(lines)})
    return found


def by_property(rows: list[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, backend, number in rows:
        found.setdefault(name, {})[backend] = number
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1500, help="a property, default 1500")
    parser.add_argument("--seed", type=int, help="default: a random one")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON file")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        counts, report = Path(scratch) / "counts.json", Path(scratch) / "report.xml"
        surroundings = {
            **os.environ,
            "STEPKTO_FUZZ": str(args.cases),
            "STEPKTO_FUZZ_COUNTS": str(counts),
        }
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", *map(str, TESTS), f"--junitxml={report}"),
                *(f"--hypothesis-seed={seed}", "--durations=0", "--durations-min=1", *args.pytest),
            ],
            cwd=ROOT,
            env=surroundings,
        )
        rows = json.loads(counts.read_text()) if counts.exists() else []
        failed = failures(report) if report.exists() else []
    properties = by_property(rows)
    command = f"python benchmarks/fuzz.py --cases {args.cases} --seed {seed}"
    result = {
        "environment": environment("cpu", command),
        "seed": seed,
        "cases": sum(sum(each.values()) for each in properties.values()),
        "seconds": round(time.monotonic() - start),
        "failures": failed,
        "properties": properties,
    }
    args.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['cases']} cases, {len(failed)} failures, seed {seed}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
