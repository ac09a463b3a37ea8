"""Random cases of the property tests: what they are made of, how many, and which ran to the end.

STEPKTO_FUZZ=N tries about N cases of each property instead of a few (`make fuzz`), and
STEPKTO_FUZZ_COUNTS names a JSON file for the number of those that ran to the end.
Letters: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import atexit
import collections
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from stepkto_kernels import KLBaseline, StepKTOConfig, available_backends, native, plan

FUZZ = int(os.environ.get("STEPKTO_FUZZ", "0"))
FP32 = torch.finfo(torch.float32)
FP64 = torch.finfo(torch.float64)

# ---- how many ---------------------------------------------------------------------------------

counts: collections.Counter[tuple[str, str]] = collections.Counter()  # of (property, backend)


def _write_counts(path: str) -> None:
    rows = [[name, backend, number] for (name, backend), number in sorted(counts.items())]
    pathlib.Path(path).write_text(json.dumps(rows), encoding="utf-8")


if "STEPKTO_FUZZ_COUNTS" in os.environ:
    atexit.register(_write_counts, os.environ["STEPKTO_FUZZ_COUNTS"])


def fuzzed(cases: int, share: float = 1.0) -> Callable[[Callable], Callable]:
    """Settings of a property that takes a `case`: `cases` of them, or `share` of STEPKTO_FUZZ.

    Stands above @given. Cases that end by `assume` are not counted, nor those that fail.
    """
    fuzzing = FUZZ > 0
    chosen = settings(
        max_examples=max(int(share * FUZZ), 1) if fuzzing else cases,
        deadline=None,
        derandomize=not fuzzing,
        database=None,  # a run depends on its seed alone
        print_blob=True,
        # explaining a failure takes as long as shrinking it
        phases=[phase for phase in Phase if phase is not Phase.explain],
        suppress_health_check=list(HealthCheck),
    )

    def decorate(test: Callable) -> Callable:
        inner = test.hypothesis.inner_test  # type: ignore[attr-defined]

        @functools.wraps(inner)
        def counted(*args: Any, **kwargs: Any) -> None:
            inner(*args, **kwargs)
            case = kwargs["case"]
            counts[test.__name__, getattr(case, "backend", "any")] += 1

        test.hypothesis.inner_test = counted  # type: ignore[attr-defined]
        return chosen(test)

    return decorate


# ---- tensors ----------------------------------------------------------------------------------

VIEWS = ("as is", "strided", "transposed", "offset")


def _garbage(x: Tensor, *shape: int) -> Tensor:
    """What lies between the elements of a view must not be read: NaN, or an index far off."""
    return x.new_full(shape, math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)


def viewed(x: Tensor, view: str) -> Tensor:
    """The same values in other memory."""
    if view == "strided" and x.ndim:
        wide = _garbage(x, *x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if view == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if view == "offset":
        part = _garbage(x, x.numel() + 3)[3:].view(x.shape)
        return part.copy_(x)
    return x


def served_by(backend: str) -> AbstractContextManager[object]:
    """Functions that take no backend by name take "native" where it is there; so hide it."""
    if backend == "native":
        return nullcontext()
    return mock.patch.object(native, "WHY_NOT", "hidden by the test")


# Triton's interpreter takes a hundred times as long, so it gets fewer cases, and smaller ones.
_WEIGHTS = {"torch": 8, "native": 8, "triton": 2, "reference": 2}


def backends_of(*names: str) -> st.SearchStrategy[str]:
    state = available_backends()
    usable = [name for name in names if state[name] == "ok"]
    return st.sampled_from([name for name in usable for _ in range(_WEIGHTS[name])])


# ---- an lm_head -------------------------------------------------------------------------------

ALL = ("hidden", "weight", "bias")
NEEDS = (("hidden",), ALL, ("weight", "bias"), ALL, ("bias",), ())
LOGITS = (
    *("normal",) * 4,
    "wide",  # N(0, 100**2)
    "huge",  # N(0, 1e4**2)
    "signs",  # 1e4 or -1e4, all of them
    "equal",
    "zero",
    "certain",  # the target's is the largest by far: p -> 1
    "hopeless",  # another's is: p -> 0
    "masked",  # -inf in the bias of some columns
    "spike",  # 1e4 in the bias of one
)


@dataclass(frozen=True)
class HeadCase:
    """Arguments of a call over an lm_head; `problem` makes the tensors."""

    backend: str
    shape: tuple[int, ...]
    V: int
    H: int
    dtype: torch.dtype
    logits: str
    bias: bool
    ignored: str
    upstream: float  # size of the upstream gradients
    needs: tuple[str, ...]
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    views: tuple[str, str, str] = ("as is", "as is", "as is")  # hidden, weight, target
    budget: int | None = None
    chunks: tuple[int, int] | None = None  # tokens and vocabulary columns of a tile

    @property
    def unit(self) -> float:
        """Relative rounding of dlogits: kept ones, and all of Triton's, are as narrow as inputs."""
        narrow = self.backend in ("triton", "reference") or bool(self.budget)
        return torch.finfo(self.dtype if narrow else torch.float32).eps

    @property
    def wanted(self) -> tuple[str, ...]:
        has_bias = self.bias or self.logits in ("masked", "spike")
        return tuple(name for name in self.needs if name != "bias" or has_bias)

    def tiles(self) -> AbstractContextManager[object]:
        """While it is open, tiles are as small as `chunks` says."""
        if self.chunks is None:
            return nullcontext()
        tokens, columns = self.chunks
        return mock.patch.multiple(
            plan,
            TOKEN_CHUNK={**plan.TOKEN_CHUNK, "cpu": tokens},
            VOCAB_CHUNK={**plan.VOCAB_CHUNK, "cpu": columns},
        )

    def problem(self, head_problem: Callable) -> Any:
        """A HeadProblem of conftest.py."""
        spread = {"wide": 100.0, "huge": 1e4, "zero": 0.0}.get(self.logits, 3.0)
        problem = head_problem(
            N=self.shape, V=self.V, H=self.H, dtype=self.dtype, spread=spread, seed=self.seed,
            bias=self.bias or self.logits in ("masked", "spike"), ignored=self.ignored,
        )  # fmt: skip
        hidden, weight, bias = problem.hidden, problem.weight, problem.bias
        known = problem.target.clamp(min=0)
        if self.logits == "signs":
            weight = torch.zeros_like(weight)
            weight[:, 0] = 100 * problem.weight[:, 0].sign()
            hidden = hidden.clone()
            hidden[..., 0] = 100
        elif self.logits == "equal":
            weight = weight[:1].expand(self.V, self.H).clone()
        elif self.logits in ("certain", "hopeless"):
            weight = torch.where(weight < 0, -1.0, 1.0).to(self.dtype)
            other = 0 if self.logits == "certain" else 1
            hidden = 60 / self.H * weight[(known + other) % self.V]
        elif self.logits == "masked":
            generator = torch.Generator().manual_seed(self.seed)
            masked = torch.rand(self.V, generator=generator) < 0.5
            masked[known.flatten()] = False
            masked[0] = False
            bias = bias.masked_fill(masked, -torch.inf)
        elif self.logits == "spike":
            bias = bias.clone()
            bias[self.seed % self.V] = 1e4
        ignore_index = self.options.get("ignore_index", -100)
        target = problem.target.where(problem.target != -100, ignore_index)
        return replace(
            problem,
            hidden=viewed(hidden, self.views[0]),
            weight=viewed(weight, self.views[1]),
            target=viewed(target, self.views[2]),
            bias=bias,
            upstream=problem.upstream * self.upstream,
            options=self.options,
        )

    def call(self) -> dict[str, Any]:
        return {"backend": self.backend, "memory_budget": self.budget}


def _maybe(draw: Any, strategy: st.SearchStrategy) -> Any:
    return draw(st.one_of(st.none(), strategy))


@st.composite
def logit_options(draw: Any, masked: bool = False) -> dict[str, Any]:
    """masked: with logits of -inf, whose product with a scale of 0 or less means nothing."""
    scale, zero = st.floats(0.01, 2.0), st.just(0.0)
    options = {
        "temperature": _maybe(draw, st.floats(0.1, 4.0)),
        "logit_scale": _maybe(draw, scale if masked else scale | scale.map(float.__neg__) | zero),
        # one that caps makes a masked column an ordinary one
        "softcap": None if masked else _maybe(draw, st.floats(0.5, 50.0)),
        "ignore_index": draw(st.sampled_from([None, None, -1, 0, -(2**40)])),
    }
    return {name: value for name, value in options.items() if value is not None}


def dtypes_of(backend: str) -> st.SearchStrategy[torch.dtype]:
    """bf16 is broken in Triton's interpreter."""
    narrow = [] if backend == "triton" else [torch.bfloat16]
    return st.sampled_from([torch.float32, torch.float16, *narrow])


def upstreams_of(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Gradients beyond fp16's range are infinite in any order of summing."""
    huge = [30.0] if dtype == torch.float16 else [1e6, 1e20]
    return st.sampled_from([1.0, 1.0, 1.0, 0.0, *huge])


@st.composite
def head_cases(
    draw: Any,
    backends: Sequence[str] = ("torch", "native", "triton", "reference"),
    logits: Sequence[str] = LOGITS,
) -> HeadCase:
    backend = draw(backends_of(*backends))
    slow = backend == "triton"
    dtype = draw(dtypes_of(backend))
    kind = draw(st.sampled_from(logits))
    n = st.integers(0, 9 if slow else 40)
    pair = st.tuples(st.integers(0, 3), st.integers(0, 3 if slow else 13))
    view = st.sampled_from(VIEWS)
    return HeadCase(
        backend=backend,
        shape=draw(st.tuples(n) | st.tuples(n) | pair | st.just(())),
        V=draw(st.integers(1, 40 if slow else 200)),
        H=draw(st.integers(1, 20 if slow else 40)),
        dtype=dtype,
        logits=kind,
        bias=draw(st.booleans()),
        ignored=draw(st.sampled_from(["some", "none", "some", "none", "all"])),
        upstream=draw(upstreams_of(dtype)),
        needs=draw(st.sampled_from(NEEDS)),
        seed=draw(st.integers(0, 2**20)),
        options=draw(logit_options(kind == "masked")),
        views=draw(st.tuples(view, view, view)),
        budget=draw(st.sampled_from([None, 0, 10**4, 10**7])),
        chunks=draw(st.sampled_from([None, None, (16, 16), (7, 33), (1, 64)])),
    )


def within_range(*values: Tensor, dtype: torch.dtype) -> bool:
    """Whether the exact values can be written in a dtype at all, the sums behind them too."""
    largest = max((x.abs().max().item() for x in values if x.numel()), default=0.0)
    return not largest > torch.finfo(dtype).max / 4


# ---- a batch of sequences ---------------------------------------------------------------------

LABELS = st.sampled_from([1, 0, 1, 0, -1])


@st.composite
def sequences(draw: Any, most: int = 5) -> list:
    """A batch as in conftest's BATCHES."""
    step = st.tuples(LABELS, st.integers(0, 6))
    one = st.tuples(LABELS, st.lists(step, max_size=4), st.integers(0, 4))
    return draw(st.lists(one, max_size=most))


@st.composite
def configs(draw: Any, matched: bool = True) -> StepKTOConfig:
    # what hypothesis draws of floats are mostly edges, at which there is no gradient to look at
    weight = st.sampled_from([1.0, 0.3, 1.7, 3.0, 0.0])
    slope = st.sampled_from([0.1, 0.01, 0.5, 1.0, 3.0])
    loss_type = draw(st.sampled_from(["kto", "kto", "apo_zero"]))
    points: list[object] = ["mismatched", "zero", "ema", 0.3] + ["matched"] * matched
    if loss_type == "apo_zero":
        points = ["mismatched", "zero"]
    return StepKTOConfig(
        beta=draw(slope),
        step_beta=_maybe(draw, slope),
        step_weight=draw(weight),
        desirable_weight=draw(weight),
        undesirable_weight=draw(weight),
        step_desirable_weight=draw(weight),
        step_undesirable_weight=draw(weight),
        step_reduction=draw(st.sampled_from(["sequence_mean", "mean", "sum"])),
        loss_type=loss_type,
        reference_point=draw(st.sampled_from(points)),
        ratio_clip=draw(st.sampled_from([None, None, (-1.0, 0.5)])),
        length_normalize=draw(st.booleans()),
    )


def needs_baseline(config: StepKTOConfig) -> bool:
    return config.fixed_reference_point is None and config.reference_point != "matched"


def baseline_of(config: StepKTOConfig, size: float = 1.0) -> KLBaseline | None:
    return KLBaseline(0.2 * size, 0.1 * size) if needs_baseline(config) else None


def slopes_in_parts(
    loss: Callable[[Tensor, StepKTOConfig], Tensor], logps: Tensor, config: StepKTOConfig
) -> Tensor:
    """|d outcome term / d logps| + |d process term / d logps|, which may cancel in the sum."""
    parts = []
    for part in (replace(config, step_weight=0.0), config):
        leaf = logps.detach().requires_grad_()
        value = loss(leaf, part)
        parts.append(torch.autograd.grad(value, leaf)[0] if value.requires_grad else 0 * logps)
    outcome, both = parts
    return outcome.abs() + (both - outcome).abs()
