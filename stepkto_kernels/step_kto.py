"""Step-KTO loss of per-token log-probs (arXiv 2501.10799), with its analytic gradient.

segment_loss.py has the formulas; here are the custom op, reference points, normalizers and the
public functions. Letters: N tokens, B sequences, S steps.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from stepkto_kernels import backend as backends
from stepkto_kernels import checks, cuda, native, segment_loss
from stepkto_kernels.config import SegmentOptions, StepKTOConfig
from stepkto_kernels.metrics import TOTALS, StepKTOMetrics
from stepkto_kernels.ops import custom_op
from stepkto_kernels.segment_loss import SegmentBatch, mean_over, term_counts
from stepkto_kernels.segments import SegmentIndex, StepSegments
from stepkto_kernels.shards import named_group

Group = torch.distributed.ProcessGroup


class KLBaseline(NamedTuple):
    """Reference points z_o and z_s, in nats: 0-dim tensors or numbers, without gradient."""

    outcome: Tensor | float
    step: Tensor | float


class LossNormalizer(NamedTuple):
    """What the outcome and the process term are divided by; a term divided by 0 is 0."""

    outcome: Tensor | float
    step: Tensor | float


def kernels(backend: str, device: torch.device) -> ModuleType:
    """The module whose SegmentBatch and token_slopes serve a backend on a device.

    "triton" is the GPU's own kernels, which at this level are CUDA C++ where that was built.
    """
    if backend == "native":
        return native
    return cuda if backend == "triton" and cuda.serves(device) else segment_loss


@custom_op("stepkto::step_kto")
def _step_kto(
    logps: Tensor,
    ref_logps: Tensor,
    index: list[Tensor],
    z_o: Tensor,
    z_s: Tensor,
    n_o: Tensor,
    n_s: Tensor,
    matched: bool,
    context_group: str,
    options: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (), metric totals, slopes (B,) and (S,). context_group: its name, "" for none."""
    level = kernels(backend, logps.device)
    if context_group and level is cuda:  # whose one launch leaves no room for other ranks' sums
        level = segment_loss
    batch_of = SegmentIndex(*index), SegmentOptions.unpack(options)
    if level is segment_loss and logps.device.type == "cpu":  # native looks for itself
        batch_of[0].check_values()
    if level is cuda:
        out = cuda.batch_loss(*batch_of, logps, ref_logps, (z_o, z_s), (n_o, n_s), matched)
    else:
        batch = level.SegmentBatch(*batch_of)
        batch.add(logps, ref_logps)
        tokens = batch.all_reduce(named_group(context_group)) if context_group else None
        baseline = batch.matched_baseline() if matched else (z_o, z_s)
        out = batch.loss(baseline, (n_o, n_s))
        if tokens is not None:
            out.totals[TOTALS.index("tokens")] = tokens
    return out.loss.to(logps.dtype), out.totals, out.outcome_slope, out.step_slope


@_step_kto.register_fake
def _(logps, ref_logps, index, z_o, z_s, n_o, n_s, matched, context_group, options, backend):  # type: ignore[no-untyped-def]
    wide = lambda *shape: logps.new_empty(shape, dtype=torch.float64)
    outcome_label, step_label = index[2], index[3]
    sizes = (len(TOTALS),), outcome_label.shape, step_label.shape
    return logps.new_empty(()), *(wide(*size) for size in sizes)


@custom_op("stepkto::step_kto_bwd")
def _step_kto_bwd(
    dloss: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    index: list[Tensor],
    outcome_slope: Tensor,
    step_slope: Tensor,
    options: list[float],
    backend: str,
) -> Tensor:
    return kernels(backend, logps.device).token_slopes(
        SegmentIndex(*index),
        SegmentOptions.unpack(options),
        logps,
        ref_logps,
        outcome_slope,
        step_slope,
        dloss,
    )


@_step_kto_bwd.register_fake
def _(dloss, logps, ref_logps, index, outcome_slope, step_slope, options, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(logps)


def _step_kto_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logps, ref_logps, index = inputs[:3]
    ctx.call = inputs[-2:]  # options, backend
    ctx.save_for_backward(logps, ref_logps, output[2], output[3], *index)


def _step_kto_backward(ctx, dloss, *unused):  # type: ignore[no-untyped-def]
    logps, ref_logps, outcome_slope, step_slope, *index = ctx.saved_tensors
    g = _step_kto_bwd(dloss, logps, ref_logps, index, outcome_slope, step_slope, *ctx.call)
    return g, None, [None] * len(index), *[None] * 8


_step_kto.register_autograd(_step_kto_backward, setup_context=_step_kto_setup)


def step_kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    segments: StepSegments,
    baseline: KLBaseline | None = None,
    config: StepKTOConfig = StepKTOConfig(),  # noqa: B008, frozen
    normalizer: LossNormalizer | None = None,
    *,
    context_group: Group | None = None,
) -> tuple[Tensor, StepKTOMetrics]:
    """Step-KTO loss of per-token log-probs.

    Args:
        logps: (...) fp32 or fp64 with N elements: policy log-probs in nats, in the order of
            `segments`. Not bf16: a sum over thousands of tokens would keep the rounding of each.
        ref_logps: same shape and dtype, of the reference model; no gradient flows into it.
        segments: layout and labels.
        baseline: reference points for reference_point "mismatched", "ema" and, where the caller
            averages over ranks, "matched"; refused where `config` fixes them.
        normalizer: divisors of the two terms; None counts the labels of this batch. Give global
            counts (`loss_normalizer`, added over micro-batches and ranks) so that micro-batches'
            gradients add up to the gradient of the whole batch.
        context_group: process group over which the tokens of a sequence are cut (context parallel):
            `logps` are this rank's, `segments` as parallel.own_segments makes them. Loss, metrics
            and normalizer are then those of the whole batch on every rank, and the gradient that of
            the rank's own tokens.
    Returns:
        loss: () dtype of `logps`, differentiable in `logps`; 0 where nothing is labelled. NaN if
        anything in a labelled segment, or the baseline, is NaN.
        metrics: of this batch.
    Raises:
        ValueError: shape, dtype or device differs, or `baseline` and `config` do not fit; on the
            CPU also an index or label of `segments` out of range.
    """
    check_log_probs(logps, ref_logps, segments, config)
    return loss_of_log_probs(
        logps,
        ref_logps,
        segments,
        config,
        resolve_baseline(baseline, config, logps.device),
        resolve_normalizer(normalizer, segments, config),
        backends.resolve("auto" if logps.dtype == torch.float32 else "torch", logps.device),
        context_name(context_group),
    )


def loss_of_log_probs(
    logps: Tensor,
    ref_logps: Tensor,
    segments: StepSegments,
    config: StepKTOConfig,
    baseline: tuple[tuple[Tensor, Tensor], bool],
    normalizer: tuple[Tensor, Tensor],
    backend: str,
    context_group: str = "",
) -> tuple[Tensor, StepKTOMetrics]:
    """step_kto_loss of checked arguments, on a resolved backend."""
    z, matched = baseline
    loss, totals, _, _ = _step_kto(
        logps.reshape(-1),
        ref_logps.detach().reshape(-1),
        list(SegmentIndex.of(segments)),
        *z,
        *normalizer,
        matched,
        context_group,
        config.segment_options().pack(),
        backend,
    )
    return loss, StepKTOMetrics(totals)


def check_group(group: object, name: str = "group") -> None:
    fits = group is None or isinstance(group, Group)
    checks.require(fits, name, "None or a ProcessGroup", group)


def context_name(group: Group | None) -> str:
    check_group(group, "context_group")
    return "" if group is None else group.group_name


def check_log_probs(
    logps: Tensor, ref_logps: Tensor, segments: StepSegments, config: object
) -> None:
    checks.instance("segments", segments, StepSegments)
    checks.instance("config", config, StepKTOConfig)
    checks.token_tensor("logps", logps, segments)
    checks.ref_logps(ref_logps, logps.shape, logps.dtype, logps.device)


def resolve_baseline(
    baseline: KLBaseline | None, config: StepKTOConfig, device: torch.device
) -> tuple[tuple[Tensor, Tensor], bool]:
    """Reference points as 0-dim fp64 tensors, and whether to take them from the batch itself."""
    checks.instance("config", config, StepKTOConfig)
    fixed = config.fixed_reference_point
    if fixed is not None:
        checks.require(
            baseline is None,
            "baseline",
            f"None, as config fixes the reference points at {fixed}",
            baseline,
        )
        baseline = KLBaseline(fixed, fixed)
    matched = baseline is None and config.reference_point == "matched"
    if matched:
        baseline = KLBaseline(0.0, 0.0)
    checks.require(
        baseline is not None,
        "baseline",
        f"a KLBaseline, as config.reference_point is {config.reference_point!r}"
        " (kl_baseline makes one; 'zero' and 'matched' need none)",
        None,
    )
    checks.instance("baseline", baseline, KLBaseline)
    assert baseline is not None
    z_o = as_scalar("baseline.outcome", baseline.outcome, device)
    return (z_o, as_scalar("baseline.step", baseline.step, device)), matched


def resolve_normalizer(
    normalizer: LossNormalizer | None, segments: StepSegments, config: StepKTOConfig
) -> tuple[Tensor, Tensor]:
    if normalizer is None:
        normalizer = loss_normalizer(segments, config)
    checks.instance("normalizer", normalizer, LossNormalizer)
    return (
        as_scalar("normalizer.outcome", normalizer.outcome, segments.device, low=0),
        as_scalar("normalizer.step", normalizer.step, segments.device, low=0),
    )


def as_scalar(
    name: str, value: Tensor | float, device: torch.device, low: float = -math.inf
) -> Tensor:
    if isinstance(value, Tensor):
        checks.shape(name, value, (), "()")
        checks.require(not value.is_complex(), name, "a real number", value.dtype)
        checks.require(device.type == "meta" or not value.is_meta, name, "a value", "a meta tensor")
        # not waiting is safe on the way to a device only
        ahead = device.type != "cpu"
        return value.detach().to(device=device, dtype=torch.float64, non_blocking=ahead)
    checks.number(name, value, low=low)
    return torch.full((), float(value), dtype=torch.float64, device=device)


@dataclass(frozen=True, eq=False)
class KLTotals:
    """Sums behind the reference points, which add up over micro-batches: `a + b`, then `baseline`.

    Args:
        totals: (4,) fp64: sum and number of the log-ratios of sequences, then those of steps.
    """

    totals: Tensor

    def __add__(self, other: "KLTotals") -> "KLTotals":
        return KLTotals(self.totals + other.totals)

    def baseline(self, group: Group | None = None) -> KLBaseline:
        """max(0, global sum over global count) of all that was added, over `group` if given."""
        check_group(group)
        sums = self.totals
        if group is not None:
            sums = sums.clone()
            torch.distributed.all_reduce(sums, group=group)
        z = (sums[0::2] / sums[1::2].clamp(min=1)).clamp(min=0)
        return KLBaseline(z[0], z[1])


@torch.no_grad()
def kl_totals(
    logps: Tensor,
    ref_logps: Tensor,
    segments: StepSegments,
    *,
    config: StepKTOConfig = StepKTOConfig(),  # noqa: B008, frozen
    context_group: Group | None = None,
    labelled_only: bool = False,
) -> KLTotals:
    """What `kl_baseline` is made of, for a batch that is scored in several micro-batches.

        baseline = sum(totals[1:], totals[0]).baseline(group)  # totals: of each micro-batch

    Args:
        context_group: as in `step_kto_loss`; the totals are then the same on all of its ranks, so
            `baseline` takes the group of data-parallel ranks alone.
        labelled_only: count the segments that have a label, with or without tokens, as
            reference_point "matched" does with the batch's own.
        Others: as `kl_baseline`.
    """
    check_log_probs(logps, ref_logps, segments, config)
    checks.boolean("labelled_only", labelled_only)
    if checks.values_are_free(logps):
        SegmentIndex.of(segments).check_values()
    batch = SegmentBatch(SegmentIndex.of(segments), config.segment_options())
    batch.add(logps.reshape(-1), ref_logps.reshape(-1))
    context_name(context_group)
    if context_group is not None:
        batch.all_reduce(context_group)
    outcome_tokens, step_tokens = batch.tokens
    counted = batch.labelled if labelled_only else (outcome_tokens > 0, step_tokens > 0)
    parts = [mean_over(batch.r(level), counted[level]) for level in (0, 1)]
    return KLTotals(torch.stack([value for part in parts for value in part]))


def kl_baseline(
    logps: Tensor,
    ref_logps: Tensor,
    segments: StepSegments,
    group: Group | None = None,
    *,
    config: StepKTOConfig = StepKTOConfig(),  # noqa: B008, frozen
) -> KLBaseline:
    """Reference points: max(0, mean log-ratio) over the batch's sequences and over its steps.

    Pass the log-probs of mismatched pairs (the prompt of one example, the completion of another)
    for KTO's estimate of the KL divergence. Labels are not looked at; segments without tokens are
    left out. Global sum over global count where `group` is given. `kl_totals` does it in parts.

    Args:
        logps, ref_logps: (...) fp32 or fp64 with N elements, nats.
        segments: layout of those tokens.
        group: process group to average over; every rank must call.
        config: `ratio_clip` and `length_normalize` are applied as in the loss.
    Returns:
        KLBaseline of 0-dim fp64 tensors; NaN if a log-prob of a segment is.
    Raises:
        ValueError: shape, dtype or device differs; on the CPU also an index or label of `segments`
            out of range.
    """
    check_group(group)
    return kl_totals(logps, ref_logps, segments, config=config).baseline(group)


@torch.no_grad()
def loss_normalizer(
    segments: StepSegments,
    config: StepKTOConfig = StepKTOConfig(),  # noqa: B008, frozen
    group: Group | None = None,
) -> LossNormalizer:
    """Divisors of the two loss terms for this batch, summed over `group` where it is given.

    Over gradient accumulation, add up the micro-batches': the field sums are the whole batch's.

    Returns:
        outcome: number of labelled sequences; step: number of sequences with a labelled step, or of
        labelled steps with step_reduction "mean". 0-dim fp64 tensors.
    Raises:
        ValueError: not segments, a config or a group; on the CPU also an index out of range.
    """
    checks.instance("segments", segments, StepSegments)
    checks.instance("config", config, StepKTOConfig)
    check_group(group)
    if checks.values_are_free(segments.outcome_label):
        SegmentIndex.of(segments).check_values()
    outcome, step, _ = term_counts(SegmentIndex.of(segments), config.segment_options())
    counts = torch.stack([outcome, step])
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    return LossNormalizer(counts[0], counts[1])
