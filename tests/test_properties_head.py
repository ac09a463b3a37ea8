"""Random heads against fp64: shapes, strides, options, extreme logits and upstream gradients.

What a case is made of stands in fuzz_helpers.py. A case that fails is shrunk and printed, to be
kept here as an @example.
Letters: N tokens, H hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")

from fuzz_helpers import (  # noqa: E402
    FP32,
    HeadCase,
    fuzzed,
    head_cases,
    viewed,
    within_range,
)
from hypothesis import assume, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from stepkto_kernels import (  # noqa: E402
    linear_logprobs,
    linear_logprobs_with_stats,
    reference,
    token_logprobs,
)
from stepkto_kernels.rows import STATS  # noqa: E402


@fuzzed(60)
@given(case=head_cases())
def test_linear_logprobs(case, head_problem, evaluate, assert_head_within_bound):
    problem, needs = case.problem(head_problem), case.wanted
    exact = evaluate(reference.linear_logprobs, problem.to(torch.float64), needs)
    grads = [value for name, value in exact.items() if name != "logps"]
    assume(within_range(*grads, dtype=case.dtype))
    with case.tiles():
        found = evaluate(linear_logprobs, problem, needs, gradient_bound=0, **case.call())
    assert_head_within_bound(found, problem, needs, unit=case.unit, whole=False)


# ---- logits that are held ---------------------------------------------------------------------


def logits_of(problem):
    exact = problem.to(torch.float64)
    z = exact.hidden @ exact.weight.T
    return (z if exact.bias is None else z + exact.bias).to(problem.weight.dtype)


@fuzzed(40)
@given(case=head_cases(backends=("torch", "triton", "reference")))
def test_token_logprobs(case, head_problem, assert_within_bound):
    problem = case.problem(head_problem)
    logits, options = logits_of(problem), problem.options
    assume(not logits.isposinf().any() and (case.logits == "masked" or logits.isfinite().all()))
    found = {}
    for name, function, dtype, call in (
        ("ours", token_logprobs, case.dtype, {"backend": case.backend}),
        ("eager", reference.token_logprobs, case.dtype, {}),
        ("exact", reference.token_logprobs, torch.float64, {}),
    ):
        leaf = viewed(logits.to(dtype), case.views[0]).detach().requires_grad_()
        logps = function(leaf, problem.target, **options, **call)
        (grad,) = torch.autograd.grad(logps, leaf, problem.upstream.to(logps.dtype))
        found[name] = logps, grad
    assert found["ours"][0].dtype == torch.float32 and found["ours"][1].dtype == case.dtype
    assume(within_range(found["exact"][1], dtype=case.dtype))

    # every operation on a logit rounds it: scale, quotient, tanh, product, temperature
    chain = abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
    size = logits.double().abs().nan_to_num(posinf=0)
    of_logit = 8 * size.amax(-1) * chain
    scored = problem.target != options.get("ignore_index", -100)
    of_logp = (of_logit + 4 + torch.tensor(float(case.V)).log()) * scored
    scalars = {name: value for name, value in options.items() if name != "ignore_index"}
    p = reference.transform_logits(logits.double(), **scalars).softmax(-1)
    onehot = torch.nn.functional.one_hot(problem.target.where(scored, 0), case.V)
    g = (problem.upstream.double().abs() * scored * chain)[..., None]
    of_p = p * (1 + torch.expm1(FP32.eps * of_logp) / FP32.eps)[..., None]
    of_dlogits = 8 * g * (onehot + of_p + FP32.smallest_normal / FP32.eps)
    if "softcap" in options:
        of_dlogits += g * (onehot + p) * of_logit[..., None] / options["softcap"]
    for i, scale in enumerate((of_logp, of_dlogits)):
        parts = (found[name][i] for name in ("ours", "eager", "exact"))
        assert_within_bound(*parts, scale=scale, whole=False, name=("logps", "dlogits")[i])


# ---- statistics -------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatCase:
    head: HeadCase
    names: tuple[str, ...]
    through_logps: float  # 0: the gradient comes through the entropy alone

    @property
    def backend(self):
        return self.head.backend


names_of_stats = st.lists(st.sampled_from(STATS), unique=True).map(tuple)
stat_cases = st.builds(StatCase, head_cases(), names_of_stats, st.sampled_from([0.0, 1.0]))


def with_stats(function, problem, needs, names, through_logps, dentropy, **call):
    """Log-probs, statistics and gradients of (logps * upstream + entropy * dentropy).sum()."""
    leaves = {
        name: value.detach().requires_grad_(name in needs)
        for name in ("hidden", "weight", "bias")
        if (value := getattr(problem, name)) is not None
    }
    logps, stats = function(
        **leaves, target=problem.target, stats=names, **problem.options, **call
    )  # fmt: skip
    stats = stats if isinstance(stats, dict) else stats._asdict()
    found = {"logps": logps, **{name: stats[name] for name in names}}
    for name in set(names) - {"entropy"}:
        assert not found[name].requires_grad
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    if wanted:
        total = (logps * through_logps * problem.upstream.to(logps.dtype)).sum()
        if "entropy" in names:
            total = total + (found["entropy"] * dentropy.to(logps.dtype)).sum()
        grads = torch.autograd.grad(total, wanted)
        named = [name for name, leaf in leaves.items() if leaf.requires_grad]
        found |= {"d" + name: grad for name, grad in zip(named, grads, strict=True)}
    return {name: value.detach() for name, value in found.items()}


@fuzzed(50)
@given(case=stat_cases)
def test_statistics(case, head_problem, rounding_scale, assert_within_bound):
    head, names = case.head, case.names
    problem, needs = head.problem(head_problem), head.wanted
    dentropy = problem.upstream.roll(1).flip(-1) if problem.upstream.ndim else problem.upstream
    arguments = needs, names, case.through_logps, dentropy
    exact_problem = problem.to(torch.float64)
    exact = with_stats(reference.linear_logprobs_with_stats, exact_problem, *arguments)
    assume(within_range(*(x for n, x in exact.items() if n[0] == "d"), dtype=head.dtype))
    eager = with_stats(reference.linear_logprobs_with_stats, problem, *arguments)
    with head.tiles():
        ours = with_stats(linear_logprobs_with_stats, problem, *arguments, **head.call())
    assert ours.keys() == exact.keys()
    pulled = replace(problem, upstream=case.through_logps * problem.upstream)
    scale = rounding_scale(pulled)
    of_logp, V = scale["logps"], head.V
    of_log_p = torch.expm1(FP32.eps * of_logp) / FP32.eps  # a relative error of p, not of log p
    if "is_top1" in names:
        # the reference forms logits in the dtype of the inputs
        dtype = head.dtype if head.backend == "reference" else torch.float32
        sure = top1_is_sure(problem, exact_problem, torch.finfo(dtype).eps * of_logp)
        assert torch.equal(ours["is_top1"][sure], exact["is_top1"][sure])
    scales = {"logps": of_logp, "log_sum_sq_prob": 2 * of_log_p}
    scales["mean_logit"] = of_logp * (1 + V**0.5)
    if "entropy" in names:
        # sum over v of p * d * (1 + |log p|), where d is the error of log p
        scales["entropy"] = (4 + V**0.5 + of_log_p) * (1 + exact["entropy"])
        scale = with_entropy(scale, problem, exact["entropy"], dentropy, of_log_p)
    scales |= {name: scale[name] for name in exact if name[0] == "d"}
    for name, value in scales.items():
        if name not in exact:
            continue
        unit = head.unit if name[0] == "d" else FP32.eps
        parts = ours[name], eager[name], exact[name]
        assert_within_bound(*parts, scale=value, unit=unit, whole=False, name=name)


def top1_is_sure(problem, exact, error):
    """Where rounding cannot decide whether another logit is larger than the target's."""
    scalars = {k: v for k, v in problem.options.items() if k != "ignore_index"}
    z = torch.nn.functional.linear(exact.hidden, exact.weight, exact.bias)
    z = reference.transform_logits(z, **scalars)
    scored = problem.target != problem.options.get("ignore_index", -100)
    target = problem.target.where(scored, 0)[..., None]
    own = z.gather(-1, target)[..., 0]
    other = z.scatter(-1, target, -torch.inf).amax(-1)
    return ~scored | ((own - other).abs() > 2 * error)


def with_entropy(scale, problem, entropy, dentropy, of_log_p):
    """`rounding_scale` of the gradients with those of the entropy: p * (log p + entropy) a logit.

    Both log p and the entropy are as far off as p is, relatively; a product rounds four times.
    """
    exact, options = problem.to(torch.float64), problem.options
    h, w = exact.hidden.reshape(-1, exact.hidden.shape[-1]), exact.weight
    scalars = {k: v for k, v in options.items() if k != "ignore_index"}
    z = reference.transform_logits(torch.nn.functional.linear(h, w, exact.bias), **scalars)
    log_p = z.log_softmax(-1)
    scored = (problem.target != options.get("ignore_index", -100)).flatten()
    chain = abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
    wide = (1 + log_p.abs().clamp(max=1e4) + entropy.flatten()[:, None].abs()) * 2
    of_p = log_p.exp() + FP32.smallest_normal / FP32.eps
    d = dentropy.flatten().double().abs() * scored
    off = 1 + of_log_p.flatten()[:, None]
    if "softcap" in options:  # whose slope bends within `softcap`
        off = off * (1 + 1 / options["softcap"])
    of_dlogit = (d * chain)[:, None] * of_p * wide * off
    of_dlogit += (d.clamp(min=1) * scored)[:, None] * torch.finfo(problem.weight.dtype).tiny
    N, V = z.shape
    return {
        **scale,
        "dhidden": scale["dhidden"]
        + ((4 + V**0.5) * (of_dlogit @ w.abs())).view(exact.hidden.shape),
        "dweight": scale["dweight"] + (4 + N**0.5) * (of_dlogit.T @ h.abs()),
        "dbias": scale["dbias"] + (4 + N**0.5) * of_dlogit.sum(0),
    }


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_entropy_of_a_masked_vocabulary(backend):
    """p log p is 0 where p is, and so is its gradient; the reference's was NaN. Shrunk."""
    hidden = torch.ones(1, 1, requires_grad=True)
    bias = torch.tensor([0.0, 0.0, -torch.inf])
    arguments = hidden, torch.zeros(3, 1), torch.zeros(1, dtype=torch.int64), bias
    _, stats = linear_logprobs_with_stats(*arguments, stats=("entropy",), backend=backend)
    assert stats.entropy.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(stats.entropy.sum(), hidden)[0] == 0


# ---- bits -------------------------------------------------------------------------------------


@fuzzed(30)
@given(case=head_cases(backends=("torch", "native", "triton")), data=st.data())
def test_a_row_has_the_same_bits_in_any_selection(case, data, head_problem):
    """Any rows in any order, any mode, tile and memory budget: see the promise in linear_logprobs.

    A case of its own shape, so leading dimensions are flattened.
    """
    problem = case.problem(head_problem)
    N = problem.target.numel()
    flat = replace(
        problem, hidden=problem.hidden.reshape(N, case.H), target=problem.target.reshape(N)
    )
    chosen = data.draw(st.permutations(range(N)), label="order")
    chosen = chosen[: data.draw(st.integers(0, N), label="kept")]

    def logps(rows, needs, **call):
        leaf = lambda name, x: None if x is None else x.detach().requires_grad_(name in needs)
        hidden = flat.hidden[rows]
        return linear_logprobs(
            *(leaf("hidden", hidden), leaf("weight", flat.weight), flat.target[rows]),
            leaf("bias", flat.bias),
            **flat.options,
            **call,
        ).detach()

    whole = logps(slice(None), (), backend=case.backend)
    assert torch.equal(
        logps(torch.tensor(chosen).long(), case.wanted, **case.call()), whole[chosen]
    )
