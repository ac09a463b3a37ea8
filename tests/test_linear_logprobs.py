"""linear_logprobs and its statistics: accuracy in every mode, edge cases, memory, errors.

Letters: N tokens, H hidden size, V vocabulary.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import stepkto_kernels as sk
from stepkto_kernels import head, linear_logprobs, linear_logprobs_with_stats, plan, reference

ALL = ("hidden", "weight", "bias")
STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_prob")

# name: inputs that need a gradient, rows of (onehot - p) that may be kept, the mode this asks for
MODES = {
    "no gradient": ((), None, "forward"),
    "no gradient, budget given": ((), 9, "forward"),
    "frozen head": (("hidden",), None, "frozen"),
    "frozen head, budget given": (("hidden",), 9, "frozen"),
    "cached, all rows": (ALL, 10**6, "cached"),
    "cached, some rows": (ALL, 9, "cached"),
    "cached, one row": (ALL, 1, "cached"),
    "cached, no row": (ALL, 0, "recompute"),
    "recompute": (ALL, None, "recompute"),
    "frozen hidden": (("weight", "bias"), None, "recompute"),
    "frozen hidden, cached": (("weight", "bias"), 9, "cached"),
    "only the bias": (("bias",), None, "recompute"),
    "only the bias, cached": (("bias",), 9, "cached"),
}
ONE_OF_EACH_MODE = ("no gradient", "frozen head", "cached, some rows", "recompute")


def budget(problem, rows):
    """Bytes in which `rows` rows of (onehot - p) can be kept, with the scratch to make them."""
    if rows is None:
        return None
    V, itemsize = problem.weight.shape[0], problem.weight.element_size()
    scratch = 0 if itemsize == 4 else plan.token_chunk(problem.weight.device.type) * V * 4
    return rows * V * itemsize + scratch


@pytest.fixture
def run(evaluate, backend):
    """Results of linear_logprobs in a mode of MODES."""

    def run(problem, mode):
        needs, rows, _ = MODES[mode]
        call = {"memory_budget": budget(problem, rows)}
        if not problem.weight.is_cuda:
            call["backend"] = backend
        return evaluate(linear_logprobs, problem, needs, **call)

    return run


@pytest.fixture
def check(run, assert_head_within_bound, backend):
    """Run a problem in a mode and hold everything it returns against the error bound."""

    def check(problem, mode, **kwargs):
        needs, _, name = MODES[mode]
        narrow_dlogits = name == "cached" or problem.weight.is_cuda or backend == "triton"
        unit = torch.finfo(problem.weight.dtype if narrow_dlogits else torch.float32).eps
        assert_head_within_bound(run(problem, mode), problem, needs, unit=unit, **kwargs)

    return check


# ---- accuracy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_with_every_option(check, head_problem, dtype, mode, logit_options):
    check(head_problem(dtype=dtype, **logit_options), mode)


@pytest.mark.parametrize("mode", MODES)
def test_mode_names_are_what_runs(head_problem, dtype, mode):
    needs, rows, name = MODES[mode]
    problem = head_problem(dtype=dtype, bias=True)
    planned = plan.plan_head(
        40,
        300,
        dtype.itemsize,
        "cpu",
        needs_hidden="hidden" in needs,
        needs_weight="bias" in needs,
        memory_budget=budget(problem, rows),
    )
    assert planned.mode == name
    assert planned.cached_rows == (min(rows, 40) if name == "cached" else 0)


@pytest.mark.parametrize("mode", ["frozen head", "recompute", "frozen hidden", "only the bias"])
def test_narrow_inputs_have_the_precision_of_fp32(check, head_problem, dtype, mode, logit_options):
    """Logits and sums are kept in fp32: the eager computation to compare with is fp32's."""
    check(head_problem(dtype=dtype, **logit_options), mode, precision=torch.float32)


@pytest.mark.parametrize("H", [1, 33, 64])
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 5000])
def test_sizes(check, head_problem, V, H):
    problem = head_problem(N=19, V=V, H=H, bias=True)
    for mode in ONE_OF_EACH_MODE:
        check(problem, mode)


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
@pytest.mark.parametrize("token_chunk", [1, 7, 16, 40])
@pytest.mark.parametrize("vocab_chunk", [64, 128])
@pytest.mark.parametrize("V", [128, 129, 300])
def test_tiles(check, head_problem, monkeypatch, dtype, mode, token_chunk, vocab_chunk, V):
    """Several chunks along both axes, last ones of 1 and 33 tokens and of 1, 44 and 64 columns."""
    monkeypatch.setitem(plan.TOKEN_CHUNK, "cpu", token_chunk)
    monkeypatch.setitem(plan.VOCAB_CHUNK, "cpu", vocab_chunk)
    check(head_problem(N=41, V=V, H=33, dtype=dtype, softcap=6.0), mode)


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
def test_two_threads(check, head_problem, mode):
    torch.set_num_threads(2)
    check(head_problem(N=700, V=4100, bias=True, softcap=9.0), mode)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
def test_on_a_gpu(check, head_problem, dtype, mode):
    check(head_problem(dtype=dtype, bias=True, softcap=9.0).to("cuda"), mode)


# ---- shapes and strides -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 7), (3, 0, 2)], ids=str)
def test_leading_dimensions(check, head_problem, dtype, mode, shape):
    check(head_problem(N=shape, V=70, dtype=dtype, bias=True), mode)


def transposed(x):
    return x.T.contiguous().T


def every_second(x):
    return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
@pytest.mark.parametrize("layout", [transposed, every_second])
def test_strided_inputs(check, run, head_problem, backend, dtype, mode, layout):
    problem = head_problem(dtype=dtype, bias=True)
    strided = replace(
        problem,
        hidden=layout(problem.hidden),
        weight=layout(problem.weight),
        target=every_second(problem.target),
        bias=every_second(problem.bias),
        upstream=every_second(problem.upstream),
    )
    assert not strided.hidden.is_contiguous() and not strided.target.is_contiguous()
    check(strided, mode)
    if backend != "triton":  # its own GEMM wants unit strides, others go to the vendor's
        assert torch.equal(run(strided, mode)["logps"], run(problem, mode)["logps"])


# ---- ignored tokens and upstream gradients ----------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ignored", ["some", "all"])
def test_ignored_tokens_are_exactly_zero(run, head_problem, dtype, mode, ignored):
    problem = head_problem(dtype=dtype, bias=True, ignored=ignored)
    skipped = problem.target == -100
    results = run(problem, mode)
    assert (results["logps"][skipped] == 0).all() and (results["logps"][~skipped] < 0).all()
    if "dhidden" in results:
        assert (results["dhidden"][skipped] == 0).all()
    if ignored == "all":
        assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("mode", MODES)
def test_ignored_tokens_may_hold_anything(run, head_problem, mode):
    """Padding is not read on the CPU: NaN in it reaches nothing."""
    problem = head_problem(bias=True)
    garbage = problem.hidden.clone()
    garbage[problem.target == -100] = torch.nan
    for name, value in run(replace(problem, hidden=garbage), mode).items():
        assert torch.equal(value, run(problem, mode)[name]), name


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
def test_ignore_index_may_be_in_the_vocabulary(check, run, head_problem, mode):
    problem = head_problem(V=5, ignored="none", ignore_index=3)
    check(problem, mode)
    assert torch.equal(run(problem, mode)["logps"] == 0, problem.target == 3)
    assert (problem.target == 3).any()


@pytest.mark.parametrize("mode", [name for name, (needs, _, _) in MODES.items() if needs])
def test_upstream_gradient_of_zero(run, head_problem, dtype, mode):
    problem = head_problem(dtype=dtype, bias=True)
    results = run(replace(problem, upstream=torch.zeros(40)), mode)
    assert all((value == 0).all() for name, value in results.items() if name != "logps")


@pytest.mark.parametrize("mode", [name for name, (needs, _, _) in MODES.items() if needs])
def test_nan_upstream_gradient_is_not_hidden(run, head_problem, mode):
    """It is no gradient of 0 to be dropped; an ignored token has none, whatever comes back."""
    problem = head_problem(bias=True)
    ignored = (problem.target == -100).nonzero()[0, 0]
    problem.upstream[ignored] = torch.nan
    assert all(value.isfinite().all() for value in run(problem, mode).values())
    problem.upstream[2] = torch.nan
    results = run(problem, mode)
    if "dhidden" in results:
        assert results["dhidden"][2].isnan().all()
        assert results["dhidden"][torch.arange(40) != 2].isfinite().all()
    for name in {"dweight", "dbias"} & results.keys():
        assert results[name].isnan().all()


@pytest.mark.parametrize("mode", [name for name, (needs, _, _) in MODES.items() if needs])
def test_expanded_upstream_gradient(check, head_problem, mode):
    """What logps.sum() sends back: one number with stride 0."""
    check(replace(head_problem(bias=True), upstream=torch.tensor(0.3).expand(40)), mode)


@pytest.mark.parametrize("mode", [name for name, (needs, _, _) in MODES.items() if needs])
def test_backward_twice_gives_twice_the_gradient(head_problem, backend, mode):
    problem = head_problem(bias=True)
    needs, rows, _ = MODES[mode]
    leaves = {name: getattr(problem, name).requires_grad_(name in needs) for name in ALL}
    logps = linear_logprobs(
        *(leaves["hidden"], leaves["weight"], problem.target, leaves["bias"]),
        memory_budget=budget(problem, rows),
        backend=backend,
    )
    logps.backward(problem.upstream, retain_graph=True)
    once = {name: leaves[name].grad.clone() for name in needs}
    logps.backward(problem.upstream)
    assert all(torch.equal(leaves[name].grad, 2 * once[name]) for name in needs)


@pytest.mark.parametrize("mode", [name for name, (needs, _, _) in MODES.items() if needs])
def test_a_second_derivative_raises(head_problem, backend, mode):
    problem = head_problem(bias=True)
    needs, rows, _ = MODES[mode]
    leaves = {name: getattr(problem, name).requires_grad_(name in needs) for name in ALL}
    logps = linear_logprobs(
        *(leaves["hidden"], leaves["weight"], problem.target, leaves["bias"]),
        memory_budget=budget(problem, rows),
        backend=backend,
    )
    first = torch.autograd.grad(logps.sum(), leaves[needs[0]], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.square().sum().backward()


@pytest.mark.parametrize("mode", [name for name, (needs, _, _) in MODES.items() if needs])
def test_gradient_bound(run, head_problem, evaluate, backend, dtype, mode):
    """Tokens with an upstream gradient of at most the bound count as if it was 0."""
    problem = head_problem(dtype=dtype, bias=True)
    small = problem.upstream.abs() <= 0.5
    problem.upstream[2] = 0.5  # at most: the bound itself is dropped
    assert 0 < small.sum() < 40
    needs, rows, _ = MODES[mode]
    call = {"memory_budget": budget(problem, rows), "backend": backend, "gradient_bound": 0.5}
    results = evaluate(linear_logprobs, problem, needs, **call)
    zeroed = replace(problem, upstream=problem.upstream * (problem.upstream.abs() > 0.5))
    for name, value in run(zeroed, mode).items():
        assert torch.equal(results[name], value), name


# ---- extreme logits ---------------------------------------------------------------------------


def logits_as_given(problem, logits):
    """A problem whose logits are these numbers: hidden is a row of the identity."""
    N = logits.shape[0]
    dtype = problem.weight.dtype
    hidden, weight = torch.eye(N, dtype=dtype), logits.T.to(dtype).contiguous()
    target = problem.target[:N].clamp(max=logits.shape[1] - 1)
    return replace(
        problem,
        hidden=hidden,
        weight=weight,
        target=target,
        upstream=problem.upstream[:N],
        bias=None,
    )


def huge(logits, target):
    return logits.sign() * 1e4


def huge_and_varied(logits, target):
    return logits * 3e3


def all_equal(logits, target):
    return torch.full_like(logits, 5.0)


def target_certain(logits, target):
    return logits.scatter(1, target[:, None], 60.0)


def target_almost_certain(logits, target):
    return logits.scatter(1, target[:, None], 20.0)


def target_hopeless(logits, target):
    return logits.scatter(1, target[:, None], -1e4)


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
@pytest.mark.parametrize(
    "shape_of",
    [huge, huge_and_varied, all_equal, target_certain, target_almost_certain, target_hopeless],
)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 30.0, "temperature": 0.7}], ids=["plain", "softcap"]
)
def test_extreme_logits(check, head_problem, monkeypatch, dtype, mode, shape_of, options):
    monkeypatch.setitem(plan.VOCAB_CHUNK, "cpu", 64)
    problem = head_problem(N=32, V=150, dtype=dtype, ignored="none", **options)
    check(logits_as_given(problem, shape_of(torch.randn(32, 150), problem.target)), mode)


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
def test_log_sum_exp_is_kept_relative_to_the_maximum(run, head_problem, mode):
    """Logits of 8192 and a few more are exact in fp32; max + log sum exp would be 1e-3 off."""
    problem = head_problem(N=32, V=150, ignored="none")
    more = torch.randint(0, 4, (32, 150)).float()
    logps = run(logits_as_given(problem, 8192 + more), mode)["logps"]
    target = problem.target.clamp(max=149)
    exact = more.double().log_softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(
        logps.double(), exact, rtol=4 * torch.finfo(torch.float32).eps, atol=0
    )


@pytest.mark.parametrize("mode", ["frozen head", "cached, some rows", "recompute"])
@pytest.mark.parametrize(
    ("softcap", "temperature"), [(30.0, 1.0), (30.0, 0.7), (30.0, 0.3), (50.0, 0.7)]
)
def test_saturated_softcap_has_no_gradient(run, head_problem, mode, softcap, temperature):
    """tanh is 1 to the last bit: an eager computation has gradient 0, and so has the exact one."""
    problem = head_problem(N=32, V=150, ignored="none", softcap=softcap, temperature=temperature)
    results = run(logits_as_given(problem, torch.randn(32, 150).sign() * 1e4), mode)
    assert all((value == 0).all() for name, value in results.items() if name != "logps")


def masked_problem(head_problem, masked, dtype=torch.float32):
    """A vocabulary of 300 with a bias of -inf in the columns `masked`, and the rest alone."""
    problem = head_problem(V=300, dtype=dtype, bias=True)
    bias = problem.bias.clone()
    bias[masked] = -torch.inf
    kept = bias.isfinite().nonzero()[:, 0]
    scored = problem.target >= 0
    among_kept = torch.randint(0, len(kept), problem.target.shape)
    full = replace(problem, bias=bias, target=kept[among_kept].where(scored, -100))
    small = replace(
        problem,
        weight=problem.weight[kept],
        bias=bias[kept],
        target=among_kept.where(scored, -100),
    )
    return full, small, kept


MASKED = {
    "some columns": slice(None, None, 3),
    "last columns": slice(280, None),
    "a whole chunk": slice(128, 192),
    "first chunks": slice(0, 150),
    "last chunks": slice(100, None),
}


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
@pytest.mark.parametrize("masked", MASKED.values(), ids=MASKED)
def test_masked_vocabulary(check, head_problem, monkeypatch, dtype, mode, masked):
    monkeypatch.setitem(plan.VOCAB_CHUNK, "cpu", 64)
    check(masked_problem(head_problem, masked, dtype)[0], mode)


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
def test_masked_target_has_log_prob_minus_infinity(check, run, head_problem, mode):
    problem = head_problem(V=300, bias=True)
    bias = problem.bias.clone()
    bias[problem.target[2]] = -torch.inf
    problem = replace(problem, bias=bias)
    assert run(problem, mode)["logps"][2] == -torch.inf and problem.upstream[2] != 0
    check(problem, mode)


# ---- the reference ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6, "logit_scale": -1.7, "softcap": 2.5}], ids=["plain", "all"]
)
def test_reference_is_the_formula(options):
    """logp = z[y] - log sum exp z, z = cap(scale * (h @ W.T + b)) / T, in plain floats."""
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((3, 2), (4, 2), (4,)))
    target = torch.tensor([3, -100, 0])
    got = reference.linear_logprobs(hidden, weight, target, bias, **options).tolist()
    _, stats = reference.linear_logprobs_with_stats(
        hidden, weight, target, bias, stats=STATS, **options
    )
    T, scale, cap = (options.get(k) for k in ("temperature", "logit_scale", "softcap"))
    for t, y in enumerate(target.tolist()):
        if y < 0:
            assert got[t] == 0 and all(value[t] == 0 for value in stats.values())
            continue
        z = []
        for v in range(4):
            x = sum(hidden[t, i].item() * weight[v, i].item() for i in range(2)) + bias[v].item()
            x *= scale or 1.0
            x = cap * math.tanh(x / cap) if cap else x
            z.append(x / (T or 1.0))
        log_p = [x - math.log(sum(math.exp(x) for x in z)) for x in z]
        assert got[t] == pytest.approx(log_p[y], rel=1e-13)
        wanted = {
            "entropy": -sum(math.exp(x) * x for x in log_p),
            "mean_logit": sum(z) / 4,
            "is_top1": float(z[y] == max(z)),
            "log_sum_sq_prob": math.log(sum(math.exp(x) ** 2 for x in log_p)),
        }
        assert {k: float(v[t]) for k, v in stats.items()} == pytest.approx(wanted, rel=1e-13)


def test_gradcheck_of_the_reference(head_problem, logit_options):
    problem = head_problem(N=4, V=7, H=3, dtype=torch.float64, **logit_options)
    inputs = [problem.hidden, problem.weight] + ([] if problem.bias is None else [problem.bias])

    def function(hidden, weight, bias=None):
        logps, stats = reference.linear_logprobs_with_stats(
            hidden, weight, problem.target, bias, stats=("entropy",), **problem.options
        )
        return logps, stats["entropy"]

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


# ---- statistics -------------------------------------------------------------------------------


def statistic(function, name):
    """`function` returning one statistic in place of the log-probs."""

    def value(hidden, weight, target, bias, **options):
        stats = function(hidden, weight, target, bias, stats=(name,), **options)[1]
        return stats[name] if isinstance(stats, dict) else getattr(stats, name)

    return value


@pytest.mark.parametrize("name", ["entropy", "mean_logit", "log_sum_sq_prob"])
@pytest.mark.parametrize("vocab_chunk", [64, 2048])
def test_statistics(
    assert_within_bound,
    rounding_scale,
    evaluate,
    head_problem,
    monkeypatch,
    backend,
    dtype,
    logit_options,
    name,
    vocab_chunk,
):
    monkeypatch.setitem(plan.VOCAB_CHUNK, "cpu", vocab_chunk)
    problem = head_problem(dtype=dtype, **logit_options)
    function = statistic(linear_logprobs_with_stats, name)
    ours = evaluate(function, problem, (), backend=backend)["logps"]
    theirs = statistic(reference.linear_logprobs_with_stats, name)
    eager = evaluate(theirs, problem.to(torch.float32), ())["logps"]
    exact = evaluate(theirs, problem.to(torch.float64), ())["logps"]
    scale = rounding_scale(problem)
    assert ours.dtype == torch.float32
    assert_within_bound(
        ours, eager, exact, magnitude=scale["largest logit"].item(), scale=scale["logps"], name=name
    )


def test_is_top1(head_problem, backend):
    """True where no logit is larger than the target's, so also where several share the maximum."""
    problem = head_problem(N=30, V=300)
    logits = (problem.hidden.double() @ problem.weight.double().T).sort(1, descending=True)
    assert (logits.values[:, 0] - logits.values[:, 1]).min() > 1e-4  # no rounding decides
    target = logits.indices[:, 0].clone()
    target[::2] = logits.indices[::2, 1]
    target[::5] = -100
    call = {"stats": ("is_top1",), "backend": backend}
    stats = linear_logprobs_with_stats(problem.hidden, problem.weight, target, **call)[1]
    assert stats.is_top1.dtype == torch.bool
    expected = (torch.arange(30) % 2 == 1) & (target >= 0)
    assert torch.equal(stats.is_top1, expected)
    tied = torch.zeros(7, 64)
    stats = linear_logprobs_with_stats(problem.hidden, tied, torch.arange(30) % 7, **call)[1]
    assert stats.is_top1.all()


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
def test_only_named_statistics_are_computed(head_problem, backend, mode):
    problem = head_problem(N=(4, 10))
    needs, rows, _ = MODES[mode]
    hidden = problem.hidden.requires_grad_("hidden" in needs)
    weight = problem.weight.requires_grad_("weight" in needs)
    arguments = (hidden, weight, problem.target)
    call = {"memory_budget": budget(problem, rows), "backend": backend}
    logps = linear_logprobs(*arguments, **call)
    everything = linear_logprobs_with_stats(*arguments, **call)
    for name in STATS:
        alone = linear_logprobs_with_stats(*arguments, stats=(name,), **call)
        assert torch.equal(everything[0], logps) and torch.equal(alone[0], logps)
        for other in STATS:
            value = getattr(alone[1], other)
            if other != name:
                assert value is None
                continue
            assert value.shape == (4, 10) and (value.view(-1)[1::5] == 0).all()
            assert torch.equal(value, getattr(everything[1], name))
            assert value.requires_grad == (name == "entropy" and bool(needs))
    assert linear_logprobs_with_stats(*arguments, stats=(), **call)[1] == sk.LogprobStats()


@pytest.mark.parametrize("needs", [ALL, ("hidden",), ("weight",), ("bias",)], ids=" ".join)
@pytest.mark.parametrize("of_logp", [0.0, 0.7], ids=["entropy alone", "with logp"])
def test_entropy_gradient(
    assert_within_bound,
    evaluate,
    head_problem,
    monkeypatch,
    backend,
    dtype,
    logit_options,
    needs,
    of_logp,
):
    monkeypatch.setitem(plan.VOCAB_CHUNK, "cpu", 128)
    problem = head_problem(dtype=dtype, **{**logit_options, "bias": True})

    def regularised(function):
        def value(hidden, weight, target, bias, **options):
            logps, stats = function(hidden, weight, target, bias, stats=("entropy",), **options)
            entropy = stats["entropy"] if isinstance(stats, dict) else stats.entropy
            return entropy if of_logp == 0 else of_logp * logps + entropy

        return value

    # what the frozen and, for this budget, the cached mode keep is too little for the entropy
    call = {"memory_budget": 10**9, "backend": backend}
    ours = evaluate(regularised(linear_logprobs_with_stats), problem, needs, **call)
    theirs = regularised(reference.linear_logprobs_with_stats)
    eager = evaluate(theirs, problem.to(torch.float32), needs)
    exact = evaluate(theirs, problem.to(torch.float64), needs)
    assert ours.keys() == exact.keys() and len(ours) == 1 + len(needs)
    for name in ours:
        magnitude = 5.0 if name == "logps" else 0.0  # log V is 5.7, the largest logit about 12
        assert_within_bound(ours[name], eager[name], exact[name], magnitude=magnitude, name=name)


def test_a_statistic_named_twice_is_the_statistic(head_problem, backend):
    problem = head_problem()
    gradients = []
    for stats in (("entropy",), ("entropy", "entropy")):
        hidden = problem.hidden.clone().requires_grad_()
        arguments = (hidden, problem.weight, problem.target)
        values = linear_logprobs_with_stats(*arguments, stats=stats, backend=backend)[1]
        values.entropy.sum().backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("masked", MASKED.values(), ids=MASKED)
def test_statistics_of_a_masked_vocabulary(
    assert_within_bound, head_problem, monkeypatch, backend, masked
):
    """Columns with a bias of -inf have probability 0 and count in no statistic but mean_logit."""
    monkeypatch.setitem(plan.VOCAB_CHUNK, "cpu", 64)
    full, small, kept = masked_problem(head_problem, masked)
    ours, eager, exact = {}, {}, {}
    for results, problem, function in (
        (ours, full, partial(linear_logprobs_with_stats, backend=backend)),
        (eager, small, reference.linear_logprobs_with_stats),
        (exact, small.to(torch.float64), reference.linear_logprobs_with_stats),
    ):
        hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
        _, stats = function(hidden, weight, problem.target, problem.bias, stats=STATS)
        results.update(stats if isinstance(stats, dict) else stats._asdict())
        results["dhidden"], results["dweight"] = torch.autograd.grad(
            (results["entropy"] * problem.upstream).sum(), [hidden, weight]
        )
    ours["dweight"] = ours["dweight"][kept]
    assert torch.equal(ours["is_top1"], exact["is_top1"])
    assert torch.equal(ours["mean_logit"] == -torch.inf, full.target >= 0)
    for name in ("entropy", "log_sum_sq_prob", "dhidden", "dweight"):
        magnitude = 0.0 if name.startswith("d") else 5.0
        assert_within_bound(ours[name], eager[name], exact[name], magnitude=magnitude, name=name)


# ---- surroundings -----------------------------------------------------------------------------


@pytest.fixture
def in_autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
def test_autocast_does_not_lower_the_precision(run, head_problem, in_autocast, mode):
    problem = head_problem(bias=True)
    expected = run(problem, mode)
    with in_autocast:
        results = run(problem, mode)
    for name, value in results.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
def test_default_dtype_does_not_matter(run, head_problem, mode, default):
    problem = head_problem(bias=True, softcap=8.0)
    expected = run(problem, mode)
    torch.set_default_dtype(default)
    try:
        results = run(problem, mode)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


def test_inference_mode(run, head_problem):
    problem = head_problem(bias=True)
    expected = run(problem, "no gradient")["logps"]
    with torch.inference_mode():
        assert torch.equal(run(problem, "no gradient")["logps"], expected)


# ---- memory -----------------------------------------------------------------------------------


N_LARGE, V_LARGE = 2000, 5000


@pytest.mark.parametrize("mode", ["no gradient", "frozen head", "recompute", "frozen hidden"])
def test_no_tensor_of_all_logits(run, head_problem, allocations, backend, dtype, mode, monkeypatch):
    """Nothing is larger than a tile of fp32 logits, and two tiles are in use at a time."""
    problem = head_problem(N=N_LARGE, V=V_LARGE, H=16, dtype=dtype)
    tile = 4 * plan.token_chunk("cpu") * plan.vocab_chunk(V_LARGE, "cpu")
    assert tile < N_LARGE * V_LARGE  # so that a bool for each logit would be seen
    chunks = plan.token_chunk("cpu"), plan.vocab_chunk(V_LARGE, "cpu")
    monkeypatch.setattr(plan, "EPILOGUE_TILE", chunks)
    # on the CPU the operands of Triton's GEMMs are widened, where a GPU takes them as they are
    widened = tile if backend == "triton" else 0
    largest, peak = allocations(lambda: run(problem, mode))
    assert largest <= tile
    rows_and_gradients = 4 * 4 * 16 * (N_LARGE + V_LARGE)
    assert peak <= 2 * tile + rows_and_gradients + widened


@pytest.mark.parametrize("rows", [600, 1500])
def test_memory_budget_is_kept(evaluate, head_problem, allocations, backend, dtype, rows):
    problem = head_problem(N=N_LARGE, V=V_LARGE, H=16, dtype=dtype)
    bytes_ = budget(problem, rows)
    call = {"memory_budget": bytes_, "backend": backend}
    largest, peak = allocations(
        lambda: evaluate(linear_logprobs, problem, ("hidden", "weight"), **call)
    )
    assert largest == rows * V_LARGE * dtype.itemsize  # the cache
    tile = 4 * plan.token_chunk("cpu") * plan.vocab_chunk(V_LARGE, "cpu")
    assert peak <= bytes_ + 4 * tile


@pytest.mark.parametrize("ignored", ["none", "some"])
@pytest.mark.parametrize(
    ("mode", "units"),
    [
        ("no gradient", 1),
        ("frozen head", 2),
        ("cached, all rows", 3),
        ("recompute", 4),
        ("frozen hidden", 3),
        ("only the bias", 2),
    ],
)
def test_gemm_units(run, head_problem, gemm_flops, mode, units, ignored):
    """A unit is one pass over the head by the tokens that are scored; ignored ones cost nothing."""
    problem = head_problem(N=80 if ignored == "none" else 100, V=640, ignored=ignored)
    problem = replace(problem, upstream=torch.ones(problem.target.shape), bias=torch.zeros(640))
    assert (problem.target >= 0).sum() == 80
    assert gemm_flops(lambda: run(problem, mode)) == units * 2 * 80 * 640 * 64


@pytest.mark.parametrize(
    "shape", [(0, 5, 3), (5, 0, 3), (5, 0, 40), (40, 0, 40), (5, 3, 0)], ids=str
)
def test_a_gemm_of_nothing_is_zero(shape):
    """Without tokens the weight's gradient is one. torch 2.8 cannot pad what has no columns."""
    n, k, m = shape
    a, b, out = torch.ones(n, k), torch.ones(k, m), torch.full((n, m), torch.nan)
    assert torch.equal(head.mm(a, b), torch.zeros(n, m))
    assert torch.equal(head.mm(a, b, out), torch.zeros(n, m)) and out.eq(0).all()


@pytest.mark.parametrize(("needs", "units"), [(("hidden",), 2), (("hidden", "weight"), 3)])
def test_an_entropy_that_is_only_logged_costs_no_gemm(
    evaluate, head_problem, gemm_flops, backend, needs, units
):
    problem = head_problem(N=80, V=640, ignored="none")
    problem = replace(problem, upstream=torch.ones(80))
    logged = lambda *args, **call: linear_logprobs_with_stats(*args, stats=("entropy",), **call)[0]
    call = {"memory_budget": budget(problem, 80), "backend": backend}
    flops = gemm_flops(lambda: evaluate(logged, problem, needs, **call))
    assert flops == units * 2 * 80 * 640 * 64


def test_tokens_without_an_upstream_gradient_cost_no_backward_gemm(run, head_problem, gemm_flops):
    problem = head_problem(N=96, V=640, ignored="none")
    assert (problem.upstream == 0).sum() == 32
    unit = 2 * 640 * 64
    assert gemm_flops(lambda: run(problem, "recompute")) == (96 + 3 * 64) * unit
    assert gemm_flops(lambda: run(problem, "cached, all rows")) == (96 + 2 * 64) * unit


def test_shapes_alone_decide(head_problem, backend):
    """Nothing outside of the ops looks at a value: tensors without any do, as while compiling."""
    problem = head_problem()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in (problem.hidden, problem.weight, problem.target)]
        fake[0].requires_grad_()
        logps = linear_logprobs(*fake, backend=backend)
        assert logps.shape == (40,) and logps.dtype == torch.float32
        logps.sum().backward()
        assert fake[0].grad.shape == (40, 64)


# ---- refused arguments ------------------------------------------------------------------------

GOOD = {
    "hidden": torch.zeros(2, 3, 8),
    "weight": torch.zeros(5, 8),
    "target": torch.zeros(2, 3, dtype=torch.int64),
}
BAD = [
    ("hidden", [1.0], "a torch.Tensor, got list"),
    ("hidden", torch.zeros(2, 3, 8).double(), "dtype float32 or .*, got torch.float64"),
    ("hidden", torch.tensor(1.0), r"shape \(\.\.\., H\), got shape \(\)"),
    ("weight", None, "a torch.Tensor, got NoneType"),
    ("weight", torch.zeros(5, 8).bfloat16(), "dtype float32, got torch.bfloat16"),
    ("weight", torch.zeros(5, 9), r"shape \(V, H\) = \(5, 8\), got \(5, 9\)"),
    ("weight", torch.zeros(1, 5, 8), r"2 dimensions, got shape \(1, 5, 8\)"),
    ("weight", torch.zeros(0, 8), r"at least one row, got shape \(0, 8\)"),
    ("weight", torch.zeros(5, 8, device="meta"), "hidden's device cpu, got meta"),
    ("target", torch.zeros(2, 3).int(), "dtype int64, got torch.int32"),
    ("target", torch.zeros(6).long(), r"shape hidden.shape\[:-1\] = \(2, 3\), got \(6,\)"),
    ("target", torch.zeros(2, 3, device="meta").long(), "hidden's device cpu, got meta"),
    ("bias", torch.zeros(5).half(), "dtype float32, got torch.float16"),
    ("bias", torch.zeros(8), r"shape \(V,\) = \(5,\), got \(8,\)"),
    ("bias", torch.zeros(5, device="meta"), "hidden's device cpu, got meta"),
    ("temperature", 0.0, r".*\(0, inf\].*, got 0.0"),
    ("temperature", -1, r".*\(0, inf\].*, got -1"),
    ("temperature", math.nan, r".*\(0, inf\].*, got nan"),
    ("temperature", math.inf, r"a finite number.*, got inf"),
    ("temperature", torch.tensor(1.0), r"a number in \(0, inf\], got tensor"),
    ("temperature", True, r"a number in \(0, inf\], got True"),
    ("logit_scale", math.inf, r".*, got inf"),
    ("logit_scale", "1", r"a number.*, got '1'"),
    ("softcap", 0, r".*\(0, inf\].*, got 0"),
    ("softcap", -30.0, r".*\(0, inf\].*, got -30"),
    ("ignore_index", -100.0, "an int, got -100.0"),
    ("ignore_index", None, "an int, got None"),
    ("memory_budget", -1, r".*bytes >= 0.*, got -1"),
    ("memory_budget", 1e9, r".*bytes >= 0.*, got 1000000000.0"),
    ("memory_budget", True, r".*bytes >= 0.*, got True"),
    ("gradient_bound", -0.1, r".*\[0, inf\].*, got -0.1"),
    ("gradient_bound", None, r"a number in \[0, inf\], got None"),
    ("backend", "cuda", r"one of 'auto', .*, got 'cuda'"),
    ("group", dict, r"None.*, got <class"),
]  # fmt: skip


@pytest.mark.parametrize("function", [linear_logprobs, linear_logprobs_with_stats])
@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=lambda x: str(x)[:30])
def test_refused_arguments(function, name, value, message):
    """The error names the argument, what was wanted and what was got."""
    with pytest.raises(ValueError, match=f"^{name}: want {message}"):
        function(**{**GOOD, name: value})


@pytest.mark.parametrize("mode", ONE_OF_EACH_MODE)
@pytest.mark.parametrize("value", [-101, -1, 300, 2**40])
def test_targets_out_of_range(run, head_problem, mode, value):
    problem = head_problem()
    target = problem.target.clone()
    target[7] = value
    with pytest.raises(ValueError, match=rf"^target\[7\]: want .*\[0, 300\).* -100, got {value}$"):
        run(replace(problem, target=target), mode)


def test_unknown_statistic():
    with pytest.raises(ValueError, match="^stats: want one of 'entropy', .*, got 'perplexity'"):
        linear_logprobs_with_stats(**GOOD, stats=("entropy", "perplexity"))


def test_no_hidden_size():
    """H = 0 is a vocabulary of equal logits, or is refused by name."""
    empty = {
        "hidden": torch.zeros(4, 0),
        "weight": torch.zeros(5, 0),
        "target": torch.zeros(4).long(),
    }
    try:
        logps = linear_logprobs(**empty)
    except ValueError as error:
        assert "hidden" in str(error) or "weight" in str(error)
    else:
        assert torch.allclose(logps, torch.full((4,), -math.log(5)))


def test_backends_that_cannot_serve_are_refused_with_the_reason(head_problem):
    states = sk.available_backends()
    assert list(states) == ["reference", "torch", "native", "triton"]
    assert states["reference"] == states["torch"] == "ok"
    for name, state in states.items():
        if state != "ok":
            with pytest.raises(ValueError, match=f"^backend: want .*'{name}'.*") as error:
                linear_logprobs(**GOOD, backend=name)
            assert state in str(error.value)


def test_reference_backend_takes_fp64(head_problem):
    problem = head_problem(dtype=torch.float64)
    arguments = (problem.hidden, problem.weight, problem.target)
    logps, stats = linear_logprobs_with_stats(*arguments, backend="reference")
    assert logps.dtype == stats.entropy.dtype == torch.float64
    assert torch.equal(logps, reference.linear_logprobs(*arguments))
    assert stats.is_top1.dtype == torch.bool
