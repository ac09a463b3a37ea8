"""Row kernels on one tile of logits, in Triton: log-sum-exp, statistics, dlogits.

The same names as rows.py of the package, whose formulas these are. A tile is read as the GEMM left
it, in fp32, bf16 or fp16; the logit options are applied on the way and all arithmetic is fp32.
`Fold` keeps partial results of every vocabulary chunk, and one kernel folds them in a fixed order,
whoever wrote them: the kernels here or the GEMM epilogues of gemm_epilogue.py.

Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (online softmax).
Letters: n tokens, v vocabulary columns of the tile, C vocabulary chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepkto_kernels.config import LogitOptions
from stepkto_kernels.rows import LogSumExp, RowGradient, Tile

INTERPRETED = bool(triton.knobs.runtime.interpret)
# One row a program: 4096 columns are 16 KiB of fp32, 16 elements a thread. The interpreter pays by
# program, so there a program takes many rows; a row's bits do not depend on that.
BLOCK_ROWS = 32 if INTERPRETED else 1
BLOCK_V, NUM_WARPS = 4096, 8
MAX_REGISTERS = 96  # a thread, for two programs a multiprocessor and more
# Of the fold over chunks: C is 16 for tiles of logits, about 500 to 2000 for GEMM epilogues.
FINISH_ROWS, FINISH_CHUNKS = 32, 32
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a max that is finite even of masked logits
NEGLIGIBLE = tl.constexpr(-1e4)  # log of a probability that is 0 in fp32; 0 * -inf would be NaN


def registers(most: int) -> dict[str, int]:
    """Launch option: registers a thread, on NVIDIA's GPUs; other compilers do not know it.

    Left to itself ptxas keeps a few values of some mixtures of options in memory, to fit one more
    program on a multiprocessor (benchmarks/compile_report.py --all).
    """
    return {} if torch.version.hip else {"maxnreg": most}


# ---- mathematics of a logit, shared with gemm_epilogue.py ----------------------------------------


@triton.jit
def tanh_fp32(x):
    """tanh from exp, an odd polynomial near 0, where 1 - 2 / (exp(2|x|) + 1) would cancel."""
    a = tl.abs(x)
    s = x * x
    # minimax polynomial of Cephes' tanhf on |x| < 0.625
    p = -5.70498872745e-3
    p = p * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    near = p * s * x + x
    # a comparison, as tl.minimum of NaN and 20 is 20: the tanh of NaN would be 1
    limited = tl.where(a > 20.0, 20.0, a)
    tail = 1.0 - 2.0 / (tl.exp(2.0 * limited) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0.0, -tail, tail))


@triton.jit
def transform(
    x,  # (rows, columns) fp32
    bias_ptr,  # (v,) any float
    columns,
    v,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """z = cap(logit_scale * (x + bias)) / temperature, fp32."""
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=columns < v, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        x *= logit_scale
    if HAS_SOFTCAP:
        x = tanh_fp32(x / softcap) * softcap
    if HAS_TEMPERATURE:
        x = x / temperature
    return x


@triton.jit
def column_of(target_ptr, rows, here, v0, v):
    """Column of each row's target among v from v0 on, -1 where it is not there. int32.

    As int32, like the columns: a 64-bit comparison for every element takes registers. Compared
    before it is narrowed, or a target far outside would come back as another column.
    """
    column = tl.load(target_ptr + rows, mask=here, other=-1) - v0
    return tl.where((column >= 0) & (column < v), column, -1).to(tl.int32)


@triton.jit
def cap_slope(z, softcap, temperature):
    """d cap / d (its argument) of a transformed logit; 0 where tanh rounded to 1.

    Within 3 ulps of 1, as z lost up to that on the way; the slope there is 4e-7 at most.
    """
    t = z * (temperature / softcap)
    return tl.where(tl.abs(t) >= 0.9999998, 0.0, 1.0 - t * t)


@triton.jit
def expm1_fp32(x):
    """exp(x) - 1 for x <= 0, relative error of about 1e-6: by its series where that is shorter."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x / 720)))))
    return tl.where(x > -0.35, series, tl.exp(x) - 1.0)


@triton.jit
def dlogits_of(
    z,  # (rows, columns) fp32
    is_target,  # (rows, columns)
    rows,  # positions of the rows in what follows
    here,  # mask of `rows`
    top_ptr,  # (n,) fp32, as all that follow; see rows.RowGradient
    logsum_ptr,
    logp_ptr,
    dlogp_ptr,
    dentropy_ptr,
    entropy_ptr,
    logit_scale,
    softcap,
    temperature,
    HAS_DLOGP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Gradient of the loss in hidden @ weight.T + bias. Exactly 0 where that of the row is."""
    top = tl.load(top_ptr + rows, mask=here, other=0.0)[:, None]
    logsum = tl.load(logsum_ptr + rows, mask=here, other=0.0)[:, None]
    logp = tl.load(logp_ptr + rows, mask=here, other=0.0)[:, None]
    dlogp = tl.full(logp.shape, 1.0, tl.float32)
    if HAS_DLOGP:
        dlogp = tl.load(dlogp_ptr + rows, mask=here, other=0.0)[:, None]
    log_p = (z - top) - logsum
    # p - 1 of a target that is almost certain must not come from a rounded p
    own = -dlogp * expm1_fp32(logp)
    pull = dlogp
    dead = dlogp == 0.0
    if HAS_ENTROPY:
        dentropy = tl.load(dentropy_ptr + rows, mask=here, other=0.0)[:, None]
        entropy = tl.load(entropy_ptr + rows, mask=here, other=0.0)[:, None]
        finite = tl.maximum(logp, NEGLIGIBLE)
        own -= dentropy * tl.exp(finite) * (finite + entropy)
        pull = dlogp + dentropy * (tl.maximum(log_p, NEGLIGIBLE) + entropy)
        dead = dead & (dentropy == 0.0)
    d = tl.where(is_target, own, -pull * tl.exp(log_p))
    if HAS_SOFTCAP:
        d *= cap_slope(z, softcap, temperature)
    # a token without gradient may hold anything, NaN too, so its 0 is not a product
    return tl.where(dead, 0.0, d * (logit_scale / temperature))


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _fold_kernel(
    x_ptr,  # (n, v) fp32 | bf16 | fp16, unit stride along v
    target_ptr,  # (n,) int64
    bias_ptr,  # (v,) fp32
    top_ptr,  # (n,) fp32, as all that follow: partial results of this chunk, out
    sum_ptr,
    logit_sum_ptr,
    moment_ptr,
    square_ptr,
    target_logit_ptr,  # out where the target is in the tile
    running_top_ptr,  # in and out
    rescale_ptr,  # out
    d_ptr,  # (n, v), out
    n,
    v,
    v0,
    stride_x,
    stride_d,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_LOGIT_SUM: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    FROZEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = rows < n
    column = column_of(target_ptr, rows, here, v0, v)
    top = tl.full((BLOCK_ROWS,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    logit_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    square = tl.zeros((BLOCK_ROWS,), tl.float32)
    target_logit = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, v, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        inside = here[:, None] & (offs_v < v)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_x + offs_v[None, :], mask=inside, other=0.0)
        z = transform(
            x.to(tl.float32),
            bias_ptr,
            offs_v,
            v,
            logit_scale,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SCALE,
            HAS_SOFTCAP,
            HAS_TEMPERATURE,
        )
        if HAS_LOGIT_SUM:
            logit_sum += tl.sum(tl.where(inside, z, 0.0), 1)
        target_logit += tl.sum(tl.where(offs_v[None, :] == column[:, None], z, 0.0), 1)
        z = tl.where(inside, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        drop = top - new_top
        shrink = tl.exp(drop)
        e = tl.exp(z - new_top[:, None])
        if HAS_MOMENT:
            # sum e^(z - top') (z - top') = e^drop * (moment + drop * sum) of what was there
            carried = tl.where(total == 0.0, 0.0, shrink * (moment + drop * total))
            deep = tl.maximum(z - new_top[:, None], NEGLIGIBLE)
            moment = carried + tl.sum(e * deep, 1)
        if HAS_SQUARE:
            square = square * shrink * shrink + tl.sum(e * e, 1)
        total = total * shrink + tl.sum(e, 1)
        top = new_top
    tl.store(top_ptr + rows, top, mask=here)
    tl.store(sum_ptr + rows, total, mask=here)
    tl.store(target_logit_ptr + rows, target_logit, mask=here & (column >= 0))
    if HAS_LOGIT_SUM:
        tl.store(logit_sum_ptr + rows, logit_sum, mask=here)
    if HAS_MOMENT:
        tl.store(moment_ptr + rows, moment, mask=here)
    if HAS_SQUARE:
        tl.store(square_ptr + rows, square, mask=here)
    if FROZEN:
        before = tl.load(running_top_ptr + rows, mask=here, other=0.0)
        running = tl.maximum(before, top)
        tl.store(running_top_ptr + rows, running, mask=here)
        tl.store(rescale_ptr + rows, tl.exp(before - running), mask=here)
        for start in range(0, v, BLOCK_V):  # from the cache: a row of 8192 columns is 32 KiB
            offs_v = start + tl.arange(0, BLOCK_V)
            inside = here[:, None] & (offs_v < v)[None, :]
            x = tl.load(x_ptr + rows[:, None] * stride_x + offs_v[None, :], mask=inside, other=0.0)
            z = transform(
                x.to(tl.float32),
                bias_ptr,
                offs_v,
                v,
                logit_scale,
                softcap,
                temperature,
                HAS_BIAS,
                HAS_SCALE,
                HAS_SOFTCAP,
                HAS_TEMPERATURE,
            )
            d = tl.exp(z - running[:, None])
            if HAS_SOFTCAP:
                d *= cap_slope(z, softcap, temperature)
            d = tl.where(offs_v[None, :] == column[:, None], 0.0, d)
            out = d_ptr + rows[:, None] * stride_d + offs_v[None, :]
            tl.store(out, d.to(d_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dlogits_kernel(
    x_ptr,  # (n, v) fp32 | bf16 | fp16, unit stride along v
    target_ptr,  # (n,) int64
    bias_ptr,  # (v,) fp32
    top_ptr,  # (n,) fp32, as all that follow; see rows.RowGradient
    logsum_ptr,
    logp_ptr,
    dlogp_ptr,
    dentropy_ptr,
    entropy_ptr,
    d_ptr,  # (n, v), out
    n,
    v,
    v0,
    stride_x,
    stride_d,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_DLOGP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    here = rows < n
    inside = here[:, None] & (offs_v < v)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x + offs_v[None, :], mask=inside, other=0.0)
    z = transform(
        x.to(tl.float32),
        bias_ptr,
        offs_v,
        v,
        logit_scale,
        softcap,
        temperature,
        HAS_BIAS,
        HAS_SCALE,
        HAS_SOFTCAP,
        HAS_TEMPERATURE,
    )
    column = column_of(target_ptr, rows, here, v0, v)
    d = dlogits_of(
        z,
        offs_v[None, :] == column[:, None],
        rows,
        here,
        top_ptr,
        logsum_ptr,
        logp_ptr,
        dlogp_ptr,
        dentropy_ptr,
        entropy_ptr,
        logit_scale,
        softcap,
        temperature,
        HAS_DLOGP,
        HAS_ENTROPY,
        HAS_SOFTCAP,
    )
    out = d_ptr + rows[:, None] * stride_d + offs_v[None, :]
    tl.store(out, d.to(d_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finish_kernel(
    top_ptr,  # (C, n) fp32, as the four that follow: partial results
    sum_ptr,
    logit_sum_ptr,
    moment_ptr,
    square_ptr,
    target_logit_ptr,  # (n,) fp32
    logp_ptr,  # (n,) fp32, out, as all that follow
    out_top_ptr,
    logsum_ptr,
    entropy_ptr,
    mean_logit_ptr,
    is_top1_ptr,
    log_square_ptr,
    n,
    C,
    vocabulary,
    HAS_LOGIT_SUM: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < n
    top = tl.full((ROWS,), LOWEST, tl.float32)
    for start in range(0, C, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < C)[:, None] & here[None, :]
        offs = chunk.to(tl.int64)[:, None] * n + rows[None, :]
        top = tl.maximum(top, tl.max(tl.load(top_ptr + offs, mask=inside, other=LOWEST), 0))
    total = tl.zeros((ROWS,), tl.float32)
    logit_sum = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, C, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < C)[:, None] & here[None, :]
        offs = chunk.to(tl.int64)[:, None] * n + rows[None, :]
        drop = tl.load(top_ptr + offs, mask=inside, other=LOWEST) - top[None, :]
        shrink = tl.exp(drop)
        part = tl.load(sum_ptr + offs, mask=inside, other=0.0)
        total += tl.sum(shrink * part, 0)
        if HAS_MOMENT:
            within = tl.load(moment_ptr + offs, mask=inside, other=0.0)
            raised = tl.maximum(drop, NEGLIGIBLE) * part
            moment += tl.sum(shrink * (within + raised), 0)
        if HAS_SQUARE:
            part = tl.load(square_ptr + offs, mask=inside, other=0.0)
            square += tl.sum(shrink * shrink * part, 0)
        if HAS_LOGIT_SUM:
            logit_sum += tl.sum(tl.load(logit_sum_ptr + offs, mask=inside, other=0.0), 0)
    total = tl.where(here, total, 1.0)
    square = tl.where(here, square, 1.0)
    logsum = tl.log(total)
    target_logit = tl.load(target_logit_ptr + rows, mask=here, other=0.0)
    tl.store(logp_ptr + rows, (target_logit - top) - logsum, mask=here)
    tl.store(out_top_ptr + rows, top, mask=here)
    tl.store(logsum_ptr + rows, logsum, mask=here)
    if HAS_MOMENT:
        tl.store(entropy_ptr + rows, logsum - moment / total, mask=here)
    if HAS_LOGIT_SUM:
        tl.store(mean_logit_ptr + rows, logit_sum / vocabulary, mask=here)
    if HAS_TOP1:
        tl.store(is_top1_ptr + rows, tl.where(target_logit >= top, 1.0, 0.0), mask=here)
    if HAS_SQUARE:
        tl.store(log_square_ptr + rows, tl.log(square) - 2.0 * logsum, mask=here)


# ---- launchers ----------------------------------------------------------------------------------


def option_arguments(options: LogitOptions, has_bias: bool) -> dict[str, float | bool]:
    """Keyword arguments of every kernel that transforms logits."""
    return {
        "logit_scale": float(options.logit_scale),
        "softcap": float(options.softcap or 1.0),
        "temperature": float(options.temperature),
        "HAS_BIAS": has_bias,
        "HAS_SCALE": options.logit_scale != 1.0,
        "HAS_SOFTCAP": options.softcap is not None,
        "HAS_TEMPERATURE": options.temperature != 1.0,
    }


def stat_arguments(stats: tuple[str, ...]) -> dict[str, bool]:
    """Which partial results the statistics `stats` are made of."""
    return {
        "HAS_LOGIT_SUM": "mean_logit" in stats,
        "HAS_MOMENT": "entropy" in stats,
        "HAS_SQUARE": "log_sum_sq_prob" in stats,
    }


def prepare(tile: Tile, options: LogitOptions) -> Tile:
    """The kernels take tiles as they are."""
    return tile


class Fold:
    """Collects log-sum-exp, target logit and statistics of n tokens, a vocabulary chunk a call."""

    def __init__(
        self,
        n: int,
        chunks: int,
        vocabulary: int,
        stats: tuple[str, ...],
        options: LogitOptions,
        device: torch.device,
    ):
        new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=device)
        self.n, self.chunks, self.vocabulary = n, chunks, vocabulary
        self.stats, self.options = stats, options
        # (C, n), so that whoever writes or reads a chunk does so in one run
        self.top, self.sum = new(chunks, n), new(chunks, n)
        wanted = stat_arguments(stats)
        part = lambda name: new(chunks, n) if wanted[name] else self.top
        self.logit_sum = part("HAS_LOGIT_SUM")
        self.moment = part("HAS_MOMENT")
        self.square = part("HAS_SQUARE")
        # NaN where the target is in no chunk: an ignored token, or one that is out of range
        self.target_logit = new(n).fill_(torch.nan)
        self.running_top = new(n).fill_(torch.finfo(torch.float32).min)

    @property
    def partials(self) -> tuple[Tensor, ...]:
        """(C, n) each: top, sum, logit_sum, moment, square; `top` again for those not wanted."""
        return self.top, self.sum, self.logit_sum, self.moment, self.square

    def add(self, tile: Tile, rows: slice, chunk: int) -> None:
        """Fold in a tile of the tokens `rows` and the vocabulary chunk `chunk`."""
        self._launch(tile, rows, chunk, None, None)

    def add_frozen(
        self, tile: Tile, rows: slice, chunk: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """`add`, and exp(z - top) * slope with 0 at the target, (n, v) of `dtype`.

        In place where the tile has that dtype.
        top is the largest logit so far. Also returns what sums over earlier tiles are to be
        multiplied by, (n,) fp32, as that may have risen.
        """
        rescale = torch.empty(tile.x.shape[0], dtype=torch.float32, device=tile.x.device)
        d = tile.x if tile.x.dtype == dtype else torch.empty_like(tile.x, dtype=dtype)
        self._launch(tile, rows, chunk, rescale, d)
        return rescale, d

    def _launch(
        self, tile: Tile, rows: slice, chunk: int, rescale: Tensor | None, d: Tensor | None
    ) -> None:
        n, v = tile.x.shape
        if n == 0:
            return
        assert tile.x.stride(1) == 1 or v == 1
        parts = [part[chunk, rows] for part in self.partials]
        d = tile.x if d is None else d
        rescaled = self.target_logit if rescale is None else rescale
        _fold_kernel[(triton.cdiv(n, BLOCK_ROWS),)](
            tile.x,
            tile.target,
            tile.x if tile.bias is None else tile.bias,
            *parts,
            self.target_logit[rows],
            self.running_top[rows],
            rescaled,
            d,
            n,
            v,
            tile.v0,
            tile.x.stride(0),
            d.stride(0),
            **option_arguments(self.options, tile.bias is not None),
            **stat_arguments(self.stats),
            FROZEN=rescale is not None,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_V=block_v(v),
            num_warps=NUM_WARPS,
            **registers(MAX_REGISTERS),
        )

    def finish(self) -> tuple[Tensor, LogSumExp, dict[str, Tensor]]:
        """Log-prob of the target (n,), its log-sum-exp, and the statistics by name (n,)."""
        row = lambda: torch.empty_like(self.target_logit)
        logp, top, logsum = row(), row(), row()
        values = {name: row() for name in self.stats}
        if self.n:
            _finish_kernel[(triton.cdiv(self.n, FINISH_ROWS),)](
                *self.partials,
                self.target_logit,
                logp,
                top,
                logsum,
                values.get("entropy", logp),
                values.get("mean_logit", logp),
                values.get("is_top1", logp),
                values.get("log_sum_sq_prob", logp),
                self.n,
                self.chunks,
                self.vocabulary,
                **stat_arguments(self.stats),
                HAS_TOP1="is_top1" in self.stats,
                ROWS=FINISH_ROWS,
                CHUNKS=FINISH_CHUNKS,
                num_warps=4,
                **registers(MAX_REGISTERS),
            )
        return logp, LogSumExp(top, logsum), values


def block_v(v: int) -> int:
    """Columns that a program takes at once. A function of the chunk's width alone."""
    return min(BLOCK_V, max(triton.next_power_of_2(v), 16))


def gradient_arguments(row: RowGradient) -> tuple[list[Tensor], dict[str, bool]]:
    """Six (n,) tensors that kernels take for a RowGradient, and which of them are there."""
    held = [row.lse.top, row.lse.logsum, row.logp, row.dlogp, row.dentropy, row.entropy]
    tensors = [(row.logp if x is None else x).contiguous() for x in held]
    return tensors, {"HAS_DLOGP": row.dlogp is not None, "HAS_ENTROPY": row.dentropy is not None}


def dlogits_(
    tile: Tile, row: RowGradient, options: LogitOptions, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits -> gradient of the loss in hidden @ weight.T + bias, (n, v) of `dtype`.

    In place where the tile has that dtype.
    """
    out = tile.x if tile.x.dtype == dtype else torch.empty_like(tile.x, dtype=dtype)
    return dlogits(tile, row, options, out)


def dlogits(tile: Tile, row: RowGradient, options: LogitOptions, out: Tensor) -> Tensor:
    """The same into out (n, v) of any dtype."""
    n, v = tile.x.shape
    if n == 0:
        return out
    assert tile.x.stride(1) == 1 or v == 1
    tensors, flags = gradient_arguments(row)
    _dlogits_kernel[(triton.cdiv(n, BLOCK_ROWS), triton.cdiv(v, block_v(v)))](
        tile.x,
        tile.target,
        tile.x if tile.bias is None else tile.bias,
        *tensors,
        out,
        n,
        v,
        tile.v0,
        tile.x.stride(0),
        out.stride(0),
        **option_arguments(options, tile.bias is not None),
        **flags,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_V=block_v(v),
        num_warps=NUM_WARPS,
        **registers(MAX_REGISTERS),
    )
    return out
