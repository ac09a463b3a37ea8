"""Measure this library beside its peers: `stepkto bench`, with the results beside this file.

python benchmarks/run.py                                  # everything, on the CPU
python benchmarks/run.py --suite head --peers naive trl   # --help lists the options
"""

import pathlib
import sys

from stepkto_kernels.cli import main

RESULTS = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    sys.exit(main(["bench", "--output", str(RESULTS), *sys.argv[1:]]))
