"""Registration of the library's custom ops."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def custom_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """torch.library.custom_op of a function that mutates nothing, with autocast off inside.

    The ops choose their own precision; autocast would round the GEMMs in them behind their back.
    """

    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            device = next(arg.device for arg in args if isinstance(arg, Tensor))
            with torch.autocast(device.type, enabled=False):
                return function(*args)

        return torch.library.custom_op(name, run, mutates_args=())

    return register
