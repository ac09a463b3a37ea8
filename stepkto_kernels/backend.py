"""Which implementation serves a call: "auto" takes the fastest, a named one serves or raises."""

from __future__ import annotations

import importlib.util
import os

import torch

from stepkto_kernels import checks, native

BACKENDS = ("auto", "reference", "torch", "native", "triton")


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton() -> str | None:
    """Why the Triton kernels cannot run here, None if they can. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() and not interpreted():
        return "there is no CUDA GPU, and TRITON_INTERPRET=1 is not set"
    if interpreted() and importlib.util.find_spec("numpy") is None:
        return "Triton's interpreter needs numpy, which is not installed"
    return None


def available_backends() -> dict[str, str]:
    """Name of each backend -> "ok", or why it cannot be used here."""
    return {
        "reference": "ok",
        "torch": "ok",
        "native": native.WHY_NOT or "ok",
        "triton": _triton() or "ok",
    }


def resolve(
    backend: str,
    device: torch.device,
    serving: tuple[str, ...] = ("reference", "torch", "native", "triton"),
) -> str:
    """The backend that serves a call on `device`, for an op that the backends `serving` have.

    Raises:
        ValueError: an unknown backend, one that is not available, does not have the op, or does not
            run on the device.
    """
    checks.choice("backend", backend, BACKENDS)
    if backend == "auto":
        fastest = {"cpu": "native", "cuda": "triton"}.get(device.type, "torch")
        usable = fastest in serving and available_backends()[fastest] == "ok"
        backend = fastest if usable else "torch"
    state = available_backends()[backend]
    checks.require(state == "ok", "backend", "an available one", f"{backend!r} ({state})")
    checks.require(backend in serving, "backend", " or ".join(serving), repr(backend))
    triton = ("cpu",) if interpreted() else ("cuda",)
    kinds = {"native": ("cpu",), "torch": ("cpu", "cuda"), "triton": triton}
    devices = kinds.get(backend, (device.type,))
    want = "'reference' or another device"
    checks.require(device.type in devices, "backend", want, f"{backend!r} on {device.type}")
    return backend
