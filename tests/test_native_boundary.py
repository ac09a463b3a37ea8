"""The C++ extension called with what does not fit: a ValueError, never a read or write outside.

`make sanitize` runs this under AddressSanitizer, which ends the process at the first one.
Letters: n rows, v columns, N tokens, B sequences, S steps.
"""

import os

import pytest
import torch

from stepkto_kernels import native
from stepkto_kernels.metrics import TOTALS

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
fuzzed = settings(
    max_examples=int(os.environ.get("STEPKTO_FUZZ", "60")),
    deadline=None,
    derandomize="STEPKTO_FUZZ" not in os.environ,
)


def fp32(*shape):
    return torch.randn(shape)


def fp64(*shape):
    return torch.zeros(shape, dtype=torch.float64)


def integers(low, high, n, dtype):
    return torch.randint(low, high, (n,), dtype=dtype)


def valid_tile(n, v):
    target = integers(-3, v + 3, n, torch.int64)
    return {"x": fp32(n, v), "bias": fp32(v), "target": target, "v0": 0}


def valid_state(n):
    top = torch.full((n,), torch.finfo(torch.float32).min)
    names = "logit_sum", "moment", "square_sum"
    return {"top": top, "sum": fp64(n), "target_logit": fp32(n)} | {k: fp64(n) for k in names}


def valid_row(n):
    names = "top", "logsum", "logp", "dlogp", "dentropy", "entropy"
    return {name: fp32(n) for name in names}


def valid_segments(N, B, S):
    return {
        "sequence_index": integers(-1, B, N, torch.int32),
        "step_index": integers(-1, S, N, torch.int32),
        "outcome_label": integers(-1, 2, B, torch.int8),
        "step_label": integers(-1, 2, S, torch.int8),
        "step_sequence": integers(-1, B, S, torch.int32),
    }


def valid_sums(n):
    return {"ratio": fp64(n), "logp": fp64(n), "tokens": fp64(n)}


LEVEL = (0.0, 0.1, 1.0, 1.0)


def valid_options():
    return {"outcome": LEVEL, "step": LEVEL, "step_weight": 1.0, "step_reduction": 0} | {
        "length_normalize": True,
        "outcome_normalizer": 2.0,
        "step_normalizer": 3.0,
    }


def valid_calls(n, v, N, B, S):
    """name -> arguments; a pair (class, arguments) stands for an object of the extension."""
    tile, state = ("Tile", valid_tile(n, v)), ("FoldState", valid_state(n))
    segments = ("Segments", valid_segments(N, B, S))
    outcome, step = ("LevelSums", valid_sums(B)), ("LevelSums", valid_sums(S))
    options = ("LogitOptions", {"temperature": 0.7, "logit_scale": 1.3, "softcap": 5.0})
    tokens = {"logps": fp32(N), "ref_logps": fp32(N), "low": -1.0, "high": 1.0}
    return {
        "fold": {"tile": tile, "state": state, "options": options, "threads": 2},
        "fold_frozen": {"tile": tile, "state": state, "options": options}
        | {"rescale": fp32(n), "threads": 2},
        "finish": {"state": state, "logp": fp32(n), "logsum": fp32(n), "entropy": fp32(n)}
        | {"log_sum_sq_prob": fp32(n), "threads": 1},
        "dlogits": {"tile": tile, "row": ("RowGradient", valid_row(n))}
        | {"options": options, "threads": 2},
        "segment_sums": {"segments": segments, **tokens, "outcome": outcome, "step": step},
        "batch_loss": {"segments": segments, "outcome": outcome, "step": step}
        | {"options": ("LossOptions", valid_options()), "loss": fp64(), "totals": fp64(len(TOTALS))}
        | {"outcome_slope": fp64(B), "step_slope": fp64(S)},
        "token_slopes": {"segments": segments, **tokens}
        | {"outcome_slope": fp64(B), "step_slope": fp64(S), "scale": 1.0, "g": fp32(N)},
        "exp_array": {"x": fp32(n), "out": fp32(n)},
        "tanh_array": {"x": fp32(n), "out": fp32(n)},
    }


def call(name, arguments):
    made = {}

    def make(value):
        if not isinstance(value, tuple) or not isinstance(value[0], str):
            return value
        if id(value) not in made:
            made[id(value)] = getattr(native._native, value[0])(*value[1].values())
        return made[id(value)]

    getattr(native._native, name)(*(make(value) for value in arguments.values()))


def freed(x):
    """x with its storage taken away, as FSDP does with parameters that are not in use."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def cut_short(x):
    x = x.clone()
    x.untyped_storage().resize_(max(x.untyped_storage().nbytes() - 1, 0))
    return x


def overlapping(x):
    """As many rows as x has, all of them the first."""
    return x[:1].expand(x.shape) if x.ndim and len(x) > 1 else x.unsqueeze(0)


# What is no longer what the kernels take; of empty tensors some are.
SPOILED_TENSOR = {
    "longer": lambda x: torch.cat([x, x[:1]]) if x.ndim and len(x) else x.new_zeros(7),
    "shorter": lambda x: x[:-1] if x.ndim and len(x) else x.new_zeros(3, 3),
    "another shape": lambda x: x[..., None],
    "no dimension": lambda x: x.new_zeros(()) if x.ndim else x.new_zeros(1),
    "huge": lambda x: x.new_zeros(1).expand(2**40),
    "another dtype": lambda x: x.to(torch.float16),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "overlapping": overlapping,
    "freed": freed,
    "cut short": cut_short,
    "numpy": lambda x: x.numpy()[..., ::-1] if x.ndim else x.numpy(),
    "address": lambda x: x.data_ptr(),
    "list": lambda x: x.tolist(),
    "text": lambda x: "x",
    "another object": lambda x: object(),
}
SPOILED_INDEX = {
    "past the end": lambda x: torch.where(torch.arange(len(x)) == len(x) // 2, 2**7 - 1, x),
    "negative": lambda x: torch.where(torch.arange(len(x)) == 0, -2, x),
}
SPOILED_INTEGER = [-1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**200, 1.5, None, "1"]
OPTIONAL = {"bias", "logit_sum", "moment", "square_sum", "dlogp", "dentropy"}
INDICES = {"sequence_index", "step_index", "outcome_label", "step_label", "step_sequence"}


def leaves(arguments, path=()):
    """Paths of all tensors and integers that a call takes."""
    for name, value in arguments.items():
        if isinstance(value, tuple) and isinstance(value[0], str):
            yield from leaves(value[1], (*path, name))
        elif isinstance(value, torch.Tensor) or name in ("v0", "threads", "step_reduction"):
            yield (*path, name)


def replaced(arguments, path, change):
    name, *rest = path
    value = arguments[name]
    value = (value[0], replaced(value[1], rest, change)) if rest else change(value)
    return arguments | {name: value}


sizes = st.integers(0, 70)


@fuzzed
@given(st.data(), sizes, st.integers(0, 2100), sizes, st.integers(1, 9), sizes)
def test_one_wrong_argument(data, n, v, N, B, S):
    calls = valid_calls(n, v, N, B, S)
    name = data.draw(st.sampled_from(sorted(calls)))
    call(name, calls[name])  # fits as it is
    path = data.draw(st.sampled_from(sorted(leaves(calls[name]))))
    if path[-1] in ("v0", "threads", "step_reduction"):
        wrong = data.draw(st.sampled_from(SPOILED_INTEGER))
        if path[-1] == "v0" and wrong in (2**31, 2**63 - 1):  # a late column is a column
            wrong = 2**63 - v
        spoiled = replaced(calls[name], path, lambda _: wrong)
    else:
        kinds = SPOILED_TENSOR | (SPOILED_INDEX if path[-1] in INDICES else {})
        kind = data.draw(st.sampled_from(sorted(kinds)))
        spoiled = replaced(calls[name], path, kinds[kind])
        before = calls[name]
        for part in path:
            before = (before[1] if isinstance(before, tuple) else before)[part]
        if before.numel() == 0 or still_fits(before, kind):
            allowed_to_pass(name, spoiled)
            return
    with pytest.raises(ValueError, match=r"want .*, got "):
        call(name, spoiled)


def still_fits(x, kind):
    """Whether another stride is none: of one element, or of one row."""
    if kind not in ("every second", "overlapping"):
        return False
    y = SPOILED_TENSOR[kind](x)
    return y.shape == x.shape and y.is_contiguous()


def allowed_to_pass(name, arguments):
    try:
        call(name, arguments)
    except ValueError as error:
        assert "want " in str(error)


@pytest.mark.parametrize("name", sorted(valid_calls(0, 0, 0, 1, 0)))
@pytest.mark.parametrize(
    "size", [(0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (3, 0, 4, 2, 0), (33, 2049, 65, 9, 70)]
)
def test_what_fits_is_taken(name, size):
    call(name, valid_calls(*size)[name])


def test_lengths_of_objects_must_agree():
    calls, shorter = valid_calls(4, 5, 6, 2, 3), valid_calls(3, 5, 5, 1, 2)
    for name, argument in (
        ("fold", "state"),
        ("fold_frozen", "state"),
        ("dlogits", "row"),
        ("segment_sums", "outcome"),
        ("segment_sums", "step"),
        ("batch_loss", "outcome"),
        ("batch_loss", "step"),
    ):
        with pytest.raises(ValueError, match=f"{argument}: want . rows, got ."):
            call(name, calls[name] | {argument: shorter[name][argument]})


def test_statistics_that_were_not_collected():
    arguments = valid_calls(4, 5, 6, 2, 3)["finish"]
    for statistic, sum_ in (("entropy", "moment"), ("log_sum_sq_prob", "square_sum")):
        name, state = arguments["state"]
        without = arguments | {"state": (name, state | {sum_: None})}
        with pytest.raises(ValueError, match=f"{statistic}: want None, as state has no {sum_}"):
            call("finish", without)
        call("finish", without | {statistic: None})
    row = valid_row(4) | {"entropy": None}
    with pytest.raises(ValueError, match="entropy: want a tensor, as dentropy is given"):
        native._native.RowGradient(*row.values())


def test_any_target_is_outside_of_a_tile_or_in_it():
    """Also those whose distance from the tile's first column is no int64."""
    lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    target = torch.tensor([lowest, lowest + 1, -1, 6, 7, highest])
    arguments = valid_calls(6, 3, 0, 1, 0)["fold"]
    tile, state = arguments["tile"][1], arguments["state"][1]
    state["target_logit"].fill_(0.0)
    tile |= {"target": target, "v0": 5, "bias": None}
    want = torch.zeros(6)
    options = ("LogitOptions", {"temperature": 1.0, "logit_scale": 1.0, "softcap": 0.0})
    want[3], want[4] = tile["x"][3, 1], tile["x"][4, 2]
    call("fold", arguments | {"options": options})
    assert torch.equal(state["target_logit"], want)
