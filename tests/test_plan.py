"""plan.py: which mode runs, in which chunks. Arithmetic on shapes alone.

Letters: N tokens, H hidden size, V vocabulary, R cached rows.
"""

import inspect
from itertools import product

import pytest

from stepkto_kernels import plan
from stepkto_kernels.plan import (
    MIB,
    HeadPlan,
    cached_rows,
    cpu_tile,
    cut,
    even_chunk,
    fused_rows,
    last_level_cache,
    plan_head,
    vocab_chunk,
)

DEVICES = ("cpu", "cuda")
VOCABULARIES = (
    *(1, 2, 63, 64, 65, 2047, 2048, 2049, 4097, 65537),
    *(32000, 50257, 128256, 151936, 262144),  # Llama 2, GPT-2, Llama 3, Qwen 2.5, Gemma 3
)
BUDGETS = (0, 1, 10**6, 10**8, 10**10, 10**13)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 100])
@pytest.mark.parametrize("chunk", [1, 16, 100, 1000])
def test_cut_covers_exactly(length, chunk):
    slices = cut(length, chunk)
    assert [i for s in slices for i in range(length)[s]] == list(range(length))
    assert all(0 < s.stop - s.start <= chunk for s in slices)
    assert len(slices) == -(-length // chunk)


@pytest.mark.parametrize("length", [0, 1, 100, 2048, 2049, 5000])
@pytest.mark.parametrize("widest", [1, 64, 2048])
@pytest.mark.parametrize("multiple", [1, 64])
def test_even_chunks(length, widest, multiple):
    """The fewest pieces, none of which is much shorter than the others."""
    chunk = even_chunk(length, widest, multiple)
    pieces = cut(length, chunk)
    assert chunk % multiple == 0 and chunk < max(widest, 1) + multiple
    assert len(pieces) <= -(-length // widest)
    assert sum(s.stop - s.start for s in pieces) == length


@pytest.mark.parametrize("mib", [0, 1, 2, 4, 8, 16, 32, 64, 105, 384, 10**4])
def test_a_cpu_tile_fits_a_quarter_of_the_cache(mib):
    tokens, columns = cpu_tile(mib * MIB)
    assert tokens == 2 * columns and columns in (256, 512, 1024, 2048)
    # and one of twice the edge does not, unless it is the widest
    assert columns == 256 or tokens * columns * 4 <= mib * MIB / 4
    assert columns == 2048 or 4 * tokens * columns * 4 > mib * MIB / 4
    assert cpu_tile(32 * MIB) == (2048, 1024)


def test_last_level_cache(tmp_path):
    """The largest that the system names, and a stated default where it names none."""
    assert last_level_cache(tmp_path) == plan.UNKNOWN_CACHE
    for i, size in enumerate(["48K", "1024K", "32M"]):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    assert last_level_cache(tmp_path) == 32 * MIB
    (tmp_path / "index2" / "size").write_text("")
    assert last_level_cache(tmp_path) == plan.UNKNOWN_CACHE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_vocab_chunk(V, device):
    """As few chunks of at most VOCAB_CHUNK columns as there can be, even but for rounding to 64."""
    chunk = vocab_chunk(V, device)
    assert 1 <= chunk <= plan.VOCAB_CHUNK[device]
    assert chunk == V or chunk % 64 == 0
    widths = [s.stop - s.start for s in cut(V, chunk)]
    assert sum(widths) == V and len(widths) == -(-V // plan.VOCAB_CHUNK[device])
    assert chunk - V / len(widths) < 64 or len(widths) == 1


def test_epilogue_pays_where_moving_logits_costs_more_than_the_slower_gemm():
    """Two fp32 transfers of a logit against the GEMM's share; fp32 operands go to the vendor."""
    assert plan.epilogue_pays(2048, 2) and plan.epilogue_pays(4096, 2)
    assert not plan.epilogue_pays(10**5, 2)
    assert not plan.epilogue_pays(2048, 4)


def test_vocab_chunk_is_a_function_of_v_alone():
    """A token's log-prob is folded chunk by chunk: its bits must not depend on batch or mode."""
    assert list(inspect.signature(vocab_chunk).parameters) == ["V", "device_type"]


def test_an_unknown_device_is_treated_as_a_gpu():
    assert vocab_chunk(10**5, "xpu") == vocab_chunk(10**5, "cuda")
    assert plan.token_chunk("xpu") == plan.token_chunk("cuda")
    assert fused_rows(10**5, None, "xpu") == fused_rows(10**5, None, "cuda")


# needs_hidden, needs_weight, needs_entropy, memory_budget -> mode
MODES = {
    (False, False, False, None): "forward",
    (False, False, True, None): "forward",
    (False, False, False, 10**12): "forward",
    (True, False, False, None): "frozen",
    (True, False, False, 10**12): "frozen",
    (True, False, True, None): "recompute",  # the entropy's gradient needs p itself
    (True, True, True, 10**12): "recompute",
    (True, True, False, None): "recompute",
    (True, True, False, 0): "recompute",
    (True, True, False, 10**12): "cached",
    (False, True, False, None): "recompute",
    (False, True, False, 10**12): "cached",
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("asked", MODES, ids=str)
def test_modes(asked, itemsize, device):
    needs_hidden, needs_weight, needs_entropy, memory_budget = asked
    got = plan_head(
        1000,
        32000,
        itemsize,
        device,
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        needs_entropy=needs_entropy,
        memory_budget=memory_budget,
    )
    assert got == HeadPlan(MODES[asked], 1000 if MODES[asked] == "cached" else 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_cached_rows_use_the_budget_and_no_more(itemsize, device):
    """Narrow dtypes need fp32 logits of one token chunk beside the cache."""
    for N, V, budget in product((0, 1, 1000, 10**6), VOCABULARIES, BUDGETS):
        rows = cached_rows(N, V, itemsize, budget, device)
        assert 0 <= rows <= N
        scratch = 0 if itemsize == 4 else plan.token_chunk(device) * V * 4
        assert rows == 0 or rows * V * itemsize + scratch <= budget
        assert rows == N or (rows + 1) * V * itemsize + scratch > budget
        if rows == 0:
            wants = {"needs_hidden": True, "needs_weight": True, "memory_budget": budget}
            assert plan_head(N, V, itemsize, device, **wants) == HeadPlan("recompute")


@pytest.mark.parametrize("device", DEVICES)
def test_fused_rows_use_the_budget_but_hold_at_least_16(device):
    for V, budget in product(VOCABULARIES, BUDGETS):
        rows = fused_rows(V, budget, device)
        assert rows >= plan.MIN_FUSED_ROWS == 16
        assert rows == 16 or rows * V * 4 <= budget
        assert (rows + 1) * V * 4 > budget
        default = max(plan.FUSED_BYTES[device], plan.FUSED_ROWS[device] * V * 4)
        assert fused_rows(V, None, device) == fused_rows(V, default, device)
