"""`stepkto bench`: run suites, print rows as they come, write JSON and PNG."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from stepkto_kernels.backend import BACKENDS
from stepkto_kernels.bench.contenders import MODES, NEEDS, PATHS, Skip
from stepkto_kernels.bench.environment import environment
from stepkto_kernels.bench.options import Options, Row
from stepkto_kernels.bench.peers import PEERS
from stepkto_kernels.bench.plans import PLANNED_PATHS
from stepkto_kernels.bench.plots import plot
from stepkto_kernels.bench.problems import DTYPES, Shape
from stepkto_kernels.bench.report import header, line, summary, write_json
from stepkto_kernels.bench.roofline import Roofline, measure_copy
from stepkto_kernels.bench.segment_suite import PATHS as SEGMENT_PATHS
from stepkto_kernels.bench.suites import SUITES

SUITE_PATHS = {
    "head": tuple(PATHS["head"]),
    "loss": tuple(PATHS["loss"]),
    "segments": tuple(SEGMENT_PATHS),
    "memory": PLANNED_PATHS,
    "accuracy": tuple(path for path in MODES if NEEDS[path]),
}
OUTPUT = Path("benchmarks/results")
DESCRIPTION = "Measure this library beside its peers. Each path is checked against fp64 first."


def add_arguments(parser: argparse.ArgumentParser, output: Path = OUTPUT) -> None:
    add = parser.add_argument
    add(
        "--suite",
        nargs="+",
        default=["all"],
        choices=[*SUITES, "all"],
        metavar="SUITE",
        help=f"{', '.join(SUITES)} or all (default)",
    )
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add(
        "--peers",
        nargs="+",
        default=["all"],
        choices=[*PEERS, "all", "none"],
        metavar="PEER",
        help=f"{', '.join(PEERS)}, all (those without -default) or none",
    )
    add(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="NxHxV",
        help="tokens x hidden x vocabulary, for every chosen suite; default: the suite's own",
    )
    add("--dtype", nargs="+", choices=list(DTYPES), help="default: the suite's own")
    add("--paths", nargs="+", metavar="PATH", help="only these paths, such as recompute or kto")
    add(
        "--backends",
        nargs="+",
        choices=[name for name in BACKENDS if name not in ("auto", "reference")],
        help="of this library; default: all that run",
    )
    add("--repeats", type=_positive, default=5, help="timed rounds, best and median (default 5)")
    add("--threads", type=_positive, help="CPU threads; default: torch's")
    add("--no-memory", action="store_true", help="leave out the memory column of head and loss")
    add("--output", type=Path, default=output, metavar="DIR", help=f"default {output}")


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"want a whole number > 0, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Returns 1 where one of our own rows is not "ok".

    Raises:
        ValueError: --device cuda without a GPU, or --paths that no chosen suite has.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: want a device that is here, got cuda without a GPU")
    if args.threads:
        torch.set_num_threads(args.threads)
    names = tuple(SUITES) if "all" in args.suite else tuple(dict.fromkeys(args.suite))
    _check_paths(args.paths, names)
    options = Options(
        device=args.device,
        peers=_peers(args.peers),
        shapes=None if args.shapes is None else tuple(args.shapes),
        dtypes=None if args.dtype is None else tuple(args.dtype),
        paths=None if args.paths is None else tuple(args.paths),
        backends=None if args.backends is None else tuple(args.backends),
        repeats=args.repeats,
        memory=not args.no_memory,
        note=lambda text: print(f"... {text}", file=sys.stderr, flush=True),
    )
    roofline = Roofline(measure_copy(args.device))
    results = [
        run_suite(name, options, args.output, command(args, name), roofline) for name in names
    ]
    rows = [row for result in results for row in result["rows"]]
    return int(any(row["name"] == "ours" and row["status"] != "ok" for row in rows))


def run_suite(
    name: str, options: Options, output: Path, command: str, roofline: Roofline
) -> dict[str, Any]:
    """Print rows as they come, write `output`/<suite>_<device>.json and .png.

    The JSON is written with every row, so that a run that is cut off is not lost. The floors in it
    are those of its roofline, which rises with the bare GEMMs that are timed; the lines printed
    earlier have the floors known then.

    Returns the content of the JSON.
    """
    result = {"benchmark": name, **environment(options.device, command)}
    rows: list[Row] = []
    skipped: list[dict[str, str]] = []
    result.update(complete=False, repeats=options.repeats, roofline=roofline.header())
    result.update(rows=rows, skipped=skipped)
    stem = output / f"{name}_{options.device}"
    begin = time.perf_counter()
    for item in SUITES[name](options):
        if isinstance(item, Skip):
            skipped.append(item._asdict())
            print(f"without {item.who}: {item.reason}", flush=True)
            continue
        if not rows:
            print(header(name))
        rows.append(item)
        roofline.see(item)
        result["roofline"] = roofline.header()
        for row in rows:
            row.update(roofline.columns(row))
        print(line(item), flush=True)
        write_json(result, stem.with_suffix(".json"))
    result.update(complete=True, seconds=round(time.perf_counter() - begin))
    write_json(result, stem.with_suffix(".json"))
    if name in ("head", "loss"):
        print("\n" + summary(rows))
    print(f"wrote {stem}.json", flush=True)
    try:
        plot(result, stem.with_suffix(".png"))
        print(f"wrote {stem}.png\n", flush=True)
    except ImportError as error:
        print(f"no plot: {error}\n", flush=True)
    return result


def _peers(names: list[str]) -> tuple[str, ...]:
    if "all" in names:
        named = [name for name in names if name in PEERS]
        usual = [name for name, peer in PEERS.items() if not peer.on_request]
        return tuple(dict.fromkeys(usual + named))
    return tuple(dict.fromkeys(name for name in names if name != "none"))


def _check_paths(paths: list[str] | None, suites: tuple[str, ...]) -> None:
    known = list(dict.fromkeys(path for suite in suites for path in SUITE_PATHS[suite]))
    for path in paths or []:
        if path not in known:
            raise ValueError(f"--paths: want some of {', '.join(known)}, got {path!r}")


def command(args: argparse.Namespace, suite: str) -> str:
    """The command that measures one suite again; where it wrote to is left out."""
    words = ["stepkto", "bench", "--suite", suite, "--device", args.device, "--peers", *args.peers]
    for name in ("shapes", "dtype", "paths", "backends"):
        values = getattr(args, name)
        if values:
            words += [f"--{name}", *map(str, values)]
    words += ["--repeats", str(args.repeats)]
    if args.threads:
        words += ["--threads", str(args.threads)]
    if args.no_memory:
        words.append("--no-memory")
    return shlex.join(words)
