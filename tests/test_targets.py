"""Targets that are out of range: a ValueError on the CPU, NaN where values are not looked at.

A GPU is not waited for, so there the kernels get such targets. The same kernels get them here with
the check taken out. Letters: N tokens, V vocabulary.
"""

from functools import partial

import pytest
import torch

from stepkto_kernels import (
    StepKTOConfig,
    StepSegments,
    checks,
    fused_linear_step_kto_loss,
    linear_logprobs,
    linear_logprobs_with_stats,
    plan,
    reference,
    token_logprobs,
)

N, V, H = 21, 300, 24
LOWEST, HIGHEST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
# far ones come back inside where 64 bits are cut down to 32
WRONG = [-1, -V, V, V + 7, 2**31 + 5, 2**32, 2**32 + 5, -(2**32) + 5, HIGHEST, LOWEST]
AT = [0, 2, 3, 7, 8, 11, 12, 15, 16, 20]
OTHERS = [t for t in range(N) if t not in AT]


def with_wrong_targets(problem):
    target = problem.target.clone()
    target[AT] = torch.tensor(WRONG)
    return target


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(checks, "targets", lambda *args: None)


def one_sequence():
    everywhere = torch.zeros(N, dtype=torch.int32)
    label = torch.ones(1, dtype=torch.int8)
    return StepSegments(everywhere, everywhere, label, label, everywhere[:1])


def fused(hidden, weight, target, **options):
    config = StepKTOConfig(reference_point="zero")
    ref_logps = torch.zeros(N)
    return fused_linear_step_kto_loss(
        hidden, weight, target, one_sequence(), ref_logps, config=config, **options
    )[0]


HEADS = {
    "linear_logprobs": linear_logprobs,
    "with stats": partial(linear_logprobs_with_stats, stats=("entropy",)),
    "fused": fused,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", [*HEADS, "token_logprobs", "reference"])
def test_refused_on_the_cpu(head_problem, name, wrong):
    problem = head_problem(N, V, H, ignored="none")
    problem.target[5] = wrong
    with pytest.raises(ValueError, match=rf"target\[5\]: want a value in \[0, V\) .*, got {wrong}"):
        if name == "token_logprobs":
            token_logprobs(problem.hidden @ problem.weight.T, problem.target)
        elif name == "reference":
            reference.linear_logprobs(problem.hidden, problem.weight, problem.target)
        else:
            HEADS[name](problem.hidden, problem.weight, problem.target)


@pytest.mark.parametrize("needs", ["nothing", "hidden", "weight", "kept"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("epilogue", [False, True])
def test_nan_and_no_other_row_changes(
    head_problem, backend, unchecked, monkeypatch, needs, options, epilogue
):
    if epilogue and backend != "triton":
        pytest.skip("only triton has a GEMM of its own")
    monkeypatch.setattr(plan, "epilogue_pays", lambda *args: epilogue)
    problem = head_problem(N, V, H, ignored="none")
    hidden, weight = problem.hidden, problem.weight
    results = []
    for target in (problem.target, with_wrong_targets(problem)):
        hidden = problem.hidden.clone().requires_grad_(needs in ("hidden", "kept"))
        weight = problem.weight.clone().requires_grad_(needs in ("weight", "kept"))
        budget = 10**6 if needs == "kept" else None
        logps = linear_logprobs(
            hidden, weight, target, memory_budget=budget, backend=backend, **options
        )
        if needs != "nothing":
            upstream = torch.ones(N)
            upstream[AT] = 0.0
            logps.backward(upstream)
        results.append((logps.detach(), hidden.grad, weight.grad))
    (want, *want_grads), (logps, *grads) = results
    assert logps[AT].isnan().all()
    assert torch.equal(logps[OTHERS], want[OTHERS])
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert grad is None or torch.equal(grad, want_grad)  # tokens with upstream 0 add nothing


def test_a_loss_of_such_targets_is_nan(head_problem, backend, unchecked):
    problem = head_problem(N, V, H, ignored="none")
    assert not fused(problem.hidden, problem.weight, problem.target, backend=backend).isnan()
    hidden = problem.hidden.clone().requires_grad_()
    loss = fused(hidden, problem.weight, with_wrong_targets(problem), backend=backend)
    assert loss.isnan()
    loss.backward()
    assert hidden.grad.isnan().all()  # of the one sequence there is


@pytest.mark.parametrize("which", ["torch", "triton"])
def test_given_logits(head_problem, unchecked, which):
    if which == "triton":
        pytest.importorskip("triton")
    problem = head_problem(N, V, H, ignored="none")
    logits = problem.hidden @ problem.weight.T
    want = token_logprobs(logits, problem.target, backend=which)
    logps = token_logprobs(logits, with_wrong_targets(problem), backend=which)
    assert logps[AT].isnan().all() and torch.equal(logps[OTHERS], want[OTHERS])


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["torch", "triton"])
def test_on_a_gpu(head_problem, which):
    problem = head_problem(N, V, H, ignored="none").to("cuda")
    target = problem.target.clone()
    target[AT] = torch.tensor(WRONG, device="cuda")
    logps = linear_logprobs(problem.hidden, problem.weight, target, backend=which)
    assert logps[AT].isnan().all() and not logps[OTHERS].isnan().any()
