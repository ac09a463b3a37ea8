"""NaN in, NaN out: what is not finite reaches the loss, and nothing else.

The values of the core's functions where an input is not finite, for every backend. An infinity is
a number where the formulas have a limit (a logit of -inf has probability 0, a capped one is the
cap), and NaN everywhere else.
"""

import math

import pytest
import torch

from stepkto_kernels import (
    KLBaseline,
    LossNormalizer,
    StepKTOConfig,
    StepSegments,
    fused_linear_step_kto_loss,
    kl_baseline,
    linear_logprobs,
    native,
    reference,
    segment_sums,
    step_kto_loss,
)
from stepkto_kernels.metrics import TOTALS, StepKTOMetrics

BAD = [math.nan, math.inf, -math.inf]
# what needs a gradient, and bytes for cached rows of 300 logits: the modes of linear_logprobs
MODES = {
    "no gradient": ((), None),
    "frozen head": (("hidden",), None),
    "recompute": (("hidden", "weight", "bias"), None),
    "cached": (("hidden", "weight", "bias"), 12 * 300 * 4),
}
BASELINE = KLBaseline(0.21, 0.13)
CONFIG = StepKTOConfig(beta=0.2, step_weight=0.7)


@pytest.fixture(params=list(MODES.values()), ids=list(MODES))
def mode(request):
    return request.param


@pytest.fixture
def logps_of(backend, evaluate, mode):
    def logps_of(problem):
        needs, budget = mode
        extra = {"backend": backend, "memory_budget": budget}
        return evaluate(linear_logprobs, problem, needs, **extra)

    return logps_of


def row_bits(logps: torch.Tensor) -> torch.Tensor:
    return logps.view(torch.int32)


@pytest.mark.parametrize("value", BAD)
def test_a_hidden_state_reaches_its_own_log_prob_alone(logps_of, head_problem, dtype, value):
    problem = head_problem(dtype=dtype, bias=True)
    clean = logps_of(problem)
    row = 7
    assert problem.target[row] >= 0 and problem.upstream[row] != 0
    problem.hidden[row, 5] = value
    found = logps_of(problem)
    assert found["logps"][row].isnan()
    others = torch.arange(40) != row
    assert torch.equal(row_bits(found["logps"])[others], row_bits(clean["logps"])[others])
    if "dhidden" in found:
        assert found["dhidden"][row].isnan().all()
        assert torch.equal(found["dhidden"][others], clean["dhidden"][others])
    if "dweight" in found:
        assert found["dweight"].isnan().all() and found["dbias"].isnan().all()


def test_nan_is_not_capped(logps_of, head_problem, logit_options):
    """A cap turns infinite logits into finite ones, but no NaN into a number."""
    problem = head_problem(**logit_options)
    clean = logps_of(problem)
    problem.hidden[7, 5] = math.nan
    found = logps_of(problem)["logps"]
    assert found[7].isnan()
    others = torch.arange(40) != 7
    assert torch.equal(row_bits(found)[others], row_bits(clean["logps"])[others])


@pytest.mark.parametrize("column", [0, 150, 299])
def test_nan_in_the_head_reaches_every_log_prob(logps_of, head_problem, column):
    for name in ("weight", "bias"):
        problem = head_problem(bias=True)
        getattr(problem, name)[column] = math.nan
        scored = problem.target >= 0
        found = logps_of(problem)
        assert found["logps"][scored].isnan().all()
        assert (found["logps"][~scored] == 0).all()
        for gradient in found.keys() - {"logps", "dhidden"}:
            assert not found[gradient].isfinite().all()


@pytest.fixture
def batch(typical, head_problem):
    """A problem for the tokens of `typical`, its reference log-probs, and tokens in the loss."""
    problem = head_problem(N=typical.num_tokens, bias=True, ignored="none")
    generator = torch.Generator().manual_seed(3)
    ref_logps = -6 + torch.randn(typical.num_tokens, generator=generator)
    labelled = torch.isin(typical.sequence_index, (typical.outcome_label >= 0).nonzero()[:, 0])
    return problem, ref_logps, (labelled & (typical.sequence_index >= 0)).nonzero()[:, 0]


POINTS = {
    "given": (CONFIG, BASELINE),
    "matched": (StepKTOConfig(reference_point="matched"), None),
    "clipped": (StepKTOConfig(reference_point="zero", ratio_clip=(-1.0, 1.0)), None),
    "by length": (StepKTOConfig(reference_point="zero", length_normalize=True), None),
}


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
@pytest.mark.parametrize("rows", [None, 16], ids=["one block", "several blocks"])
@pytest.mark.parametrize("where", ["hidden", "weight", "bias", "ref_logps"])
def test_the_fused_loss(batch, typical, backend, where, rows, point):
    config, baseline = point
    problem, ref_logps, scored = batch
    tensors = {name: getattr(problem, name) for name in ("hidden", "weight", "bias")}
    tensors["ref_logps"] = ref_logps
    tensors[where][scored[3]] = math.nan
    loss, metrics = fused_linear_step_kto_loss(
        problem.hidden,
        problem.weight,
        problem.target,
        typical,
        ref_logps,
        baseline,
        problem.bias,
        config=config,
        memory_budget=rows and rows * 300 * 4,
        backend=backend,
    )
    assert loss.isnan()
    means = metrics.compute()
    assert math.isnan(means["loss"])


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
@pytest.mark.parametrize("where", ["logps", "ref_logps"])
@pytest.mark.parametrize("value", BAD)
def test_the_loss_of_log_probs(batch, typical, auto_is, where, value, point):
    """An infinite log-ratio has a finite loss, the sigmoid's limit; the metrics still show it."""
    config, baseline = point
    _, ref_logps, scored = batch
    logps = (ref_logps + 0.5).requires_grad_()
    given = {"logps": logps, "ref_logps": ref_logps}
    with torch.no_grad():
        given[where][scored[3]] = value
    loss, metrics = step_kto_loss(logps, ref_logps, typical, baseline, config)
    loss.backward()
    own = typical.sequence_index == typical.sequence_index[scored[3]]
    if config.reference_point != "matched":  # which is a number for all of them
        assert logps.grad[~own].isfinite().all()
    if math.isnan(value):
        assert loss.isnan() and logps.grad[own].isnan().any()
    hidden = config.ratio_clip is not None and where == "ref_logps" and math.isinf(value)
    assert metrics.totals.isfinite().all() == hidden


def test_an_unlabelled_segment_is_not_in_the_loss(batch, typical, auto_is):
    _, ref_logps, _ = batch
    [sequence] = (typical.outcome_label < 0).nonzero()[:, 0].tolist()
    in_step = (typical.step_index >= 0) & (typical.sequence_index == sequence)
    logps = ref_logps + 0.5
    token = (typical.sequence_index == sequence) & ~in_step
    logps[token] = math.nan
    loss, metrics = step_kto_loss(logps, ref_logps, typical, BASELINE, CONFIG)
    assert loss.isfinite() and metrics.totals.isfinite().all()


@pytest.mark.parametrize("value", BAD)
def test_reference_points(batch, typical, value):
    """max(0, NaN) is NaN. A mean of -inf is below 0, and so 0."""
    _, ref_logps, scored = batch
    logps = ref_logps + 0.5
    logps[scored[3]] = value
    z = kl_baseline(logps, ref_logps, typical)
    want = torch.tensor(max(0.0, value) if math.isinf(value) else value).double()
    torch.testing.assert_close(torch.as_tensor(z.outcome), want, equal_nan=True)
    step = typical.step_index[scored[3]] >= 0
    if step:
        torch.testing.assert_close(torch.as_tensor(z.step), want, equal_nan=True)
    # and a reference point that is NaN makes the loss so
    loss, _ = step_kto_loss(ref_logps + 0.5, ref_logps, typical, z, CONFIG)
    assert loss.isnan() == math.isnan(value)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_sums(typical, value, dtype):
    ratio = torch.randn(typical.num_tokens, dtype=dtype)
    clean = segment_sums(ratio, typical)
    token = (typical.step_index >= 0).nonzero()[2, 0]
    ratio[token] = value
    for sums, before, index in zip(
        segment_sums(ratio, typical),
        clean,
        (typical.sequence_index, typical.step_index),
        strict=True,
    ):
        own = torch.arange(len(sums)) == index[token]
        assert not sums[own].isfinite().any() and sums[own].isnan() == math.isnan(value)
        assert torch.equal(sums[~own], before[~own])


@pytest.mark.parametrize("name", TOTALS)
def test_metrics_show_it(batch, typical, name):
    """Whichever of the sums is NaN, and however many batches without it are added."""
    _, ref_logps, _ = batch
    _, clean = step_kto_loss(ref_logps + 0.5, ref_logps, typical, BASELINE, CONFIG)
    totals = clean.totals.clone()
    totals[TOTALS.index(name)] = math.nan
    means = (clean + StepKTOMetrics(totals) + clean).compute()
    assert any(math.isnan(value) for value in means.values())


@pytest.mark.skipif(native.WHY_NOT is not None, reason=f"native: {native.WHY_NOT}")
def test_the_kernels_functions_keep_nan():
    x = torch.tensor([math.nan, 0.3, -math.nan, 21.0])
    for function in (native.exp, native.tanh):
        assert function(x).isnan().tolist() == [True, False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_is_not_capped_on_a_gpu(head_problem, backend):
    """Whose minimum of NaN and a number is the number, unlike that of Triton's interpreter."""
    problem = head_problem(dtype=torch.bfloat16, softcap=5.0).to("cuda")
    problem.hidden[7, 5] = math.nan
    found = linear_logprobs(
        problem.hidden, problem.weight, problem.target, softcap=5.0, backend=backend
    )
    assert found.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("level", ["outcome", "step"])
def test_a_divisor_that_is_nan_makes_the_loss_nan(auto_is, level):
    one = torch.zeros(1, dtype=torch.int32)
    label = torch.ones(1, dtype=torch.int8)
    segments = StepSegments(one, one, label, label, one)
    logps = torch.zeros(1, requires_grad=True)
    config = StepKTOConfig(reference_point="zero")
    divisors = LossNormalizer(1.0, 1.0)._replace(**{level: torch.tensor(math.nan)})
    loss, _ = step_kto_loss(logps, torch.zeros(1), segments, config=config, normalizer=divisors)
    loss.backward()
    assert loss.isnan() and logps.grad.isnan().all()
    assert reference.step_kto_loss(
        logps, torch.zeros(1), segments, config=config, normalizer=divisors
    ).isnan()
