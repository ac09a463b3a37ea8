"""Triton kernels one by one, in Triton's interpreter: rows.py of the package is what they must be.

The ops that call them are tested for every backend in test_linear_logprobs.py and its neighbours.
Letters: n tokens, H hidden size, V vocabulary.
"""

from itertools import pairwise

import pytest
import torch

from stepkto_kernels import available_backends, plan
from stepkto_kernels import rows as torch_rows
from stepkto_kernels.config import LogitOptions
from stepkto_kernels.linear_logprobs import linear_logprobs
from stepkto_kernels.rows import STATS, RowGradient, Tile

pytestmark = pytest.mark.skipif(
    available_backends()["triton"] != "ok" or torch.cuda.is_available(),
    reason=f"for Triton's interpreter; backend triton: {available_backends()['triton']}",
)

OPTIONS = {
    "plain": (LogitOptions(), False),
    "bias": (LogitOptions(), True),
    "softcap": (LogitOptions(softcap=5.0), False),
    "all together": (LogitOptions(temperature=1.3, logit_scale=-0.6, softcap=7.0), True),
}
# A row of logits in fp32 has this error against fp64, from the GEMM and the option that follow.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture
def gemm_epilogue():
    from stepkto_kernels.kernels import gemm_epilogue

    return gemm_epilogue


@pytest.fixture
def triton_rows():
    from stepkto_kernels.kernels import rows

    return rows


@pytest.fixture(params=list(OPTIONS.values()), ids=list(OPTIONS))
def options_bias(request):
    return request.param


class Problem:
    """hidden, weight, target with an ignored and a masked token, and what torch makes of them."""

    def __init__(self, dtype, options, with_bias, n=75, H=40, V=201):
        self.hidden = torch.randn(n, H).to(dtype)
        self.weight = torch.randn(V, H).to(dtype)
        self.bias = torch.randn(V).to(dtype) if with_bias else None
        self.target = torch.randint(V, (n,))
        self.target[3] = -100
        self.options, self.V, self.n = options, V, n
        wide = None if self.bias is None else self.bias.double()
        x = self.hidden.double() @ self.weight.double().T
        self.z = torch_rows.transform_(x.clone(), wide, options)
        self.x = x.float()
        self.log_p = self.z.log_softmax(1)

    def tile(self, start, stop, dtype=torch.float32):
        bias = None if self.bias is None else self.bias[start:stop].float()
        x = self.x[:, start:stop].to(dtype).contiguous()
        return Tile(x, self.target, start, bias)

    def expected_stats(self):
        likeliest = self.z.argmax(1) == self.target
        return {
            "entropy": -(self.log_p.exp() * self.log_p).sum(1),
            "mean_logit": self.z.mean(1),
            "is_top1": likeliest.double(),
            "log_sum_sq_prob": (2 * self.log_p).logsumexp(1),
        }

    def expected_logp(self):
        own = self.log_p.gather(1, self.target.clamp(min=0)[:, None])[:, 0]
        return torch.where(self.target >= 0, own, torch.nan)  # as of any target that is nowhere

    def gradient(self, entropy):
        logp, lse, values = self.fold(torch_rows)
        dlogp = torch.randn(self.n)
        dlogp[5] = 0
        row = RowGradient(lse, logp, dlogp)
        return (
            row._replace(dentropy=torch.randn(self.n), entropy=values["entropy"])
            if entropy
            else row
        )

    def fold(self, kernels, edges=(0, 64, 160, 201)):
        fold = kernels.Fold(self.n, len(edges) - 1, self.V, STATS, self.options, self.x.device)
        for chunk, (start, stop) in enumerate(pairwise(edges)):
            tile = kernels.prepare(self.tile(start, stop), self.options)
            fold.add(tile, slice(0, self.n), chunk)
        return fold.finish()


def assert_forward(problem, logp, values):
    want = problem.expected_logp()
    torch.testing.assert_close(logp.double(), want, **CLOSE, equal_nan=True)
    for name, expected in problem.expected_stats().items():
        got = values[name].double()
        scored = problem.target >= 0 if name == "is_top1" else slice(None)
        torch.testing.assert_close(got[scored], expected[scored], **CLOSE, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("H", [1, 48, 64])  # 48: Triton 3.4 wants 16 elements, not bytes
@pytest.mark.parametrize("V", [1, 63, 64, 65, 201])
def test_forward_epilogue(gemm_epilogue, dtype, descriptors, H, V, options_bias):
    problem = Problem(dtype, *options_bias, H=H, V=V)
    if descriptors and not gemm_epilogue._describable(problem.hidden):
        assert H == 1
        pytest.skip("TMA takes rows of a multiple of 16 bytes")
    fold = gemm_epilogue.forward(
        problem.hidden,
        problem.weight,
        problem.target,
        problem.bias,
        problem.options,
        STATS,
        descriptors=descriptors,
    )
    logp, _, values = fold.finish()
    assert_forward(problem, logp, values)


@pytest.mark.parametrize(
    "rows", [(0, 1), (0, 31), (0, 33), (0, 99), (32, 100), (64, 97), (96, 100)]
)
def test_rows_of_the_epilogue_do_not_depend_on_the_batch(gemm_epilogue, rows):
    """Same row, same bits, whatever else is in the batch.

    The interpreter's dot is numpy's, which gives the rows of a tile different bits by their place,
    so rows move by whole tiles here; test_gpu.py moves them by any number.
    """
    problem = Problem(torch.float16, LogitOptions(), False, n=100)
    run = lambda part: gemm_epilogue.forward(
        problem.hidden[part], problem.weight, problem.target[part], None, problem.options, STATS
    ).finish()
    part = slice(*rows)
    whole, alone = run(slice(None)), run(part)
    bits = lambda logp: logp.view(torch.int32)  # NaN too, of the token without target
    assert torch.equal(bits(whole[0][part]), bits(alone[0]))
    for name in STATS:
        assert torch.equal(whole[2][name][part], alone[2][name])


def test_fold(triton_rows, options_bias):
    problem = Problem(torch.float32, *options_bias)
    logp, _, values = problem.fold(triton_rows)
    assert_forward(problem, logp, values)


@pytest.mark.parametrize("tile_dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("entropy", [False, True])
def test_dlogits(triton_rows, tile_dtype, entropy, options_bias):
    problem = Problem(torch.float32, *options_bias)
    row = problem.gradient(entropy)
    tile = problem.tile(64, 160, tile_dtype)
    reference = torch_rows.prepare(tile._replace(x=tile.x.float().clone()), problem.options)
    expected = torch_rows.dlogits_(reference, row, problem.options)
    if not entropy:
        expected[5] = 0
    held = tile.x.clone()
    got = triton_rows.dlogits_(tile, row, problem.options, torch.float32)
    torch.testing.assert_close(got, expected, **CLOSE)
    in_place = got.data_ptr() == tile.x.data_ptr()
    assert in_place == (tile_dtype == torch.float32)
    assert in_place or torch.equal(held, tile.x)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("entropy", [False, True])
def test_dlogits_epilogue(gemm_epilogue, descriptors, entropy, options_bias):
    problem = Problem(torch.float32, *options_bias, H=48)  # see test_forward_epilogue
    row = problem.gradient(entropy)
    expected = torch_rows.dlogits_(
        torch_rows.prepare(problem.tile(64, 160), problem.options), row, problem.options
    )
    if not entropy:
        expected[5] = 0
    out = torch.full((problem.n, 96), torch.nan)
    gemm_epilogue.dlogits(
        problem.hidden,
        problem.weight[64:160],
        problem.target,
        None if problem.bias is None else problem.bias[64:160],
        64,
        row,
        problem.options,
        out,
        descriptors=descriptors,
    )
    torch.testing.assert_close(out, expected, **CLOSE)


def test_a_token_without_gradient_may_hold_anything(gemm_epilogue, triton_rows):
    """0 times NaN is NaN: the 0 of a row whose dlogp is 0 must not be a product."""
    problem = Problem(torch.float32, LogitOptions(), False)
    row = problem.gradient(False)
    problem.hidden[5] = torch.nan
    problem.x[5] = torch.nan
    row.lse.logsum[5] = row.logp[5] = torch.nan
    tile = problem.tile(0, 201)
    assert triton_rows.dlogits_(tile, row, problem.options).isfinite().all()
    out = torch.empty(problem.n, problem.V)
    arguments = problem.hidden, problem.weight, problem.target, None, 0, row, problem.options, out
    assert gemm_epilogue.dlogits(*arguments).isfinite().all()


def test_frozen(triton_rows, options_bias):
    """Sums relative to a running maximum, collected over chunks, are those of the whole row."""
    problem = Problem(torch.float32, *options_bias)
    everything = slice(0, problem.n)
    make = lambda kernels: kernels.Fold(problem.n, 3, problem.V, (), problem.options, "cpu")
    ours, reference = make(triton_rows), make(torch_rows)
    for chunk, (start, stop) in enumerate(pairwise((0, 64, 160, 201))):
        tile = problem.tile(start, stop)
        prepared = torch_rows.prepare(tile._replace(x=tile.x.clone()), problem.options)
        rescale, d = ours.add_frozen(tile, everything, chunk, torch.float32)
        wanted = reference.add_frozen(prepared, everything, chunk, torch.float32)
        torch.testing.assert_close((rescale, d), wanted, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("epilogue", [False, True], ids=["vendor GEMM", "epilogue"])
@pytest.mark.parametrize("mode", ["frozen", "cached", "recompute"])
def test_the_op_whichever_gemm_the_planner_takes(
    monkeypatch, head_problem, evaluate, assert_head_within_bound, dtype, epilogue, mode
):
    monkeypatch.setattr(plan, "epilogue_pays", lambda H, itemsize: epilogue)
    monkeypatch.setitem(plan.VOCAB_CHUNK, "cpu", 64)
    monkeypatch.setitem(plan.TOKEN_CHUNK, "cpu", 16)
    problem = head_problem(dtype=dtype, bias=True, softcap=9.0)
    V = problem.weight.shape[0]
    scratch = 0 if dtype == torch.float32 else 16 * V * 4
    budget = 9 * V * dtype.itemsize + scratch if mode == "cached" else None
    needs = ("hidden",) if mode == "frozen" else ("hidden", "weight", "bias")
    results = evaluate(linear_logprobs, problem, needs, backend="triton", memory_budget=budget)
    assert_head_within_bound(results, problem, needs, unit=torch.finfo(dtype).eps)
