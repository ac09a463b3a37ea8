"""One way to run a path: what it costs, how it is called; and this library's own ways.

A path says which gradients are wanted and what may be kept. A contender says how many GEMM units
it spends on a path, one unit being one pass of the head, 2 * N * H * V floating-point operations;
what it cannot do is not among its units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stepkto_kernels import available_backends
from stepkto_kernels.bench.problems import (
    HALF_PROMPT,
    HeadProblem,
    LossProblem,
    Shape,
    make_problem,
    on_path,
)
from stepkto_kernels.fused_step_kto import fused_linear_step_kto_loss
from stepkto_kernels.linear_logprobs import linear_logprobs
from stepkto_kernels.step_kto import step_kto_loss

# Suite -> path -> what needs a gradient. No two suites share the name of a path.
PATHS: dict[str, dict[str, tuple[str, ...]]] = {
    "head": {
        "forward": (),
        "frozen": ("hidden",),
        "cached": ("hidden", "weight"),  # something of size (N, V) is kept for the backward pass
        "recompute": ("hidden", "weight"),  # nothing of that size is
        HALF_PROMPT: ("hidden", "weight"),  # like recompute, with half of the tokens ignored
    },
    "loss": {
        "kto": ("hidden", "weight"),  # outcome level only, reference log-probs given
        "kto+ref": ("hidden", "weight"),  # the same, and the reference's forward pass
        "step_kto": ("hidden", "weight"),  # both levels, reference log-probs given
    },
}
# Paths of suite head on which every token is scored
MODES = tuple(path for path in PATHS["head"] if path != HALF_PROMPT)
NEEDS = {path: needs for paths in PATHS.values() for path, needs in paths.items()}

WARM = (Shape(32, 64, 64), Shape(96, 80, 144))

# (problem, hidden, weight, path) -> log-probs (N,) in suite head, the loss () in suite loss
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Contender:
    name: str  # "ours", or the name that --peers takes
    who: str  # in tables
    backend: str
    units: Mapping[str, int]  # path -> GEMM units
    run: Run
    includes: str = ""

    @property
    def key(self) -> str:
        """Unique in a suite."""
        return f"{self.who}/{self.backend}"


class Skip(NamedTuple):
    """Who is not measured, and why."""

    who: str
    reason: str


class Outcome(NamedTuple):
    value: Tensor  # log-probs (N,), or the loss ()
    dhidden: Tensor | None  # (N, H)
    dweight: Tensor | None  # (V, H)


def execute(contender: Contender, problem: HeadProblem, path: str) -> Outcome:
    """Forward, and backward where the path has gradients. This is what is timed."""
    needs = NEEDS[path]
    hidden = problem.hidden.detach().requires_grad_("hidden" in needs)
    weight = problem.weight.detach().requires_grad_("weight" in needs)
    with torch.set_grad_enabled(bool(needs)):
        value = contender.run(problem, hidden, weight, path)
    if needs:
        value.backward(problem.upstream.to(value.dtype) if value.ndim else None)
    return Outcome(value.detach(), hidden.grad, weight.grad)


def warm_up(contender: Contender, problem: HeadProblem, path: str) -> None:
    """Run two tiny problems of that kind: imports, thread pools, compilation.

    Of different shapes, after which a peer that compiles does so for any shape.
    """
    suite = "loss" if isinstance(problem, LossProblem) else "head"
    hidden = problem.hidden
    for shape in WARM:
        tiny = make_problem(suite, shape, hidden.dtype, hidden.device.type)
        execute(contender, on_path(tiny, path), path)


def our_backends(device: str) -> tuple[list[str], list[Skip]]:
    """Backends of this library that run on `device`, the fastest first, and the one that cannot."""
    fast = "native" if device == "cpu" else "triton"
    state = available_backends()[fast]
    if state == "ok":
        return [fast, "torch"], []
    return ["torch"], [Skip(f"stepkto_kernels/{fast}", state)]


def our_heads(backend: str, budget: int | None = None) -> list[Contender]:
    """budget: bytes for the cached mode; None: every row."""
    # the ignored half is dropped before any GEMM
    units = {"forward": 1, "frozen": 2, "cached": 3, "recompute": 4, HALF_PROMPT: 2}
    return [Contender("ours", "stepkto_kernels", backend, units, partial(_head, backend, budget))]


def our_losses(backend: str, budget: int | None = None) -> list[Contender]:
    """budget: bytes; None: the default of the fused loss, every row of the cached composition."""
    make = lambda what, *rest: Contender("ours", f"stepkto_kernels {what}", backend, *rest)
    return [
        make(
            "fused",
            {"kto": 3, "kto+ref": 4, "step_kto": 3},
            partial(_fused, backend, budget),
            "log-probs, segment sums, loss, metrics, both gradients in one pass",
        ),
        make(
            "cached",
            {"kto": 3, "step_kto": 3},
            partial(_composed, backend, budget, True),
            "linear_logprobs with every row cached, then step_kto_loss",
        ),
        make(
            "recompute",
            {"kto": 4, "step_kto": 4},
            partial(_composed, backend, budget, False),
            "linear_logprobs without a budget, then step_kto_loss",
        ),
    ]


def all_rows(problem: HeadProblem) -> int:
    """A memory budget, bytes, in which every row can be cached."""
    N, _, V = problem.shape
    return 8 * (N + 8192) * V


def _logps(
    backend: str,
    budget: int | None,
    cached: bool,
    problem: HeadProblem,
    hidden: Tensor,
    weight: Tensor,
) -> Tensor:
    given = (budget or all_rows(problem)) if cached else None
    return linear_logprobs(hidden, weight, problem.target, memory_budget=given, backend=backend)


def _head(
    backend: str,
    budget: int | None,
    problem: HeadProblem,
    hidden: Tensor,
    weight: Tensor,
    path: str,
) -> Tensor:
    return _logps(backend, budget, path == "cached", problem, hidden, weight)


def _fused(
    backend: str,
    budget: int | None,
    problem: LossProblem,
    hidden: Tensor,
    weight: Tensor,
    path: str,
) -> Tensor:
    ref_logps = problem.ref_logps()
    if path == "kto+ref":
        with torch.no_grad():
            ref_logps = _logps(backend, None, False, problem, problem.ref_hidden, weight)
    return fused_linear_step_kto_loss(
        hidden,
        weight,
        problem.target,
        problem.segments,
        ref_logps,
        problem.baseline,
        config=problem.config,
        memory_budget=budget,
        backend=backend,
    )[0]


def _composed(
    backend: str,
    budget: int | None,
    cached: bool,
    problem: LossProblem,
    hidden: Tensor,
    weight: Tensor,
    path: str,
) -> Tensor:
    logps = _logps(backend, budget, cached, problem, hidden, weight)
    return step_kto_loss(
        logps, problem.ref_logps(), problem.segments, problem.baseline, problem.config
    )[0]
