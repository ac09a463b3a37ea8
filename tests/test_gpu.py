"""What only a GPU can show: bf16, large shapes, streams, graphs, and many random configurations.

Letters: N tokens, H hidden size, V vocabulary.
"""

import random
from dataclasses import replace

import pytest
import torch

from stepkto_kernels import (
    StepKTOConfig,
    fused_linear_step_kto_loss,
    linear_logprobs,
    plan,
    reference,
)

pytestmark = pytest.mark.gpu

NARROW = [torch.bfloat16, torch.float16]
MODES = {
    "forward": ((), None),
    "frozen": (("hidden",), None),
    "recompute": (("hidden", "weight", "bias"), None),
    "cached": (("hidden", "weight", "bias"), 2**28),
}


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["vendor GEMM", "epilogue"])
def gemm(request, monkeypatch):
    """Either of the two ways that the planner chooses from."""
    monkeypatch.setattr(plan, "epilogue_pays", lambda H, itemsize: request.param and itemsize == 2)
    return request.param


def hold(problem, backend, needs, budget, evaluate, assert_head_within_bound):
    results = evaluate(linear_logprobs, problem, needs, backend=backend, memory_budget=budget)
    unit = torch.finfo(problem.weight.dtype).eps
    assert_head_within_bound(results, problem, needs, unit=unit)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("V", [1, 255, 256, 257, 4999])
@pytest.mark.parametrize("H", [8, 100, 513])
def test_modes(head_problem, evaluate, assert_head_within_bound, gemm, dtype, mode, V, H):
    needs, budget = MODES[mode]
    problem = head_problem(N=200, V=V, H=H, dtype=dtype, bias=True, softcap=9.0).to("cuda")
    hold(problem, "triton", needs, budget, evaluate, assert_head_within_bound)


def test_random_configurations(head_problem, evaluate, assert_head_within_bound, monkeypatch):
    """1000 of them against fp64; a failure names its seed."""
    for seed in range(1000):
        pick = random.Random(seed)
        torch.manual_seed(seed)
        options = {}
        if pick.random() < 0.5:
            options["softcap"] = pick.uniform(2, 30)
        if pick.random() < 0.5:
            options["temperature"] = pick.uniform(0.5, 2)
        if pick.random() < 0.5:
            options["logit_scale"] = pick.uniform(-2, 2)
        fused = pick.random() < 0.5
        monkeypatch.setattr(plan, "epilogue_pays", lambda H, size, on=fused: on and size == 2)
        problem = head_problem(
            N=pick.randint(1, 300),
            V=pick.randint(1, 3000),
            H=pick.randint(1, 300),
            dtype=pick.choice([torch.float32, *NARROW]),
            bias=pick.random() < 0.5,
            **options,
        ).to("cuda")
        needs = pick.choice([(), ("hidden",), ("hidden", "weight"), ("weight",)])
        budget = pick.choice([None, 2**20, 2**28])
        backend = pick.choice(["torch", "triton"])
        try:
            hold(problem, backend, needs, budget, evaluate, assert_head_within_bound)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("N, H, V", [(16384, 64, 151936), (9001, 64, 256000), (4096, 128, 50257)])
def test_large_shapes(mode, N, H, V, gemm):
    """N * V beyond 2**31: the last rows and the last vocabulary entries are right."""
    needs, budget = MODES[mode]
    hidden = torch.randn(N, H, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(V, (N,), device="cuda")
    target[-1] = V - 1
    hidden.requires_grad_("hidden" in needs)
    weight.requires_grad_("weight" in needs)
    logps = linear_logprobs(hidden, weight, target, memory_budget=budget, backend="triton")
    rows = slice(N - 64, N)
    exact_hidden = hidden.detach()[rows].double().requires_grad_()
    exact = reference.linear_logprobs(exact_hidden, weight.detach().double(), target[rows])
    assert (logps[rows] - exact).abs().max() <= 2e-5
    if needs:
        upstream = torch.zeros(N, device="cuda")
        upstream[rows] = 1
        logps.backward(upstream)
        exact.sum().backward()
        error = (hidden.grad[rows].double() - exact_hidden.grad).norm() / exact_hidden.grad.norm()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps
        assert hidden.grad[: N - 64].abs().max() == 0
    if "weight" in needs:
        p = (exact_hidden.detach() @ weight.detach()[-64:].double().T) - (
            exact_hidden.detach() @ weight.detach().double().T
        ).logsumexp(1, keepdim=True)
        onehot = (target[rows, None] == torch.arange(V - 64, V, device="cuda")).double()
        wanted = (onehot - p.exp()).T @ exact_hidden.detach()
        error = (weight.grad[-64:].double() - wanted).norm() / wanted.norm()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("mode", MODES)
def test_repeating_gives_the_same_bits(head_problem, evaluate, gemm, mode):
    needs, budget = MODES[mode]
    problem = head_problem(N=3000, V=5000, H=256, dtype=torch.bfloat16, bias=True).to("cuda")
    run = lambda: evaluate(linear_logprobs, problem, needs, backend="triton", memory_budget=budget)
    first = run()
    for _ in range(20):
        again = run()
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_row_has_the_same_bits_in_every_batch(head_problem, monkeypatch):
    """The log-ratio of a model with itself is exactly 0, whatever surrounds a token."""
    monkeypatch.setattr(plan, "epilogue_pays", lambda H, itemsize: True)
    problem = head_problem(N=1000, V=5000, H=256, dtype=torch.bfloat16).to("cuda")
    run = lambda rows: linear_logprobs(
        problem.hidden[rows], problem.weight, problem.target[rows], backend="triton"
    )
    with torch.no_grad():
        whole = run(slice(None))
        for n in (1, 17, 128, 129, 999):
            assert torch.equal(run(slice(1000 - n, None)), whole[1000 - n :])


def capture(step):
    """A CUDA graph of step(), and the tensors that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


@pytest.mark.parametrize("mode", MODES)
def test_cuda_graph(head_problem, gemm, mode):
    """Nothing waits for the device or allocates outside of the graph's pool."""
    needs, budget = MODES[mode]
    problem = head_problem(N=300, V=3000, H=128, dtype=torch.bfloat16).to("cuda")
    hidden = problem.hidden.detach().clone().requires_grad_("hidden" in needs)
    weight = problem.weight.detach().clone().requires_grad_("weight" in needs)

    def step():
        logps = linear_logprobs(
            hidden, weight, problem.target, memory_budget=budget, backend="triton"
        )
        grads = (
            torch.autograd.grad(
                logps, [x for x in (hidden, weight) if x.requires_grad], problem.upstream
            )
            if needs
            else ()
        )
        return (logps.detach(), *grads)

    graph, captured = capture(step)
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    for got, wanted in zip(captured, step(), strict=True):
        assert torch.equal(got, wanted)


def test_side_stream(head_problem):
    """Work goes to torch's current stream: it waits there and nowhere else."""
    problem = head_problem(N=2000, V=5000, H=256, dtype=torch.bfloat16).to("cuda")
    call = lambda p: linear_logprobs(p.hidden, p.weight, p.target, backend="triton")
    with torch.no_grad():
        wanted = call(problem)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            late = torch.empty_like(problem.hidden).fill_(torch.nan)
            torch.cuda._sleep(50_000_000)
            late.copy_(problem.hidden)
            got = call(replace(problem, hidden=late))
        side.synchronize()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_no_wait_for_the_device(head_problem, gemm, mode):
    needs, budget = MODES[mode]
    problem = head_problem(N=300, V=3000, H=128, dtype=torch.bfloat16).to("cuda")
    hidden = problem.hidden.detach().requires_grad_("hidden" in needs)
    weight = problem.weight.detach().requires_grad_("weight" in needs)

    def step():
        logps = linear_logprobs(
            hidden, weight, problem.target, memory_budget=budget, backend="triton"
        )
        if needs:
            logps.backward(problem.upstream)

    step()  # compiles, which may wait
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def fused_step(head_problem, layout, long):
    """Maker of a function that returns the fused loss and its gradients, and of its inputs."""

    def fused_step(rows, made_on="cpu"):
        segments = layout(long, "interleaved").to("cuda")
        if made_on == "cuda":
            segments = replace(segments, outcome_label=segments.outcome_label.clone())
        problem = head_problem(N=segments.num_tokens, V=3000, H=128, dtype=torch.bfloat16)
        problem = problem.to("cuda")
        leaves = [x.detach().clone().requires_grad_() for x in (problem.hidden, problem.weight)]
        ref_logps = torch.full((segments.num_tokens,), -8.0, device="cuda")

        def step():
            loss, metrics = fused_linear_step_kto_loss(
                *(*leaves, problem.target, segments, ref_logps),
                config=StepKTOConfig(reference_point="zero"),
                memory_budget=rows * 3000 * 4,
                backend="triton",
            )
            return loss.detach(), metrics.totals, *torch.autograd.grad(loss, leaves)

        return step, leaves

    return fused_step


# Sequences of 3, 42, 3 and 20 tokens: in one block, in several, and one longer than a block.
ROWS = {"one block": 1000, "several": 50, "longer than a block": 16}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_fused_loss_does_not_wait(fused_step, gemm, rows):
    step, _ = fused_step(rows)
    step()  # compiles, which may wait
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_fused_loss_of_segments_made_on_either_device(fused_step, gemm, rows):
    here, there = (fused_step(rows, made_on)[0]() for made_on in ("cpu", "cuda"))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_cuda_graph_of_the_fused_loss(fused_step, gemm, rows):
    step, leaves = fused_step(rows)
    graph, captured = capture(step)
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    for got, wanted in zip(captured, step(), strict=True):
        assert torch.equal(got, wanted)


def test_compiled(head_problem):
    problem = head_problem(N=300, V=3000, H=128, dtype=torch.bfloat16).to("cuda")
    function = lambda h, w: linear_logprobs(h, w, problem.target, backend="triton").sum()
    compiled = torch.compile(function, fullgraph=True)
    h, w = (x.detach().requires_grad_() for x in (problem.hidden, problem.weight))
    wanted = torch.autograd.grad(function(h, w), (h, w))
    for got, expected in zip(torch.autograd.grad(compiled(h, w), (h, w)), wanted, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["forward", "frozen"])
def test_workspace(mode, gemm):
    """At most 0.35 GiB beyond inputs and gradients."""
    needs, _ = MODES[mode]
    N, H, V = 8192, 1024, 131072
    hidden = torch.randn(N, H, device="cuda", dtype=torch.bfloat16, requires_grad=bool(needs))
    weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(V, (N,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logps = linear_logprobs(hidden, weight, target, backend="triton")
    kept = 6 * N * H if needs else 0  # d logp / d hidden in fp32, and as it is kept
    assert torch.cuda.max_memory_allocated() - before <= 0.35 * 2**30 + kept
    assert logps.isfinite().all()
