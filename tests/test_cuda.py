"""The CUDA kernels against segment_loss.py: on a GPU, and on the host from the same source.

The host runs the kernels' own source on stand-ins for warps and blocks (cuda_on_host.h). It shows
that they compute the right thing, not that a GPU runs them, nor races within a block.
Letters: N tokens, B sequences, S steps.
"""

import contextlib
import functools
import importlib.machinery
import importlib.util
import math
import os
import pathlib
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import replace

import pytest
import torch

from stepkto_kernels import StepKTOConfig, StepSegments, cuda, segment_loss, step_kto, step_kto_loss
from stepkto_kernels.segments import SegmentIndex

CSRC = pathlib.Path(__file__).parent.parent / "csrc"
# fp64 sums of at most 3000 numbers in another order: 3000 * 2**-53 of their sizes' sum, which is
# at most 10 times the largest result here
CLOSE = dict(rtol=3e-12, atol=3e-12, equal_nan=True)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="session")
def host_build(tmp_path_factory):
    """Module like stepkto_kernels._cuda that runs the kernels on the host."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    shutil.copy(pathlib.Path(__file__).parent / "cuda_on_host.h", folder / "cuda_runtime.h")
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += ["-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
    includes = folder, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]
    command += [f"-I{path}" for path in includes]
    command += shlex.split(os.environ.get("STEPKTO_HOST_FLAGS", ""))  # benchmarks/sanitize.py
    target = folder / "_cuda.so"
    command += ["-x", "c++", CSRC / "step_kto_cuda.cu", CSRC / "bindings_cuda.cpp", "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(target))
    spec = importlib.util.spec_from_file_location("_cuda", target, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(params=[GPU, "host"])
def device(request, monkeypatch):
    """Where cuda.py runs its kernels."""
    if request.param == "cuda":
        if cuda.WHY_NOT is not None:
            pytest.skip(cuda.WHY_NOT)
        return torch.device("cuda", torch.cuda.current_device())
    host_build = request.getfixturevalue("host_build")
    queue = lambda device: contextlib.nullcontext(host_build.Queue(torch.device("cpu"), 0))
    monkeypatch.setattr(cuda, "_cuda", host_build)
    monkeypatch.setattr(cuda, "_queue", queue)
    monkeypatch.setattr(cuda, "_workspaces", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return torch.device("cpu")


def random_segments(N, B, S, order="packed", seed=0):
    """A layout of N tokens: one in ten unscored, a third of the labels missing.

    order: "packed" lays sequences end to end and their steps within, "shuffled" spreads each over
    the whole batch.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, n: torch.randint(0, high, (n,), generator=generator)
    step_sequence = draw(B, S).sort().values if B else torch.full((S,), -1)
    sequence = draw(B, N).sort().values if B else torch.full((N,), -1)
    step = torch.full((N,), -1)
    for b in range(B):
        of_sequence, steps = (sequence == b).nonzero()[:, 0], (step_sequence == b).nonzero()[:, 0]
        if len(steps):
            step[of_sequence] = steps[draw(len(steps), len(of_sequence)).sort().values]
    unscored = torch.rand(N, generator=generator) < 0.1
    sequence[unscored] = step[unscored] = -1
    at = torch.randperm(N, generator=generator) if order == "shuffled" else slice(None)
    return StepSegments(
        sequence_index=sequence[at].int(),
        step_index=step[at].int(),
        outcome_label=(draw(3, B) - 1).to(torch.int8),
        step_label=(draw(3, S) - 1).to(torch.int8),
        step_sequence=step_sequence.int(),
    ).validate()


def random_logps(N, seed=0):
    """Policy and reference log-probs of N tokens."""
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(N, generator=generator) ** 4
    return logps, logps + 0.2 * torch.randn(N, generator=generator)


def scalars(*values, device="cpu"):
    return tuple(torch.tensor(value, dtype=torch.float64, device=device) for value in values)


BASELINE, NORMALIZER = (0.21, 0.13), (5.0, 3.0)
SCALE = 0.75  # upstream gradient, exact in fp32
LABELS = ("outcome_label", "step_label")


def expected(segments, config, logps, ref_logps, matched=False):
    """BatchLoss, g and the batch of segment_loss.py."""
    index, options = SegmentIndex.of(segments), config.segment_options()
    batch = segment_loss.SegmentBatch(index, options)
    batch.add(logps, ref_logps)
    baseline = batch.matched_baseline() if matched else scalars(*BASELINE)
    out = batch.loss(baseline, scalars(*NORMALIZER))
    g = segment_loss.token_slopes(index, options, logps, ref_logps, *out[2:], scale=SCALE)
    return out, g, batch


def one_launch(segments, config, logps, ref_logps, device, matched=False):
    """BatchLoss and g of cuda.py."""
    index, options = SegmentIndex.of(segments.to(device)), config.segment_options()
    logps, ref_logps = logps.to(device), ref_logps.to(device)
    z, n = scalars(*BASELINE, device=device), scalars(*NORMALIZER, device=device)
    out = cuda.batch_loss(index, options, logps, ref_logps, z, n, matched)
    scale = torch.tensor(SCALE, device=device)
    g = cuda.token_slopes(index, options, logps, ref_logps, *out[2:], scale=scale)
    return out, g


def in_blocks(segments, config, logps, ref_logps, device, blocks):
    """BatchLoss, g of the tokens of all blocks, and the batch, of cuda.py."""
    index, options = SegmentIndex.of(segments.to(device)), config.segment_options()
    batch = cuda.SegmentBatch(index, options)
    logps, ref_logps = logps.to(device), ref_logps.to(device)
    for rows in blocks:
        rows = rows.to(device)
        batch.add(logps[rows], ref_logps[rows], rows)
    z, n = scalars(*BASELINE, device=device), scalars(*NORMALIZER, device=device)
    out = batch.loss(z, n)
    g = torch.full_like(logps, math.nan)
    for rows in blocks:
        rows = rows.to(device)
        part = logps[rows], ref_logps[rows]
        g[rows] = cuda.token_slopes(index, options, *part, *out[2:], scale=SCALE, rows=rows)
    return out, g, batch


def assert_close(ours, theirs):
    for name, one, other in zip(theirs._fields, ours, theirs, strict=True):
        message = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(one.cpu(), other, **CLOSE, msg=message)


def assert_g_close(ours, theirs):
    # fp32 of fp64 numbers that differ in their last bits
    torch.testing.assert_close(ours.cpu(), theirs, rtol=2**-23, atol=1e-12, equal_nan=True)


def assert_same_bits(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize("order", ["packed", "shuffled"])
def test_agrees_with_segment_loss(device, config, order):
    segments = random_segments(700, 6, 15, order)
    logps, ref_logps = random_logps(700)
    matched = config.reference_point == "matched"
    theirs, g, _ = expected(segments, config, logps, ref_logps, matched)
    ours, our_g = one_launch(segments, config, logps, ref_logps, device, matched)
    assert_close(ours, theirs)
    assert_g_close(our_g, g)


@pytest.mark.parametrize(
    "N, B, S",
    [
        *[(0, 0, 0), (0, 3, 2), (1, 1, 0), (1, 1, 1), (5, 0, 0), (5, 0, 2), (40, 4, 0)],
        # a warp, a block, more segments than threads of a block
        *[(31, 2, 3), (32, 2, 3), (33, 2, 3), (511, 3, 9), (512, 3, 9), (513, 3, 9)],
        *[(3000, 600, 700), (1200, 1, 1), (64, 40, 900)],
    ],
)
def test_sizes(device, N, B, S):
    for order in ("packed", "shuffled"):
        segments = random_segments(N, B, S, order)
        logps, ref_logps = random_logps(N)
        theirs, g, _ = expected(segments, StepKTOConfig(), logps, ref_logps, matched=True)
        ours, our_g = one_launch(segments, StepKTOConfig(), logps, ref_logps, device, matched=True)
        assert_close(ours, theirs)
        assert_g_close(our_g, g)


@pytest.mark.parametrize("side", [0, 1, -1])
def test_one_class(device, side):
    segments = random_segments(300, 5, 12)
    labels = {name: torch.full_like(getattr(segments, name), side) for name in LABELS}
    segments = replace(segments, **labels)
    logps, ref_logps = random_logps(300)
    theirs, g, _ = expected(segments, StepKTOConfig(), logps, ref_logps, matched=True)
    ours, our_g = one_launch(segments, StepKTOConfig(), logps, ref_logps, device, matched=True)
    assert_close(ours, theirs)
    assert_g_close(our_g, g)


def test_in_blocks_of_rows(device):
    """As fused_step_kto does: shuffled blocks, the sums and the loss between them."""
    segments = random_segments(700, 6, 15, "shuffled")
    config = StepKTOConfig(ratio_clip=(-0.3, 0.4), length_normalize=True)
    logps, ref_logps = random_logps(700)
    theirs, g, batch = expected(segments, config, logps, ref_logps)
    whole = one_launch(segments, config, logps, ref_logps, device)
    blocks = torch.randperm(700).split([1, 0, 333, 366])
    ours, our_g, our_batch = in_blocks(segments, config, logps, ref_logps, device, blocks)
    assert_close(ours, theirs)
    assert_g_close(our_g, g)
    for name in ("ratio", "logp", "tokens"):
        for one, other in zip(getattr(our_batch, name), getattr(batch, name), strict=True):
            torch.testing.assert_close(one.cpu(), other, **CLOSE)
    for one, other in zip(our_batch.matched_baseline(), batch.matched_baseline(), strict=True):
        torch.testing.assert_close(one.cpu(), other, **CLOSE)
    assert_same_bits([*ours, our_g], [*whole[0], whole[1]])


def test_rows_of_some_tokens(device):
    """Tokens that are not added count among the scored ones, as in segment_loss.py."""
    segments = random_segments(300, 4, 9)
    index, options = SegmentIndex.of(segments), StepKTOConfig().segment_options()
    logps, ref_logps = random_logps(300)
    rows = torch.arange(5, 250, 3)
    batch = segment_loss.SegmentBatch(index, options)
    batch.add(logps[rows], ref_logps[rows], rows)
    theirs = batch.loss(scalars(*BASELINE), scalars(*NORMALIZER))
    ours, _, _ = in_blocks(segments, StepKTOConfig(), logps, ref_logps, device, [rows])
    assert_close(ours, theirs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["policy", "reference", "both"])
def test_not_finite(device, value, where):
    segments = random_segments(300, 4, 9)
    logps, ref_logps = random_logps(300)
    token = int((segments.step_index >= 0).nonzero()[0])
    if where != "reference":
        logps[token] = value
    if where != "policy":
        ref_logps[token] = value
    for clip in (None, (-0.3, 0.4)):
        config = StepKTOConfig(ratio_clip=clip)
        theirs, g, _ = expected(segments, config, logps, ref_logps)
        ours, our_g = one_launch(segments, config, logps, ref_logps, device)
        assert_close(ours, theirs)
        assert_g_close(our_g, g)


def test_infinities_of_both_signs(device):
    segments = random_segments(40, 1, 1)
    logps, ref_logps = random_logps(40)
    first, second = (segments.step_index >= 0).nonzero()[:2, 0].tolist()
    logps[first], logps[second] = math.inf, -math.inf
    theirs, _, _ = expected(segments, StepKTOConfig(), logps, ref_logps)
    ours, _ = one_launch(segments, StepKTOConfig(), logps, ref_logps, device)
    assert_close(ours, theirs)


def test_unlabelled_nan_is_not_in_the_loss(device):
    segments = random_segments(300, 4, 9)
    segments = replace(
        segments,
        outcome_label=torch.tensor([-1, 1, 0, 1], dtype=torch.int8),
        step_label=segments.step_label.where(segments.step_sequence > 0, -1),
    )
    logps, ref_logps = random_logps(300)
    logps[segments.sequence_index == 0] = math.nan
    theirs, g, _ = expected(segments, StepKTOConfig(), logps, ref_logps, matched=True)
    ours, our_g = one_launch(segments, StepKTOConfig(), logps, ref_logps, device, matched=True)
    assert not ours.loss.isnan()
    assert_close(ours, theirs)
    assert_g_close(our_g, g)


def test_sums_are_exact(device):
    """Log-probs of at least 2**-32 in size are multiples of 2**-56: nothing is rounded but the sum.

    So a log-ratio of a model with itself is 0 exactly, and one token's sum is its log-prob.
    """
    N = 1000
    exponent = torch.randint(-32, 40, (N,)).float()
    logps = torch.randn(N).sign() * (1 + torch.rand(N)) * 2**exponent
    segments = random_segments(N, 3, 8, "shuffled")
    blocks = [torch.arange(N)]
    _, _, batch = in_blocks(segments, StepKTOConfig(), logps, logps, device, blocks)
    for level, index in enumerate((segments.sequence_index, segments.step_index)):
        sums = [math.fsum(logps[index == i].tolist()) for i in range(len(batch.logp[level]))]
        assert batch.logp[level].tolist() == sums
        assert batch.ratio[level].tolist() == [0.0] * len(sums)


def test_tiny_and_huge(device):
    """Below 2**-57 an addend counts as 0, beyond 2**44 as 2**44."""
    segments = random_segments(64, 1, 0)
    segments = replace(segments, sequence_index=torch.zeros(64, dtype=torch.int32))
    for value, kept in ((1e-30, 0.0), (-1e-18, 0.0), (2.0**44, 2.0**44), (-3e38, -(2.0**44))):
        logps = torch.full((64,), value)
        blocks = [torch.arange(64)]
        config = StepKTOConfig()
        _, _, batch = in_blocks(segments, config, logps, torch.zeros(64), device, blocks)
        assert batch.logp[0].tolist() == batch.ratio[0].tolist() == [64 * kept]


def test_bits_do_not_depend_on_the_order(device):
    """The host build also draws another order of blocks and threads each time."""
    segments = random_segments(1500, 9, 40)
    logps, ref_logps = random_logps(1500)
    first = one_launch(segments, StepKTOConfig(), logps, ref_logps, device)
    for _ in range(3):
        at = torch.randperm(1500)
        index = {name: getattr(segments, name)[at] for name in ("sequence_index", "step_index")}
        moved = replace(segments, **index)
        out, g = one_launch(moved, StepKTOConfig(), logps[at], ref_logps[at], device)
        assert_same_bits(out, first[0])
        assert torch.equal(g, first[1][at.to(device)])


def test_repeats_bit_for_bit(device):
    segments = random_segments(700, 6, 15, "shuffled")
    logps, ref_logps = random_logps(700)
    first = one_launch(segments, StepKTOConfig(), logps, ref_logps, device)
    for _ in range(20 if device.type == "cuda" else 3):
        out, g = one_launch(segments, StepKTOConfig(), logps, ref_logps, device)
        assert_same_bits([*out, g], [*first[0], first[1]])
    assert len(cuda._workspaces) == 1
    assert all(not workspace.any() for workspace in cuda._workspaces.values())


@pytest.mark.parametrize("name", ["sequence_index", "step_index", "step_sequence"])
def test_index_past_the_end_is_nan(device, name):
    """Not a write past the end, and the next call is as if nothing had been."""
    segments = random_segments(300, 4, 9)
    logps, ref_logps = random_logps(300)
    wrong = getattr(segments, name).clone()
    wrong[len(wrong) // 2] = 1 << 20
    bad = replace(segments, **{name: wrong})
    out, g = one_launch(bad, StepKTOConfig(), logps, ref_logps, device)
    assert out.loss.isnan() and out.outcome_slope.isnan().all() and out.step_slope.isnan().all()
    scored = (bad.sequence_index >= 0) | (bad.step_index >= 0)
    assert g.cpu()[scored].isnan().all()
    theirs, _, _ = expected(segments, StepKTOConfig(), logps, ref_logps)
    assert_close(one_launch(segments, StepKTOConfig(), logps, ref_logps, device)[0], theirs)


def test_launch_errors_are_raised(device):
    if device.type == "cuda":
        pytest.skip("needs a launch that fails")
    queue = cuda._cuda.Queue(torch.device("cpu"), 1)  # the host build has the default stream only
    segments = cuda._segments(SegmentIndex.of(random_segments(3, 1, 1)))
    sums, workspace = torch.empty(6, dtype=torch.float64), torch.zeros(100, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="stepkto read_sums: an error of the test"):
        cuda._cuda.read_sums(segments, workspace, sums, queue)


def test_tensors_that_do_not_fit_are_refused(host_build):
    """What would be read or written outside of a tensor, or on another device."""
    segments = random_segments(4, 2, 3)
    index = SegmentIndex.of(segments)
    queue = host_build.Queue(torch.device("cpu"), 0)
    wide = lambda *shape: torch.zeros(shape, dtype=torch.float64)
    words = host_build.workspace_words(2, 3)
    workspace = torch.zeros(words, dtype=torch.int64)

    def tokens(n=4, rows=None):
        return host_build.Tokens(rows, torch.zeros(n), torch.zeros(n), -9.0, 9.0)

    def loss(B=2, S=3, totals=23, reduction=0):
        level, numbers = (0.1, 1.0, 1.0), [wide() for _ in range(4)]
        out = wide(), wide(totals), wide(B), wide(S)
        return host_build.Loss(level, level, 1.0, reduction, False, *numbers, False, *out)

    def run(index=index, tokens=tokens, loss=loss, workspace=workspace, sums=15, queue=queue):
        held = host_build.Segments(*index)
        host_build.forward(held, tokens(), loss(), workspace, wide(sums), queue)

    run()
    rows = lambda dtype: torch.arange(2, dtype=dtype)
    for wrong, message in (
        (
            dict(index=index._replace(step_index=index.step_index[:3])),
            r"step_index: want shape \(4",
        ),
        (dict(index=index._replace(step_label=index.step_label.int())), "step_label: want dtype"),
        (dict(tokens=lambda: tokens(3)), "logps: want 4 rows, got 3"),
        (dict(tokens=lambda: tokens(2, rows(torch.int32))), "rows: want dtype torch.int64"),
        (dict(tokens=lambda: tokens(3, rows(torch.int64))), r"rows: want shape \(3"),
        (dict(loss=lambda: loss(B=3)), "loss: want 5 rows, got 6"),
        (dict(loss=lambda: loss(totals=22)), r"totals: want shape \(23"),
        (dict(loss=lambda: loss(reduction=3)), r"step_reduction: want an int in \[0, 2\]"),
        (dict(workspace=workspace[1:]), f"workspace: want {words} words or more"),
        (dict(sums=14), r"sums: want shape \(15"),
        (dict(queue=host_build.Queue(torch.device("cuda", 0), 0)), "want device cuda:0, got cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**wrong)


def test_public_loss(device, config, baseline, monkeypatch):
    """step_kto_loss and its gradient, dispatched to these kernels."""
    monkeypatch.setattr(step_kto.backends, "resolve", lambda *args: "triton")
    monkeypatch.setattr(cuda, "serves", lambda device: True)
    segments = random_segments(200, 6, 15)
    logps, ref_logps = random_logps(200)
    ours = logps.clone().to(device).requires_grad_()
    arguments = ref_logps.to(device), segments.to(device), baseline, config
    loss, metrics = step_kto_loss(ours, *arguments)
    (loss * 0.7).backward()
    monkeypatch.setattr(cuda, "serves", lambda device: False)
    theirs = logps.requires_grad_()
    want, want_metrics = step_kto_loss(theirs, ref_logps, segments, baseline, config)
    (want * 0.7).backward()
    torch.testing.assert_close(loss.cpu(), want, rtol=2**-23, atol=0)
    torch.testing.assert_close(metrics.totals.cpu(), want_metrics.totals, **CLOSE)
    assert_g_close(ours.grad, theirs.grad)


def test_dispatch():
    where = torch.device("cpu")
    assert step_kto.kernels("native", where).__name__.endswith("native")
    assert step_kto.kernels("triton", where) is segment_loss
    assert step_kto.kernels("torch", torch.device("cuda")) is segment_loss


@pytest.mark.gpu
def test_dispatch_on_a_gpu():
    if cuda.WHY_NOT is not None:
        pytest.skip(cuda.WHY_NOT)
    assert step_kto.kernels("triton", torch.device("cuda", 0)) is cuda


@pytest.mark.parametrize("device", [GPU], indirect=True)
def test_nothing_waits_for_the_device(device):
    segments = random_segments(700, 6, 15).to(device)
    logps, ref_logps = (x.to(device) for x in random_logps(700))
    index, options = SegmentIndex.of(segments), StepKTOConfig().segment_options()
    z, n = scalars(*BASELINE, device=device), scalars(*NORMALIZER, device=device)
    rows = torch.arange(100, device=device)
    scale = torch.ones((), device=device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = cuda.batch_loss(index, options, logps, ref_logps, z, n, matched=True)
        cuda.token_slopes(index, options, logps, ref_logps, *out[2:], scale=scale)
        batch = cuda.SegmentBatch(index, options)
        batch.add(logps[:100], ref_logps[:100], rows)
        batch.loss(batch.matched_baseline(), n)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("device", [GPU], indirect=True)
def test_graph_replay(device):
    """Replays see new log-probs and a new reference point, interleaved with calls outside."""
    segments = random_segments(700, 6, 15, "shuffled").to(device)
    index, options = SegmentIndex.of(segments), StepKTOConfig().segment_options()
    logps, ref_logps = (x.to(device) for x in random_logps(700))
    z, n = scalars(*BASELINE, device=device), scalars(*NORMALIZER, device=device)
    scale = torch.tensor(SCALE, device=device)

    def run():
        out = cuda.batch_loss(index, options, logps, ref_logps, z, n)
        return *out, cuda.token_slopes(index, options, logps, ref_logps, *out[2:], scale=scale)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        new = random_logps(700, seed)
        logps.copy_(new[0])
        ref_logps.copy_(new[1])
        z[0].fill_(0.1 * seed)
        graph.replay()
        assert_same_bits(captured, run())


@pytest.mark.parametrize("device", [GPU], indirect=True)
def test_side_stream(device):
    """Runs behind what its own stream has queued, and not on the default one."""
    segments = random_segments(700, 6, 15)
    logps, ref_logps = random_logps(700)
    want = one_launch(segments, StepKTOConfig(), logps, ref_logps, device)
    on_device = segments.to(device)
    ours, ref_logps = torch.zeros(700, device=device), ref_logps.to(device)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        ours.copy_(logps.to(device))
        got = one_launch(on_device, StepKTOConfig(), ours, ref_logps, device)
    stream.synchronize()
    assert_same_bits([*got[0], got[1]], [*want[0], want[1]])
