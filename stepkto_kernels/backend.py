"""Which implementation serves a call: "auto" takes the fastest, a named one serves or raises."""

from __future__ import annotations

import torch

from stepkto_kernels import checks, native

BACKENDS = ("auto", "reference", "torch", "native", "triton")


def available_backends() -> dict[str, str]:
    """Name of each backend -> "ok", or why it cannot be used here."""
    return {
        "reference": "ok",
        "torch": "ok",
        "native": native.WHY_NOT or "ok",
        "triton": "not in this version: the Triton kernels are not written yet",
    }


def resolve(
    backend: str, device: torch.device, serving: tuple[str, ...] = ("reference", "torch", "native")
) -> str:
    """The backend that serves a call on `device`, for an op that the backends `serving` have.

    Raises:
        ValueError: an unknown backend, one that is not available, does not have the op, or does not
            run on the device.
    """
    checks.choice("backend", backend, BACKENDS)
    if backend == "auto":
        fast = "native" in serving and device.type == "cpu" and native.WHY_NOT is None
        backend = "native" if fast else "torch"
    state = available_backends()[backend]
    checks.require(state == "ok", "backend", "an available one", f"{backend!r} ({state})")
    checks.require(backend in serving, "backend", " or ".join(serving), repr(backend))
    devices = {"native": ("cpu",), "torch": ("cpu", "cuda")}.get(backend, (device.type,))
    want = "'reference' or another device"
    checks.require(device.type in devices, "backend", want, f"{backend!r} on {device.type}")
    return backend
