"""Random batches and configurations of the loss, of log-probs and of hidden states, against fp64.

What a case is made of stands in fuzz_helpers.py. A case that fails is shrunk and printed, to be
kept here as an @example.
Letters: N tokens, V vocabulary, B sequences, S steps.
"""

import math
import warnings
from dataclasses import dataclass, replace

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")

from fuzz_helpers import (  # noqa: E402
    FP32,
    FP64,
    HeadCase,
    backends_of,
    baseline_of,
    configs,
    fuzzed,
    head_cases,
    needs_baseline,
    sequences,
    served_by,
    slopes_in_parts,
    viewed,
    within_range,
)
from hypothesis import assume, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from stepkto_kernels import (  # noqa: E402
    KLBaseline,
    LossNormalizer,
    StepKTOConfig,
    StepKTOLoss,
    StepKTOMetrics,
    fused_linear_step_kto_loss,
    kl_totals,
    linear_logprobs,
    loss_normalizer,
    reference,
    step_kto_loss,
)
from stepkto_kernels.metrics import TOTALS  # noqa: E402

ORDERS = st.sampled_from(["packed", "interleaved"])


def sizes_of(config, r):
    """What u can be at most in magnitude, from the sum of |log-ratios|."""
    beta = max(config.beta, config.step_beta or 0.0)
    return beta * (2 * r + 1)


# ---- from log-probs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCase:
    backend: str
    batch: list
    order: str
    config: StepKTOConfig
    size: float  # of a log-prob, nats
    dtype: torch.dtype
    view: str
    baseline: str  # as "numbers" or as "tensors"
    normalizer: tuple[float, float] | None
    upstream: float
    seed: int

    def log_probs(self, segments):
        generator = torch.Generator().manual_seed(self.seed)
        draw = lambda: self.size * torch.randn(segments.num_tokens, generator=generator)
        return draw().to(self.dtype), draw().to(self.dtype)

    def reference_points(self):
        given = baseline_of(self.config, max(self.size, 1.0))
        if given is None or self.baseline == "numbers":
            return given
        return KLBaseline(*(torch.tensor(z, dtype=torch.float64) for z in given))


divisors = st.sampled_from([7.0, 0.0, 1.0, 1e9])
loss_cases = st.builds(
    LossCase,
    backend=backends_of("torch", "native"),
    batch=sequences(),
    order=ORDERS,
    config=configs(),
    size=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    view=st.sampled_from(["as is", "strided", "offset"]),
    baseline=st.sampled_from(["numbers", "tensors"]),
    normalizer=st.none() | st.tuples(divisors, divisors),
    upstream=st.sampled_from([1.0, 0.0, -3.0, 1e20]),
    seed=st.integers(0, 2**20),
)


@fuzzed(60, 2.0)
@given(case=loss_cases)
def test_step_kto_loss(case, layout, assert_within_bound):
    segments, config = layout(case.batch, case.order), case.config
    logps, ref_logps = case.log_probs(segments)
    normalizer = None if case.normalizer is None else LossNormalizer(*case.normalizer)
    found = {}
    for name, function, dtype in (
        ("ours", step_kto_loss, case.dtype),
        ("eager", reference.step_kto_loss, case.dtype),
        ("exact", reference.step_kto_loss, torch.float64),
    ):
        leaf = viewed(logps, case.view).to(dtype).detach().requires_grad_()
        ref = viewed(ref_logps, case.view).to(dtype).detach().requires_grad_()
        rest = segments, case.reference_points(), config, normalizer
        with served_by(case.backend):
            value = function(leaf, ref, *rest)
            loss = value[0] if name == "ours" else value
            if loss.requires_grad:
                (case.upstream * loss).backward()
        assert ref.grad is None
        found[name] = loss, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    loss, gradient = found["ours"]
    assert loss.dtype == gradient.dtype == case.dtype and gradient.shape == logps.shape

    # All of it is fp64, so that only results are rounded to the inputs' dtype. A term is
    # lam * sigmoid(-u): relative to itself, it and its slope change by at most as much as u does.
    r = (logps.double() - ref_logps.double()).abs().sum()
    of_u = 8 + sizes_of(config, r + (1 if case.size < 1 else case.size))
    wide = lambda leaf, part: reference.step_kto_loss(
        leaf, ref_logps.double(), segments, case.reference_points(), part, normalizer
    )
    parts = abs(case.upstream) * slopes_in_parts(wide, logps.double(), config)
    # a term below fp64's normal numbers may be flushed to 0: lam, step_weight and beta are <= 3
    terms = segments.num_sequences + segments.num_steps
    flushed = 27 * terms * FP64.tiny / FP64.eps
    scales = (found["exact"][0].abs() * of_u + flushed, parts * of_u + flushed * abs(case.upstream))
    for i, name in enumerate(("loss", "gradient")):
        values = (found[key][i] for key in ("ours", "eager", "exact"))
        assert_within_bound(*values, scale=scales[i], unit=FP64.eps, whole=False, name=name)


# ---- from hidden states -----------------------------------------------------------------------


@dataclass(frozen=True)
class FusedCase:
    head: HeadCase  # its shape is that of the batch
    batch: list
    order: str
    config: StepKTOConfig
    ratio: float  # size of the log-ratios, nats
    normalizer: tuple[float, float] | None
    gradient_bound: float

    @property
    def backend(self):
        return self.head.backend


@st.composite
def fused_cases(draw, matched=True):
    head = draw(head_cases())
    config = draw(configs(matched))
    if head.logits in ("huge", "signs", "spike"):  # log-probs are known to no better than 1e-3
        config = replace(config, beta=config.beta / 30, step_beta=None)
    return FusedCase(
        head=replace(head, budget=draw(st.sampled_from([None, 0, 10**4, 10**5]))),
        batch=draw(sequences(2 if head.backend == "triton" else 5)),
        order=draw(ORDERS),
        config=config,
        ratio=draw(st.sampled_from([1.0, 0.0, 20.0])),
        normalizer=draw(st.none() | st.tuples(divisors, divisors)),
        gradient_bound=draw(st.sampled_from([0, 0.0])),
    )


class Fused:
    """The tensors of a FusedCase."""

    def __init__(self, case, head_problem, layout):
        self.case, self.config = case, case.config
        self.segments = layout(case.batch, case.order)
        head = replace(case.head, shape=(self.segments.num_tokens,))
        self.problem, self.needs = head.problem(head_problem), head.wanted
        exact = self.problem.to(torch.float64)
        self.exact_logps = reference.linear_logprobs(
            exact.hidden, exact.weight, exact.target, exact.bias, **exact.options
        )
        generator = torch.Generator().manual_seed(head.seed)
        ratio = case.ratio * torch.randn(self.segments.num_tokens, generator=generator)
        self.ref_logps = (self.exact_logps - ratio).float()
        self.baseline = baseline_of(case.config)
        self.normalizer = None if case.normalizer is None else LossNormalizer(*case.normalizer)

    def loss(self, function, **extra):
        """As a function that `evaluate` can call; extra: what the reference does not take."""

        def loss(hidden, weight, target, bias, **options):
            ref = self.ref_logps.to(torch.promote_types(hidden.dtype, torch.float32))
            out = function(
                *(hidden, weight, target, self.segments, ref, self.baseline, bias),
                config=self.config, normalizer=self.normalizer, **options, **extra,
            )  # fmt: skip
            return out[0] if isinstance(out, tuple) else out

        return loss


def flushed_gradients(problem, upstream):
    """What is lost where a slope or dlogit is below fp32's normal numbers, before it is scaled.

    Gradients are made in the forward pass, so a huge upstream gradient comes after that.
    """
    least = FP32.tiny * upstream.abs().clamp(min=1).double()
    h, w = problem.hidden.double(), problem.weight.double()
    return {
        "dhidden": least * (1 + w.abs().sum(0)),
        "dweight": least * (1 + h.reshape(-1, w.shape[1]).abs().sum(0)),
        "dbias": least * (1 + problem.target.numel()),
    }


def error_of_u(made, off):
    """Of the segment where it is largest, from the errors of log-probs, whose signs are random.

    Twice, as z may be as far off as r is; at 50 a term is not known at all.
    """
    squares = reference.segment_sums(off.square(), made.segments)
    largest = max((x.max().item() for x in squares if len(x)), default=0.0)
    return min(2 * max(made.config.beta, made.config.step_beta or 0.0) * largest**0.5, 50.0)


@fuzzed(60, 0.8)
@given(case=fused_cases())
def test_fused_loss(case, head_problem, layout, evaluate, rounding_scale, assert_within_bound):
    made = Fused(case, head_problem, layout)
    upstream = torch.tensor(case.head.upstream)
    problem, needs = replace(made.problem, upstream=upstream), made.needs
    eager_loss = made.loss(reference.fused_linear_step_kto_loss)
    exact = evaluate(eager_loss, problem.to(torch.float64), needs)
    assume(within_range(*(x for n, x in exact.items() if n != "logps"), dtype=case.head.dtype))
    eager = evaluate(eager_loss, problem, needs)
    extra = {**case.head.call(), "gradient_bound": case.gradient_bound}
    with case.head.tiles():
        ours = evaluate(made.loss(fused_linear_step_kto_loss, **extra), problem, needs)
    assert ours.keys() == exact.keys()

    wide = lambda leaf, part: reference.step_kto_loss(
        leaf, made.ref_logps.double(), made.segments, made.baseline, part, made.normalizer
    )
    slopes = slopes_in_parts(wide, made.exact_logps, case.config) * upstream.abs()
    scale = rounding_scale(replace(problem, upstream=slopes))
    # a log-prob is off by `off`, and a term and its slope, relatively, by e**du - 1
    off = FP32.eps * scale["logps"]
    if case.config.ratio_clip is not None:
        ratio = made.exact_logps - made.ref_logps.double()
        edges = [(ratio - edge).abs() <= 2 * off for edge in case.config.ratio_clip]
        assume(not torch.stack(edges).any())  # whether such a token is clipped is not known
    du = error_of_u(made, off)
    of_term = 4 + math.expm1(du) / FP32.eps
    # on the CPU its dlogits are fp32 whatever the inputs, except Triton's
    narrow = case.backend in ("triton", "reference")
    unit = torch.finfo(case.head.dtype if narrow else torch.float32).eps
    flushed = flushed_gradients(problem, upstream)
    for name, value in ours.items():
        if name == "logps":  # `evaluate` calls so what the function returns
            floor = {"scale": exact[name].abs() * of_term, "unit": FP32.eps}
            dtype, name_here = torch.float32, "loss"
        else:
            of = scale[name] * (1 + math.expm1(du) / unit) + flushed[name] / unit
            floor = {"scale": of, "unit": unit}
            dtype, name_here = case.head.dtype, name
        assert value.dtype == dtype
        assert_within_bound(value, eager[name], exact[name], whole=False, name=name_here, **floor)


@fuzzed(30, 0.5)
@given(case=fused_cases())
def test_fused_loss_has_the_bits_of_the_composition(case, head_problem, layout):
    """Loss and metrics, by any backend, block and tile."""
    made = Fused(case, head_problem, layout)
    problem = made.problem
    assume(case.backend != "triton")  # whose GEMM is another where a block is not a whole batch
    level = served_by("native" if case.backend == "native" else "torch")  # of step_kto_loss
    with case.head.tiles(), torch.no_grad(), level:
        loss, metrics = fused_linear_step_kto_loss(
            *(problem.hidden, problem.weight, problem.target, made.segments, made.ref_logps),
            *(made.baseline, problem.bias),
            config=made.config, normalizer=made.normalizer, **problem.options, **case.head.call(),
        )  # fmt: skip
        call = {**problem.options, "backend": case.backend}
        parts = problem.hidden, problem.weight, problem.target, problem.bias
        logps = linear_logprobs(*parts, **call)
        rest = made.segments, made.baseline, made.config, made.normalizer
        want, want_metrics = step_kto_loss(logps, made.ref_logps, *rest)
    assert torch.equal(loss, want)
    assert torch.equal(metrics.totals, want_metrics.totals)


@fuzzed(60, 0.8)
@given(case=fused_cases())
def test_fused_gradients_are_those_of_the_composition(
    case, head_problem, layout, evaluate, assert_head_within_bound
):
    """Of the same log-probs, to the bit, and so of the same slopes: what is left is the head's.

    Sharper than against fp64 of the whole, where a log-prob's rounding moves the slopes.
    """
    made = Fused(case, head_problem, layout)
    problem, needs = made.problem, made.needs
    assume(case.backend in ("torch", "native"))  # as above
    parts = problem.hidden, problem.weight, problem.target, problem.bias
    with case.head.tiles(), served_by("native" if case.backend == "native" else "torch"):
        with torch.no_grad():
            logps = linear_logprobs(*parts, **problem.options, backend=case.backend)
        leaf = logps.clone().requires_grad_()
        rest = made.segments, made.baseline, made.config, made.normalizer
        (slopes,) = torch.autograd.grad(step_kto_loss(leaf, made.ref_logps, *rest)[0], leaf)
        assume(within_range(slopes, dtype=case.head.dtype))
        extra = {**case.head.call(), "gradient_bound": case.gradient_bound}
        one = replace(problem, upstream=torch.tensor(1.0))
        found = evaluate(made.loss(fused_linear_step_kto_loss, **extra), one, needs)
    # "matched" has no fused pass: what linear_logprobs keeps for its gradient has the inputs' dtype
    kept = case.head.dtype if case.config.reference_point == "matched" else torch.float32
    unit = torch.finfo(kept).eps
    composed = replace(problem, upstream=slopes)
    assert_head_within_bound(found | {"logps": logps}, composed, needs, unit=unit, whole=False)


@fuzzed(20, 0.3)
@given(case=fused_cases(), training=st.booleans(), batches=st.integers(1, 4))
def test_module(case, training, batches, head_problem, layout):
    """StepKTOLoss is the function with its options bound, and a mean of reference points."""
    made = Fused(case, head_problem, layout)
    problem, config = made.problem, made.config
    options = {**problem.options, **case.head.call()}
    module = StepKTOLoss(config, **options).train(training)
    arguments = problem.hidden, problem.weight, problem.target, made.segments, made.ref_logps
    running, known = [0.0, 0.0], [False, False]
    ema = config.reference_point == "ema" and config.loss_type == "kto"
    mismatched = config.reference_point == "mismatched" and needs_baseline(config)
    for number in range(batches):
        given_now = KLBaseline(0.3 * number, 0.1) if mismatched and number % 2 == 0 else None
        if mismatched and given_now is None or ema:
            used = KLBaseline(*(max(z, 0.0) for z in running))
        else:
            used = given_now
        rest = {"normalizer": made.normalizer, "bias": problem.bias}
        with case.head.tiles(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one about a batch without a baseline
            loss, metrics = module(*arguments, given_now, **rest)
            want, want_metrics = fused_linear_step_kto_loss(
                *arguments, used, config=config, **rest, **options
            )
        assert torch.equal(loss, want) and torch.equal(metrics.totals, want_metrics.totals)
        if not training:
            continue
        if ema:
            seen = [
                mean_of(want_metrics, "outcome", config.beta),
                mean_of(want_metrics, "step", config.step_beta or config.beta),
            ]
        else:
            seen = list(given_now or (None, None))
        for level, value in enumerate(seen):
            if value is not None:
                decay = config.ema_decay if known[level] else 0.0
                running[level] = decay * running[level] + (1 - decay) * value
                known[level] = True
    torch.testing.assert_close(
        module.running, torch.tensor(running, dtype=torch.float64), rtol=1e-14, atol=0
    )


def mean_of(metrics, level, beta):
    """Mean log-ratio of the labelled segments, None where there are none."""
    values, prefix = metrics.compute(), "step/" if level == "step" else ""
    sides = [values.get(f"{prefix}rewards/{side}") for side in ("chosen", "rejected")]
    if sides == [None, None]:
        return None
    total = dict(zip(TOTALS, metrics.totals.tolist(), strict=True))
    rewards = total[f"{level}_chosen_reward"] + total[f"{level}_rejected_reward"]
    return rewards / beta / (total[f"{level}_chosen"] + total[f"{level}_rejected"])


# ---- micro-batches ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitCase:
    """A batch whose sequences are dealt out: sequence b goes to micro-batch parts[b]."""

    fused: FusedCase
    parts: list[int]

    @property
    def backend(self):
        return self.fused.backend

    def micro_batches(self, layout):
        """Token positions within the whole batch, and the segments, of each micro-batch."""
        start, tokens = 0, []
        for _, steps, loose in self.fused.batch:  # one unscored token before each, see `layout`
            stop = start + 1 + sum(n for _, n in steps) + loose
            tokens.append(list(range(start, stop)))
            start = stop
        for part in sorted(set(self.parts)):
            mine = [b for b, p in enumerate(self.parts) if p == part]
            positions = torch.tensor([t for b in mine for t in tokens[b]], dtype=torch.int64)
            yield positions, layout([self.fused.batch[b] for b in mine])


@st.composite
def split_cases(draw, smooth=False):
    """smooth: with a gradient that no rounding of a log-prob makes jump, in hidden at least."""
    fused = draw(fused_cases(matched=not smooth))
    batch = fused.batch or draw(sequences().filter(bool))
    config, needs = fused.config, fused.head.needs
    if smooth:
        config, needs = replace(config, ratio_clip=None), tuple({"hidden", *needs})
    parts = draw(st.lists(st.integers(0, 2), min_size=len(batch), max_size=len(batch)))
    return SplitCase(
        replace(
            fused,
            head=replace(fused.head, needs=needs),
            batch=batch,
            order="packed",
            config=config,
            normalizer=None,
        ),
        parts,
    )


def global_baseline(made, logps, micro_batches):
    """The batch's own reference points, from sums over its micro-batches."""
    if made.config.reference_point != "matched":
        return made.baseline
    totals = [
        kl_totals(
            logps[rows], made.ref_logps[rows], segments, config=made.config, labelled_only=True
        )
        for rows, segments in micro_batches
    ]
    return sum(totals[1:], totals[0]).baseline()


def add_up(normalizers):
    return LossNormalizer(
        *(sum(level, torch.zeros(())) for level in zip(*normalizers, strict=True))
    )


@fuzzed(40, 0.7)
@given(case=split_cases())
def test_micro_batches_add_up(case, head_problem, layout):
    """Loss, gradient of each token and metrics of step_kto_loss with the normalizer of all."""
    made = Fused(case.fused, head_problem, layout)
    config, segments = made.config, made.segments
    logps, ref_logps = made.exact_logps.float(), made.ref_logps
    micro_batches = list(case.micro_batches(layout))
    normalizer = add_up([loss_normalizer(part, config) for _, part in micro_batches])
    assert normalizer == loss_normalizer(segments, config)
    baseline = global_baseline(made, logps, micro_batches)

    leaf = logps.detach().requires_grad_()
    with served_by("native" if case.backend == "native" else "torch"):
        whole, whole_metrics = step_kto_loss(leaf, ref_logps, segments, made.baseline, config)
        whole.backward()
        gradient, losses, metrics = torch.zeros_like(logps), [], []
        for rows, part in micro_batches:
            piece = logps[rows].requires_grad_()
            loss, own = step_kto_loss(piece, ref_logps[rows], part, baseline, config, normalizer)
            loss.backward()
            gradient[rows] = piece.grad
            losses.append(loss.detach().double())
            metrics.append(own)
    # the same fp64 numbers but for the order of sums, each rounded once to fp32
    r = (logps.double() - ref_logps.double()).abs().sum().item()
    of_u = FP64.eps * (8 + sizes_of(config, r + 1))
    whole_loss = lambda x, part: reference.step_kto_loss(
        x, ref_logps.double(), segments, baseline_or_none(config, baseline), part
    )
    slopes = slopes_in_parts(whole_loss, logps.double(), config)
    allowed = FP32.eps * leaf.grad.abs() + of_u * slopes + FP32.smallest_normal * FP32.eps
    assert ((gradient - leaf.grad).abs() <= allowed).all()
    total = sum(losses)
    size = whole.detach().double().abs() + total.abs()
    assert (total - whole.detach()).abs() <= (FP32.eps + of_u) * size + FP32.smallest_normal

    merged = sum(metrics[1:], metrics[0])
    assert isinstance(merged, StepKTOMetrics)
    got, want = merged.compute(), whole_metrics.compute()
    assert got.keys() == want.keys()
    # a mean may cancel: it is as good as the log-probs and rewards that it is made of
    floor = of_u * (1 + r + logps.double().abs().sum().item())
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=8 * of_u, abs=8 * floor), name


def baseline_or_none(config, baseline):
    return baseline if needs_baseline(config) else None


@fuzzed(25, 0.3)
@given(case=split_cases(smooth=True))
def test_gradients_of_micro_batches_add_up(
    case, head_problem, layout, evaluate, rounding_scale, assert_within_bound
):
    """Of the fused loss, those of the weight too, against fp64 of the whole batch."""
    made = Fused(case.fused, head_problem, layout)
    config, head = made.config, case.fused.head
    micro_batches = list(case.micro_batches(layout))
    problem, needs = replace(made.problem, upstream=torch.tensor(1.0)), made.needs
    reference_loss = made.loss(reference.fused_linear_step_kto_loss)
    exact = evaluate(reference_loss, problem.to(torch.float64), needs)
    eager = evaluate(reference_loss, problem, needs)
    gradients = {name: value for name, value in exact.items() if name != "logps"}
    assume(within_range(*gradients.values(), dtype=head.dtype))
    normalizer = add_up([loss_normalizer(part, config) for _, part in micro_batches])
    found = {name: torch.zeros(value.shape) for name, value in gradients.items()}
    for rows, part in micro_batches:
        own = Fused(case.fused, head_problem, layout)
        own.segments, own.ref_logps, own.normalizer = part, made.ref_logps[rows], normalizer
        piece = replace(problem, hidden=problem.hidden[rows], target=problem.target[rows])
        with head.tiles():
            results = evaluate(own.loss(fused_linear_step_kto_loss, **head.call()), piece, needs)
        for name, value in found.items():
            value[rows if name == "dhidden" else slice(None)] += results[name].float()

    wide = lambda leaf, part: reference.step_kto_loss(
        leaf, made.ref_logps.double(), made.segments, made.baseline, part
    )
    slopes = slopes_in_parts(wide, made.exact_logps, config)
    scale = rounding_scale(replace(problem, upstream=slopes))
    du = error_of_u(made, FP32.eps * scale["logps"])
    flushed = flushed_gradients(problem, problem.upstream)
    unit = torch.finfo(head.dtype).eps  # each micro-batch's gradient is rounded to it
    for name, value in found.items():
        of = scale[name] * (2 + math.expm1(du) / unit) + flushed[name] / unit
        narrow = value.to(head.dtype)
        assert_within_bound(
            narrow, eager[name], exact[name], scale=of, unit=unit, whole=False, name=name
        )


def test_labelled_sequences_without_tokens_count_in_matched_reference_points(layout):
    """Of micro-batches as of the whole batch; `kl_totals` used to leave them out. Shrunk."""
    segments = layout([(0, [], 0), (0, [], 1)])
    config = StepKTOConfig(reference_point="matched")
    logps, ref_logps = torch.tensor([0.0, 0.0, 1.0]), torch.zeros(3)
    totals = kl_totals(logps, ref_logps, segments, labelled_only=True)
    _, metrics = step_kto_loss(logps, ref_logps, segments, None, config)
    assert totals.totals.tolist() == [1.0, 2.0, 0.0, 0.0]
    assert totals.baseline().outcome == metrics.compute()["kl"] == 0.5
