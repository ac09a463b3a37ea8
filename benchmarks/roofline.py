"""Write the tables of ROOFLINE.md from the arithmetic in stepkto_kernels/bench/predictions.py.

The tables of compiled kernels are from results/compile.json, which compile_report.py writes.

python benchmarks/roofline.py            # rewrites what stands between the begin and end marks
python benchmarks/roofline.py --check    # exits with 1 where ROOFLINE.md differs
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

from stepkto_kernels.bench.predictions import TABLES  # noqa: E402
from stepkto_kernels.training.report import markdown_table, with_tables  # noqa: E402

PAGE = ROOT / "benchmarks/ROOFLINE.md"
COMPILED = ROOT / "benchmarks/results/compile.json"
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")  # instructions of the tensor cores, by architecture


def compile_table() -> str:
    """The most that any configuration of a kernel needs, by architecture and operands."""
    result = json.loads(COMPILED.read_text(encoding="utf-8"))
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for report in result["reports"]:
        dtype, _, rest = report["config"].partition(" ")
        operands = rest.split()[0] if "pointers" in rest or "descriptors" in rest else ""
        is_dtype = dtype in ("bf16", "fp16", "fp32")
        what = f"{dtype} {operands}".strip() if is_dtype else "fp32"
        key = report["kernel"].strip("_"), f"sm_{report['sm']}", what
        groups.setdefault(key, []).append(report)
    rows = []
    for key, reports in groups.items():
        most = lambda name, reports=reports: max(report[name] for report in reports)
        used = {op for report in reports for op in report["opcodes"]}
        cores = ", ".join(op for op in (*MATRIX, "UTMALDG") if op in used)
        needs = most("registers"), most("stack_bytes"), f"{most('shared_bytes') / 1024:.0f}"
        rows.append([*key, len(reports), *needs, cores])
    header = ["kernel", "for", "operands", "configurations", "registers", "stack", "shared KiB"]
    table = markdown_table([*header, "tensor cores and TMA"], rows)
    return f"{table}\nTriton {result['triton']}; all in benchmarks/results/compile.json.\n"


def mixtures_table() -> str:
    """The same of the mixtures of options that compile_report.py --all compiled."""
    result = json.loads(COMPILED.read_text(encoding="utf-8"))["all"]
    rows = [
        [
            group["kernel"].strip("_"),
            f"sm_{group['sm']}",
            group["operands"],
            group["compiled"],
            group["registers"],
            group["stack_bytes"],
            f"{group['shared_bytes'] / 1024:.0f}",
        ]
        for group in result["most"]
    ]
    header = ["kernel", "for", "operands", "mixtures", "registers", "stack", "shared KiB"]
    compiled, total = result["compiled"], result["mixtures"]
    share = f"{compiled} of {total} mixtures"
    if compiled < total:
        share += f", the usual ones and others at random (seed {result['seed']})"
    return f"{markdown_table(header, rows)}\n{share}.\n"


def candidates_table() -> str:
    """Tile shapes of `stepkto tune`, and for which kinds each compiles without a spill."""
    found = json.loads(COMPILED.read_text(encoding="utf-8"))["candidates"]
    columns = list(dict.fromkeys((entry["sm"], entry["operands"]) for entry in found))
    kinds = {(e["tile"], e["sm"], e["operands"]): ", ".join(e["kinds"]) or "-" for e in found}
    rows = [
        [tile, *(kinds[tile, sm, operands] for sm, operands in columns)]
        for tile in dict.fromkeys(entry["tile"] for entry in found)
    ]
    header = ["tile", *(f"sm_{sm} {operands.split()[1]}" for sm, operands in columns)]
    return markdown_table(header, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="tables of benchmarks/ROOFLINE.md")
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    tables = {**TABLES, "compile": compile_table, "mixtures": mixtures_table}
    tables["candidates"] = candidates_table
    new = with_tables(old, {name: table() for name, table in tables.items()})
    if args.check:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
