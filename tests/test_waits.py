"""On a GPU nothing waits for the device, shown without one: the ops run on the meta device.

It has no values, so that reading one raises, and takes every branch that is not the CPU's. What
would wait without reading a value on the host is refused by `NoWaits`. test_gpu.py has the same on
a GPU, where torch says what waits.
Letters: N tokens, H hidden size, V vocabulary.
"""

import importlib
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepkto_kernels import (
    KLBaseline,
    LossNormalizer,
    StepKTOConfig,
    StepKTOLoss,
    available_backends,
    cuda,
    fused_linear_step_kto_loss,
    kl_baseline,
    linear_logprobs_with_stats,
    loss_normalizer,
    plan,
    segment_sums,
    step_kto_loss,
    token_logprobs,
)
from stepkto_kernels import backend as backends
from stepkto_kernels.segments import SegmentIndex, TokenLayout

V, H = 5000, 16
ALL = ("hidden", "weight", "bias")
STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_prob")
MODES = {  # inputs that need a gradient, memory budget, statistics
    "forward": ((), None, ()),
    "statistics": ((), None, STATS),
    "frozen": (("hidden",), None, ()),
    "frozen, statistics": (("hidden",), None, STATS[1:]),
    "cached": (ALL, 10**9, ()),
    "cached, some rows": (ALL, 4096 * V * 4 + 20 * V * 4, ()),
    "recompute": (ALL, None, ()),
    "entropy": (ALL, None, ("entropy",)),
    "only the bias": (("bias",), None, ()),
}
CONFIGS = {
    "default": {},
    "matched": {"reference_point": "matched"},
    "options": {
        **{"step_reduction": "mean", "length_normalize": True, "ratio_clip": (-1.0, 1.0)},
        **{"undesirable_weight": 1.3, "step_weight": 0.3},
    },
}

# Sizes of their results, or the CPU's view of a copy, depend on values.
WAITING = ("nonzero", "unique", "_unique2", "unique_consecutive", "unique_dim", "masked_select")
WAITING += ("_local_scalar_dense", "bincount", "equal", "is_nonzero")


class NoWaits(TorchDispatchMode):
    """Refuses on meta tensors what waits for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if any(isinstance(x, torch.Tensor) and x.is_meta for x in leaves):
            assert name not in WAITING, f"{name} waits"
            if name in ("index", "index_put", "index_put_"):
                assert all(x is None or x.dtype == torch.int64 for x in args[1]), "a mask waits"
        if name in ("copy_", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            to = args[0].device if name == "copy_" else kwargs.get("device") or source.device
            ahead = kwargs.get("non_blocking") or any(x is True for x in args)
            from_host = source.device.type == "cpu"
            assert source.device.type == torch.device(to).type or (from_host and ahead), "a copy"
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: bool((x > 0).all()),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x),
        lambda x: (x > 0).nonzero(),
        lambda x: x.unique(),
        lambda x: x.unique_consecutive(return_counts=True),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.long().bincount(),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits_is_seen(waits):
    with NoWaits(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        waits(torch.ones(3, device="meta"))


class Stub:
    """A Triton kernel that is launched and does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


# module, op, its setup_context and backward
OPS = (
    ("linear_logprobs", "_linear_logprobs", "_setup_context", "_backward"),
    ("token_logprobs", "_token_logprobs", "_setup_context", "_backward"),
    ("fused_step_kto", "_fused_step_kto", "_setup_context", "_backward"),
    ("step_kto", "_step_kto", "_step_kto_setup", "_step_kto_backward"),
    ("segments", "_segment_sums", "_segment_sums_setup", "_segment_sums_backward"),
)


def differentiable(implementation, setup, backward):
    """An op as an autograd.Function: the dispatcher would run its fake implementation here."""

    def without_lists(ctx, *grads):
        return tuple(None if isinstance(g, list) else g for g in backward(ctx, *grads))

    methods = {"forward": implementation, "setup_context": setup, "backward": without_lists}
    methods = {name: staticmethod(method) for name, method in methods.items()}
    return type("Op", (torch.autograd.Function,), methods).apply


def widening_gemm() -> bool:
    """Whether this torch says what comes of a narrow GEMM with an fp32 result: 2.8 does not."""
    narrow = torch.empty(16, 16, dtype=torch.bfloat16, device="meta")
    try:
        torch.mm(narrow, narrow, out_dtype=torch.float32)
    except TypeError:
        return False
    return True


@pytest.fixture(params=["torch", "triton", "triton, vendor GEMM"])
def on_meta(request, monkeypatch):
    """All ops run their implementation of a backend, in several tiles, with NoWaits."""
    if "dtype" in request.fixturenames and request.getfixturevalue("dtype") != torch.float32:
        if not widening_gemm():
            pytest.skip("this torch has no meta kernel of mm with an out_dtype")
    backend = request.param.split(",")[0]
    if backend == "triton":
        if available_backends()["triton"] != "ok":
            pytest.skip(f"triton: {available_backends()['triton']}")
        from stepkto_kernels.kernels import gemm_epilogue, rows

        launched = {rows: ("_fold_kernel", "_dlogits_kernel", "_finish_kernel")}
        launched[gemm_epilogue] = ("_forward_kernel", "_dlogits_kernel")
        for module, kernels in launched.items():
            for kernel in kernels:
                monkeypatch.setattr(module, kernel, Stub())
        epilogue = request.param == "triton"
        monkeypatch.setattr(plan, "epilogue_pays", lambda H, itemsize: epilogue)
    for chunks, size in ((plan.TOKEN_CHUNK, 32), (plan.VOCAB_CHUNK, 1024)):
        monkeypatch.setitem(chunks, "meta", size)
    monkeypatch.setattr(backends, "resolve", lambda *args: backend)
    monkeypatch.setattr(cuda, "serves", lambda device: False)
    for name, op, setup, backward in OPS:
        module = importlib.import_module("stepkto_kernels." + name)
        plain = lambda op, module=module: getattr(module, op)._init_fn.__wrapped__
        function = differentiable(plain(op), getattr(module, setup), getattr(module, backward))
        monkeypatch.setattr(module, op, function)
        if hasattr(module, op + "_bwd"):
            monkeypatch.setattr(module, op + "_bwd", plain(op + "_bwd"))
    with NoWaits():
        yield backend


def head(N, dtype=torch.float32, needs=ALL):
    """hidden, weight, target and bias on the meta device."""
    new = lambda name, *shape: torch.empty(
        shape, dtype=dtype, device="meta", requires_grad=name in needs
    )
    target = torch.empty(N, dtype=torch.int64, device="meta")
    return new("hidden", N, H), new("weight", V, H), target, new("bias", V)


@pytest.mark.parametrize("mode", MODES)
def test_linear_logprobs(on_meta, dtype, mode):
    needs, budget, stats = MODES[mode]
    hidden, weight, target, bias = head(75, dtype, needs)
    call = {"memory_budget": budget, "softcap": 9.0, "temperature": 0.7}
    logps, values = linear_logprobs_with_stats(hidden, weight, target, bias, stats=stats, **call)
    assert logps.is_meta and logps.shape == (75,)
    assert all((getattr(values, name) is not None) == (name in stats) for name in STATS)
    if needs:
        entropy = values.entropy if "entropy" in stats else 0.0
        (logps + entropy).sum().backward()
        for name, leaf in zip(ALL, (hidden, weight, bias), strict=True):
            assert (leaf.grad is not None) == (name in needs)


def test_token_logprobs(on_meta, dtype):
    logits = torch.empty(75, V, dtype=dtype, device="meta", requires_grad=True)
    target = torch.empty(75, dtype=torch.int64, device="meta")
    token_logprobs(logits, target).sum().backward()
    assert logits.grad.shape == (75, V)


@pytest.fixture
def moved(on_meta, layout, long):
    """Segments that were made on the CPU: sequences of 3, 42, 3 and 20 tokens."""
    return layout(long, "interleaved").to("meta", non_blocking=True)


@pytest.mark.parametrize(
    "needs, dtype",
    [
        (ALL, torch.float32),
        (ALL, torch.bfloat16),
        (ALL, torch.float16),
        (("hidden",), torch.bfloat16),
        ((), torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [None, 30, 16], ids=["one block", "several", "longer than one"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_fused_loss(moved, dtype, config, rows, needs):
    hidden, weight, target, bias = head(moved.num_tokens, dtype, needs)
    ref_logps = torch.empty(moved.num_tokens, device="meta")
    # the reference points of a caller may be on the CPU
    baseline = None if "reference_point" in config else KLBaseline(torch.tensor(0.3), 0.1)
    loss, metrics = fused_linear_step_kto_loss(
        *(hidden, weight, target, moved, ref_logps, baseline, bias),
        config=StepKTOConfig(**config),
        normalizer=LossNormalizer(3, torch.tensor(4.0)),
        memory_budget=None if rows is None else rows * V * 4,
    )
    assert loss.is_meta and metrics.totals.is_meta
    if needs:
        loss.backward()
        for name, leaf in zip(ALL, (hidden, weight, bias), strict=True):
            assert (leaf.grad is not None) == (name in needs)


def test_fused_loss_of_segments_made_on_the_device_waits(moved):
    hidden, weight, target, bias = head(moved.num_tokens)
    made = replace(moved, outcome_label=moved.outcome_label.clone())
    assert moved.layout is not None and made.layout is None
    ref_logps = torch.empty(moved.num_tokens, device="meta")
    config = StepKTOConfig(reference_point="zero")
    with pytest.raises(AssertionError, match="a copy"):
        fused_linear_step_kto_loss(
            hidden, weight, target, made, ref_logps, None, bias, config=config
        )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_step_kto_loss(moved, config):
    logps = torch.empty(moved.num_tokens, device="meta", requires_grad=True)
    ref_logps = torch.empty(moved.num_tokens, device="meta")
    config = StepKTOConfig(**config)
    baseline = kl_baseline(logps, ref_logps, moved, config=config)
    normalizer = loss_normalizer(moved, config)
    given = None if config.reference_point == "matched" else baseline
    loss, _ = step_kto_loss(logps, ref_logps, moved, given, config, normalizer)
    loss.backward()
    assert logps.grad.is_meta
    segment_sums(logps, moved)[0].sum().backward()


@pytest.mark.parametrize("kind", ["mismatched", "ema"])
def test_module(moved, kind):
    with torch.device("meta"):
        module = StepKTOLoss(StepKTOConfig(reference_point=kind))
    hidden, weight, target, bias = head(moved.num_tokens)
    ref_logps = torch.empty(moved.num_tokens, device="meta")
    baseline = KLBaseline(torch.tensor(1.0), 2.0) if kind == "mismatched" else None
    loss, _ = module(hidden, weight, target, moved, ref_logps, baseline, bias)
    loss.backward()
    assert weight.grad.is_meta


# ---- the layout that goes along ---------------------------------------------------------------


def test_layout_goes_along(layout, sequences):
    """Tokens of labelled segments, sequence after sequence in their order; the others after."""
    here = layout(sequences, "interleaved")
    index = SegmentIndex.of(here)
    assert here.layout is None and here.to("cpu").layout is None
    moved = here.to("meta")
    assert moved.layout.order.is_meta and moved.layout.lengths.device.type == "cpu"
    assert moved.to("meta").layout.lengths is moved.layout.lengths
    order, lengths = TokenLayout.of(index)
    assert torch.equal(lengths, moved.layout.lengths)
    scored = index.scored_tokens()
    kept = scored.nonzero()[:, 0]
    wanted = kept[here.sequence_index[kept].sort(stable=True).indices]
    assert torch.equal(order[: len(kept)], wanted)
    assert sorted(order.tolist()) == list(range(here.num_tokens))
    counts = [int((here.sequence_index[kept] == b).sum()) for b in range(-1, here.num_sequences)]
    assert lengths.tolist() == counts


def test_layout_is_not_kept_beside_other_labels(typical):
    moved = typical.to("meta")
    other = replace(moved, outcome_label=moved.outcome_label.clone())
    assert other.layout is None and other.to("meta").layout is None


def test_moving_compiles(typical):
    torch._dynamo.reset()
    function = lambda segments: segments.to("meta").layout
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    order, lengths = compiled(typical)
    assert order.is_meta and torch.equal(lengths, function(typical).lengths)


def test_batches_of_other_lengths_share_a_graph(layout):
    """The lengths are a tensor in the graph and not numbers that it was compiled for."""

    def loss(hidden, weight, target, segments, ref_logps):
        config = StepKTOConfig(reference_point="zero")
        return fused_linear_step_kto_loss(
            hidden, weight, target, segments, ref_logps, config=config
        )[0]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for first in (3, 7, 12):
            segments = layout(((1, ((1, first),), 0), (0, ((0, 20 - first),), 1)))
            known = TokenLayout.of(SegmentIndex.of(segments))
            object.__setattr__(segments, "layout", known)  # as if it had been moved here
            N = segments.num_tokens
            hidden, weight, target = torch.randn(N, H), torch.randn(99, H), torch.arange(N)
            arguments = hidden, weight, target, segments, torch.randn(N)
            assert torch.equal(compiled(*arguments), loss(*arguments))
