"""Random shapes, strides, options, logits and upstream gradients, against fp64.

STEPKTO_FUZZ=N tries N cases of each property instead of a few (`make fuzz`). A case that fails is
shrunk and printed as an @example to keep here.
"""

import os
from dataclasses import replace

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from stepkto_kernels import (  # noqa: E402
    KLBaseline,
    StepKTOConfig,
    available_backends,
    fused_linear_step_kto_loss,
    linear_logprobs,
    reference,
    segment_sums,
    step_kto_loss,
)

CASES = int(os.environ.get("STEPKTO_FUZZ", "40"))
fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="STEPKTO_FUZZ" not in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
BACKENDS = [name for name in ("torch", "native") if available_backends()[name] == "ok"]
NEEDS = [("hidden",), ("weight", "bias"), ("hidden", "weight", "bias"), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
labels = st.sampled_from([-1, 0, 1])


@st.composite
def heads(draw):
    """Arguments of head_problem, what is done to its tensors, and how it is called."""
    scalar = lambda low, high: st.one_of(st.none(), st.floats(low, high))
    options = {
        "temperature": draw(scalar(0.1, 4.0)),
        "logit_scale": draw(scalar(-2.0, 2.0)),
        "softcap": draw(scalar(0.5, 50.0)),
    }
    return {
        "N": draw(st.integers(0, 40)),
        "V": draw(st.integers(1, 200)),
        "H": draw(st.integers(1, 40)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "bias": draw(st.booleans()),
        "ignored": draw(st.sampled_from(["some", "all", "none"])),
        "spread": draw(st.sampled_from([0.0, 3.0, 100.0])),
        "seed": draw(st.integers(0, 2**20)),
        **{name: value for name, value in options.items() if value is not None},
    }


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values in every second column of a wider tensor."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("backend", BACKENDS)
@fuzzed
@given(
    arguments=heads(),
    needs=st.sampled_from(NEEDS),
    budget=st.sampled_from([None, 0, 10**4, 10**7]),
    upstream=st.sampled_from([None, 0.0, 1e6]),
    has_strides=st.booleans(),
)
def test_head(
    backend,
    head_problem,
    evaluate,
    assert_head_within_bound,
    arguments,
    needs,
    budget,
    upstream,
    has_strides,
):
    problem = head_problem(**arguments)
    if upstream is not None:
        problem = replace(problem, upstream=problem.upstream * upstream)
    if problem.weight.dtype == torch.float16 and upstream == 1e6:
        return  # gradients beyond fp16's range are infinite in any order of summing
    given_problem = problem
    if has_strides:
        parts = {name: strided(getattr(problem, name)) for name in ("hidden", "weight")}
        given_problem = replace(problem, **parts)
    if not arguments["bias"]:
        needs = tuple(name for name in needs if name != "bias")
    found = evaluate(linear_logprobs, given_problem, needs, memory_budget=budget, backend=backend)
    unit = torch.finfo(problem.weight.dtype).eps  # kept gradients are of that dtype
    assert_head_within_bound(found, problem, needs, unit=unit, whole=False)


@st.composite
def sequences(draw):
    """A batch as in conftest's BATCHES."""
    step = st.tuples(labels, st.integers(0, 6))
    one = st.tuples(labels, st.lists(step, max_size=4), st.integers(0, 4))
    return draw(st.lists(one, max_size=5))


@st.composite
def configs(draw):
    weight = st.floats(0.0, 3.0)
    loss_type = draw(st.sampled_from(["kto", "apo_zero"]))
    points = ["zero"] if loss_type == "apo_zero" else ["mismatched", "zero", "matched", 0.3]
    return StepKTOConfig(
        beta=draw(st.floats(0.01, 3.0)),
        step_beta=draw(st.one_of(st.none(), st.floats(0.01, 3.0))),
        step_weight=draw(weight),
        desirable_weight=draw(weight),
        undesirable_weight=draw(weight),
        step_desirable_weight=draw(weight),
        step_undesirable_weight=draw(weight),
        step_reduction=draw(st.sampled_from(["sequence_mean", "mean", "sum"])),
        loss_type=loss_type,
        reference_point=draw(st.sampled_from(points)),
        ratio_clip=draw(st.sampled_from([None, (-1.0, 0.5)])),
        length_normalize=draw(st.booleans()),
    )


def baseline_of(config: StepKTOConfig) -> KLBaseline | None:
    own = config.fixed_reference_point is not None or config.reference_point == "matched"
    return None if own else KLBaseline(0.2, 0.1)


@fuzzed
@given(
    batch=sequences(),
    config=configs(),
    size=st.sampled_from([0.0, 1.0, 30.0]),
    order=st.sampled_from(["packed", "interleaved"]),
    seed=st.integers(0, 2**20),
)
def test_loss_and_its_gradient(layout, assert_within_bound, batch, config, size, order, seed):
    segments = layout(batch, order)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: size * torch.randn(segments.num_tokens, generator=generator)
    logps, ref_logps = draw(), draw()
    found = {}
    for name, function, dtype in (
        ("ours", step_kto_loss, torch.float32),
        ("eager", reference.step_kto_loss, torch.float32),
        ("exact", reference.step_kto_loss, torch.float64),
    ):
        leaf = logps.to(dtype).requires_grad_()
        value = function(leaf, ref_logps.to(dtype), segments, baseline_of(config), config)
        loss = value[0] if name == "ours" else value
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        found[name] = loss, torch.zeros_like(leaf) if gradient is None else gradient
    # u is known to an ulp of beta * sum |ratio|, and a slope to as many of its own
    slope = max(config.beta, config.step_beta or 0.0, 1.0)
    ulps = 4 + 2 * slope * (logps - ref_logps).abs().sum().double()
    for i, what in enumerate(("loss", "gradient")):
        ours, eager, exact = (found[name][i] for name in ("ours", "eager", "exact"))
        assert_within_bound(ours, eager, exact, scale=exact.abs() * ulps, name=what)


@fuzzed
@given(
    batch=sequences(),
    config=configs(),
    V=st.integers(1, 60),
    budget=st.sampled_from([None, 0, 10**5]),
    seed=st.integers(0, 2**20),
)
def test_fused_loss_is_the_composition(layout, batch, config, V, budget, seed):
    segments = layout(batch)
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator)
    N = segments.num_tokens
    target, ref_logps = torch.randint(0, V, (N,), generator=generator), -randn(N).abs()
    values = randn(N, 8), randn(V, 8)
    found = []
    for fused in (True, False):
        hidden, weight = (value.clone().requires_grad_() for value in values)
        if fused:
            loss, _ = fused_linear_step_kto_loss(
                hidden, weight, target, segments, ref_logps, baseline_of(config),
                config=config, memory_budget=budget,
            )  # fmt: skip
        else:
            logps = linear_logprobs(hidden, weight, target)
            loss, _ = step_kto_loss(logps, ref_logps, segments, baseline_of(config), config)
        loss.backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (hidden, weight)]
        found.append((loss.detach(), *grads))
    for ours, want in zip(*found, strict=True):
        largest = want.abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5 * max(largest, 1e-3))


@fuzzed
@given(batch=sequences(), size=st.sampled_from([0.0, 1.0, 1e4]), seed=st.integers(0, 2**20))
def test_segment_sums(layout, batch, size, seed):
    """Exact: the fp64 sum, rounded once."""
    segments = layout(batch, "interleaved")
    values = size * torch.randn(segments.num_tokens, generator=torch.Generator().manual_seed(seed))
    outcome, steps = segment_sums(values, segments)
    for index, sums in ((segments.sequence_index, outcome), (segments.step_index, steps)):
        kept = index >= 0
        want = torch.zeros(len(sums), dtype=torch.float64)
        want.index_add_(0, index[kept].long(), values[kept].double())
        torch.testing.assert_close(sums.double(), want, rtol=2e-7, atol=1e-12 * max(size, 1))
