"""Which implementation serves a call: "auto" takes the fastest, a named one serves or raises."""

from __future__ import annotations

import torch

from stepkto_kernels import checks

BACKENDS = ("auto", "reference", "torch", "native", "triton")
_UNAVAILABLE = {
    "native": "not in this version: the C++ kernels are not written yet",
    "triton": "not in this version: the Triton kernels are not written yet",
}


def available_backends() -> dict[str, str]:
    """Name of each backend -> "ok", or why it cannot be used here."""
    return {name: _UNAVAILABLE.get(name, "ok") for name in BACKENDS[1:]}


def resolve(backend: str, device: torch.device) -> str:
    """The backend that serves a call on `device`: "reference" or "torch".

    Raises:
        ValueError: an unknown backend, one that is not available, or a device it does not run on.
    """
    checks.choice("backend", backend, BACKENDS)
    why_not = _UNAVAILABLE.get(backend)
    checks.require(why_not is None, "backend", "an available one", f"{backend!r} ({why_not})")
    served = device.type in ("cpu", "cuda") or backend == "reference"
    checks.require(served, "backend", f"'reference' on {device.type} tensors", repr(backend))
    return "torch" if backend == "auto" else backend
