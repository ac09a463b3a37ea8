"""Every public op of the CPU on small shapes, as calls that can be repeated.

Letters: N tokens, H hidden size, V vocabulary, B sequences, K steps a sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stepkto_kernels import (
    KLBaseline,
    StepKTOConfig,
    StepKTOLoss,
    StepSegments,
    fused_linear_step_kto_loss,
    kl_baseline,
    linear_logprobs,
    linear_logprobs_with_stats,
    loss_normalizer,
    native,
    reference,
    segment_sums,
    step_kto_loss,
    token_logprobs,
)
from stepkto_kernels.plan import plan_head

Call = Callable[[], object]

B, T, K, H, V = 2, 6, 2, 8, 50
STEP_IDS = torch.tensor([[-1, 0, 0, 1, 1, -1], [-1, -1, 0, 0, 1, 1]])
COMPLETION = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
OUTCOME, STEPS = torch.tensor([1, 0]), torch.tensor([[1, 1], [1, 0]])
BASELINE = KLBaseline(0.2, 0.1)
BUDGET = 4096  # bytes: some rows of the head are kept, not all


def segments() -> StepSegments:
    return StepSegments.from_padded(STEP_IDS, COMPLETION, OUTCOME, STEPS)


def head(needs_hidden: bool = True, needs_weight: bool = True, bias: bool = True) -> list[Tensor]:
    """hidden, weight, target, bias."""
    draw = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=draw)
    target = torch.randint(0, V, (B, T), generator=draw)
    hidden = randn(B, T, H).requires_grad_(needs_hidden)
    weight = randn(V, H).requires_grad_(needs_weight)
    return [hidden, weight, target, *([randn(V).requires_grad_(needs_weight)] if bias else [])]


def backward(loss: Tensor, *leaves: Tensor) -> None:
    loss.backward()
    for leaf in leaves:
        leaf.grad = None


def head_call(mode: str, backend: str) -> Call:
    needs = {"forward": (False, False), "frozen": (True, False)}.get(mode, (True, True))
    budget = BUDGET if mode == "cached" else None
    plan = plan_head(
        *(B * T, V, 4, "cpu"),
        needs_hidden=needs[0],
        needs_weight=needs[1],
        needs_entropy=False,
        memory_budget=budget,
    )
    assert plan.mode == mode, f"want mode {mode}, got {plan}"
    hidden, weight, target, bias = head(*needs)

    def call() -> None:
        found = linear_logprobs(hidden, weight, target, bias, memory_budget=budget, backend=backend)
        if mode != "forward":
            backward(found.sum(), hidden, weight, bias)

    return call


def stats_call(backend: str) -> Call:
    hidden, weight, target, bias = head()

    def call() -> None:
        logp, stats = linear_logprobs_with_stats(hidden, weight, target, bias, backend=backend)
        assert stats.entropy is not None
        backward((logp + stats.entropy).sum(), hidden, weight, bias)

    return call


def token_call(backend: str) -> Call:
    logits = torch.randn(B, T, V, requires_grad=True)
    target = head()[2]
    return lambda: backward(token_logprobs(logits, target, backend=backend).sum(), logits)


def sums_call() -> Call:
    ratio, layout = torch.randn(B, T, requires_grad=True), segments()

    def call() -> None:
        outcome, step = segment_sums(ratio, layout)
        backward(outcome.sum() + step.sum(), ratio)

    return call


def loss_call(function: Callable[..., Any], point: str = "mismatched") -> Call:
    logps, ref_logps, layout = torch.randn(B, T, requires_grad=True), torch.randn(B, T), segments()
    config = StepKTOConfig(reference_point=point)
    baseline = BASELINE if point == "mismatched" else None
    normalizer = loss_normalizer(layout, config)

    def call() -> None:
        found = function(logps, ref_logps, layout, baseline, config, normalizer)
        if isinstance(found, Tensor):  # the reference gives the loss only
            found = found, None
        loss, metrics = found
        if metrics is not None:
            metrics.compute()
        backward(loss, logps)

    return call


def fused_call(use: str, backend: str, point: str = "mismatched", **options: object) -> Call:
    """use: "backward", "no gradient", or "unused", a loss that is dropped."""
    hidden, weight, target, bias = head(use != "no gradient", use != "no gradient")
    ref_logps, layout = torch.randn(B, T), segments()
    config = StepKTOConfig(reference_point=point)
    baseline = BASELINE if point == "mismatched" else None

    def call() -> None:
        loss, metrics = fused_linear_step_kto_loss(
            *(hidden, weight, target, layout, ref_logps, baseline, bias),
            config=config,
            backend=backend,
            **options,  # type: ignore[arg-type]
        )
        metrics.compute()
        if use == "backward":
            backward(loss, hidden, weight, bias)

    return call


def baseline_call(function: Callable[..., object]) -> Call:
    logps, ref_logps, layout = torch.randn(B, T), torch.randn(B, T), segments()
    return lambda: function(logps, ref_logps, layout)


def padded_call() -> object:
    return segments().validate().to("cpu")


def packed_call() -> object:
    ends, step_index = torch.tensor([0, 5, 12]), torch.tensor([0, 0, 1, 1, -1, 2, 2, 2, 3, 3, 3, 3])
    made = StepSegments.from_packed(ends, step_index, OUTCOME, STEPS.flatten())
    return made.validate().to("cpu")


def module_call(point: str, backend: str) -> Call:
    """One module that is called again and again, its running value moving, as in training."""
    module = StepKTOLoss(StepKTOConfig(reference_point=point), backend=backend)
    hidden, weight, target, bias = head()
    ref_logps, layout = torch.randn(B, T), segments()
    baseline = BASELINE if point == "mismatched" else None

    def call() -> None:
        loss, _ = module(hidden, weight, target, layout, ref_logps, baseline, bias)
        backward(loss, hidden, weight, bias)

    return call


def module_made() -> object:
    """A module of its own in each call, copied and loaded as checkpoints do."""
    module = StepKTOLoss(StepKTOConfig(reference_point="ema"))
    module.load_state_dict(module.state_dict())
    return module.half()


def refused_call(backend: str) -> Call:
    """Calls that raise: their tracebacks hold the frames, and those the tensors, until dropped."""
    hidden, weight, target, bias = head()
    layout, ref_logps = segments(), torch.randn(B, T)
    far = target.clone()
    far[0, 0] = V
    config = StepKTOConfig()
    fused = lambda *args, **options: fused_linear_step_kto_loss(*args, backend=backend, **options)
    refused: list[Call] = [
        lambda: linear_logprobs(hidden, weight, far, bias, backend=backend),  # inside of the op
        lambda: linear_logprobs(hidden, weight[:, 1:], target, bias, backend=backend),
        lambda: linear_logprobs(hidden.double(), weight, target, bias, backend=backend),
        lambda: linear_logprobs(hidden, weight, target, bias, backend="other"),
        lambda: linear_logprobs_with_stats(hidden, weight, target, stats=("other",)),
        lambda: token_logprobs(torch.randn(B, T, 2), target, backend=backend),
        lambda: fused(hidden, weight, far, layout, ref_logps, BASELINE, bias, config=config),
        lambda: fused(hidden, weight, target, layout, ref_logps[:1], BASELINE, config=config),
        lambda: fused(hidden, weight, target, layout, ref_logps, None, bias, config=config),
        lambda: step_kto_loss(ref_logps, ref_logps[0], layout, BASELINE),
        lambda: step_kto_loss(ref_logps, ref_logps, layout, None),
        lambda: segment_sums(ref_logps[0], layout),
        lambda: kl_baseline(ref_logps, ref_logps[0], layout),
        lambda: StepSegments.from_padded(STEP_IDS + 9, COMPLETION, OUTCOME, STEPS),
        lambda: StepSegments.from_packed(OUTCOME, OUTCOME + 9, OUTCOME[:1], OUTCOME),
        lambda: StepKTOConfig(beta=-1.0),
        lambda: StepKTOLoss(config, temperature=0.0),
    ]

    def call() -> None:
        for each in refused:
            try:
                each()
            except ValueError:
                continue
            raise AssertionError("want a ValueError, got none")

    return call


def compiled_call() -> Call:
    """Traced and run as torch.compile does, without the C++ compiler."""
    hidden, weight, target, bias = head()
    ref_logps, layout = torch.randn(B, T), segments()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logps = linear_logprobs(hidden, weight, target, bias)
        return step_kto_loss(logps, ref_logps, layout, BASELINE)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    return lambda: backward(compiled(hidden, weight, bias), hidden, weight, bias)


@contextmanager
def without_native() -> Iterator[None]:
    """ "auto" takes "torch"."""
    before = native.WHY_NOT
    native.WHY_NOT = "hidden by the benchmark"
    try:
        yield
    finally:
        native.WHY_NOT = before


def on_torch(make: Callable[[], Call]) -> Callable[[], Call]:
    """The same of the backend "torch", for functions that take no backend by name."""

    def made() -> Call:
        call = make()

        def hidden() -> None:
            with without_native():
                call()

        return hidden

    return made


MODES = ("forward", "frozen", "cached", "recompute")
BACKENDS = ("native", "torch")


def all_calls() -> dict[str, Callable[[], Call]]:
    """By name what makes the call."""
    found: dict[str, Callable[[], Call]] = {}
    for backend in BACKENDS:
        for mode in MODES:
            found[f"linear_logprobs, {mode}, {backend}"] = (
                lambda mode=mode, backend=backend: head_call(mode, backend)  # type: ignore[misc]
            )
        found |= {
            f"{name}, {backend}": lambda make=make, backend=backend: make(backend)  # type: ignore
            for name, make in {
                "linear_logprobs_with_stats": stats_call,
                "fused loss, backward": lambda backend: fused_call("backward", backend),
                "fused loss, no gradient": lambda backend: fused_call("no gradient", backend),
                "fused loss, unused": lambda backend: fused_call("unused", backend),
                "fused loss, matched": lambda backend: fused_call("backward", backend, "matched"),
                "fused loss, budget of 16 tokens": lambda backend: fused_call(
                    "backward", backend, memory_budget=1
                ),
                "StepKTOLoss, mismatched": lambda backend: module_call("mismatched", backend),
                "StepKTOLoss, ema": lambda backend: module_call("ema", backend),
                "refused calls": refused_call,
            }.items()
        }
    for mode in ("forward", "recompute"):
        found[f"linear_logprobs, {mode}, reference"] = (
            lambda mode=mode: head_call(mode, "reference")  # type: ignore[misc]
        )
    levels = {
        "step_kto_loss": lambda: loss_call(step_kto_loss),
        "step_kto_loss, matched": lambda: loss_call(step_kto_loss, "matched"),
    }
    found |= {f"{name}, native": make for name, make in levels.items()}
    found |= {f"{name}, torch": on_torch(make) for name, make in levels.items()}
    return found | {
        "step_kto_loss, reference": lambda: loss_call(reference.step_kto_loss),
        "fused loss, backward, reference": lambda: fused_call("backward", "reference"),
        "token_logprobs, torch": lambda: token_call("torch"),
        "token_logprobs, reference": lambda: token_call("reference"),
        "kl_baseline": lambda: baseline_call(kl_baseline),
        "kl_baseline, reference": lambda: baseline_call(reference.kl_baseline),
        "segment_sums": sums_call,
        "StepSegments.from_padded": lambda: padded_call,
        "StepSegments.from_packed": lambda: packed_call,
        "StepKTOLoss, made": lambda: module_made,
        "compiled": compiled_call,
    }


# ---- what must be found -----------------------------------------------------------------------


def keeps_tensors() -> Call:
    """One float a call, as a tensor."""
    kept: list[Tensor] = []
    return lambda: kept.append(torch.zeros(1))


def keeps_bytes() -> Call:
    """64 bytes a call, in an object that the collector does not know."""
    kept: list[bytes] = []
    return lambda: kept.append(bytes(31))  # and 33 of its header


def keeps_malloc() -> Call:
    """64 bytes a call that no Python object stands for, as C++ would lose them."""
    malloc, memset = ctypes.CDLL(None).malloc, ctypes.CDLL(None).memset
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    return lambda: memset(malloc(64), 1, 64)


def keeps_graphs() -> Call:
    """The loss of each call with all that its backward pass would need."""
    kept: list[Tensor] = []
    hidden, weight, target, bias = head()
    return lambda: kept.append(linear_logprobs(hidden, weight, target, bias).sum())


def keeps_errors() -> Call:
    """An exception a call, with the frames and tensors of its traceback."""
    kept: list[ValueError] = []
    hidden, weight, target, _ = head()

    def call() -> None:
        try:
            linear_logprobs(hidden, weight, target + V)
        except ValueError as error:
            kept.append(error)

    return call


# with the quantities that must be seen to grow
CONTROLS: dict[str, tuple[Callable[[], Call], tuple[str, ...]]] = {
    "a tensor of one float": (keeps_tensors, ("malloc", "blocks", "objects", "tensors")),
    "64 bytes of Python's": (keeps_bytes, ("resident", "blocks")),
    "64 bytes of malloc": (keeps_malloc, ("resident", "malloc")),
    "a loss and its graph": (keeps_graphs, ("resident", "malloc", "tensors", "storages")),
    "an exception": (keeps_errors, ("resident", "blocks", "objects")),
}
