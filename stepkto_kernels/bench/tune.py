"""`stepkto tune`: time the candidate tile shapes of gemm_epilogue.py on this GPU, write the best.

One shape is chosen for each kind of launch, dtype and way to read operands, whatever the number of
tokens: a row's bits depend on it. Each candidate is checked against fp64 before it is timed.
Letters: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepkto_kernels import plan
from stepkto_kernels.backend import available_backends
from stepkto_kernels.bench.options import one_line
from stepkto_kernels.bench.problems import DTYPES, HeadProblem, Shape, head_problem
from stepkto_kernels.bench.timing import Times, interleaved, release
from stepkto_kernels.config import LogitOptions
from stepkto_kernels.head import gemm_epilogue
from stepkto_kernels.kernels import tiles
from stepkto_kernels.kernels.tiles import Key, TileShape
from stepkto_kernels.rows import RowGradient

DESCRIPTION = "Time tile shapes of the Triton GEMM on this GPU and write the best to a file."
SHAPES = (Shape(8192, 4096, 131072), Shape(8192, 2048, 131072))
OUTPUT = Path("tuned.json")
CHECKED = 64  # tokens, and vocabulary entries, compared with fp64
GATE = 2  # a candidate's error over the default's; beyond it the candidate is left out
MARGIN = 0.01  # by which one has to be faster than the default

# runs by name -> milliseconds, as timing.interleaved gives them
Timer = Callable[[Mapping[str, Callable[[], object]]], dict[str, Times]]


class Launch(NamedTuple):
    """Something to run with a tile shape, and what comes out right."""

    run: Callable[[TileShape], Tensor]
    exact: Tensor  # fp64
    compared: Callable[[Tensor], Tensor]  # the part of run's result that `exact` is about

    def error(self, shape: TileShape) -> float:
        return float((self.compared(self.run(shape)).double() - self.exact).abs().max())


class Choice(NamedTuple):
    """shape: the fastest. ratio: its time over the default's, mean over shapes and launches."""

    shape: TileShape
    default: TileShape
    ratio: float
    left_out: dict[str, str]  # candidate -> why it was not timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shapes", nargs="+", type=_shape, default=list(SHAPES), metavar="NxHxV")
    add("--dtype", nargs="+", choices=tiles.DTYPES, default=["bfloat16"])
    add("--repeats", type=int, default=5, help="timed rounds, the best counts (default 5)")
    add("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default {OUTPUT}")


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Write the file, and say how to use it.

    Raises:
        ValueError: there is no GPU with Triton.
    """
    if not torch.cuda.is_available() or available_backends()["triton"] != "ok":
        raise ValueError("tune: want a CUDA GPU and Triton, got none")
    timer = lambda runs: interleaved(runs, args.repeats, "cuda")
    gemm = gemm_epilogue()
    choices = tune(args.shapes, args.dtype, "cuda", timer, lambda text: print(text, flush=True))
    notes = {
        key: {"ratio": round(choice.ratio, 4), "default": asdict(choice.default)}
        for key, choice in choices.items()
    }
    shapes = {key: choice.shape for key, choice in choices.items()}
    tiles.write(args.output, gemm.identity(torch.cuda.current_device()), shapes, notes)
    print(f"\nto use it: export {tiles.VARIABLE}={args.output.resolve()}")
    return 0


def tune(
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    device: str,
    timer: Timer,
    note: Callable[[str], None] = lambda text: None,
) -> dict[Key, Choice]:
    """The fastest candidate of every case that this device has, the default where none is faster.

    dtypes: of tiles.DTYPES. note: told what was chosen.
    """
    gemm = gemm_epilogue()
    ways = gemm.ways_to_read(torch.device(device))
    keys = [Key(k, dtype, way) for dtype in dtypes for way in ways for k in tiles.KINDS]
    choices = {}
    for key in keys:
        choices[key] = choose(key, shapes, device, timer)
        shape, default, ratio, left_out = choices[key]
        note(f"{' '.join(map(str, key))}: {_words(shape)}, {ratio:.3f} of the default's time")
        for candidate, why in left_out.items():
            note(f"    without {candidate}: {why}")
    return choices


def choose(key: Key, shapes: Sequence[Shape], device: str, timer: Timer) -> Choice:
    gemm = gemm_epilogue()
    default = gemm.default_shape(torch.device(device), key)
    candidates = {_words(shape): shape for shape in tiles.CANDIDATES}
    left_out: dict[str, str] = {}
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    for size in shapes:
        problem = head_problem(size, DTYPES[key.dtype], device)
        for launch in launches(key, problem):
            bound = GATE * launch.error(default) + torch.finfo(torch.float32).eps
            runs = {"default": partial(launch.run, default)}
            for name, shape in candidates.items():
                why = None if name in left_out else _why_not(launch, shape, bound)
                if why is not None:
                    left_out[name] = why
                elif name not in left_out:
                    runs[name] = partial(launch.run, shape)
            times = timer(runs)
            for name in runs:
                if name != "default":
                    ratios[name].append(times[name].best / times["default"].best)
        del problem
        release(device)
    means = {name: statistics.mean(found) for name, found in ratios.items() if name not in left_out}
    best = min(means, key=lambda name: means[name], default=None)
    if best is None or means[best] > 1 - MARGIN:
        return Choice(default, default, 1.0, left_out)
    return Choice(candidates[best], default, means[best], left_out)


def _why_not(launch: Launch, shape: TileShape, bound: float) -> str | None:
    """Why a candidate cannot be used, None if it can."""
    from triton import OutOfResources

    try:
        error = launch.error(shape)
    except OutOfResources as failure:
        return one_line(failure)
    return None if error <= bound else f"error {error:.3g}, more than {bound:.3g}"  # or NaN


def launches(key: Key, problem: HeadProblem) -> list[Launch]:
    """What a key stands for: forward, dlogits, or both with a bias and a soft cap."""
    narrow = key.kind == "narrow"
    options = LogitOptions(softcap=30.0) if narrow else LogitOptions()
    hidden, weight, target = problem.hidden, problem.weight, problem.target
    bias = weight[:, 0].contiguous() if narrow else None
    gemm = gemm_epilogue()
    columns = slice(0, min(plan.EPILOGUE_TILE[1], len(weight)))
    dlogits_bias = None if bias is None else bias[columns]

    def forward(shape: TileShape | None) -> Any:
        parts = hidden, weight, target, bias, options, ()
        return gemm.forward(*parts, descriptors=key.descriptors, shape=shape).finish()

    logp, lse, _ = forward(None)
    row = RowGradient(lse, logp, problem.upstream)
    out = hidden.new_empty(len(hidden), columns.stop)

    def dlogits(shape: TileShape) -> Tensor:
        parts = hidden, weight[columns], target, dlogits_bias, 0, row, options, out
        return gemm.dlogits(*parts, descriptors=key.descriptors, shape=shape)

    exact_logp, exact_d = exact(problem, bias, options, columns)
    last = slice(max(len(hidden) - CHECKED, 0), None)
    both = {
        "forward": Launch(lambda shape: forward(shape)[0], exact_logp, lambda got: got[last]),
        "dlogits": Launch(dlogits, exact_d, lambda got: got[last, -CHECKED:]),
    }
    return list(both.values()) if narrow else [both[key.kind]]


def exact(
    problem: HeadProblem, bias: Tensor | None, options: LogitOptions, columns: slice
) -> tuple[Tensor, Tensor]:
    """Of the last tokens, fp64: log-probs, and dlogits of the last of `columns`."""
    last = slice(max(len(problem.hidden) - CHECKED, 0), None)
    h = problem.hidden[last].double()
    parts = []
    for vocab in plan.cut(len(problem.weight), 8192):
        z = h @ problem.weight[vocab].double().T
        z = z if bias is None else z + bias[vocab].double()
        parts.append(z)
    z = torch.cat(parts, 1)
    slope = torch.ones_like(z)
    if options.softcap is not None:
        slope = 1 - torch.tanh(z / options.softcap).square()
        z = options.softcap * torch.tanh(z / options.softcap)
    log_p = z.log_softmax(1)
    target = problem.target[last, None]
    d = -log_p.exp()
    d.scatter_add_(1, target, torch.ones_like(h[:, :1]))
    d *= slope * problem.upstream[last, None].double()
    return log_p.gather(1, target)[:, 0], d[:, columns][:, -CHECKED:]


def _words(shape: TileShape) -> str:
    return "x".join(map(str, asdict(shape).values()))
