"""Random layouts against loops over Python numbers: segments, their sums, reference points, counts.

What a case is made of stands in fuzz_helpers.py. A case that fails is shrunk and printed, to be
kept here as an @example.
Letters: N tokens, B sequences, S steps, T padded length, K steps of a sequence.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")

from fuzz_helpers import (  # noqa: E402
    FP64,
    LABELS,
    configs,
    fuzzed,
    sequences,
    viewed,
)
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from stepkto_kernels import (  # noqa: E402
    KLTotals,
    StepKTOConfig,
    StepSegments,
    kl_baseline,
    kl_totals,
    loss_normalizer,
    reference,
    segment_sums,
)

ORDERS = st.sampled_from(["packed", "interleaved"])
SEEDS = st.integers(0, 2**20)


@dataclass(frozen=True)
class SumCase:
    batch: list
    order: str
    size: float
    dtype: torch.dtype
    view: str
    upstream: float
    seed: int
    config: StepKTOConfig = StepKTOConfig()

    def values(self, segments, number):
        generator = torch.Generator().manual_seed(self.seed + number)
        values = self.size * torch.randn(segments.num_tokens, generator=generator)
        return viewed(values.to(self.dtype), self.view)


sum_cases = st.builds(
    SumCase,
    batch=sequences(),
    order=ORDERS,
    size=st.sampled_from([0.0, 1.0, 1e4, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    view=st.sampled_from(["as is", "strided", "offset"]),
    upstream=st.sampled_from([0.0, 1.0, 1e20]),
    seed=SEEDS,
)


def members(index, i):
    return [t for t, where in enumerate(index.tolist()) if where == i]


@fuzzed(40, 2.0)
@given(case=sum_cases)
def test_segment_sums(case, layout):
    """The fp64 sum in any order, rounded once; the gradient is looked up and added."""
    segments = layout(case.batch, case.order)
    ratio = case.values(segments, 0).requires_grad_()
    sums = segment_sums(ratio, segments)
    ups = [case.upstream * torch.randn(len(x), dtype=case.dtype) for x in sums]
    (gradient,) = torch.autograd.grad(sums, ratio, ups)
    want_gradient = torch.zeros_like(gradient)
    for index, found, up in zip(
        (segments.sequence_index, segments.step_index), sums, ups, strict=True
    ):
        assert found.dtype == case.dtype
        for i in range(len(found)):
            mine = [ratio[t].item() for t in members(index, i)]
            want, size = math.fsum(mine), math.fsum(map(abs, mine))
            allowed = torch.finfo(case.dtype).eps * abs(want) + len(mine) * FP64.eps * size
            assert abs(found[i].item() - want) <= allowed
            want_gradient[members(index, i)] += up[i]
    assert torch.equal(gradient, want_gradient)
    for found, plain in zip(sums, reference.segment_sums(ratio.double(), segments), strict=True):
        torch.testing.assert_close(found.double(), plain, rtol=1e-6, atol=1e-5 * case.size)


# ---- layouts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayoutCase:
    """Sequences as lists of tokens (scored, step or -1), with K step labels each."""

    tokens: list[list[tuple[bool, int]]]
    labels: list[list[int]]
    outcomes: list[int]
    pad: int
    left: bool
    index_dtype: torch.dtype
    label_dtype: torch.dtype
    mask_dtype: torch.dtype


@st.composite
def layout_cases(draw):
    B, K = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    token = st.tuples(st.booleans(), st.integers(-1, K - 1))
    fixed = lambda element, n: st.lists(element, min_size=n, max_size=n)
    return LayoutCase(
        tokens=draw(fixed(st.lists(token, max_size=6), B)),
        labels=draw(fixed(fixed(LABELS, K), B)),
        outcomes=draw(fixed(LABELS, B)),
        pad=draw(st.integers(0, 3)),
        left=draw(st.booleans()),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        label_dtype=draw(st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64])),
        mask_dtype=draw(st.sampled_from([torch.bool, torch.int8, torch.int64])),
    )


def packed_and_padded(case):
    """The same sequences laid out both ways, and where the packed tokens are in the padded ones."""
    B, K = len(case.tokens), len(case.labels[0]) if case.labels else 0
    T = max(map(len, case.tokens), default=0) + case.pad
    step_ids = torch.full((B, T), -1, dtype=case.index_dtype)
    mask = torch.zeros(B, T, dtype=case.mask_dtype)
    flat_steps, flat_mask, where, ends = [], [], [], [0]
    for b, tokens in enumerate(case.tokens):
        first = T - len(tokens) if case.left else 0
        for t, (scored, step) in enumerate(tokens):
            step_ids[b, first + t], mask[b, first + t] = step, scored
            flat_steps.append(b * K + step if step >= 0 else -1)
            flat_mask.append(scored)
            where.append(b * T + first + t)
        ends.append(len(flat_steps))
    flat_steps += [-1] * case.pad
    flat_mask += [False] * case.pad
    outcomes = torch.tensor(case.outcomes, dtype=case.label_dtype)
    labels = torch.tensor(case.labels, dtype=case.label_dtype).reshape(B, K)
    padded = StepSegments.from_padded(step_ids, mask, outcomes, labels)
    packed = StepSegments.from_packed(
        torch.tensor(ends, dtype=case.index_dtype),
        torch.tensor(flat_steps, dtype=case.index_dtype),
        outcomes,
        labels.flatten(),
        torch.tensor(flat_mask, dtype=case.mask_dtype),
    )
    return packed, padded, torch.tensor(where, dtype=torch.int64)


@fuzzed(40, 2.0)
@given(case=layout_cases())
def test_packed_and_padded_layouts(case):
    packed, padded, where = packed_and_padded(case)
    B, K = len(case.tokens), len(case.labels[0]) if case.labels else 0
    sequence_index, step_index, step_sequence = [], [], [-1] * (B * K)
    for b, tokens in enumerate(case.tokens):
        for scored, step in tokens:
            sequence_index.append(b if scored else -1)
            step_index.append(b * K + step if scored and step >= 0 else -1)
            if step_index[-1] >= 0:
                step_sequence[step_index[-1]] = b
    n = len(sequence_index)
    for made, at in ((packed, slice(0, n)), (padded, where)):
        assert made.validate() is made
        assert made.sequence_index[at].tolist() == sequence_index
        assert made.step_index[at].tolist() == step_index
        assert made.step_sequence.tolist() == step_sequence
        assert made.outcome_label.tolist() == case.outcomes
        assert made.step_label.tolist() == [x for labels in case.labels for x in labels]
        rest = torch.ones(made.num_tokens, dtype=torch.bool)
        rest[at] = False
        assert (made.sequence_index[rest] == -1).all() and (made.step_index[rest] == -1).all()
    assert loss_normalizer(packed) == loss_normalizer(padded)


@dataclass(frozen=True)
class WrongCase:
    batch: list
    order: str
    name: str
    position: int
    value: int


wrong_cases = st.builds(
    WrongCase,
    batch=sequences().filter(lambda batch: any(steps for _, steps, _ in batch)),
    order=ORDERS,
    name=st.sampled_from(
        ["sequence_index", "step_index", "outcome_label", "step_label", "step_sequence"]
    ),
    position=st.integers(0, 10**6),
    value=st.integers(-128, 127),
)


@fuzzed(40, 1.5)
@given(case=wrong_cases)
def test_validate_finds_a_wrong_value(case, layout):
    """One value is changed: `validate` raises if and only if that breaks a rule, and names it."""
    segments = layout(case.batch, case.order)
    values = getattr(segments, case.name).clone()
    values[case.position % len(values)] = case.value
    changed = replace(segments, **{case.name: values})
    B, S = segments.num_sequences, segments.num_steps
    high = {"sequence_index": B - 1, "step_index": S - 1, "step_sequence": B - 1}
    inside = -1 <= case.value <= high.get(case.name, 1)
    step_sequence = changed.step_sequence.tolist()
    apart = inside and any(
        step >= 0 and step_sequence[step] != sequence
        for step, sequence in zip(
            changed.step_index.tolist(), changed.sequence_index.tolist(), strict=True
        )
    )
    if inside and not apart:
        assert changed.validate() is changed
    else:
        with pytest.raises(ValueError, match="sequence_index" if apart else case.name):
            changed.validate()


# ---- reference points and counts --------------------------------------------------------------


def written_out(segments, logps, ref_logps, config, labelled_only):
    """Sum and number of the log-ratios of both levels, and what the sums are made of."""
    low, high = config.ratio_clip or (-math.inf, math.inf)
    ratio = [
        min(max(x - y, low), high) for x, y in zip(logps.tolist(), ref_logps.tolist(), strict=True)
    ]
    out = []
    for index, labels in (
        (segments.sequence_index, segments.outcome_label.tolist()),
        (segments.step_index, segments.step_label.tolist()),
    ):
        sums, size = [], 0.0
        for i, label in enumerate(labels):
            mine = [ratio[t] for t in members(index, i)]
            if label >= 0 if labelled_only else mine:
                n = max(len(mine), 1) if config.length_normalize else 1
                sums.append(math.fsum(mine) / n)
                size += math.fsum(map(abs, mine))
        out.append((math.fsum(sums), len(sums), size))
    return out


@fuzzed(40)
@given(
    case=st.builds(replace, sum_cases, config=configs()),
    cut=st.integers(0, 5),
    labelled_only=st.booleans(),
)
def test_reference_points(case, cut, labelled_only, layout):
    """Against loops; and the totals of two micro-batches add up to those of the batch."""
    segments, config = layout(case.batch, case.order), case.config
    logps, ref_logps = case.values(segments, 0), case.values(segments, 1)
    totals = kl_totals(logps, ref_logps, segments, config=config, labelled_only=labelled_only)
    assert totals.totals.dtype == torch.float64 and not totals.totals.requires_grad
    want = written_out(segments, logps, ref_logps, config, labelled_only)
    n = segments.num_tokens + len(case.batch) + segments.num_steps
    floors = [2 * n * FP64.eps * size for _, _, size in want]
    z = totals.baseline()
    if not labelled_only:
        assert kl_baseline(logps, ref_logps, segments, config=config) == z
    eager = reference.kl_baseline(logps.double(), ref_logps.double(), segments, config=config)
    for level, (total, number, _) in enumerate(want):
        assert totals.totals[2 * level + 1] == number
        assert abs(totals.totals[2 * level].item() - total) <= floors[level]
        mean = max(0.0, total / max(number, 1))
        assert abs(z[level].item() - mean) <= floors[level]
        assert labelled_only or abs(eager[level].item() - mean) <= floors[level]

    first = sum(1 + sum(n for _, n in steps) + loose for _, steps, loose in case.batch[:cut])
    packed = layout(case.batch)
    whole = kl_totals(logps, ref_logps, packed, config=config, labelled_only=labelled_only)
    added = None
    for rows, batch in (
        (slice(0, first), case.batch[:cut]),
        (slice(first, None), case.batch[cut:]),
    ):
        part = kl_totals(
            logps[rows], ref_logps[rows], layout(batch), config=config, labelled_only=labelled_only
        )
        added = part if added is None else added + part
    assert isinstance(added, KLTotals)
    sizes = written_out(packed, logps, ref_logps, config, labelled_only)
    for level, (_, _, size) in enumerate(sizes):
        assert added.totals[2 * level + 1] == whole.totals[2 * level + 1]
        difference = added.totals[2 * level] - whole.totals[2 * level]
        assert abs(difference.item()) <= 2 * n * FP64.eps * size


@fuzzed(20)
@given(case=st.builds(replace, sum_cases, config=configs()))
def test_normalizer_counts_labels(case, layout):
    segments, config = layout(case.batch, case.order), case.config
    labelled = [
        sum(label >= 0 for label, _ in steps) for _, steps, _ in case.batch
    ]  # steps without tokens have a sequence here, as `layout` says which
    outcome = sum(label >= 0 for label, _, _ in case.batch)
    steps = sum(labelled) if config.step_reduction == "mean" else sum(n > 0 for n in labelled)
    found = loss_normalizer(segments, config)
    assert found.outcome.dtype == torch.float64 and found == (outcome, steps)
