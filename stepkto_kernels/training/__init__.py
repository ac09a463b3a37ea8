"""Training with Step-KTO: data, sampling, rewards and the trainer.

StepKTOTrainer and StepKTOArguments are imported when first used, as they bring in transformers;
each submodule brings in only what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepkto_kernels.training.arguments import StepKTOArguments
    from stepkto_kernels.training.trainer import StepKTOTrainer

__all__ = ["StepKTOArguments", "StepKTOTrainer"]

_MODULES = {"StepKTOArguments": "arguments", "StepKTOTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
