"""Write the tables of docs/SCALING.md from stepkto_kernels/scaling.py and benchmarks/results.

python benchmarks/scaling.py            # rewrites what stands between the begin and end marks
python benchmarks/scaling.py --check    # exits with 1 where SCALING.md differs
"""

from __future__ import annotations

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

from stepkto_kernels.bench.scale_tables import FROM_RESULTS, PREDICTED  # noqa: E402
from stepkto_kernels.training.report import with_tables  # noqa: E402

PAGE = ROOT / "docs/SCALING.md"
RESULTS = ROOT / "benchmarks/results"


def main() -> int:
    parser = argparse.ArgumentParser(description="tables of docs/SCALING.md")
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    tables = {name: table(RESULTS) for name, table in FROM_RESULTS.items()}
    tables |= {name: table() for name, table in PREDICTED.items()}
    old = PAGE.read_text(encoding="utf-8")
    new = with_tables(old, tables)
    if args.check:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
