"""Argument checks at the public boundary: a ValueError that names the argument, wanted and got.

Shapes, dtypes, devices and host numbers are looked at; values only on the CPU, as reading one would
wait for a device.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
LABEL_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)
MASK_DTYPES = (torch.bool, *LABEL_DTYPES)


def require(condition: bool, name: str, want: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: want {want}, got {got}")


def tensor(
    name: str, value: Any, *, dtypes: tuple[torch.dtype, ...], ndim: int | None = None
) -> None:
    require(isinstance(value, Tensor), name, "a torch.Tensor", type(value).__name__)
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    require(value.dtype in dtypes, name, f"dtype {names}", value.dtype)
    require(value.layout == torch.strided, name, "a dense tensor", value.layout)
    if ndim is not None:
        require(value.ndim == ndim, name, f"{ndim} dimensions", f"shape {tuple(value.shape)}")


def shape(name: str, value: Tensor, want: tuple[int, ...], letters: str) -> None:
    got = tuple(value.shape)
    if got != tuple(want):
        raise ValueError(f"{name}: want shape {letters} = {tuple(want)}, got {got}")


def same_device(name: str, value: Any, other_name: str, other: Any) -> None:
    require(
        value.device == other.device, name, f"{other_name}'s device {other.device}", value.device
    )


def choice(name: str, value: object, options: tuple[str, ...]) -> None:
    known = isinstance(value, str) and value in options
    require(known, name, "one of " + ", ".join(map(repr, options)), repr(value))


def number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """A finite int or float inside an interval; tensors are refused, reading them may sync."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number:
        inside = low < value if low_open else low <= value
        inside = inside and (value < high if high_open else value <= high)
        # an int may be larger than any float, and a float is what becomes of it
        if inside and -sys.float_info.max <= value <= sys.float_info.max:
            return
    interval = f"{'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"
    want = f"a finite number in {interval}" if is_number else f"a number in {interval}"
    raise ValueError(f"{name}: want {want}, got {value!r}")


def integer(name: str, value: Any, *, low: int) -> None:
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= low
    require(valid, name, f"an int >= {low}", repr(value))


def token_counts(value: Any, ranks: int) -> None:
    """A number of tokens for each rank of a group."""
    valid = isinstance(value, (list, tuple)) and len(value) == ranks
    valid = valid and all(type(count) is int and count >= 0 for count in value)
    require(valid, "counts", f"a number of tokens >= 0 for each of {ranks} ranks", value)


def boolean(name: str, value: Any) -> None:
    require(isinstance(value, bool), name, "True or False", repr(value))


def instance(name: str, value: Any, cls: type) -> None:
    if not isinstance(value, cls):  # torch.compile cannot trace the repr of what fits
        raise ValueError(f"{name}: want a {cls.__name__}, got {value!r}")


def memory_budget(value: Any) -> None:
    # below 2**63, as custom ops take int64
    valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    want = "a number of bytes >= 0 and < 2**63, or None"
    if value is not None and not valid:
        raise ValueError(f"memory_budget: want {want}, got {value!r}")


def token_tensor(name: str, value: Any, segments: Any) -> None:
    """One fp32 or fp64 number for each token of a StepSegments, in any shape."""
    tensor(name, value, dtypes=(torch.float32, torch.float64))
    num_tokens(name, value, segments)
    same_device(name, value, "segments", segments)


def num_tokens(name: str, value: Tensor, segments: Any) -> None:
    # the message is made on failure only: under torch.compile, writing out a size fixes it
    if value.numel() != segments.num_tokens:
        got = tuple(value.shape)
        raise ValueError(f"{name}: want N = {segments.num_tokens} elements, got shape {got}")


def values_are_free(value: Tensor) -> bool:
    """True where looking at the values neither waits for a device nor breaks a compiled graph."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def index(name: str, value: Tensor, size: int) -> None:
    """Values in [-1, size). Waits for a device."""
    if value.numel():
        low, high = (int(x) for x in value.aminmax())
        require(-1 <= low and high < size, name, f"values in [-1, {size})", (low, high))


def labels(name: str, value: Tensor) -> None:
    """1, 0 or -1 each. Looked at on the CPU only."""
    if value.numel() and values_are_free(value):
        low, high = (int(x) for x in value.aminmax())
        require(-1 <= low and high <= 1, name, "labels 1, 0 or -1", f"values in [{low}, {high}]")


def ref_logps(value: Any, shape_: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Reference log-probs must match the policy's: broadcasting here would change the loss."""
    tensor("ref_logps", value, dtypes=(dtype,))
    shape("ref_logps", value, tuple(shape_), "of logps")
    require(value.device == device, "ref_logps", f"the policy's device {device}", value.device)


def targets(target: Tensor, scored: Tensor, V: int, ignore_index: int) -> None:
    """Scored targets lie in the vocabulary. Looked at on the CPU only, where it costs nothing."""
    if not values_are_free(target):
        return
    wrong = (scored & ((target < 0) | (target >= V))).reshape(-1)
    if bool(wrong.any()):
        t = int(wrong.nonzero()[0, 0])
        want = f"a value in [0, V) = [0, {V}) or ignore_index = {ignore_index}"
        require(False, f"target[{t}]", want, int(target.reshape(-1)[t]))
