"""The loss of per-token log-probs: segments, reference points, normalizers, both levels, metrics.

Letters: N tokens, B sequences, S steps.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp

import stepkto_kernels as sk
from stepkto_kernels import (
    KLBaseline,
    LossNormalizer,
    StepKTOConfig,
    StepKTOMetrics,
    StepSegments,
    kl_baseline,
    loss_normalizer,
    reference,
    segment_sums,
    step_kto_loss,
)
from stepkto_kernels.metrics import TOTALS

APO_ZERO = {"loss_type": "apo_zero"}


def int8(values):
    return torch.tensor(values, dtype=torch.int8)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def log_probs(segments, dtype=torch.float64, seed=0):
    """Policy and reference log-probs whose difference is a nat or so a token."""
    generator = torch.Generator().manual_seed(seed)
    ref_logps = -3 * torch.rand(segments.num_tokens, generator=generator)
    logps = ref_logps + torch.randn(segments.num_tokens, generator=generator)
    return logps.to(dtype), ref_logps.to(dtype)


def sigmoid(x):
    """Without cancellation at either end."""
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def written_out(logps, ref_logps, segments, baseline, config):
    """Loss and metrics of a batch in loops over plain floats: the formulas of the design."""
    tokens = range(segments.num_tokens)
    low, high = config.ratio_clip or (-math.inf, math.inf)
    logp = logps.tolist()
    ratio = [min(max(x - y, low), high) for x, y in zip(logp, ref_logps.tolist(), strict=True)]

    def level(index, labels):
        out = []
        for i, label in enumerate(labels):
            mine = [t for t in tokens if index[t] == i]
            r = sum(ratio[t] for t in mine) / (max(len(mine), 1) if config.length_normalize else 1)
            out.append((label, r, sum(logp[t] for t in mine)))
        return out

    sequence_of = segments.step_sequence.tolist()
    outcome = level(segments.sequence_index.tolist(), segments.outcome_label.tolist())
    step = level(segments.step_index.tolist(), segments.step_label.tolist())

    def matched(rows):
        labelled = [r for label, r, _ in rows if label >= 0]
        return max(0.0, sum(labelled) / len(labelled)) if labelled else 0.0

    if config.loss_type == "apo_zero" or config.reference_point == "zero":
        z_o = z_s = 0.0
    elif config.reference_point == "matched" and baseline is None:
        z_o, z_s = matched(outcome), matched(step)
    elif isinstance(config.reference_point, float):
        z_o = z_s = config.reference_point
    else:
        z_o, z_s = baseline

    step_beta = config.step_beta or config.beta

    def terms(rows, z, beta, right, wrong):
        signed = [(right, 1) if label == 1 else (wrong, -1) for label, _, _ in rows]
        return [
            lam * sigmoid(-sign * beta * (r - z)) if label >= 0 else None
            for (label, r, _), (lam, sign) in zip(rows, signed, strict=True)
        ]

    c = config
    l_o = terms(outcome, z_o, c.beta, c.desirable_weight, c.undesirable_weight)
    l_s = terms(step, z_s, step_beta, c.step_desirable_weight, c.step_undesirable_weight)
    l_o = [x for x in l_o if x is not None]
    by_sequence = {}
    for b, loss in zip(sequence_of, l_s, strict=True):
        if loss is not None:
            by_sequence.setdefault(b, []).append(loss)
    if config.step_reduction == "mean":
        step_terms = [x for losses in by_sequence.values() for x in losses]
    elif config.step_reduction == "sum":
        step_terms = [sum(losses) for losses in by_sequence.values()]
    else:
        step_terms = [sum(losses) / len(losses) for losses in by_sequence.values()]

    in_labelled = [
        t
        for t in tokens
        if (b := segments.sequence_index[t]) >= 0
        and segments.outcome_label[b] >= 0
        or (h := segments.step_index[t]) >= 0
        and segments.step_label[h] >= 0
    ]
    out = {"loss": 0.0, "tokens": len(in_labelled), "kl": z_o, "step/kl": z_s}
    if l_o:
        out["outcome_loss"] = sum(l_o) / len(l_o)
        out["loss"] += out["outcome_loss"]
    if step_terms:
        out["step/loss"] = sum(step_terms) / len(step_terms)
        out["loss"] += config.step_weight * out["step/loss"]
    for prefix, rows, z, beta in (("", outcome, z_o, c.beta), ("step/", step, z_s, step_beta)):
        for name, wanted in (("chosen", 1), ("rejected", 0)):
            mine = [(r, logp) for label, r, logp in rows if label == wanted]
            if mine:
                out[f"{prefix}rewards/{name}"] = sum(beta * r for r, _ in mine) / len(mine)
                out[f"{prefix}logps/{name}"] = sum(logp for _, logp in mine) / len(mine)
        if f"{prefix}rewards/chosen" in out and f"{prefix}rewards/rejected" in out:
            chosen, rejected = out[f"{prefix}rewards/chosen"], out[f"{prefix}rewards/rejected"]
            out[f"{prefix}rewards/margins"] = chosen - rejected
        labelled = [r for label, r, _ in rows if label >= 0]
        if labelled:
            flat = [r for r in labelled if abs(beta * (r - z)) > 7]
            out[f"{prefix}saturated"] = len(flat) / len(labelled)
    return out


def value_and_gradient(function, logps, *args, upstream=1.0):
    """Loss and d (upstream * loss) / d logps."""
    logps = logps.clone().requires_grad_()
    loss = function(logps, *args)
    loss = loss[0] if isinstance(loss, tuple) else loss
    (upstream * loss).backward()
    return loss.detach(), logps.grad


# ---- loss, gradient and metrics ---------------------------------------------------------------


def test_loss_and_metrics_are_the_formulas(segments, config, baseline):
    logps, ref_logps = log_probs(segments)
    wanted = written_out(logps, ref_logps, segments, baseline, config)
    loss, metrics = step_kto_loss(logps, ref_logps, segments, baseline, config)
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-13)
    assert metrics.compute() == pytest.approx(wanted, rel=1e-12, abs=1e-13)
    of_reference = reference.step_kto_loss(logps, ref_logps, segments, baseline, config)
    assert of_reference.item() == pytest.approx(wanted["loss"], rel=1e-13)


def test_gradient_of_fp64_is_the_references(segments, config, baseline):
    logps, ref_logps = log_probs(segments)
    args = (ref_logps, segments, baseline, config)
    _, ours = value_and_gradient(step_kto_loss, logps, *args, upstream=-1.7)
    _, exact = value_and_gradient(reference.step_kto_loss, logps, *args, upstream=-1.7)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-15)


def test_loss_and_gradient_of_fp32(assert_within_bound, auto_is, segments, config, baseline):
    logps, ref_logps = log_probs(segments, torch.float32)
    args = (ref_logps, segments, baseline, config)
    results = [
        value_and_gradient(function, x, y, *args[1:], upstream=1.3)
        for function, x, y in (
            (step_kto_loss, logps, ref_logps),
            (reference.step_kto_loss, logps, ref_logps),
            (reference.step_kto_loss, logps.double(), ref_logps.double()),
        )
    ]
    # what rounds is each level's part, and the parts of a right outcome and a wrong step cancel
    only_outcomes = replace(config, step_weight=0.0)
    only_steps = replace(config, desirable_weight=0.0, undesirable_weight=0.0)
    parts = [
        value_and_gradient(
            reference.step_kto_loss,
            logps.double(),
            ref_logps.double(),
            segments,
            baseline,
            of_level,
            upstream=1.3,
        )
        for of_level in (only_outcomes, only_steps)
    ]
    sizes = [sum(part.abs() for part in level) for level in zip(*parts, strict=True)]
    torch.testing.assert_close(
        sum(part[1] for part in parts), results[2][1], rtol=1e-12, atol=1e-15
    )
    # u is known to an ulp of beta * sum |ratio|, and a slope to as many of its own
    ulps = 4 + 2 * (logps - ref_logps).abs().sum().double()
    for name, size, *of_all in zip(("loss", "dlogps"), sizes, *results, strict=True):
        assert of_all[0].dtype == torch.float32
        largest = max(size.flatten().tolist(), default=0.0)
        assert_within_bound(*of_all, magnitude=largest, scale=size * ulps, name=name)


@pytest.mark.parametrize("shape", [(6, 6), (2, 3, 6), (1, 36)], ids=str)
def test_log_probs_of_any_shape_and_stride(typical, shape):
    logps, ref_logps = log_probs(typical, torch.float32)
    assert typical.num_tokens == 41
    logps, ref_logps = (torch.cat([x, x.new_zeros(72 - 41)]) for x in (logps, ref_logps))
    padding = torch.full((72 - 41,), -1, dtype=torch.int32)
    segments = replace(
        typical,
        sequence_index=torch.cat([typical.sequence_index, padding]),
        step_index=torch.cat([typical.step_index, padding]),
    )
    loss, gradient = value_and_gradient(
        step_kto_loss, logps, ref_logps, segments, KLBaseline(0.2, 0.1)
    )
    double = (2, *shape)
    assert torch.Size(double).numel() == 72
    transposed = logps.view(double).transpose(0, -1).contiguous().transpose(0, -1)
    assert not transposed.is_contiguous()
    again, shaped = value_and_gradient(
        step_kto_loss, transposed, ref_logps.view(double), segments, KLBaseline(0.2, 0.1)
    )
    assert torch.equal(again, loss) and torch.equal(shaped, gradient.view(double))


def test_gradcheck_of_the_reference(typical, config, baseline):
    logps, ref_logps = log_probs(typical)
    if config.reference_point == "matched":  # no gradient goes through it, gradcheck would see one
        config, baseline = replace(config, reference_point="mismatched"), KLBaseline(0.2, 0.1)
    function = lambda x: reference.step_kto_loss(x, ref_logps, typical, baseline, config)
    assert torch.autograd.gradcheck(function, logps.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: reference.segment_sums(x, typical), logps)


def test_reference_log_probs_and_baseline_get_no_gradient(typical):
    logps, ref_logps = (x.requires_grad_() for x in log_probs(typical))
    baseline = KLBaseline(*torch.tensor([0.2, 0.1], requires_grad=True))
    step_kto_loss(logps, ref_logps, typical, baseline)[0].backward()
    assert logps.grad is not None and ref_logps.grad is None
    assert not any(z.requires_grad for z in kl_baseline(logps, ref_logps, typical))
    matched = StepKTOConfig(reference_point="matched")
    constant = KLBaseline(*(z.item() for z in matched_points(logps, ref_logps, typical)))
    _, through = value_and_gradient(
        step_kto_loss, logps.detach(), ref_logps, typical, None, matched
    )
    _, fixed = value_and_gradient(
        step_kto_loss, logps.detach(), ref_logps, typical, constant, matched
    )
    torch.testing.assert_close(through, fixed, rtol=1e-13, atol=0)


def matched_points(logps, ref_logps, segments):
    outcome, step = segment_sums((logps - ref_logps).detach(), segments)
    labelled = outcome[segments.outcome_label >= 0], step[segments.step_label >= 0]
    return [r.mean().clamp(min=0) for r in labelled]


# ---- plain KTO and APO-zero -------------------------------------------------------------------


def sums_by_label(ratio, segments):
    """Log-ratios of the right and of the wrong sequences, by plain torch."""
    rows = [
        ratio[segments.sequence_index == b].sum() * (segments.sequence_index == b).any()
        for b in range(segments.num_sequences)
    ]
    rows = torch.stack(rows)
    return rows[segments.outcome_label == 1], rows[segments.outcome_label == 0]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.8)])
def test_without_steps_it_is_trls_kto(typical, weights):
    """Mean of the weighted 1 - sigmoid(beta * (r - kl)) and 1 - sigmoid(beta * (kl - r))."""
    beta = 0.2
    policy, ref_logps = log_probs(typical)
    mismatched, mismatched_ref = log_probs(typical, seed=1)
    mismatched += 0.5
    policy.requires_grad_()
    right, wrong = sums_by_label(policy - ref_logps, typical)
    kl = (mismatched - mismatched_ref)[typical.sequence_index >= 0].sum() / 5
    assert kl > 0  # not clamped at 0
    losses = [
        weights[0] * (1 - torch.sigmoid(beta * (right - kl))),
        weights[1] * (1 - torch.sigmoid(beta * (kl - wrong))),
    ]
    wanted = torch.cat(losses).mean()
    wanted_gradient = torch.autograd.grad(wanted, policy)[0]

    config = StepKTOConfig(
        beta=beta, step_weight=0.0, desirable_weight=weights[0], undesirable_weight=weights[1]
    )
    baseline = kl_baseline(mismatched, mismatched_ref, typical)
    loss, metrics = step_kto_loss(policy, ref_logps, typical, baseline, config)
    gradient = torch.autograd.grad(loss, policy)[0]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-13)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-16)

    logp_right, logp_wrong = sums_by_label(policy.detach(), typical)
    values = metrics.compute()
    assert {k: v for k, v in values.items() if not k.startswith("step/")} == pytest.approx(
        {
            "loss": wanted.item(),
            "outcome_loss": wanted.item(),
            "kl": kl.item(),
            "rewards/chosen": beta * right.mean().item(),
            "rewards/rejected": beta * wrong.mean().item(),
            "rewards/margins": beta * (right.mean() - wrong.mean()).item(),
            "logps/chosen": logp_right.mean().item(),
            "logps/rejected": logp_wrong.mean().item(),
            "saturated": 0.0,
            "tokens": 35.0,
        },
        rel=1e-13,
    )


def test_without_steps_it_is_trls_apo_zero(typical):
    """1 - sigmoid(beta * r) of the right, sigmoid(beta * r) of the wrong."""
    policy, ref_logps = log_probs(typical)
    policy.requires_grad_()
    right, wrong = sums_by_label(policy - ref_logps, typical)
    wanted = torch.cat([1 - torch.sigmoid(0.5 * right), torch.sigmoid(0.5 * wrong)]).mean()
    config = StepKTOConfig(beta=0.5, step_weight=0.0, loss_type="apo_zero")
    loss, metrics = step_kto_loss(policy, ref_logps, typical, None, config)
    gradients = [torch.autograd.grad(x, policy)[0] for x in (loss, wanted)]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-13)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)
    assert metrics.compute()["kl"] == 0


@pytest.mark.parametrize("u", [0.0, 5.0, 17.0, 40.0, 80.0, -17.0, -40.0, -80.0])
@pytest.mark.parametrize("label", [1, 0])
def test_sigmoid_never_cancels(auto_is, u, label):
    """In fp32 1 - sigmoid(17) is 0; the loss and its slope keep all their digits."""
    beta, sign = 0.1, 1 if label else -1
    segments = StepSegments(int32([0]), int32([0]), int8([label]), int8([label]), int32([0]))
    logps = torch.tensor([u / beta * sign])
    config = StepKTOConfig(beta=beta, reference_point="zero")
    loss, gradient = value_and_gradient(
        step_kto_loss, logps, torch.zeros(1), segments, None, config
    )
    u = sign * beta * logps.double().item()  # as rounded
    assert loss.item() == pytest.approx(2 * sigmoid(-u), rel=torch.finfo(torch.float32).eps, abs=0)
    slope = -2 * sign * beta * sigmoid(u) * sigmoid(-u)
    assert gradient.item() == pytest.approx(slope, rel=torch.finfo(torch.float32).eps, abs=0)
    for dtype, digits in ((torch.float32, 1e-5), (torch.float64, 1e-12)):  # the specification too
        zero = torch.zeros(1, dtype=dtype)
        args = (logps.to(dtype), zero, segments, None, config)
        _, gradient = value_and_gradient(reference.step_kto_loss, *args)
        assert gradient.item() == pytest.approx(slope, rel=digits, abs=0)


# ---- micro-batches, ranks, and the normalizer -------------------------------------------------


def tokens_of(segments, first, last):
    """The sequences [first, last) as a batch of their own, and the positions of their tokens."""
    inside = (segments.sequence_index >= first) & (segments.sequence_index < last)
    at = inside.nonzero()[:, 0]
    steps = (segments.step_sequence >= first) & (segments.step_sequence < last)
    number = torch.cumsum(steps, 0) - 1
    step = segments.step_index[at]
    return at, StepSegments(
        sequence_index=segments.sequence_index[at] - first,
        step_index=torch.where(step >= 0, number[step.clamp(min=0).long()], -1).int(),
        outcome_label=segments.outcome_label[first:last],
        step_label=segments.step_label[steps],
        step_sequence=segments.step_sequence[steps] - first,
    ).validate()


@pytest.mark.parametrize("cuts", [(0, 2, 5), (0, 1, 2, 3, 4, 5), (0, 0, 4, 4, 5)], ids=str)
def test_micro_batches_add_up_to_the_batch(typical, config, cuts):
    """With the normalizer of the whole batch, gradients, losses and metrics are sums."""
    logps, ref_logps = log_probs(typical)
    baseline = KLBaseline(0.21, 0.13) if config.fixed_reference_point is None else None
    loss, gradient = value_and_gradient(step_kto_loss, logps, ref_logps, typical, baseline, config)
    whole = step_kto_loss(logps, ref_logps, typical, baseline, config)[1]

    parts = [tokens_of(typical, *pair) for pair in zip(cuts, cuts[1:], strict=False)]
    counts = [loss_normalizer(part, config) for _, part in parts]
    normalizer = LossNormalizer(sum(n.outcome for n in counts), sum(n.step for n in counts))
    assert normalizer == loss_normalizer(typical, config)
    total, summed, merged = 0.0, torch.zeros_like(gradient), None
    for at, part in parts:
        args = (logps[at], ref_logps[at], part, baseline, config, normalizer)
        part_loss, summed[at] = value_and_gradient(step_kto_loss, *args)
        total += part_loss
        metrics = step_kto_loss(*args)[1]
        merged = metrics if merged is None else merged + metrics
    assert total.item() == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(summed, gradient, rtol=1e-12, atol=1e-16)
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_loss_normalizer_counts_labels(segments, sequences, config):
    labelled_steps = [[x for x, _ in steps if x >= 0] for _, steps, _ in sequences]
    by_step = config.step_reduction == "mean"
    steps = sum(len(x) if by_step else bool(x) for x in labelled_steps)
    n = loss_normalizer(segments, config)
    assert n == (sum(label >= 0 for label, _, _ in sequences), steps)
    assert n.outcome.dtype == torch.float64 and n.outcome.shape == n.step.shape == ()


def test_a_term_divided_by_nothing_is_zero(typical):
    logps, ref_logps = log_probs(typical)
    for normalizer in (LossNormalizer(0.0, 0.0), LossNormalizer(*torch.zeros(2))):
        loss, _ = step_kto_loss(
            logps, ref_logps, typical, KLBaseline(0.2, 0.1), normalizer=normalizer
        )
        ones, _ = step_kto_loss(
            logps, ref_logps, typical, KLBaseline(0.2, 0.1), normalizer=LossNormalizer(1, 1)
        )
        assert loss == ones  # the labels are there, the count is the caller's: no division


def test_metrics_without_a_class(layout):
    """A mean over nothing is left out, not NaN."""

    def names(sequences):
        segments = layout(sequences)
        config = StepKTOConfig(reference_point="zero")
        return set(step_kto_loss(*log_probs(segments), segments, None, config)[1].compute())

    always = {"tokens", "loss", "kl", "step/kl"}
    assert names(()) == names(((-1, ((-1, 2),), 1),)) == always
    right = {"outcome_loss", "rewards/chosen", "logps/chosen", "saturated"}
    assert names(((1, (), 3),)) == always | right
    wrong = {"outcome_loss", "rewards/rejected", "logps/rejected", "saturated"}
    assert names(((0, ((-1, 2),), 3),)) == always | wrong
    assert names(((1, (), 3), (0, (), 1))) == always | right | wrong | {"rewards/margins"}
    step = {"step/loss", "step/rewards/chosen", "step/logps/chosen", "step/saturated"}
    assert names(((-1, ((1, 2),), 1),)) == always | step
    nothing = StepKTOMetrics(torch.zeros(len(TOTALS), dtype=torch.float64))
    assert nothing.compute() == {"tokens": 0.0, "loss": 0.0}


# ---- segment sums and reference points --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_segment_sums(assert_within_bound, segments, dtype):
    ratio = torch.randn(segments.num_tokens, dtype=dtype)
    upstream = torch.randn(segments.num_sequences), torch.randn(segments.num_steps)
    results = []
    for function, x in (
        (segment_sums, ratio),
        (reference.segment_sums, ratio),
        (reference.segment_sums, ratio.double()),
    ):
        x = x.clone().requires_grad_()
        sums = function(x, segments)
        torch.autograd.backward(sums, [u.to(x.dtype) for u in upstream])
        results.append((*(s.detach() for s in sums), x.grad))
    for name, ours, eager, exact in zip(("outcome", "step", "dratio"), *results, strict=True):
        assert ours.dtype == dtype
        if dtype == torch.float32:
            assert_within_bound(ours, eager, exact, scale=exact.abs(), name=name)
        else:
            torch.testing.assert_close(ours, exact, rtol=1e-14, atol=1e-14)


def test_segment_sums_are_rounded_once(typical):
    """Accumulated in fp64: a sum of many terms has the error of one rounding to fp32."""
    segments = StepSegments(
        torch.zeros(10**5).int(), torch.full((10**5,), -1).int(), int8([1]), int8([]), int32([])
    )
    ratio = torch.randn(10**5) + 10
    outcome, _ = segment_sums(ratio, segments)
    assert outcome[0] == ratio.double().sum().float()


def test_kl_baseline(segments, config):
    """max(0, mean log-ratio) over the segments that have tokens, whatever their labels."""
    for seed in range(4):
        logps, ref_logps = log_probs(segments, seed=seed)
        got = kl_baseline(logps, ref_logps, segments, config=config)
        low, high = config.ratio_clip or (-math.inf, math.inf)
        ratio = [min(max(x, low), high) for x in (logps - ref_logps).tolist()]
        for name, index, count in (
            ("outcome", segments.sequence_index.tolist(), segments.num_sequences),
            ("step", segments.step_index.tolist(), segments.num_steps),
        ):
            rows = [[r for r, i in zip(ratio, index, strict=True) if i == n] for n in range(count)]
            sums = [sum(x) / (len(x) if config.length_normalize else 1) for x in rows if x]
            mean = max(0.0, sum(sums) / len(sums)) if sums else 0.0
            value = getattr(got, name)
            assert value.dtype == torch.float64 and value.shape == ()
            assert value.item() == pytest.approx(mean, rel=1e-13, abs=1e-15), name
        of_reference = reference.kl_baseline(logps, ref_logps, segments, config=config)
        torch.testing.assert_close(tuple(of_reference), tuple(got), rtol=1e-13, atol=1e-15)


def rank_batch(rank, kind):
    """What a rank holds: sequences of different sizes, or on rank 1 nothing of `kind`."""
    table = {
        "uneven": (((1, ((1, 3), (0, 2)), 2), (0, ((1, 4),), 0)), ((1, ((-1, 2),), 5),)),
        "rank 1 has no tokens": (((1, ((1, 3),), 2),), ()),
        "rank 1 has no labels": (((1, ((1, 3),), 2),), ((-1, ((-1, 3),), 2),)),
        "rank 1 has no steps": (((0, ((1, 3), (0, 1)), 2),), ((1, (), 3),)),
        "no rank has any": ((), ()),
    }
    return table[kind][rank]


RANK_KINDS = (
    "uneven",
    "rank 1 has no tokens",
    "rank 1 has no labels",
    "rank 1 has no steps",
    "no rank has any",
)


def run_rank(rank, batches, store, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    group = torch.distributed.group.WORLD
    out = {}
    for kind, (segments, logps, ref_logps) in batches[rank].items():
        z = kl_baseline(logps, ref_logps, segments, group)
        n = loss_normalizer(segments, StepKTOConfig(step_reduction="mean"), group)
        out[kind] = [*z, *n]
    torch.save(out, results[rank])
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_process(layout, tmp_path, monkeypatch):
    """Global sum over global count, also where one rank has nothing: not a mean of rank means."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    batches = ({}, {})
    wanted = {}
    for kind in RANK_KINDS:
        both = rank_batch(0, kind) + rank_batch(1, kind)
        whole = layout(both)
        logps, ref_logps = log_probs(whole)
        logps = logps + 1.0  # so that the means are above 0
        first = sum(s[2] + sum(n for _, n in s[1]) + 1 for s in rank_batch(0, kind))
        for rank, tokens in ((0, slice(0, first)), (1, slice(first, None))):
            batches[rank][kind] = (layout(rank_batch(rank, kind)), logps[tokens], ref_logps[tokens])
        z = kl_baseline(logps, ref_logps, whole)
        wanted[kind] = [*z, *loss_normalizer(whole, StepKTOConfig(step_reduction="mean"))]
    results = [str(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    mp.spawn(run_rank, (batches, str(tmp_path / "store"), results), nprocs=2)
    for path in results:
        got = torch.load(path, weights_only=True)
        for kind in RANK_KINDS:
            torch.testing.assert_close(got[kind], wanted[kind], rtol=1e-14, atol=0, msg=kind)
    assert wanted["uneven"][0] > 0 and wanted["no rank has any"] == [0, 0, 0, 0]


# ---- layouts ----------------------------------------------------------------------------------

PADDED = {
    "step_ids": torch.tensor([[-1, -1, 0, 0, 1, 2, -1, -1], [-1, 0, 1, 1, 1, -1, -1, -1]]),
    "completion_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1]]),
    "outcome_label": torch.tensor([1, 0]),
    "step_labels": torch.tensor([[1, 0, -1], [0, 1, -1]]),
}
PACKED = {
    "cu_seqlens": torch.tensor([0, 8, 16]),
    "step_index": torch.tensor([-1, -1, 0, 0, 1, 2, -1, -1, -1, 3, 4, 4, 4, -1, -1, -1]),
    "outcome_label": torch.tensor([1, 0]),
    "step_labels": torch.tensor([1, 0, -1, 0, 1]),
    "completion_mask": PADDED["completion_mask"].flatten(),
}


def test_from_padded_by_hand():
    segments = StepSegments.from_padded(**PADDED).validate()
    assert segments.sequence_index.tolist() == [-1, -1, 0, 0, 0, 0, 0, -1, -1] + [1] * 7
    assert segments.step_index.tolist() == [-1, -1, 0, 0, 1, 2, -1, -1, -1, 3, 4, 4, 4, -1, -1, -1]
    assert segments.outcome_label.tolist() == [1, 0]
    assert segments.step_label.tolist() == [1, 0, -1, 0, 1, -1]
    assert segments.step_sequence[:5].tolist() == [0, 0, 0, 1, 1]


def test_from_packed_by_hand():
    segments = StepSegments.from_packed(**PACKED).validate()
    assert segments.sequence_index.tolist() == [-1, -1, 0, 0, 0, 0, 0, -1, -1] + [1] * 7
    assert segments.step_index.tolist() == PACKED["step_index"].tolist()
    assert segments.step_label.tolist() == [1, 0, -1, 0, 1]
    assert segments.step_sequence.tolist() == [0, 0, 0, 1, 1]


def test_from_packed_with_empty_sequences_and_padding():
    """Equal offsets are a sequence without tokens; tokens past the last offset are padding."""
    cu_seqlens = torch.tensor([1, 1, 4, 4, 6])
    segments = StepSegments.from_packed(
        cu_seqlens, torch.tensor([5, 0, -1, 0, 2, 2, 1]), torch.ones(4).int(), torch.ones(6).int()
    ).validate()
    assert segments.sequence_index.tolist() == [-1, 1, 1, 1, 3, 3, -1]
    assert segments.step_index.tolist() == [-1, 0, -1, 0, 2, 2, -1]
    assert segments.step_sequence.tolist() == [1, -1, 3, -1, -1, -1]


@pytest.mark.parametrize("truncated", [False, True], ids=["", "a labelled step lost its tokens"])
def test_padded_and_packed_give_the_same_loss(config, baseline, truncated):
    """Also where truncation left a labelled step without a token: it takes no part in either."""
    step_ids, step_index = PADDED["step_ids"].clone(), PACKED["step_index"].clone()
    if truncated:
        step_ids[1, 2:] = -1
        step_index[10:] = -1
    padded = StepSegments.from_padded(**{**PADDED, "step_ids": step_ids})
    packed = StepSegments.from_packed(**{**PACKED, "step_index": step_index})
    logps, ref_logps = log_probs(packed)
    losses = []
    for segments in (padded, packed):
        args = (logps, ref_logps, segments, baseline, config)
        loss, gradient = value_and_gradient(step_kto_loss, *args)
        losses.append((loss, gradient, step_kto_loss(*args)[1].compute()))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])
    assert losses[0][2] == losses[1][2]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int8, torch.int64])
def test_layouts_of_any_integer_dtype(index_dtype, mask_dtype):
    casts = {
        **{"step_ids": index_dtype, "cu_seqlens": index_dtype, "step_index": index_dtype},
        **{"completion_mask": mask_dtype, "outcome_label": torch.int16, "step_labels": torch.int8},
    }
    for function, arguments in (
        (StepSegments.from_padded, PADDED),
        (StepSegments.from_packed, PACKED),
    ):
        a = function(**arguments)
        b = function(**{name: value.to(casts[name]) for name, value in arguments.items()})
        for name in (
            "sequence_index",
            "step_index",
            "outcome_label",
            "step_label",
            "step_sequence",
        ):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_to_moves_everything(typical):
    moved = typical.to("meta")
    assert moved.device.type == moved.step_label.device.type == "meta"
    assert moved.num_tokens == typical.num_tokens
    assert torch.equal(typical.to("cpu").step_index, typical.step_index)


# ---- NaN --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["logps", "ref_logps"])
def test_nan_in_an_unlabelled_segment_does_not_leak(auto_is, layout, config, baseline, where):
    """Prompt and padding, and a sequence without any label."""
    segments = layout(((1, ((1, 2), (0, 1)), 1), (-1, ((-1, 3),), 2), (0, (), 2)))
    values = dict(zip(("logps", "ref_logps"), log_probs(segments, torch.float32), strict=True))
    args = (segments, baseline, config)
    loss, gradient = value_and_gradient(step_kto_loss, *values.values(), *args)
    outside = (segments.sequence_index < 0) | (segments.sequence_index == 1)
    values[where][outside] = torch.nan
    again, with_nan = value_and_gradient(step_kto_loss, *values.values(), *args)
    assert loss == again
    assert torch.equal(gradient[~outside], with_nan[~outside])
    assert (with_nan[outside] == 0).all()
    metrics = step_kto_loss(*values.values(), *args)[1].compute()
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("where", ["logps", "ref_logps"])
@pytest.mark.parametrize("level", ["outcome", "step"])
def test_nan_in_a_labelled_segment_is_not_hidden(auto_is, typical, config, baseline, where, level):
    """Loss, gradient of the segment and metrics are NaN, so that training stops; others are not."""
    if level == "step" and config.step_weight == 0:
        return
    values = dict(zip(("logps", "ref_logps"), log_probs(typical, torch.float32), strict=True))
    index = typical.sequence_index if level == "outcome" else typical.step_index
    labels = typical.outcome_label if level == "outcome" else typical.step_label
    segment = (labels >= 0).nonzero()[0, 0]
    token = (index == segment).nonzero()[0, 0]
    values[where][token] = torch.nan
    args = (*values.values(), typical, baseline, config)
    loss, gradient = value_and_gradient(step_kto_loss, *args)
    assert loss.isnan() and gradient[token].isnan()
    metrics = step_kto_loss(*args)[1].compute()
    assert math.isnan(metrics["loss"])
    if config.reference_point != "matched":
        others = typical.sequence_index != typical.sequence_index[token]
        assert gradient[others].isfinite().all()
    kl = kl_baseline(values["logps"], values["ref_logps"], typical, config=config)
    assert kl.outcome.isnan()


# ---- refused arguments ------------------------------------------------------------------------

GOOD_SEGMENTS = {
    "sequence_index": int32([0, 0, 1]),
    "step_index": int32([0, -1, 1]),
    "outcome_label": int8([1, 0]),
    "step_label": int8([1, -1]),
    "step_sequence": int32([0, 1]),
}
BAD_SEGMENTS = [
    ("sequence_index", [0, 0, 1], "a torch.Tensor, got list"),
    ("sequence_index", torch.tensor([0, 0, 1]), "dtype int32, got torch.int64"),
    ("sequence_index", int32([[0, 0, 1]]), r"1 dimensions, got shape \(1, 3\)"),
    ("step_index", int32([0, -1]), r"shape \(N,\) = \(3,\), got \(2,\)"),
    ("outcome_label", torch.tensor([True, False]), "dtype int8, got torch.bool"),
    ("step_label", torch.tensor([1, -1]), "dtype int8, got torch.int64"),
    ("step_sequence", int32([0]), r"shape \(S,\) = \(2,\), got \(1,\)"),
    ("step_sequence", int32([0, 1]).to("meta"), "sequence_index's device cpu, got meta"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_SEGMENTS, ids=lambda x: str(x)[:30])
def test_refused_segments(name, value, message):
    with pytest.raises(ValueError, match=f"^{name}: want {message}"):
        StepSegments(**{**GOOD_SEGMENTS, name: value})


BAD_VALUES = [
    ("sequence_index", int32([0, 0, 2]), r"sequence_index: want values in \[-1, 1\], got .*2"),
    ("sequence_index", int32([0, -2, 1]), r"sequence_index: want values in \[-1, 1\], got .*-2"),
    ("step_index", int32([0, -1, 2]), r"step_index: want values in \[-1, 1\], got .*2"),
    ("step_sequence", int32([0, 2]), r"step_sequence: want values in \[-1, 1\], got .*2"),
    ("outcome_label", int8([1, 2]), r"outcome_label: want values in \[-1, 1\], got .*2"),
    ("step_label", int8([1, -2]), r"step_label: want values in \[-1, 1\], got .*-2"),
    ("step_index", int32([0, -1, 0]), r"sequence_index\[2\]: want sequence 0 of its step, got 1"),
    ("step_sequence", int32([0, 0]), r"sequence_index\[2\]: want sequence 0 of its step, got 1"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES, ids=lambda x: str(x)[:30])
def test_validate(name, value, message):
    assert StepSegments(**GOOD_SEGMENTS).validate() is not None
    with pytest.raises(ValueError, match=f"^{message}"):
        StepSegments(**{**GOOD_SEGMENTS, name: value}).validate()


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES[:5], ids=lambda x: str(x)[:30])
def test_native_kernels_do_not_follow_values_that_point_outside(name, value, message):
    """Without validate: C++ reads and writes where indices and labels say."""
    segments = StepSegments(**{**GOOD_SEGMENTS, name: value})
    with pytest.raises(ValueError, match=f"^{name}: want values in"):
        step_kto_loss(torch.zeros(3), torch.zeros(3), segments, KLBaseline(0.0, 0.0))


BAD_PADDED = [
    ("step_ids", torch.zeros(2, 8), "dtype int32 or int64, got torch.float32"),
    ("step_ids", torch.zeros(16).int(), r"2 dimensions, got shape \(16,\)"),
    ("step_ids", torch.full((2, 8), 3), r"values in \[-1, K\) = \[-1, 3\), got \(3, 3\)"),
    ("step_ids", torch.full((2, 8), -2), r"values in \[-1, K\) = \[-1, 3\), got \(-2, -2\)"),
    ("completion_mask", torch.ones(2, 7).bool(), r"shape \(B, T\) = \(2, 8\), got \(2, 7\)"),
    ("completion_mask", torch.ones(2, 8), "dtype bool or .*, got torch.float32"),
    ("outcome_label", torch.ones(2), "dtype int8 or .*, got torch.float32"),
    ("outcome_label", torch.ones(3).int(), r"shape \(B,\) = \(2,\), got \(3,\)"),
    ("step_labels", torch.ones(3, 3).int(), r"shape \(B, K\) = \(2, 3\), got \(3, 3\)"),
    ("step_labels", torch.ones(6).int(), r"2 dimensions, got shape \(6,\)"),
]
BAD_PACKED = [
    ("cu_seqlens", torch.zeros(3), "dtype int32 or int64, got torch.float32"),
    ("cu_seqlens", torch.zeros(3, 1).int(), r"1 dimensions, got shape \(3, 1\)"),
    ("step_index", torch.zeros(16), "dtype int32 or int64, got torch.float32"),
    ("step_index", torch.full((16,), 5), "values in .*, got .*5"),
    ("step_index", torch.full((16,), -2), "values in .*, got .*-2"),
    ("outcome_label", torch.ones(3).int(), r"shape \(B,\) = \(2,\), got \(3,\)"),
    ("step_labels", torch.ones(5), "dtype int8 or .*, got torch.float32"),
    ("completion_mask", torch.ones(15).bool(), r"shape \(N,\) = \(16,\), got \(15,\)"),
    ("completion_mask", torch.ones(16), "dtype bool or .*, got torch.float32"),
]


@pytest.mark.parametrize(
    ("function", "good", "name", "value", "message"),
    [(StepSegments.from_padded, PADDED, *bad) for bad in BAD_PADDED]
    + [(StepSegments.from_packed, PACKED, *bad) for bad in BAD_PACKED],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_layouts(function, good, name, value, message):
    with pytest.raises(ValueError, match=f"^{name}: want {message}"):
        function(**{**good, name: value})


GOOD_LOSS = {
    "logps": torch.zeros(3),
    "ref_logps": torch.zeros(3),
    "segments": StepSegments(**GOOD_SEGMENTS),
    "baseline": KLBaseline(0.1, 0.2),
}
BAD_LOSS = [
    ({"logps": [0.0] * 3}, "logps: want a torch.Tensor, got list"),
    ({"logps": torch.zeros(3).bfloat16()}, "logps: want dtype float32 or float64, got .*bfloat16"),
    ({"logps": torch.zeros(4)}, r"logps: want N = 3 elements, got shape \(4,\)"),
    ({"logps": torch.zeros(3, device="meta")}, "logps: want segments's device cpu, got meta"),
    ({"ref_logps": torch.zeros(3).double()}, "ref_logps: want dtype float32, got torch.float64"),
    ({"ref_logps": torch.zeros(1)}, r"ref_logps: want shape of logps = \(3,\), got \(1,\)"),
    ({"ref_logps": torch.zeros(3, 1)}, r"ref_logps: want shape of logps = \(3,\), got \(3, 1\)"),
    ({"ref_logps": None}, "ref_logps: want a torch.Tensor, got NoneType"),
    ({"baseline": None}, "baseline: want a KLBaseline, as .*'mismatched'.*, got None"),
    ({"baseline": None, "config": StepKTOConfig(reference_point="ema")}, "baseline: want .*'ema'"),
    ({"config": StepKTOConfig(reference_point="zero")}, "baseline: want None, as .*, got KLB"),
    ({"config": StepKTOConfig(**APO_ZERO)}, "baseline: want None, as .*, got KLBaseline"),
    ({"config": StepKTOConfig(reference_point=0.5)}, "baseline: want None, as .*0.5, got KLB"),
    (
        {"baseline": KLBaseline(torch.zeros(3), 0.0)},
        r"baseline.outcome: want shape \(\) = \(\), got",
    ),
    ({"baseline": KLBaseline(0.0, torch.zeros(1))}, r"baseline.step: want shape \(\) = \(\), got"),
    ({"baseline": KLBaseline(0.0, math.nan)}, "baseline.step: want a finite number .*, got nan"),
    ({"baseline": KLBaseline("0", 0.0)}, "baseline.outcome: want a number .*, got '0'"),
    ({"baseline": 0.3}, "baseline: want a KLBaseline.*, got 0.3"),
    ({"baseline": (0.1, 0.2)}, "baseline: want a KLBaseline.*, got .*0.1"),
    ({"normalizer": LossNormalizer(torch.ones(2), 1.0)}, r"normalizer.outcome: want shape \(\)"),
    ({"normalizer": LossNormalizer(1.0, None)}, "normalizer.step: want a number .*, got None"),
    ({"normalizer": LossNormalizer(-1.0, 1.0)}, "normalizer.outcome: want .*, got -1"),
    ({"normalizer": (1.0, 1.0)}, "normalizer: want a LossNormalizer.*, got .*1.0"),
    ({"config": {}}, r"config: want a StepKTOConfig.*, got (\{\}|dict)"),
    ({"segments": None}, "segments: want a StepSegments.*, got None"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LOSS, ids=lambda x: str(x)[:60])
def test_refused_arguments(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        step_kto_loss(**{**GOOD_LOSS, **change})


@pytest.mark.parametrize(("change", "message"), BAD_LOSS[:7], ids=lambda x: str(x)[:60])
def test_refused_arguments_of_kl_baseline(change, message):
    good = {name: GOOD_LOSS[name] for name in ("logps", "ref_logps", "segments")}
    with pytest.raises(ValueError, match=f"^{message}"):
        kl_baseline(**{**good, **change})


@pytest.mark.parametrize("ratio", [torch.zeros(2), torch.zeros(3).half(), [0.0] * 3], ids=str)
def test_refused_arguments_of_segment_sums(ratio):
    with pytest.raises(ValueError, match="^ratio: want .*, got .*"):
        segment_sums(ratio, GOOD_LOSS["segments"])


BAD_CONFIG = [
    ("beta", 0, r".*\(0, inf\].*, got 0"),
    ("beta", math.nan, r".*\(0, inf\].*, got nan"),
    ("beta", "0.1", "a number .*, got '0.1'"),
    ("step_beta", -0.1, r".*\(0, inf\].*, got -0.1"),
    ("step_weight", -1.0, r".*\[0, inf\].*, got -1.0"),
    ("desirable_weight", -1, r".*\[0, inf\].*, got -1"),
    ("undesirable_weight", math.inf, "a finite number .*, got inf"),
    ("step_desirable_weight", None, "a number .*, got None"),
    ("step_undesirable_weight", True, "a number .*, got True"),
    ("step_reduction", "max", "one of 'sequence_mean', 'mean', 'sum', got 'max'"),
    ("loss_type", "dpo", "one of 'kto', 'apo_zero', got 'dpo'"),
    ("reference_point", "batch", "one of 'mismatched', .*, got 'batch'"),
    ("reference_point", math.inf, "a finite number .*, got inf"),
    ("reference_point", None, "a number .*, got None"),
    ("ratio_clip", 0.5, "a pair .*, got 0.5"),
    ("ratio_clip", (1.0,), r"a pair .*, got \(1.0,\)"),
    ("length_normalize", 1, "True or False, got 1"),
    ("ema_decay", 1.0, r".*\[0, 1\).*, got 1.0"),
    ("ema_decay", -0.1, r".*\[0, 1\).*, got -0.1"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_CONFIG, ids=lambda x: str(x)[:30])
def test_refused_configs(name, value, message):
    with pytest.raises(ValueError, match=f"^{name}: want {message}"):
        StepKTOConfig(**{name: value})


def test_refused_combinations():
    with pytest.raises(
        ValueError, match="^reference_point: want 'zero' with apo_zero, got matched"
    ):
        StepKTOConfig(loss_type="apo_zero", reference_point="matched")
    with pytest.raises(ValueError, match=r"^ratio_clip\[1\]: want .*\[0.5, inf\].*, got -0.5"):
        StepKTOConfig(ratio_clip=(0.5, -0.5))


def test_public_names():
    assert all(hasattr(sk, name) for name in sk.__all__)
