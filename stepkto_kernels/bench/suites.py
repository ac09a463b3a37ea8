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

from stepkto_kernels.bench.contenders import PATHS, Contender, Skip, execute, warm_up
from stepkto_kernels.bench.exact import Check, Errors, exact_logps
from stepkto_kernels.bench.memory import Case, Failed, in_fresh_process
from stepkto_kernels.bench.memory_suite import memory
from stepkto_kernels.bench.options import Options, Row, new_row, one_line
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
from stepkto_kernels.bench.segment_suite import segments
from stepkto_kernels.bench.timing import GEMM_UNITS, BareGemm, Times, interleaved, ratios

ACCURACY_SPREAD = 10.0  # the largest |z| of a row is about 40
ACCURACY_COMPARED = 512  # tokens, and vocabulary entries
TIMES = ("ms_best", "ms_median", "ratio", "ratio_median", "ratio_own", "extra_mib")


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
                    case = Case(suite, path, contender.key, shape, dtype, options.device)
                    row.update(_extra_memory(case, options))
        options.note(f"{suite} {shape} {dtype} {path}: timing {len(runs)} in turns")
        times = interleaved(runs, options.repeats, options.device)
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
        return Errors(), f"failed: {one_line(error)}"
    return errors, check.verdict(errors)


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
            for path, needs in PATHS["head"].items():
                for contender in found:
                    if needs and options.wants(path) and path in contender.units:
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


def _extra_memory(case: Case, options: Options) -> Row:
    options.note(f"{case.suite} {case.shape} {case.path}: memory of {case.key}")
    try:
        return {"extra_mib": in_fresh_process(case)}
    except Failed as error:
        return {"extra_mib": None, "memory_status": f"failed: {error}"}
