"""On the CPU a token's log-prob has the same bits whatever else is computed with it, and how.

That is what makes the log-ratio of a model with itself exactly 0: policy, reference and KL batches
are packed differently, run in different modes, and must agree to the last bit.
Letters: N tokens, H hidden size, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch

from stepkto_kernels import (
    KLBaseline,
    StepKTOConfig,
    StepSegments,
    fused_linear_step_kto_loss,
    kl_baseline,
    linear_logprobs,
    linear_logprobs_with_stats,
    plan,
    segment_sums,
    step_kto_loss,
    token_logprobs,
)

N = 37
OPTIONS = {
    "plain": {},
    "all together": {"bias": True, "temperature": 0.7, "logit_scale": 1.3, "softcap": 20.0},
}
# threads, V, H: the vocabularies of GPT-2 and (an eighth of) Qwen 2.5, and odd ones
SMALL = [(1, 2049, 33), (1, 300, 1), (1, 64, 257), (1, 17, 7)]
SIZES = [(1, 50257, 64), (1, 18992, 64), (2, 18992, 64), (2, 4097, 128), *SMALL]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=list(OPTIONS.values()), ids=list(OPTIONS))
def options(request):
    return request.param


@pytest.fixture
def logps(backend):
    def logps(problem, rows=slice(None), **kwargs):
        return linear_logprobs(
            *(problem.hidden[rows], problem.weight, problem.target[rows], problem.bias),
            **problem.options,
            backend=backend,
            **kwargs,
        )

    return logps


def case(head_problem, size, dtype, options):
    threads, V, H = size
    torch.set_num_threads(threads)
    return head_problem(N=N, V=V, H=H, dtype=dtype, ignored="none", **options)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_split_and_order(head_problem, logps, dtype, options, size):
    problem = case(head_problem, size, dtype, options)
    whole = logps(problem)
    for length in (1, 2, 15, 16, 30):
        starts = range(0, N, length) if size in SMALL else (0, N - length)
        for start in starts:
            part = slice(start, start + length)
            assert torch.equal(logps(problem, part), whole[part]), f"{length} tokens from {start}"
    for dropped in (0, 9, 30):
        some = torch.randperm(N)[dropped:]
        assert torch.equal(logps(problem, some), whole[some]), f"tokens {some.tolist()}"


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_packing_and_padding(head_problem, logps, dtype, options, size):
    """Sequences in any order, end to end or as padded rows, with garbage in the padding."""
    problem = case(head_problem, size, dtype, options)
    whole = logps(problem)
    sequences = [list(range(0, 5)), list(range(5, 25)), list(range(25, N))]
    for order in ((2, 0, 1), (1, 2, 0)):
        packed = [t for i in order for t in sequences[i]]
        assert torch.equal(logps(problem, packed), whole[packed])
    rows = torch.full((3, 20), -1)
    for i, tokens in enumerate(sequences):
        rows[i, -len(tokens) :] = torch.tensor(tokens)  # padded on the left
    padded = replace(
        problem,
        hidden=torch.where(rows[..., None] >= 0, problem.hidden[rows], torch.nan),
        target=torch.where(rows >= 0, problem.target[rows], -100),
    )
    assert torch.equal(logps(padded)[rows >= 0], whole[rows[rows >= 0]])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_mode_and_memory_budget(head_problem, logps, dtype, options, size):
    problem = case(head_problem, size, dtype, options)
    whole = logps(problem)
    frozen = replace(problem, hidden=problem.hidden.clone().requires_grad_())
    assert torch.equal(logps(frozen), whole), "frozen head"
    trained = replace(frozen, weight=problem.weight.clone().requires_grad_())
    V = problem.weight.shape[0]
    row = V * dtype.itemsize
    scratch = 0 if dtype.itemsize == 4 else plan.token_chunk("cpu") * V * 4
    for rows in (None, 0, 1, 20, N):
        memory_budget = None if rows is None else rows * row + scratch
        assert torch.equal(logps(trained, memory_budget=memory_budget), whole), f"{rows} rows kept"
    with torch.no_grad():
        assert torch.equal(logps(trained), whole), "no_grad"
    with torch.inference_mode():
        assert torch.equal(logps(problem), whole), "inference_mode"


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_statistics_change_nothing(head_problem, logps, backend, dtype, options, size):
    problem = case(head_problem, size, dtype, options)
    arguments = (problem.hidden, problem.weight, problem.target, problem.bias)
    with_stats = linear_logprobs_with_stats(*arguments, **problem.options, backend=backend)[0]
    assert torch.equal(with_stats, logps(problem))


@pytest.mark.parametrize("token_chunk", [1, 16, 17])
def test_any_token_chunk(monkeypatch, head_problem, logps, dtype, options, token_chunk):
    problem = case(head_problem, (1, 2049, 33), dtype, options)
    whole = logps(problem)
    monkeypatch.setitem(plan.TOKEN_CHUNK, "cpu", token_chunk)
    for needs in ((), ("hidden",), ("hidden", "weight")):
        chunked = replace(
            problem,
            hidden=problem.hidden.clone().requires_grad_("hidden" in needs),
            weight=problem.weight.clone().requires_grad_("weight" in needs),
        )
        assert torch.equal(logps(chunked), whole), needs


# ---- a model with itself ----------------------------------------------------------------------


def single_tokens(sequences):
    """Every token a step of its own; sequence i has tokens `sequences[i]` of N."""
    sequence_index = torch.empty(N, dtype=torch.int32)
    for i, tokens in enumerate(sequences):
        sequence_index[torch.tensor(tokens)] = i
    return StepSegments(
        sequence_index=sequence_index,
        step_index=torch.arange(N, dtype=torch.int32),
        outcome_label=torch.arange(len(sequences)).remainder(2).to(torch.int8),
        step_label=torch.arange(N).remainder(2).to(torch.int8),
        step_sequence=sequence_index,
    )


SEQUENCES = {
    "one a token": [[t] for t in range(N)],
    "one of all tokens": [list(range(N))],
    "interleaved": [list(range(0, N, 2)), list(range(1, N, 2))],
}


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("rows", [0, 20, 1000], ids=lambda rows: f"{rows} rows held")
@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")], ids=str)
def test_fused_log_ratio_with_itself_is_zero(
    head_problem, logps, backend, dtype, needs, rows, sequences
):
    """At beta = 1e12 a log-ratio of 1e-11 nats saturates its sigmoid: none may."""
    problem = case(head_problem, (1, 4097, 64), dtype, OPTIONS["all together"])
    ref_logps = torch.cat([logps(problem, slice(0, 20)), logps(problem, slice(20, N))])
    config = StepKTOConfig(beta=1e12, reference_point="zero")

    def saturated(ref_logps):
        _, metrics = fused_linear_step_kto_loss(
            problem.hidden.clone().requires_grad_("hidden" in needs),
            problem.weight.clone().requires_grad_("weight" in needs),
            *(problem.target, single_tokens(sequences), ref_logps, None, problem.bias),
            config=config,
            memory_budget=rows * 4097 * 4,
            backend=backend,
            **problem.options,
        )
        values = metrics.compute()
        return values["saturated"] + values["step/saturated"]

    assert saturated(ref_logps) == 0
    off = ref_logps.clone()
    off[3] = torch.nextafter(off[3], torch.tensor(-torch.inf))
    assert saturated(off) > 0  # this test can see a single bit of a single token


# ---- repeated calls ---------------------------------------------------------------------------

SEGMENTS = single_tokens(SEQUENCES["interleaved"])
BASELINE = KLBaseline(0.3, 0.2)
REF_LOGPS = -torch.rand(N, generator=torch.Generator().manual_seed(0))

# Every op, of hidden h, weight w, target t and the logit options and backend `call`
OPS = {
    "recompute": lambda h, w, t, call: linear_logprobs(h, w, t, **call),
    "cached": lambda h, w, t, call: linear_logprobs(h, w, t, memory_budget=2 * 10**7, **call),
    "frozen head": lambda h, w, t, call: linear_logprobs(h, w.detach(), t, **call),
    "entropy": lambda h, w, t, call: linear_logprobs_with_stats(h, w, t, **call)[1].entropy,
    "token_logprobs": lambda h, w, t, call: token_logprobs(h @ w.T, t, backend="torch"),
    "fused": lambda h, w, t, call: fused_linear_step_kto_loss(
        h, w, t, SEGMENTS, REF_LOGPS, BASELINE, **call
    )[0],
    "fused, long sequences": lambda h, w, t, call: fused_linear_step_kto_loss(
        h, w, t, SEGMENTS, REF_LOGPS, BASELINE, memory_budget=0, **call
    )[0],
    "segment_sums": lambda h, w, t, call: torch.cat(segment_sums(h[:, 0].float(), SEGMENTS)),
    "step_kto_loss": lambda h, w, t, call: step_kto_loss(
        h[:, 0].float(), REF_LOGPS, SEGMENTS, BASELINE
    )[0],
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_repeating_gives_the_same_bits(head_problem, backend, dtype, op, threads):
    """Results and gradients."""
    torch.set_num_threads(threads)
    problem = head_problem(N=N, V=5000, dtype=dtype, softcap=20.0)
    call = {**problem.options, "backend": backend}

    def run():
        h, w = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
        out = op(h, w, problem.target, call)
        out.backward(torch.linspace(-1, 1, max(out.numel(), 2))[: out.numel()].view(out.shape))
        return [out, h.grad] + ([] if w.grad is None else [w.grad])

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[1].abs().max() > 0


# ---- sums of segments -------------------------------------------------------------------------


def test_segment_sums_depend_on_the_tokens_of_a_segment_alone():
    """The same sequences in another order, with other tokens in between, have the same sums."""
    ratio = torch.randn(N)
    segments = single_tokens(SEQUENCES["interleaved"])
    outcome, step = segment_sums(ratio, segments)
    for i, tokens in enumerate(SEQUENCES["interleaved"]):
        alone = StepSegments(
            sequence_index=torch.zeros(len(tokens), dtype=torch.int32),
            step_index=torch.arange(len(tokens), dtype=torch.int32),
            outcome_label=torch.ones(1, dtype=torch.int8),
            step_label=torch.ones(len(tokens), dtype=torch.int8),
            step_sequence=torch.zeros(len(tokens), dtype=torch.int32),
        )
        alone_outcome, alone_step = segment_sums(ratio[tokens], alone)
        assert torch.equal(alone_outcome[0], outcome[i])
        assert torch.equal(alone_step, step[tokens])


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
def test_kl_baseline_with_itself_is_zero(head_problem, logps, dtype, sequences):
    problem = case(head_problem, (1, 300, 64), dtype, {})
    baseline = kl_baseline(logps(problem), logps(problem), single_tokens(sequences))
    assert baseline.outcome == 0 and baseline.step == 0


def test_token_logprobs_of_any_split(dtype, options):
    """Logits that are held: a token's log-prob does not depend on the others either."""
    logits, target = torch.randn(N, 5000).to(dtype), torch.randint(0, 5000, (N,))
    options = {name: value for name, value in options.items() if name != "bias"}
    whole = token_logprobs(logits, target, **options)
    for size in (1, 2, 16, 30):
        for start in range(0, N, size):
            part = slice(start, start + size)
            assert torch.equal(token_logprobs(logits[part], target[part], **options), whole[part])
    order = torch.randperm(N)
    assert torch.equal(token_logprobs(logits[order], target[order], **options), whole[order])
