"""fused_linear_step_kto_loss and StepKTOLoss: the loss straight from hidden states.

Letters: N tokens, H hidden size, V vocabulary, B sequences, S steps.
"""

import copy
import math
import random
import warnings
from dataclasses import replace

import pytest
import torch

from stepkto_kernels import (
    KLBaseline,
    LossNormalizer,
    StepKTOConfig,
    StepKTOLoss,
    StepSegments,
    fused_linear_step_kto_loss,
    linear_logprobs,
    plan,
    reference,
    step_kto_loss,
)
from stepkto_kernels.fused_step_kto import pack_sequences, token_blocks
from stepkto_kernels.segments import TokenLayout

V = 150
ALL = ("hidden", "weight", "bias")
NEEDS = {
    "no gradient": (),
    "frozen head": ("hidden",),
    "frozen hidden": ("weight", "bias"),
    "only the bias": ("bias",),
    "everything": ALL,
}
# Tokens whose logits are held at once; 16 is the least. "long" has sequences of 3, 42, 3 and 20.
ROWS = {"one block": 1000, "several blocks": 30, "longer than a block": 0}
BASELINE = KLBaseline(0.21, 0.13)
CONFIG = StepKTOConfig(beta=0.2, step_beta=0.5, step_weight=0.7)
UPSTREAM = 1.7  # rounded by bf16 and fp16


def in_bytes(rows):
    return None if rows is None else rows * V * 4


@pytest.fixture
def problem_of(head_problem):
    """A HeadProblem for the tokens of a batch, with reference log-probs a nat or so away."""

    def problem_of(segments, dtype=torch.float32, **options):
        options = {"bias": True, "ignored": "none", **options}
        problem = head_problem(N=segments.num_tokens, V=V, dtype=dtype, **options)
        problem = replace(problem, upstream=torch.tensor(UPSTREAM))
        exact = problem.to(torch.float64)
        ref_logps = reference.linear_logprobs(
            exact.hidden, exact.weight, exact.target, exact.bias, **exact.options
        )
        return problem, (ref_logps + torch.randn(segments.num_tokens)).float()

    return problem_of


def fused(segments, ref_logps, baseline, config, function=fused_linear_step_kto_loss):
    """The loss as a function that `evaluate` can call."""

    def loss(hidden, weight, target, bias, **options):
        ref = ref_logps.double() if hidden.dtype == torch.float64 else ref_logps
        out = function(
            hidden, weight, target, segments, ref, baseline, bias, config=config, **options
        )
        return out[0] if isinstance(out, tuple) else out

    return loss


@pytest.fixture
def check(evaluate, assert_within_bound, rounding_scale, problem_of, backend):
    """Loss and gradients of a batch against the reference in `precision` and in fp64."""

    def check(
        segments,
        baseline,
        config,
        *,
        dtype=torch.float32,
        needs=ALL,
        rows=None,
        precision=None,
        **options,
    ):
        problem, ref_logps = problem_of(segments, dtype, **options)
        args = (segments, ref_logps, baseline, config)
        call = {"memory_budget": in_bytes(rows), "backend": backend}
        ours = evaluate(fused(*args), problem, needs, **call)
        in_torch = fused(*args, function=reference.fused_linear_step_kto_loss)
        eager = evaluate(in_torch, problem.to(precision or dtype), needs)
        exact = evaluate(in_torch, problem.to(torch.float64), needs)
        assert ours.keys() == exact.keys()

        slopes = d_loss_d_logps(problem, *args)
        scale = rounding_scale(replace(problem, upstream=slopes))
        # errors of log p add up in u = beta * sum of log-ratios, relative ones of the slopes
        beta = max(config.beta, config.step_beta or 0)
        of_u = beta * scale["logps"].square().sum().sqrt()
        for name, value in ours.items():
            wanted = torch.float32 if name == "logps" else dtype
            assert value.dtype == wanted, f"{name}: {value.dtype}, not {wanted}"
            if name == "logps":
                floor = {"magnitude": of_u.item() * max(config.step_weight, 1)}
            else:
                floor = {"scale": scale[name] * (1 + of_u)}
            label = "loss" if name == "logps" else name
            assert_within_bound(value, eager[name], exact[name], name=label, **floor)

    return check


def d_loss_d_logps(problem, segments, ref_logps, baseline, config):
    """fp64 slopes of the loss in the log-probs, scaled by the upstream gradient."""
    exact = problem.to(torch.float64)
    logps = reference.linear_logprobs(
        exact.hidden, exact.weight, exact.target, exact.bias, **exact.options
    ).requires_grad_()
    loss = reference.step_kto_loss(logps, ref_logps.double(), segments, baseline, config)
    return torch.autograd.grad(loss * UPSTREAM, logps)[0].float()


# ---- accuracy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("order", ["packed", "interleaved"])
def test_modes_and_blocks(check, layout, long, dtype, needs, rows, order):
    check(layout(long, order), BASELINE, CONFIG, dtype=dtype, needs=needs, rows=rows)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_logit_options(check, layout, long, dtype, logit_options, rows):
    options = {"bias": False, **logit_options}
    check(layout(long), BASELINE, CONFIG, dtype=dtype, rows=rows, **options)


@pytest.mark.parametrize("rows", [1000, 0], ids=["one block", "several"])
def test_batches(check, segments, rows):
    check(segments, BASELINE, CONFIG, rows=rows)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_configs(check, layout, long, config, baseline, rows):
    check(layout(long), baseline, config, rows=rows)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_narrow_inputs_have_the_precision_of_fp32(check, layout, long, dtype, rows):
    check(layout(long), BASELINE, CONFIG, dtype=dtype, rows=rows, precision=torch.float32)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("length_normalize", [False, True], ids=["sums", "means"])
def test_ignored_targets_inside_a_sequence(check, layout, long, dtype, rows, length_normalize):
    """As in linear_logprobs they have log-prob 0, whatever the reference log-prob there."""
    config = replace(CONFIG, length_normalize=length_normalize)
    check(layout(long), BASELINE, config, dtype=dtype, rows=rows, ignored="some")


def test_all_targets_ignored(check, layout, long, dtype):
    check(layout(long), BASELINE, CONFIG, dtype=dtype, ignored="all")


def test_two_threads(check, layout, long):
    torch.set_num_threads(2)
    check(layout(long * 10), BASELINE, CONFIG, rows=200)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_on_a_gpu(evaluate, assert_within_bound, problem_of, layout, long, dtype, rows):
    segments = layout(long)
    problem, ref_logps = problem_of(segments, dtype)
    args = (segments, ref_logps, BASELINE, CONFIG)
    on_gpu = (segments.to("cuda"), ref_logps.to("cuda"), BASELINE, CONFIG)
    ours = evaluate(fused(*on_gpu), problem.to("cuda"), memory_budget=in_bytes(rows))
    in_torch = fused(*args, function=reference.fused_linear_step_kto_loss)
    eager = evaluate(in_torch, problem)
    exact = evaluate(in_torch, problem.to(torch.float64))
    for name in ours:
        assert_within_bound(ours[name], eager[name], exact[name], magnitude=10.0, name=name)


# ---- against the two steps it fuses -----------------------------------------------------------


@pytest.fixture
def check_composition(problem_of, auto_is):
    """Loss and metrics have the bits of linear_logprobs followed by step_kto_loss."""

    def check_composition(segments, baseline, config, rows):
        problem, ref_logps = problem_of(segments, ignored="some")
        arguments = (problem.hidden, problem.weight, problem.target)
        logps = linear_logprobs(*arguments, problem.bias)
        wanted, wanted_metrics = step_kto_loss(logps, ref_logps, segments, baseline, config)
        loss, metrics = fused_linear_step_kto_loss(
            *(*arguments, segments, ref_logps, baseline, problem.bias),
            config=config,
            memory_budget=in_bytes(rows),
        )
        assert torch.equal(loss, wanted)
        assert torch.equal(metrics.totals, wanted_metrics.totals)
        assert not loss.requires_grad and not metrics.totals.requires_grad

    return check_composition


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_batches_have_the_bits_of_the_composition(check_composition, segments, rows):
    check_composition(segments, BASELINE, CONFIG, rows)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_configs_have_the_bits_of_the_composition(
    check_composition, layout, long, config, baseline, rows
):
    check_composition(layout(long), baseline, config, rows)


def test_given_normalizer(problem_of, evaluate, layout, long, backend):
    """Both terms are divided by it; by a power of two, that changes no digit."""
    segments = layout(long)
    problem, ref_logps = problem_of(segments)
    function = fused(segments, ref_logps, BASELINE, CONFIG)
    a, b = (
        evaluate(function, problem, backend=backend, normalizer=LossNormalizer(*counts))
        for counts in ((4, 4.0), torch.tensor([4096.0, 4096.0]))
    )
    assert all(torch.equal(a[name], 1024 * b[name]) for name in a)
    assert a["logps"] == evaluate(function, problem, backend=backend)["logps"]  # 4 labels


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_gradient_bound(
    problem_of, evaluate, assert_head_within_bound, layout, long, backend, dtype, rows
):
    """Tokens with |d loss / d logp| of at most the bound get no gradient, the others theirs."""
    segments = layout(long)
    problem, ref_logps = problem_of(segments, dtype)
    problem = replace(problem, upstream=torch.tensor(1.0))
    logps = linear_logprobs(
        problem.hidden, problem.weight, problem.target, problem.bias, backend=backend
    ).requires_grad_()
    slopes = torch.autograd.grad(
        step_kto_loss(logps, ref_logps, segments, BASELINE, CONFIG)[0], logps
    )[0]
    bound = slopes.abs().median().item()
    kept = slopes.abs() > bound
    assert 10 < kept.sum() < len(kept) - 10
    call = {"memory_budget": in_bytes(rows), "backend": backend, "gradient_bound": bound}
    results = evaluate(fused(segments, ref_logps, BASELINE, CONFIG), problem, **call)
    assert (results["dhidden"][~kept] == 0).all() and (results["dhidden"][kept] != 0).any(1).all()
    results["logps"] = logps.detach()
    assert_head_within_bound(results, replace(problem, upstream=slopes * kept))


# ---- tokens that cannot change the loss -------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_tokens_without_a_label_are_dropped(problem_of, evaluate, layout, backend, dtype, rows):
    """Prompt, padding, and steps of an unlabelled sequence without a label: never read."""
    segments = layout(((1, ((1, 12), (-1, 9)), 1), (-1, ((-1, 20), (0, 2)), 7), (-1, (), 5)))
    problem, ref_logps = problem_of(segments, dtype)
    in_labelled_step = (segments.step_index >= 0) & (segments.step_label[segments.step_index] >= 0)
    used = (segments.sequence_index == 0) | in_labelled_step
    assert 0 < used.sum() == 22 + 2
    call = {"memory_budget": in_bytes(rows), "backend": backend}
    clean = evaluate(fused(segments, ref_logps, BASELINE, CONFIG), problem, **call)
    assert (clean["dhidden"][~used] == 0).all() and (clean["dhidden"][used] != 0).any(1).all()
    garbage = replace(problem, hidden=problem.hidden.clone())
    garbage.hidden[~used] = torch.nan
    ref_logps = ref_logps.clone()
    ref_logps[~used] = torch.nan
    dirty = evaluate(fused(segments, ref_logps, BASELINE, CONFIG), garbage, **call)
    assert clean.keys() == dirty.keys()
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@pytest.mark.parametrize("name", ["nothing labelled", "no tokens", "no sequences"])
def test_nothing_to_learn_from(problem_of, evaluate, layout, batches, backend, dtype, name):
    segments = (
        layout(batches[name])
        if name != "no tokens"
        else StepSegments.from_packed(
            torch.zeros(3).int(), torch.zeros(0).int(), torch.ones(2).int(), torch.ones(0).int()
        )
    )
    problem, ref_logps = problem_of(segments, dtype)
    config = StepKTOConfig(reference_point="zero")
    results = evaluate(fused(segments, ref_logps, None, config), problem, backend=backend)
    assert results["logps"] == (0.5 if name == "no tokens" else 0.0)
    for gradient in ("dhidden", "dweight", "dbias"):
        assert (results[gradient] == 0).all()


def test_nan_in_a_labelled_sequence_is_not_hidden(problem_of, evaluate, layout, long, backend):
    segments = layout(long)
    problem, ref_logps = problem_of(segments)
    bad = (segments.sequence_index == 1).nonzero()[3, 0]
    problem.hidden[bad] = torch.nan
    results = evaluate(fused(segments, ref_logps, BASELINE, CONFIG), problem, backend=backend)
    assert results["logps"].isnan() and results["dhidden"][bad].isnan().all()
    assert results["dhidden"][segments.sequence_index != 1].isfinite().all()


# ---- the backward pass ------------------------------------------------------------------------


@pytest.fixture
def small(problem_of, typical):
    """hidden, weight, bias (leaves) and a function that gives their loss."""

    def small(dtype=torch.float32, **kwargs):
        problem, ref_logps = problem_of(typical, dtype)
        leaves = [
            x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)
        ]

        def loss():
            hidden, weight, bias = leaves
            return fused_linear_step_kto_loss(
                hidden, weight, problem.target, typical, ref_logps, BASELINE, bias, **kwargs
            )[0]

        return leaves, loss

    return small


def test_second_backward_raises(small):
    _, loss = small()
    value = loss()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        value.backward()


def test_losses_add_up(small):
    """Accumulated over calls, scaled, in one backward pass or in several."""
    leaves, loss = small()
    (loss() / 2 + 3 * loss()).backward()
    together = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    (loss() / 2).backward()
    (3 * loss()).backward()
    for leaf, grad in zip(leaves, together, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-6, atol=1e-9)


def test_upstream_gradient_of_zero(small, dtype):
    leaves, loss = small(dtype)
    (0 * loss()).backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("loss_scale", [2.0**10, 2.0**16])
def test_loss_scaling_of_fp16(
    evaluate, assert_within_bound, problem_of, typical, backend, loss_scale
):
    """A GradScaler starts at 65536, past the largest fp16; small gradients must survive it.

    The normalizer is that of a large run: 1e5 labels make gradients that fp16 does not hold.
    """
    problem, ref_logps = problem_of(typical, torch.float16)
    problem = replace(problem, upstream=torch.tensor(loss_scale))
    call = {"normalizer": LossNormalizer(1e5, 1e5)}
    ours = evaluate(fused(typical, ref_logps, BASELINE, CONFIG), problem, backend=backend, **call)
    in_torch = fused(typical, ref_logps, BASELINE, CONFIG, reference.fused_linear_step_kto_loss)
    eager = evaluate(in_torch, problem, **call)
    exact = evaluate(in_torch, problem.to(torch.float64), **call)
    for name in ("dhidden", "dweight", "dbias"):
        assert exact[name].abs().max() > 1e-5
        assert_within_bound(ours[name], eager[name], exact[name], name=name)


def test_no_grad(small):
    _, loss = small()
    with torch.no_grad():
        value = loss()
    assert not value.requires_grad
    assert value == loss().detach()


def test_leading_dimensions_and_strides(problem_of, layout, backend):
    segments = layout(((1, ((1, 4), (0, 1)), 0), (0, ((1, 2),), 3)))
    problem, ref_logps = problem_of(segments)
    losses, gradients = [], []
    for shape in ((12,), (2, 6), (2, 3, 2)):
        hidden = problem.hidden.view(*shape, 64).transpose(0, -1).contiguous().transpose(0, -1)
        hidden.requires_grad_()
        loss, _ = fused_linear_step_kto_loss(
            hidden,
            problem.weight.T.contiguous().T,
            problem.target.view(shape),
            segments,
            ref_logps.view(shape),
            BASELINE,
            torch.stack([problem.bias, problem.bias], 1)[:, 0],
            backend=backend,
        )
        loss.backward()
        losses.append(loss.detach())
        gradients.append(hidden.grad.reshape(12, 64))
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


# ---- surroundings -----------------------------------------------------------------------------


@pytest.mark.parametrize("surrounding", ["autocast", "default dtype bf16", "default dtype fp64"])
@pytest.mark.parametrize("rows", [1000, 0], ids=["one block", "longer than a block"])
def test_surroundings_do_not_matter(problem_of, evaluate, layout, long, backend, surrounding, rows):
    segments = layout(long)
    problem, ref_logps = problem_of(segments, ignored="some")
    config = replace(CONFIG, desirable_weight=1.3)
    call = {"memory_budget": in_bytes(rows), "backend": backend}
    run = lambda: evaluate(fused(segments, ref_logps, BASELINE, config), problem, **call)
    expected = run()
    if surrounding == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            results = run()
    else:
        torch.set_default_dtype(torch.bfloat16 if "bf16" in surrounding else torch.float64)
        try:
            results = run()
        finally:
            torch.set_default_dtype(torch.float32)
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


def test_held_logits_fit_the_memory_budget(problem_of, evaluate, layout, allocations, backend):
    """60 sequences of 11 tokens, 100 tokens of logits: the largest block is what was allowed."""
    segments = layout(((1, ((1, 4), (0, 3)), 3),) * 60)
    problem, ref_logps = problem_of(segments)
    call = {"memory_budget": in_bytes(100), "backend": backend}
    assert segments.num_tokens == 660 and plan.fused_rows(V, in_bytes(100), "cpu") == 100
    function = fused(segments, ref_logps, BASELINE, CONFIG)
    largest, peak = allocations(lambda: evaluate(function, problem, **call))
    gradients = 4 * 64 * (660 + V)
    assert largest <= max(in_bytes(100), 4 * 64 * 660)
    assert peak <= 4 * in_bytes(100) + 4 * gradients


@pytest.mark.parametrize("needs", [("hidden", "weight"), ("hidden",), ("weight",), ()], ids=str)
@pytest.mark.parametrize(
    ("rows", "recomputed"), [(1000, 0), (80, 0), (48, 64)], ids=["one block", "two", "one too long"]
)
def test_gemm_units(problem_of, evaluate, layout, gemm_flops, needs, rows, recomputed):
    """A unit forward and one a gradient, of labelled tokens alone; one more for a long sequence.

    Logits are of whole units of 16 columns.
    """
    labelled = ((1, ((1, 30),), 34), (0, ((0, 48),), 0))
    segments = layout((*labelled, (-1, ((-1, 50),), 7)))
    problem, ref_logps = problem_of(segments, bias=False)
    function = fused(segments, ref_logps, BASELINE, CONFIG)
    call = {"memory_budget": in_bytes(rows)}
    tokens = 64 + 48
    logits = (tokens + (recomputed if needs else 0)) * math.ceil(V / 16) * 16
    gradients = len(needs) * tokens * V
    flops = gemm_flops(lambda: evaluate(function, problem, needs, **call))
    assert flops == 2 * 64 * (logits + gradients)


# ---- backends and refused arguments -----------------------------------------------------------


def test_reference_backend_takes_fp64(problem_of, typical, config, baseline):
    problem, ref_logps = problem_of(typical, torch.float64)
    arguments = (problem.hidden, problem.weight, problem.target, typical, ref_logps.double())
    call = {"baseline": baseline, "bias": problem.bias, "config": config}
    loss, metrics = fused_linear_step_kto_loss(*arguments, **call, backend="reference")
    wanted = reference.fused_linear_step_kto_loss(*arguments, **call)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-13)
    assert metrics.compute()["loss"] == pytest.approx(wanted.item(), rel=1e-13)


def test_refused_arguments(typical, problem_of):
    problem, ref_logps = problem_of(typical)
    good = {
        "hidden": problem.hidden,
        "weight": problem.weight,
        "target": problem.target,
        "segments": typical,
        "ref_logps": ref_logps,
        "baseline": BASELINE,
    }
    bad = [
        ({"hidden": problem.hidden.double()}, "hidden: want dtype .*, got torch.float64"),
        ({"weight": problem.weight[:, :5]}, r"weight: want shape \(V, H\)"),
        (
            {"hidden": problem.hidden[:5], "target": problem.target[:5]},
            "target: want .*41 elements",
        ),
        ({"ref_logps": ref_logps[:5]}, r"ref_logps: want shape .* \(41,\), got \(5,\)"),
        ({"ref_logps": ref_logps.double()}, "ref_logps: want dtype float32, got torch.float64"),
        ({"ref_logps": ref_logps.view(1, -1)}, r"ref_logps: want shape .* \(41,\), got \(1, 41\)"),
        ({"segments": typical.to("meta")}, "segments: want hidden's device cpu, got meta"),
        ({"segments": None}, "segments: want a StepSegments.*, got None"),
        ({"baseline": None}, "baseline: want a KLBaseline.*, got None"),
        ({"baseline": KLBaseline(torch.zeros(5), 0.0)}, r"baseline.outcome: want shape \(\)"),
        ({"config": StepKTOConfig(reference_point="zero")}, "baseline: want None, as"),
        ({"temperature": 0.0}, r"temperature: want .*\(0, inf\].*, got 0"),
        ({"softcap": -1.0}, r"softcap: want .*\(0, inf\].*, got -1"),
        ({"memory_budget": -1}, "memory_budget: want .*, got -1"),
        ({"gradient_bound": -1.0}, r"gradient_bound: want .*\[0, inf\].*, got -1"),
        ({"group": object()}, "group: want None.*, got <object"),
        ({"backend": "cuda"}, "backend: want one of 'auto', .*, got 'cuda'"),
        ({"target": problem.target + V}, r"target\[0\]: want a value in \[0, V\) = \[0, 150\)"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=f"^{message}"):
            fused_linear_step_kto_loss(**{**good, **change})


# ---- StepKTOLoss ------------------------------------------------------------------------------


@pytest.fixture
def call(problem_of, typical):
    """Arguments of StepKTOLoss.forward up to the reference log-probs, shifted by some nats."""
    problem, ref_logps = problem_of(typical)

    def call(shift=0.0, segments=typical):
        arguments = (problem.hidden, problem.weight, problem.target, segments, ref_logps - shift)
        return arguments

    return call


def test_module_is_the_function(call):
    options = {"temperature": 0.8, "softcap": 20.0, "memory_budget": 10**6}
    config = StepKTOConfig(beta=0.3, step_reduction="sum")
    bias, normalizer = torch.randn(V), LossNormalizer(3, 4)
    module = StepKTOLoss(config, **options)
    loss, metrics = module(*call(), BASELINE, bias, normalizer)
    wanted, wanted_metrics = fused_linear_step_kto_loss(
        *call(), BASELINE, bias, config=config, normalizer=normalizer, **options
    )
    assert torch.equal(loss, wanted) and torch.equal(metrics.totals, wanted_metrics.totals)
    assert list(module.parameters()) == []


def test_module_refuses_at_construction():
    with pytest.raises(ValueError, match="^temperature: want"):
        StepKTOLoss(temperature=0)
    with pytest.raises(ValueError, match="^softcap: want"):
        StepKTOLoss(softcap=-1)
    with pytest.raises(ValueError, match="^memory_budget: want"):
        StepKTOLoss(memory_budget=-1)
    with pytest.raises(ValueError, match="^backend: want"):
        StepKTOLoss(backend="cuda")


def kl(metrics):
    values = metrics.compute()
    return values["kl"], values["step/kl"]


def test_running_mean_of_given_baselines_serves_a_batch_without_one(call):
    """A batch of one sequence has no mismatched pair: one warning, then quiet."""
    module = StepKTOLoss(StepKTOConfig(ema_decay=0.75))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*call(), KLBaseline(4.0, 2.0))
        module(*call(), KLBaseline(torch.tensor(8.0), torch.tensor(0.0)))
    expected = (0.75 * 4 + 0.25 * 8, 0.75 * 2 + 0.25 * 0)
    with pytest.warns(UserWarning, match="no baseline for this batch: using the running mean"):
        _, metrics = module(*call())
    assert kl(metrics) == pytest.approx(expected, rel=1e-15)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, metrics = module(*call())
    assert kl(metrics) == pytest.approx(expected, rel=1e-15)  # a batch without one moves nothing


def test_before_any_baseline_the_reference_points_are_zero(call):
    with pytest.warns(UserWarning):
        _, metrics = StepKTOLoss()(*call())
    assert kl(metrics) == (0, 0)


def matched(metrics, config):
    """Mean log-ratio of the labelled segments of a batch, not clamped."""
    totals = metrics.compute()
    out = []
    for prefix, beta in (("", config.beta), ("step/", config.step_beta or config.beta)):
        counts = {"": (2, 2), "step/": (3, 4)}[prefix]  # right, wrong segments of `typical`
        chosen, rejected = (totals[f"{prefix}rewards/{side}"] for side in ("chosen", "rejected"))
        out.append((counts[0] * chosen + counts[1] * rejected) / beta / sum(counts))
    return out


@pytest.mark.parametrize("step_beta", [None, 0.9])
def test_ema_of_matched_batches(call, step_beta):
    config = StepKTOConfig(reference_point="ema", ema_decay=0.6, beta=0.3, step_beta=step_beta)
    module = StepKTOLoss(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, first = module(*call(1.0))
        _, second = module(*call(3.0))
        _, third = module(*call(-9.0))
        _, fourth = module(*call())
    a, b, c = (matched(m, config) for m in (first, second, third))
    assert kl(first) == (0, 0)
    assert kl(second) == pytest.approx([max(0, x) for x in a], rel=1e-12)
    mean = [0.6 * x + 0.4 * y for x, y in zip(a, b, strict=True)]
    assert kl(third) == pytest.approx([max(0, x) for x in mean], rel=1e-12)
    assert (
        min(mean) > 0 > max(c)
    )  # the running value is clamped where it is used, not where it is kept
    mean = [0.6 * x + 0.4 * y for x, y in zip(mean, c, strict=True)]
    assert kl(fourth) == pytest.approx([max(0, x) for x in mean], rel=1e-12)


def test_ema_of_a_level_starts_with_its_first_batch(call, typical):
    """A batch without labelled steps says nothing about steps, not that they are at 0."""
    config = StepKTOConfig(reference_point="ema")
    module = StepKTOLoss(config)
    no_steps = replace(typical, step_label=torch.full_like(typical.step_label, -1))
    module(*call(1.0, no_steps))
    _, second = module(*call(2.0))
    _, third = module(*call())
    assert kl(third)[1] == pytest.approx(matched(second, config)[1], rel=1e-12)


@pytest.mark.parametrize("kind", ["mismatched", "ema"])
def test_eval_mode_does_not_move_the_running_mean(call, kind):
    module = StepKTOLoss(StepKTOConfig(reference_point=kind))
    baseline = KLBaseline(1.0, 2.0) if kind == "mismatched" else None
    module(*call(2.0), baseline)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.eval()
    module(*call(5.0), KLBaseline(7.0, 7.0))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.train()
    module(*call(5.0), KLBaseline(7.0, 7.0) if kind == "mismatched" else None)
    assert not torch.equal(module.state_dict()["running"], before["running"])


@pytest.mark.parametrize("kind", ["mismatched", "ema"])
def test_state_dict_round_trip(call, kind, tmp_path):
    config = StepKTOConfig(reference_point=kind)
    module, other = StepKTOLoss(config), StepKTOLoss(config)
    baseline = KLBaseline(1.0, 2.0) if kind == "mismatched" else None
    module(*call(2.0), baseline)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for loss_fn in (module, other):
        loss_fn(*call(3.0), baseline and KLBaseline(3.0, 4.0))
    assert torch.equal(module.running, other.running)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert kl(module(*call())[1]) == kl(other(*call())[1])


def test_running_mean_keeps_its_precision_in_a_bf16_model(call):
    """model.to(bf16) casts the buffers of its modules; a mean of many batches needs more."""
    module = StepKTOLoss(StepKTOConfig(ema_decay=0.999)).to(torch.bfloat16)
    for _ in range(3):
        module(*call(), KLBaseline(1.0, 1.0))
    for _ in range(20):
        module(*call(), KLBaseline(2.0, 2.0))
    with pytest.warns(UserWarning):
        _, metrics = module(*call())
    assert kl(metrics) == pytest.approx((2 - 0.999**20,) * 2, rel=1e-6)


def test_module_is_copied_and_moved(call):
    """Also from the meta device, where large models are built before they get memory."""
    module = StepKTOLoss()
    module(*call(), KLBaseline(1.0, 2.0))
    assert torch.equal(copy.deepcopy(module).running, module.running)
    assert torch.equal(module.to("cpu").double().running, module.running)
    with torch.device("meta"):
        empty = StepKTOLoss()
    assert empty.running.device.type == "meta"
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    assert torch.equal(empty.running, module.running) and empty.running.dtype == torch.float64


@pytest.mark.parametrize("kind", ["mismatched", "ema"])
def test_micro_batches_share_one_running_mean(call, kind):
    """With update_running=False a call uses it and leaves it as it is."""
    module = StepKTOLoss(StepKTOConfig(reference_point=kind))
    baseline = KLBaseline(1.0, 2.0) if kind == "mismatched" else None
    module(*call(2.0), baseline)
    before = module.running.clone()
    module(*call(5.0), baseline and KLBaseline(7.0, 7.0), update_running=False)
    assert torch.equal(module.running, before)
    module(*call(5.0), baseline and KLBaseline(7.0, 7.0))
    assert not torch.equal(module.running, before)


def test_fixed_reference_points_ignore_the_running_mean(call):
    for config in (
        StepKTOConfig(reference_point="zero"),
        StepKTOConfig(reference_point=0.4),
        StepKTOConfig(reference_point="matched"),
        StepKTOConfig(loss_type="apo_zero"),
    ):
        module = StepKTOLoss(config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(*call(1.0))
            _, metrics = module(*call(1.0))
        _, wanted = fused_linear_step_kto_loss(*call(1.0), config=config)
        assert torch.equal(metrics.totals, wanted.totals)


# ---- packing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_pack_sequences(seed):
    """Blocks cover the sequences in order, fit, and could not take one more."""
    rng = random.Random(seed)
    capacity = rng.choice([1, 16, 50, 1000])
    lengths = [rng.choice([0, 1, 5, 16, 17, 49, 60]) for _ in range(rng.randrange(12))]
    blocks = pack_sequences(lengths, capacity)
    assert [i for first, last in blocks for i in range(first, last)] == list(range(len(lengths)))
    assert all(first < last for first, last in blocks)
    for first, last in blocks:
        assert sum(lengths[first:last]) <= capacity or last - first == 1
        if last < len(lengths):
            assert sum(lengths[first : last + 1]) > capacity


@pytest.mark.parametrize("seed", range(20))
def test_token_blocks(seed):
    """Every token once, whole sequences together, tokens of a sequence in their order."""
    generator = torch.Generator().manual_seed(seed)
    sequence_index = torch.randint(0, 9, (70,), generator=generator).int()
    lengths = sequence_index.bincount(minlength=9)
    layout = TokenLayout(sequence_index.sort(stable=True).indices, lengths)
    blocks = token_blocks(layout, capacity=20)
    assert sorted(torch.cat(blocks).tolist()) == list(range(70))
    held = [set(sequence_index[block].tolist()) for block in blocks]
    assert sum(len(sequences) for sequences in held) == len(set().union(*held))
    for block in blocks:
        for i in set(sequence_index[block].tolist()):
            mine = block[sequence_index[block] == i]
            assert torch.equal(mine, mine.sort().values)
    assert token_blocks(TokenLayout(sequence_index[:0], 0 * lengths), capacity=20) == []
