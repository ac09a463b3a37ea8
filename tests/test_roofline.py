"""Floors: what must move, what may be reached; and the page of predictions."""

import pathlib
import subprocess
import sys

import pytest
import torch

from stepkto_kernels.bench import predictions
from stepkto_kernels.bench.contenders import NEEDS, PATHS
from stepkto_kernels.bench.problems import (
    HALF_PROMPT,
    IGNORED,
    Shape,
    batch_layout,
    head_problem,
    on_path,
    scored_tokens,
)
from stepkto_kernels.bench.roofline import (
    Roofline,
    fewest_bytes,
    floor_ms,
    gemm_flops,
    measure_copy,
)

ROOT = pathlib.Path(__file__).parent.parent
TINY = Shape(64, 16, 100)  # two sequences of 32 tokens, 8 steps each
LAYOUT = 64 * 8 + 18 + 16 * 4  # indices of every token, labels, sequence of every step


@pytest.mark.parametrize(
    ("suite", "path", "want"),
    [
        ("head", "forward", 2 * (64 + 100) * 16 + 64 * (8 + 4)),
        ("head", "frozen", 2 * (2 * 64 + 100) * 16 + 64 * (8 + 4 + 4)),
        ("head", "recompute", 2 * (2 * 64 + 2 * 100) * 16 + 64 * (8 + 4 + 4)),
        ("head", "half_prompt", 2 * (32 + 64 + 2 * 100) * 16 + 64 * (8 + 4 + 4)),
        ("loss", "kto", 2 * (2 * 64 + 2 * 100) * 16 + 64 * (8 + 4) + LAYOUT + 4),
        ("loss", "kto+ref", 2 * (3 * 64 + 2 * 100) * 16 + 64 * 8 + LAYOUT + 4),
        ("segments", "segment_sums", 64 * (4 + 8 + 4) + 2 * 18 * 4),
        ("segments", "step_kto_loss", 64 * (4 + 4 + 4) + LAYOUT + 4),
    ],
)
def test_fewest_bytes(suite, path, want):
    assert fewest_bytes(suite, path, TINY, 2, NEEDS.get(path, ())) == want


def test_fewest_bytes_are_those_of_the_tensors():
    problem = head_problem(TINY, torch.bfloat16, "cpu")
    inputs = (problem.hidden, problem.weight, problem.target, problem.upstream)
    logps = torch.empty(64)
    moved = sum(x.nbytes for x in (*inputs, logps, problem.hidden, problem.weight))
    assert fewest_bytes("head", "recompute", TINY, 2, NEEDS["recompute"]) == moved
    layout = batch_layout(64, "cpu")
    parts = (layout.sequence_index, layout.step_index, layout.outcome_label)
    moved = sum(x.nbytes for x in (*parts, layout.step_label, layout.step_sequence))
    assert moved == LAYOUT


@pytest.mark.parametrize("N", [1, 7, 32, 96, 2048])
def test_scored_tokens(N):
    problem = head_problem(Shape(N, 4, 10), torch.float32, "cpu")
    for path in PATHS["head"]:
        kept = on_path(problem, path).target != IGNORED
        assert int(kept.sum()) == scored_tokens(N, path)
    assert scored_tokens(N, HALF_PROMPT) == (N / 2 if N % 2 == 0 else N)


def test_floor_is_the_larger_of_two_times():
    assert gemm_flops(3, Shape(10, 20, 30)) == 36000
    assert floor_ms(2e12, 1e9, gemm_tflops=100, copy_gb_s=1000) == pytest.approx(20)
    assert floor_ms(2e12, 1e12, gemm_tflops=100, copy_gb_s=1000) == pytest.approx(1000)


def row(**values):
    base = {"name": "ours", "N": 1000, "H": 1000, "V": 1000, "dtype": "float32", "units": 1}
    return {**base, "bytes": 10**6, "ms_best": 4.0, **values}


def test_columns_of_a_row():
    roofline = Roofline(copy_gb_s=100.0)
    assert roofline.columns(row()) == {"floor_ms": None, "of_floor": None}
    roofline.see(row(ms_best=1.0))  # not a bare GEMM
    roofline.see(row(name="gemm", units=3, ms_best=None))
    assert roofline.gemm_tflops == {}
    roofline.see(row(name="gemm", units=3, ms_best=6.0))
    roofline.see(row(name="gemm", units=3, ms_best=12.0))  # the best counts
    assert roofline.header() == {"gemm_tflops": {"float32": 1.0}, "copy_gb_s": 100.0}
    assert roofline.columns(row()) == pytest.approx({"floor_ms": 2.0, "of_floor": 2.0})
    assert roofline.columns(row(ms_best=None)) == {"floor_ms": 2.0, "of_floor": None}
    assert roofline.columns(row(dtype="bfloat16")) == {"floor_ms": None, "of_floor": None}
    segments = row(bytes=10**8, ms_best=2.0, H=None, V=None)
    del segments["units"]
    want = {"floor_ms": 1.0, "of_floor": 2.0, "gb_s": 50.0}
    assert roofline.columns(segments) == pytest.approx(want)
    assert roofline.columns({"name": "ours", "extra_mib": 1.0, "dtype": "float32"}) == {}


def test_copy_rate_is_one():
    assert 0.01 < measure_copy("cpu", 1 << 20) < 10_000


@pytest.mark.gpu
def test_copy_rate_of_a_gpu():
    assert 10 < measure_copy("cuda", 1 << 28) < 100_000


# ---- the page ---------------------------------------------------------------------------------


def test_the_page_holds_the_tables():
    command = [sys.executable, str(ROOT / "benchmarks/roofline.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, "run `python benchmarks/roofline.py`: " + done.stderr


def test_predictions():
    """DESIGN's figures: a byte a logit costs 92 / H of a unit."""
    assert predictions.byte_share(4096) == pytest.approx(92 / 4096, rel=2e-3)
    forward = predictions.PATHS["forward"]
    assert predictions.unit_ms(Shape(8192, 4096, 131072)) == pytest.approx(11.13, abs=0.01)
    assert predictions.vendor_ratio(forward, 4096) == pytest.approx(1 + 8 * 92 / 4096, rel=1e-3)
    bare = forward._replace(epilogue=0)
    assert predictions.epilogue_ratio(bare, 4096, 1.0) == 1
    assert predictions.epilogue_ratio(bare, 4096, 0.5) == 2
    # half of recompute's units, at half of the rate
    bare = predictions.PATHS["recompute"]._replace(epilogue=0)
    assert predictions.epilogue_ratio(bare, 4096, 0.5) == 1.5


@pytest.mark.parametrize("name", ["forward", "recompute"])
@pytest.mark.parametrize("H", predictions.WIDTHS)
def test_at_break_even_both_variants_take_as_long(name, H):
    path = predictions.PATHS[name]
    even = predictions.break_even(path, H)
    want = predictions.vendor_ratio(path, H)
    assert predictions.epilogue_ratio(path, H, even) == pytest.approx(want)


def test_sums_are_one_read_and_one_write_of_each_product():
    shape = Shape(100, 10, 1000)
    elements = 10 * 100 * 10 + 2 * 1000 * 10  # ten vocabulary chunks, two token chunks
    want = 8 * elements / predictions.COPY_GB_S / 1e6
    assert predictions.sums_ms(shape, 50, 100) == pytest.approx(want)
