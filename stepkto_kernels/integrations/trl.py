"""TRL's trainers on our head.

KTO, DPO, GRPO, RLOO and SFT all score tokens in the forward pass that TRL's `add_fused_lm_head`
gives a model. It looks the autograd function for the head up in its module at each call, so
replacing that name there is enough: models, trainers, losses and metrics stay TRL's own.
Letters: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import CodeType, ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from stepkto_kernels import backend as backends
from stepkto_kernels import checks
from stepkto_kernels.linear_logprobs import linear_logprobs_with_stats

OLDEST = "1.16"
MODULE = "trl.trainer.utils"
FUNCTION, COMPACT = "_ChunkedLogProbFunction", "_use_triton"  # the names that are replaced there
# TRL's names of the statistics, in the order in which its head returns them, and ours.
STATS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_prob",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
# What the replaced functions are called with.
HEAD_ARGUMENTS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
FORWARD_ARGUMENTS = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")

_installed: list[StepKTOHead] = []  # the last one runs
_replaced: dict[str, Any] = {}  # TRL's own, by name, while any is installed


class StepKTOHead:
    """What `use_stepkto_head` returns; TRL calls `apply`."""

    def __init__(self, memory_budget: int | None, backend: str):
        self.memory_budget = memory_budget
        self.backend = backend
        self._entered = 0

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(STATS),
    ) -> tuple[Tensor | None, ...]:
        """TRL's head: log-probs (N,) fp32 and the statistics in STATS' order, None if not asked.

        hidden: (N, H). weight: (V, H); of FSDP2's DTensor TRL hands over the gathered whole. bias:
        (V,). targets: (N,) int64. chunk_size is TRL's tile, we have our own.
        """
        # ZeRO-3 frees a parameter after the forward pass, and only TRL's backward gathers it again
        if hasattr(weight, "ds_id") and torch.is_grad_enabled():
            raise ValueError("weight: want a whole parameter, got one sharded by DeepSpeed ZeRO-3")
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            # as in every other linear layer: operands, and so gradients, are narrow. Logits are not
            dtype = torch.get_autocast_dtype(device)
        logps, stats = linear_logprobs_with_stats(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            None if bias is None else bias.to(dtype),
            stats=[STATS.get(name, name) for name in outputs if name != "log_probs"],
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            memory_budget=self.memory_budget,
            backend=self.backend,
        )
        return logps, *(getattr(stats, ours) for ours in STATS.values())

    def install(self) -> None:
        """Let TRL call this head, on top of others that are installed. Twice is as good as once."""
        if self in _installed:
            return
        utils = _trl_utils()
        if not _installed:
            _replaced.update({name: getattr(utils, name) for name in (FUNCTION, COMPACT)})
            setattr(utils, COMPACT, _drops_ignored_tokens(_replaced[COMPACT]))
        _installed.append(self)
        setattr(utils, FUNCTION, self)

    def undo(self) -> None:
        """Take this head out, wherever among others it is. Twice is as good as once."""
        if self not in _installed:
            return
        _installed.remove(self)
        utils = importlib.import_module(MODULE)
        if _installed:
            setattr(utils, FUNCTION, _installed[-1])
            return
        for name, theirs in _replaced.items():
            setattr(utils, name, theirs)
        _replaced.clear()

    def __enter__(self) -> StepKTOHead:
        self.install()
        self._entered += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            self.undo()


def use_stepkto_head(*, memory_budget: int | None = None, backend: str = "auto") -> StepKTOHead:
    """Let TRL's KTO, DPO, GRPO, RLOO and SFT trainers run on our head, in the whole process.

        with use_stepkto_head():
            trainer.train()

    or a plain call, in force until `.undo()` of what it returns. It does not matter whether models
    and trainers were made before. Prompt, padding and other ignored tokens are dropped before the
    head, on the CPU too, where TRL scores them. bf16 models and autocast have bf16 operands and
    fp32 logits. A token with the same logit as a likelier one before it counts as a top-1 hit here.

    Args:
        memory_budget: as in `linear_logprobs`, of each forward pass.
        backend: as in `linear_logprobs`.
    Raises:
        ValueError: an argument is not as above; when TRL calls it, as `linear_logprobs`, or in
            training under DeepSpeed ZeRO-3.
        ImportError: there is no TRL >= 1.16, or its head is not the one that we know.
    """
    checks.memory_budget(memory_budget)
    checks.choice("backend", backend, backends.BACKENDS)
    head = StepKTOHead(memory_budget, backend)
    head.install()
    return head


def _drops_ignored_tokens(use_triton: Callable[[torch.device], bool]) -> Callable[..., bool]:
    """TRL asks `_use_triton` whether to score only tokens with a label: we can on the CPU too."""
    return lambda device: device.type == "cpu" or use_triton(device)


def _trl_utils() -> ModuleType:
    """TRL's module with the head in it, if that is as we know it."""
    try:
        trl = importlib.import_module("trl")
    except ImportError as error:
        raise ImportError(f"trl: want >= {OLDEST}, got none ({error})") from error
    version = trl.__version__
    release = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    if release < [int(part) for part in OLDEST.split(".")]:
        raise ImportError(f"trl: want >= {OLDEST}, got {version}")

    def require(want: object, got: object, what: str) -> None:
        if got != want:
            raise ImportError(f"{MODULE}.{what}: want {want}, got {got} (trl {version})")

    utils = importlib.import_module(MODULE)
    for name in (FUNCTION, COMPACT, "add_fused_lm_head"):
        require(True, hasattr(utils, name), f"{name} exists")
    if _installed:  # checked when the first was
        return utils
    function = getattr(utils, FUNCTION)
    require(HEAD_ARGUMENTS, _arguments(getattr(function, "forward", None)), f"{FUNCTION}.forward")
    order = getattr(inspect.getmodule(function), "OPTIONAL_OUTPUTS", None)
    require(tuple(STATS), order, f"{FUNCTION}'s OPTIONAL_OUTPUTS")
    require(("device",), _arguments(getattr(utils, COMPACT)), COMPACT)
    forward = utils.add_fused_lm_head
    require(FORWARD_ARGUMENTS, _arguments(forward), "add_fused_lm_head")
    used = _global_names(forward.__code__)
    for name in (FUNCTION, COMPACT):
        require(True, name in used, f"add_fused_lm_head uses {name}")
    return utils


def _arguments(function: Any) -> tuple[str, ...] | None:
    return tuple(inspect.signature(function).parameters) if callable(function) else None


def _global_names(code: CodeType) -> set[str]:
    """Names that a function and those defined in it look up outside of themselves."""
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*map(_global_names, inner))
