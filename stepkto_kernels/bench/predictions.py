"""The roofline on paper: what each path of the head must cost on an H200, and what a variant adds.

Nothing here was measured by this project: the two rates are given, and the rate of our own GEMM is
an assumption that the tables vary. benchmarks/roofline.py writes them into benchmarks/ROOFLINE.md.
Letters: N tokens, H hidden size, V vocabulary, b bytes a logit beyond those of the bare GEMM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stepkto_kernels.bench.problems import HALF_PROMPT, Shape, scored_tokens
from stepkto_kernels.bench.roofline import fewest_bytes, floor_ms, gemm_flops
from stepkto_kernels.plan import MIB
from stepkto_kernels.training.report import markdown_table

GEMM_TFLOPS, COPY_GB_S = 790.0, 4300.0  # H200, bf16
BF16, FP32 = 2, 4  # bytes
PARTIALS, TILE = 8, 256  # bytes a token and vocabulary tile of the forward epilogue; its columns
EFFICIENCIES = (1.0, 0.95, 0.9, 0.85)  # our own GEMM's rate over the vendor's
SHAPES = tuple(Shape(8192, H, V) for H in (4096, 2048) for V in (131072, 151936))
WIDTHS = (1024, 2048, 4096, 8192)  # H
TILES = ((4096, 8192), (8192, 8192), (4096, 16384), (8192, 16384))  # tokens, vocabulary columns

NEEDS = {"forward": (), "frozen": ("hidden",)}
BOTH = ("hidden", "weight")


class Path(NamedTuple):
    """What a path costs beyond its GEMMs. A logit is written and read in fp32, dlogits in bf16."""

    units: int  # of the scored tokens
    vendor: int  # b with the vendor's GEMMs and row kernels
    own: int = 0  # units that our own GEMM with an epilogue would take over; 0: no such variant
    epilogue: float = 0.0  # b with it


PATHS = {
    "forward": Path(1, 2 * FP32, 1, PARTIALS / TILE),
    "frozen": Path(2, 2 * FP32 + BF16),
    # lse needs the whole row, so its logits are read once for lse and once for dlogits
    "fused": Path(3, 3 * FP32 + BF16),
    "cached": Path(3, 3 * FP32 + BF16),
    "recompute": Path(4, 4 * FP32 + BF16, 2, PARTIALS / TILE + BF16),
    HALF_PROMPT: Path(4, 4 * FP32 + BF16, 2, PARTIALS / TILE + BF16),
}
# The backward pass of recompute alone, for what others publish
BACKWARD = Path(3, 2 * FP32 + BF16, 1, BF16)


def unit_ms(shape: Shape) -> float:
    """Of one pass of the head at the vendor's rate."""
    return gemm_flops(1, shape) / GEMM_TFLOPS / 1e9


def byte_share(H: int) -> float:
    """Time of moving a byte for every logit, over that of a unit."""
    return GEMM_TFLOPS * 1e12 / (COPY_GB_S * 1e9) / (2 * H)


def vendor_ratio(path: Path, H: int) -> float:
    """Predicted time over the bare GEMMs of the same units, with row kernels."""
    return 1 + path.vendor * byte_share(H) / path.units


def epilogue_ratio(path: Path, H: int, efficiency: float) -> float:
    """The same with our own GEMM, its bytes in turn with the arithmetic."""
    units = path.units - path.own + path.own / efficiency
    return (units + path.epilogue * byte_share(H)) / path.units


def break_even(path: Path, H: int) -> float:
    """Efficiency of our own GEMM from which the epilogue is the faster variant."""
    return 1 / (1 + (path.vendor - path.epilogue) * byte_share(H) / path.own)


def sums_ms(shape: Shape, tokens: int, columns: int) -> float:
    """Of adding the products of all tiles to fp32 sums of dhidden and dweight, read and written."""
    N, H, V = shape
    times = -(-V // columns) * N + -(-N // tokens) * V
    return 2 * FP32 * times * H / COPY_GB_S / 1e6


def floors_table(shapes: Sequence[Shape] = SHAPES) -> str:
    """Units, operations, fewest bytes and the floor of every path at each shape."""
    rows = []
    for shape in shapes:
        for name, path in PATHS.items():
            suite, label = ("loss", "kto") if name == "fused" else ("head", name)
            n = scored_tokens(shape.N, name)
            flops = gemm_flops(path.units, shape._replace(N=n))
            moved = fewest_bytes(suite, label, shape, BF16, NEEDS.get(name, BOTH))
            rows.append(
                [
                    name,
                    str(shape),
                    f"{path.units * n / shape.N:g}",
                    f"{flops / 1e12:.2f}",
                    f"{moved / 1e9:.2f}",
                    f"{flops / GEMM_TFLOPS / 1e9:.2f}",
                    f"{moved / COPY_GB_S / 1e6:.2f}",
                    f"{floor_ms(flops, moved, GEMM_TFLOPS, COPY_GB_S):.2f}",
                ]
            )
    header = ["path", "N x H x V", "units", "TFLOP", "GB", "GEMM ms", "copy ms", "floor ms"]
    return markdown_table(header, rows)


def variants_table(widths: Sequence[int] = WIDTHS) -> str:
    """Predicted ratio to the bare GEMM of each path and variant, by H."""
    rows = []
    for name, path in PATHS.items():
        if name == HALF_PROMPT:  # the ratios of recompute
            continue
        for H in widths:
            row = [name, H, path.vendor, f"{vendor_ratio(path, H):.3f}"]
            if path.own:
                row += [f"{path.epilogue:.2f}"]
                row += [f"{epilogue_ratio(path, H, e):.3f}" for e in EFFICIENCIES]
                row += [f"{100 * break_even(path, H):.1f}"]
            else:
                row += ["-"] * (len(EFFICIENCIES) + 2)
            rows.append(row)
    header = ["path", "H", "b vendor", "ratio", "b epilogue"]
    header += [f"at {100 * e:.0f} %" for e in EFFICIENCIES]
    return markdown_table([*header, "break-even %"], rows)


def sums_table(shapes: Sequence[Shape] = SHAPES[::2]) -> str:
    """What adding up gradients over tiles of some sizes costs recompute."""
    rows = []
    for shape in shapes:
        for tokens, columns in TILES:
            ms = sums_ms(shape, tokens, columns)
            rows.append(
                [
                    f"{tokens} x {columns}",
                    str(shape),
                    tokens * columns * FP32 // MIB,
                    f"{ms:.2f}",
                    f"{100 * ms / (PATHS['recompute'].units * unit_ms(shape)):.1f}",
                ]
            )
    header = ["tile, tokens x columns", "N x H x V", "fp32 tile MiB", "sums ms", "% of 4 units"]
    return markdown_table(header, rows)


def backward_table(shapes: Sequence[Shape] = SHAPES[::2]) -> str:
    """Predicted ms of recompute's backward pass, the sums at the largest tile of TILES included."""
    rows = []
    for shape in shapes:
        own = BACKWARD.units * unit_ms(shape)
        sums = sums_ms(shape, *TILES[-1])
        row = [str(shape), f"{own:.1f}", f"{own * vendor_ratio(BACKWARD, shape.H) + sums:.1f}"]
        row += [f"{own * epilogue_ratio(BACKWARD, shape.H, e) + sums:.1f}" for e in EFFICIENCIES]
        rows.append(row)
    header = ["N x H x V", "bare 3 units", "vendor + rows"]
    return markdown_table([*header, *(f"epilogue {100 * e:.0f} %" for e in EFFICIENCIES)], rows)


TABLES = {
    "floors": floors_table,
    "variants": variants_table,
    "sums": sums_table,
    "backward": backward_table,
}
