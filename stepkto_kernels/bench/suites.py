"""The suites: each yields its rows as they are measured, and who is left out and why.

head      per-token log-probs, by path; ratio to the bare GEMM of 3 units
loss      Step-KTO and KTO from hidden states; the same ratio
segments  segment sums and the loss of given log-probs; ratio to plain torch
memory    peak of every mode and peer against N, V and budget, each in a fresh process
accuracy  errors against fp64 with large logits and likely targets
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch

from stepkto_kernels.bench.contenders import (
    MODES,
    NEEDS,
    PATHS,
    Contender,
    Skip,
    execute,
    warm_up,
)
from stepkto_kernels.bench.exact import Check, Errors, exact_logps
from stepkto_kernels.bench.memory import Case, in_fresh_process
from stepkto_kernels.bench.memory_suite import memory
from stepkto_kernels.bench.options import Options, Row, failure, new_row
from stepkto_kernels.bench.peers import contenders
from stepkto_kernels.bench.problems import (
    DTYPES,
    HeadProblem,
    LossProblem,
    Shape,
    head_problem,
    make_problem,
    on_path,
)
from stepkto_kernels.bench.roofline import path_bytes
from stepkto_kernels.bench.segment_suite import segments
from stepkto_kernels.bench.timing import GEMM_UNITS, BareGemm, Times, interleaved, ratios, release

ACCURACY_SPREAD = 10.0  # the largest |z| of a row is about 40
ACCURACY_COMPARED = 512  # tokens, and vocabulary entries
TIMES = (
    "ms_best",
    "ms_median",
    "ratio",
    "ratio_median",
    "ratio_own",
    "floor_ms",
    "of_floor",
    "extra_mib",
)


def timed(suite: str, options: Options) -> Iterator[Row | Skip]:
    """Suites head and loss: check, measure memory, then time in turns with the bare GEMM."""
    found, skipped = contenders(suite, options.device, options.peers)
    found = list(filter(options.takes, found))
    yield from skipped
    for dtype in options.dtypes_of(suite):
        for shape in options.shapes_of(suite):
            yield from timed_shape(suite, found, shape, dtype, options)


def timed_shape(
    suite: str, found: list[Contender], shape: Shape, dtype: str, options: Options
) -> Iterator[Row]:
    options.note(f"{suite} {shape} {dtype}: fp64 log-probs")
    problem = make_problem(suite, shape, DTYPES[dtype], options.device)
    exact = exact_logps(problem.hidden, problem.weight, problem.target)
    gemm = BareGemm(problem)
    gemm.run()
    bare = Contender("gemm", "bare GEMM", "-", dict.fromkeys(PATHS[suite], GEMM_UNITS), gemm.run)
    for path in PATHS[suite]:
        if not options.wants(path):
            continue
        here = on_path(problem, path)
        check = Check(here, exact, _ref_logps(here, path))
        rows: dict[str, Row] = {bare.key: _timed_row(suite, path, bare, shape, dtype)}
        runs: dict[str, Callable[[], object]] = {bare.key: gemm.run}
        for contender in found:
            if path not in contender.units:
                continue
            options.note(f"{suite} {shape} {dtype} {path}: checking {contender.key}")
            row = _timed_row(suite, path, contender, shape, dtype)
            errors, row["status"] = checked(contender, here, path, check)
            row.update(asdict(errors))
            rows[contender.key] = row
            if row["status"] == "ok":
                runs[contender.key] = partial(execute, contender, here, path)
        if options.memory:
            _extra_memory(rows, [key for key in runs if key != bare.key], options)
        options.note(f"{suite} {shape} {dtype} {path}: timing {len(runs)} in turns")
        times = interleaved(
            runs, options.repeats, options.device, failed=partial(_fail, rows, bare.key)
        )
        for key, row in rows.items():
            if key in times:
                row.update(time_columns(times[key], times[bare.key], row["units"]))
            yield row


def checked(
    contender: Contender, problem: HeadProblem, path: str, check: Check
) -> tuple[Errors, str]:
    """Errors against fp64, and "ok" or what is wrong. Leaves it warm."""
    try:
        warm_up(contender, problem, path)
        errors = check.errors(execute(contender, problem, path))
    except Exception as error:  # whatever somebody else's code raises is a row of the table
        status = failure(error)
    else:
        return errors, check.verdict(errors)
    release(problem.hidden.device.type)  # only here has the traceback let go of its tensors
    return Errors(), status


def _fail(rows: dict[str, Row], bare: str, key: str, error: Exception) -> None:
    """Nothing can be compared without the bare GEMM; anybody else is left out."""
    if key == bare:
        raise error
    rows[key]["status"] = failure(error)


def time_columns(times: Times, gemm: Times, units: int) -> Row:
    """The time columns of a row, `gemm` being the bare GEMM of GEMM_UNITS units."""
    ratio, own = ratios(times.best, gemm.best, units)
    return {
        "ms_best": times.best,
        "ms_median": times.median,
        "ratio": ratio,
        "ratio_median": times.median / gemm.median,
        "ratio_own": own,
    }


def accuracy(options: Options) -> Iterator[Row | Skip]:
    """Suite accuracy: every second target is the likeliest token, the others are random."""
    found, skipped = contenders("head", options.device, options.peers)
    found = list(filter(options.takes, found))
    yield from skipped
    for dtype in options.dtypes_of("accuracy"):
        for shape in options.shapes_of("accuracy"):
            options.note(f"accuracy {shape} {dtype}: fp64")
            problem = head_problem(
                shape,
                DTYPES[dtype],
                options.device,
                spread=ACCURACY_SPREAD,
                likely_targets=True,
            )
            exact = exact_logps(problem.hidden, problem.weight, problem.target)
            check = Check(problem, exact, compared=ACCURACY_COMPARED)
            for path in MODES:
                for contender in found:
                    if NEEDS[path] and options.wants(path) and path in contender.units:
                        row = new_row("accuracy", path, contender, shape, dtype)
                        errors, row["status"] = checked(contender, problem, path, check)
                        yield {**row, **asdict(errors)}


SUITES: dict[str, Callable[[Options], Iterator[Row | Skip]]] = {
    "head": partial(timed, "head"),
    "loss": partial(timed, "loss"),
    "segments": segments,
    "memory": memory,
    "accuracy": accuracy,
}


def _timed_row(suite: str, path: str, contender: Contender, shape: Shape, dtype: str) -> Row:
    row = new_row(suite, path, contender, shape, dtype)
    row.update(units=contender.units[path], **dict.fromkeys(TIMES), **asdict(Errors()))
    row["bytes"] = path_bytes(suite, path, shape, dtype, NEEDS)
    if suite == "loss":
        row["includes"] = contender.includes
    return row


def _ref_logps(problem: HeadProblem, path: str) -> torch.Tensor | None:
    """fp64 reference log-probs of a path of the loss."""
    if not isinstance(problem, LossProblem):
        return None
    if path == "kto+ref":
        return exact_logps(problem.ref_hidden, problem.weight, problem.target).logps
    return problem.ref_logps().double()


def _extra_memory(rows: dict[str, Row], keys: list[str], options: Options) -> None:
    """Measure the memory of the rows of these keys."""
    cases = []
    for key in keys:
        row = rows[key]
        shape = Shape(row["N"], row["H"], row["V"])
        cases.append(Case(row["suite"], row["path"], key, shape, row["dtype"], options.device))
    if not cases:
        return
    options.note(f"{cases[0].suite} {Shape(*cases[0].shape)} {cases[0].path}: memory of {keys}")
    for key, peak in zip(keys, in_fresh_process(cases), strict=True):
        if isinstance(peak, str):
            rows[key]["memory_status"] = peak
        else:
            rows[key]["extra_mib"] = peak
