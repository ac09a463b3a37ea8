"""The custom ops under torch.library.opcheck and torch.compile, and token_logprobs.

Letters: N tokens, H hidden size, V vocabulary, B sequences, S steps.
"""

import dataclasses
import functools
import importlib
import math
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepkto_kernels import (
    KLBaseline,
    StepKTOConfig,
    StepKTOLoss,
    StepSegments,
    available_backends,
    fused_linear_step_kto_loss,
    kl_baseline,
    linear_logprobs,
    linear_logprobs_with_stats,
    loss_normalizer,
    reference,
    segment_sums,
    step_kto_loss,
    token_logprobs,
)

MODULE = importlib.import_module("stepkto_kernels.token_logprobs")  # under the function's name
BASELINE = KLBaseline(0.21, 0.13)
V, H = 70, 12


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


# ---- what is run: function of hidden, weight, bias (or None), target, ref_logps, segments -----


def with_stats(h, w, b, t, r, s, **call):
    logps, stats = linear_logprobs_with_stats(h, w, t, b, softcap=9.0, **call)
    return logps, stats.entropy, stats.mean_logit, stats.is_top1.float(), stats.log_sum_sq_prob


def fused(h, w, b, t, r, s, **call):
    loss, metrics = fused_linear_step_kto_loss(h, w, t, s, r, BASELINE, b, **call)
    return loss, metrics.totals


def matched(h, w, b, t, r, s, **call):
    config = StepKTOConfig(reference_point="matched", ratio_clip=(-2, 2), length_normalize=True)
    loss, metrics = step_kto_loss(h[:, 0].float(), r, s, None, config)
    return loss, metrics.totals


def no_grad_on(*names):
    """linear_logprobs with some inputs constant."""

    def function(h, w, b, t, r, s, **call):
        h, w, b = (
            x if x is None or name not in names else x.detach()
            for name, x in zip(("hidden", "weight", "bias"), (h, w, b), strict=True)
        )
        return linear_logprobs(h, w, t, b, **call)

    return function


HEAD = {
    "recompute": lambda h, w, b, t, r, s, **call: linear_logprobs(
        h, w, t, b, temperature=0.7, softcap=9.0, **call
    ),
    "cached": lambda h, w, b, t, r, s, **call: linear_logprobs(
        h, w, t, b, memory_budget=10**6, **call
    ),
    "cached, some rows": lambda h, w, b, t, r, s, **call: linear_logprobs(
        h, w, t, b, memory_budget=9 * V * h.element_size(), **call
    ),
    "frozen head": no_grad_on("weight", "bias"),
    "frozen hidden": no_grad_on("hidden"),
    "no gradient": no_grad_on("hidden", "weight", "bias"),
    "statistics": with_stats,
    "fused": fused,
    "fused, longer than a block": lambda *args, **call: fused(*args, memory_budget=0, **call),
    "fused, matched": lambda h, w, b, t, r, s, **call: fused_linear_step_kto_loss(
        h, w, t, s, r, None, b, config=StepKTOConfig(reference_point="matched"), **call
    )[0],
}
SEGMENT = {
    "step_kto_loss": lambda h, w, b, t, r, s: step_kto_loss(h[:, 0].float(), r, s, BASELINE)[0],
    "matched": matched,
    "segment_sums": lambda h, w, b, t, r, s: segment_sums(h[:, 0].float(), s),
    "token_logprobs": lambda h, w, b, t, r, s: token_logprobs(h @ w.T, t, softcap=9.0),
    "kl_baseline": lambda h, w, b, t, r, s: tuple(kl_baseline(h[:, 0].float(), r, s)),
    "loss_normalizer": lambda h, w, b, t, r, s: tuple(loss_normalizer(s)),
}


@pytest.fixture
def inputs(head_problem, layout, batches):
    """Arguments of the functions above for a batch of BATCHES."""

    def inputs(name="typical", dtype=torch.float32, bias=True, times=1):
        segments = layout(batches[name] * times)
        problem = head_problem(N=segments.num_tokens, V=V, H=H, dtype=dtype, bias=bias)
        ref_logps = -3 * torch.rand(segments.num_tokens)
        return problem.hidden, problem.weight, problem.bias, problem.target, ref_logps, segments

    return inputs


def run(function, inputs, **call):
    """Outputs, and gradients of all that can have one."""
    h, w, b, *rest = inputs
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (h, w, b)]
    out = function(*leaves, *rest, **call)
    out = out if isinstance(out, tuple) else (out,)
    grads = [x for x in out if x.requires_grad]
    if grads:
        upstream = [torch.linspace(-1, 2, max(x.numel(), 2))[: x.numel()] for x in grads]
        upstream = [u.view(x.shape).to(x.dtype) for u, x in zip(upstream, grads, strict=True)]
        torch.autograd.backward(grads, upstream)
    gradients = [x.grad for x in leaves if x is not None and x.grad is not None]
    return [*(x.detach() for x in out), *gradients]


# ---- opcheck ----------------------------------------------------------------------------------


class Record(TorchDispatchMode):
    """Calls of this package's ops, with the arguments that the public functions give them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "stepkto":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def copies(x, differentiable):
    """The arguments of a call; backward ops have no derivative themselves."""
    if isinstance(x, list | tuple):
        return [copies(y, differentiable) for y in x]
    if not torch.is_tensor(x):
        return x
    return x.detach().clone().requires_grad_(x.requires_grad and differentiable)


def recorded(function, inputs, **call):
    with Record() as record:
        run(function, inputs, **call)
    return record.calls


def check_ops(calls, names):
    assert {str(op).split(".")[1] for op, _, _ in calls} == names
    for op, args, kwargs in calls:
        torch.library.opcheck(op, tuple(copies(args, "_bwd" not in str(op))), kwargs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", HEAD)
def test_opcheck_head(inputs, backend, name, bias):
    """Schema, autograd, fake tensors and AOT dispatch with dynamic shapes."""
    calls = recorded(HEAD[name], inputs(bias=bias), backend=backend)
    op = "fused_step_kto" if name in ("fused", "fused, longer than a block") else "linear_logprobs"
    names = {op} | ({op + "_bwd"} if op == "linear_logprobs" and name != "no gradient" else set())
    check_ops(calls, names | ({"step_kto", "step_kto_bwd"} if "matched" in name else set()))


@pytest.mark.parametrize("name", ["step_kto_loss", "matched", "segment_sums", "token_logprobs"])
def test_opcheck_segments_and_tokens(inputs, auto_is, name):
    op = "step_kto" if name == "matched" else name.removesuffix("_loss")
    check_ops(recorded(SEGMENT[name], inputs()), {op, op + "_bwd"})


@pytest.mark.parametrize("name", ["no tokens", "no sequences"])
def test_opcheck_without_tokens(inputs, backend, name):
    for function in (HEAD["frozen head"], HEAD["cached"], fused):
        for op, args, kwargs in recorded(function, inputs(name), backend=backend):
            torch.library.opcheck(op, tuple(copies(args, "_bwd" not in str(op))), kwargs)


def test_every_op_is_checked():
    """The names in the tests above are all that there are."""
    prefix = "stepkto::"
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)]
    forward = {"linear_logprobs", "token_logprobs", "segment_sums", "step_kto"}
    expected = forward | {name + "_bwd" for name in forward} | {"fused_step_kto"}
    assert {name.removeprefix(prefix).split(".")[0] for name in names} == expected


# ---- torch.compile ----------------------------------------------------------------------------


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", HEAD)
def test_compiled_head(inputs, backend, dtype, name):
    """One graph, and the bits of the uncompiled function."""
    compiled = torch.compile(HEAD[name], fullgraph=True, backend="aot_eager")
    arguments = inputs(dtype=dtype)
    wanted = run(HEAD[name], arguments, backend=backend)
    assert_same(run(compiled, arguments, backend=backend), wanted)


@pytest.mark.parametrize("name", SEGMENT)
def test_compiled_segments_and_tokens(inputs, auto_is, name):
    compiled = torch.compile(SEGMENT[name], fullgraph=True, backend="aot_eager")
    arguments = inputs()
    assert_same(run(compiled, arguments), run(SEGMENT[name], arguments))


@pytest.mark.parametrize(
    "name",
    ["recompute", "cached, some rows", "frozen head", "statistics", "fused", "step_kto_loss"],
)
def test_compiled_with_dynamic_shapes(inputs, name):
    """Batches of any size; with a graph for each, the recompilation limit (8) would raise."""
    function = {**HEAD, **SEGMENT}[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for times in range(1, 11):
        arguments = inputs("typical", times=times)
        assert_same(run(compiled, arguments), run(function, arguments))


def test_compiled_module(inputs):
    """StepKTOLoss with a running mean: the compiled one moves it as the other does."""
    config = StepKTOConfig(reference_point="ema", ema_decay=0.5)
    module, other = StepKTOLoss(config), StepKTOLoss(config)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for name in ("typical", "long"):
        h, w, b, t, r, s = inputs(name)
        losses = [loss_fn(h, w, t, s, r, None, b)[0] for loss_fn in (module, compiled)]
        assert torch.equal(*losses)
        assert torch.equal(module.running, other.running)
    assert module.running.abs().min() > 0


@pytest.mark.parametrize("layout_of", ["from_padded", "from_packed"])
def test_compiled_layouts(layout_of):
    arguments = {
        "from_padded": (
            torch.tensor([[0, 0, 1], [0, -1, -1]]),
            torch.tensor([[1, 1, 1], [1, 1, 0]]),
            torch.tensor([1, 0]),
            torch.tensor([[1, 0], [0, -1]]),
        ),
        "from_packed": (
            torch.tensor([0, 3, 5]),
            torch.tensor([0, 0, 1, 2, -1, -1]),
            torch.tensor([1, 0]),
            torch.tensor([1, 0, 0]),
        ),
    }[layout_of]
    names = [field.name for field in dataclasses.fields(StepSegments) if field.init]

    def function(*args):
        layout = getattr(StepSegments, layout_of)(*args)
        return tuple(getattr(layout, name) for name in names)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*arguments), function(*arguments))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++, none here")
def test_inductor(inputs):
    """Fused with what surrounds it: a norm before the head, a scaled loss after it."""

    def function(h, w, b, t, r, s):
        h = torch.nn.functional.rms_norm(h, (H,))
        logps, stats = linear_logprobs_with_stats(h, w, t, b, stats=("entropy",))
        return step_kto_loss(logps, r, s, BASELINE)[0] - 0.01 * stats.entropy.mean()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for name in ("typical", "long"):
        arguments = inputs(name)
        ours, wanted = run(compiled, arguments), run(function, arguments)
        for a, b in zip(ours, wanted, strict=True):
            # inductor reorders the sums of the norm and the mean: a few ulps of the largest
            ulps = 8 * torch.finfo(torch.float32).eps * b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=ulps)


# ---- token_logprobs ---------------------------------------------------------------------------


@pytest.fixture(params=["torch", "triton"])
def check_tokens(assert_within_bound, request):
    """token_logprobs and its gradient against the reference, tensor by tensor and element-wise."""

    def check_tokens(logits, target, **options):
        state = available_backends()[request.param]
        if state != "ok":
            pytest.skip(f"{request.param}: {state}")
        if request.param == "triton" and logits.dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter truncates bf16 stores and its bf16 dot is wrong")
        ours = functools.partial(token_logprobs, backend=request.param)
        upstream = torch.randn(target.shape)
        upstream.view(-1)[::3] = 0
        results = []
        for function, x in (
            (ours, logits),
            (reference.token_logprobs, logits),
            (reference.token_logprobs, logits.double()),
        ):
            x = x.detach().requires_grad_()
            logps = function(x, target, **options)
            logps.backward(upstream.to(logps.dtype))
            results.append((logps.detach(), x.grad))
        (ours, dours), (eager, deager), (exact, dexact) = results
        assert ours.dtype == torch.float32 and dours.dtype == logits.dtype
        ignored = target == options.get("ignore_index", -100)
        assert (ours[ignored] == 0).all() and (dours[ignored] == 0).all()
        if not target.numel():
            assert ours.shape == target.shape and dours.shape == logits.shape
            return
        # log p is known to 4 ulps of the largest logit and the log of V, p to as many of itself
        plain = {k: v for k, v in options.items() if k != "ignore_index"}
        z = reference.transform_logits(logits.double(), **plain)
        largest = z.abs().nan_to_num(posinf=0).amax(-1) + math.log(logits.shape[-1])
        chain = abs(plain.get("logit_scale", 1.0)) / plain.get("temperature", 1.0)
        onehot = torch.nn.functional.one_hot(target.where(~ignored, 0), logits.shape[-1])
        fp32 = torch.finfo(torch.float32)
        of_p = z.softmax(-1) * (1 + largest)[..., None] + fp32.smallest_normal / fp32.eps
        of_dlogits = (upstream.abs() * chain)[..., None] * (onehot + of_p)
        magnitude = z.abs().nan_to_num(posinf=0).max().item()
        assert_within_bound(
            ours, eager, exact, magnitude=magnitude, scale=4 * largest, name="logps"
        )
        assert_within_bound(dours, deager, dexact, scale=4 * of_dlogits, name="dlogits")

    return check_tokens


def tokens(N, V, dtype=torch.float32, spread=3.0):
    shape = (N,) if isinstance(N, int) else N
    target = torch.randint(0, V, shape)
    target.view(-1)[1::5] = -100
    return (spread * torch.randn(*shape, V)).to(dtype), target


def test_token_logprobs(check_tokens, dtype, logit_options):
    options = {name: value for name, value in logit_options.items() if name != "bias"}
    check_tokens(*tokens(40, 300, dtype), **options)


@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 50257])
def test_token_logprobs_vocabularies(check_tokens, V):
    check_tokens(*tokens(11, V), softcap=9.0)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 7), (3, 0)], ids=str)
def test_token_logprobs_shapes(check_tokens, dtype, shape):
    check_tokens(*tokens(shape, 70, dtype))


@pytest.mark.parametrize("rows", [1, 3, 40, 41])
def test_token_logprobs_row_chunks(check_tokens, monkeypatch, dtype, rows):
    """Chunks of 1, 3 (the last of 2), all, and more than all of 41 rows."""
    monkeypatch.setattr(MODULE, "ROW_BYTES", rows * 4 * 300)
    check_tokens(*tokens(41, 300, dtype), softcap=9.0, temperature=0.7)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "a view of causal logits"])
def test_token_logprobs_strides(check_tokens, dtype, kind):
    if kind == "a view of causal logits":
        logits, target = tokens((2, 9), 70, dtype)
        check_tokens(logits[:, :-1], target[:, 1:])
        return
    logits, target = tokens(20, 70, dtype)
    strided = logits.T.contiguous().T if kind == "transposed" else logits.repeat(1, 2)[:, :70]
    assert not strided.is_contiguous()
    check_tokens(strided, target)
    assert torch.equal(token_logprobs(strided, target), token_logprobs(logits, target))


@pytest.mark.parametrize(
    "logits_of",
    [
        lambda x, t: x.sign() * 1e4,
        lambda x, t: torch.zeros_like(x),
        lambda x, t: x.scatter(1, t[:, None], 30.0),
        lambda x, t: x.scatter(1, t[:, None], 18.0),
        lambda x, t: x.scatter(1, t[:, None], -torch.inf),
        lambda x, t: x.masked_fill(torch.arange(70) % 3 == 0, -torch.inf).scatter(
            1, t[:, None], 1.0
        ),
    ],
    ids=["1e4", "equal", "certain", "almost certain", "target masked", "others masked"],
)
def test_token_logprobs_extremes(check_tokens, dtype, logits_of):
    logits, target = tokens(40, 70, dtype)
    target = target.clamp(min=0)
    check_tokens(logits_of(logits, target), target)


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_token_logprobs_ignored(check_tokens, ignore_index):
    logits, target = tokens(40, 7)
    check_tokens(logits, target.where(target >= 0, ignore_index), ignore_index=ignore_index)
    check_tokens(logits, torch.full_like(target, ignore_index), ignore_index=ignore_index)
    garbage = logits.clone()
    garbage[target < 0] = torch.nan
    clean, dirty = (token_logprobs(x, target) for x in (logits, garbage))
    assert torch.equal(clean, dirty)


def test_token_logprobs_leave_the_logits_alone(dtype):
    logits, target = tokens(40, 70, dtype)
    before = logits.clone()
    token_logprobs(logits.requires_grad_(), target, softcap=5.0, temperature=2.0).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_token_logprobs_make_no_wide_copy(allocations, monkeypatch):
    """bf16 logits are widened a few rows at a time; the gradient is the one (N, V) tensor."""
    monkeypatch.setattr(MODULE, "ROW_BYTES", 100 * 4 * 1000)
    logits, target = tokens(2000, 1000, torch.bfloat16)
    logits.requires_grad_()
    largest, peak = allocations(lambda: token_logprobs(logits, target).sum().backward())
    assert largest == 2000 * 1000 * 2
    assert peak <= largest + 3 * 100 * 4 * 1000


@pytest.mark.parametrize("surrounding", ["autocast", "default dtype bf16", "default dtype fp64"])
def test_token_logprobs_in_any_surrounding(surrounding):
    logits, target = tokens(40, 70)

    def run():
        x = logits.clone().requires_grad_()
        logps = token_logprobs(x, target, softcap=9.0)
        logps.sum().backward()
        return logps.detach(), x.grad

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
    assert_same(results, expected)


def test_token_logprobs_of_the_reference_backend():
    logits, target = tokens(10, 70, torch.float64)
    logps = token_logprobs(logits, target, backend="reference")
    assert logps.dtype == torch.float64
    assert torch.equal(logps, reference.token_logprobs(logits, target))


GOOD_TOKENS = {"logits": torch.zeros(2, 3, 5), "target": torch.zeros(2, 3, dtype=torch.int64)}
BAD_TOKENS = [
    ("logits", [1.0], "a torch.Tensor, got list"),
    ("logits", torch.zeros(2, 3, 5).double(), "dtype float32 or .*, got torch.float64"),
    ("logits", torch.tensor(1.0), r"shape \(\.\.\., V\), got shape \(\)"),
    ("logits", torch.zeros(2, 3, 0), r"V > 0, got shape \(2, 3, 0\)"),
    ("target", torch.zeros(2, 3).int(), "dtype int64, got torch.int32"),
    ("target", torch.zeros(6).long(), r"shape logits.shape\[:-1\] = \(2, 3\), got \(6,\)"),
    ("target", torch.zeros(2, 3, device="meta").long(), "logits's device cpu, got meta"),
    ("temperature", 0.0, r".*\(0, inf\].*, got 0.0"),
    ("logit_scale", math.nan, ".*, got nan"),
    ("softcap", -1, r".*\(0, inf\].*, got -1"),
    ("ignore_index", 0.5, "an int, got 0.5"),
    ("backend", "cuda", "one of 'auto', .*, got 'cuda'"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_TOKENS, ids=lambda x: str(x)[:30])
def test_token_logprobs_refused_arguments(name, value, message):
    with pytest.raises(ValueError, match=f"^{name}: want {message}"):
        token_logprobs(**{**GOOD_TOKENS, name: value})


@pytest.mark.parametrize("value", [-101, -1, 70, 2**40])
def test_token_logprobs_targets_out_of_range(value):
    logits, target = tokens(10, 70)
    target[7] = value
    with pytest.raises(ValueError, match=rf"^target\[7\]: want .*\[0, 70\).* -100, got {value}$"):
        token_logprobs(logits, target)


def test_compiled_out_of_range_targets_raise(inputs):
    """The check runs inside the op, so it is not lost in a graph."""
    h, w, b, t, *_ = inputs()
    compiled = torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"^target\[0\]: want"):
        compiled(h, w, t + V, b)
    with pytest.raises(ValueError, match="^temperature: want"):
        torch.compile(linear_logprobs, backend="eager")(h, w, t, b, temperature=-1.0)


def test_second_derivatives_raise():
    logits, target = tokens(10, 70)
    logits.requires_grad_()
    logps = token_logprobs(logits, target)
    first = torch.autograd.grad(logps.sum(), logits, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.square().sum().backward()
