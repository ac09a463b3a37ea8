"""Which implementation serves a call, and what is said where one cannot."""

import importlib.util

import pytest
import torch

from stepkto_kernels import (
    StepKTOConfig,
    StepSegments,
    available_backends,
    backend,
    fused_linear_step_kto_loss,
    linear_logprobs,
    native,
    segment_loss,
)

CPU = torch.device("cpu")
NO_GPU = "there is no CUDA GPU, and TRITON_INTERPRET=1 is not set"
NO_NUMPY = "Triton's interpreter needs numpy, which is not installed"


@pytest.fixture
def machine(monkeypatch):
    """One without a GPU, that has these packages and this value of TRITON_INTERPRET."""

    def machine(installed, interpret):
        found = lambda name: name if name in installed else None
        monkeypatch.setattr(importlib.util, "find_spec", found)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("TRITON_INTERPRET", interpret)

    return machine


@pytest.mark.parametrize(
    "installed, interpret, why",
    [
        ((), "1", "Triton is not installed"),
        (("triton",), "0", NO_GPU),
        (("triton",), "1", NO_NUMPY),
        (("triton", "numpy"), "0", NO_GPU),
        (("triton", "numpy"), "1", "ok"),
    ],
)
def test_why_there_is_no_triton(machine, installed, interpret, why):
    machine(installed, interpret)
    assert available_backends()["triton"] == why
    if why != "ok":
        with pytest.raises(ValueError, match="^backend: want an available one, got 'triton'") as e:
            backend.resolve("triton", CPU)
        assert why in str(e.value)


def test_auto_does_without_the_extension_and_a_named_one_is_refused(monkeypatch):
    monkeypatch.setattr(native, "WHY_NOT", "hidden by the test")
    assert backend.resolve("auto", CPU) == "torch"
    with pytest.raises(ValueError, match=r"^backend: .*'native' \(hidden by the test\)"):
        linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend="native")


@pytest.mark.parametrize("name", ["Auto", "", None, 1, ["auto"], "cuda"])
def test_an_unknown_backend(name):
    with pytest.raises(ValueError, match="^backend: want one of 'auto', 'reference', "):
        backend.resolve(name, CPU)


@pytest.mark.parametrize("reference_point", ["zero", "matched"])
@pytest.mark.parametrize("name", ["reference", "torch", "native"])
def test_a_named_backend_serves_the_segments_too(name, reference_point, monkeypatch):
    if name == "native" and native.WHY_NOT:
        pytest.skip(native.WHY_NOT)

    def refused(*args):
        raise AssertionError(f"this is not what {name} is")

    other = segment_loss if name == "native" else native
    monkeypatch.setattr(other, "SegmentBatch", refused)
    monkeypatch.setattr(other, "token_slopes", refused)
    segments = StepSegments.from_padded(
        torch.tensor([[0, 0, 1]]),
        torch.ones(1, 3, dtype=torch.bool),
        torch.tensor([1]),
        torch.tensor([[1, 0]]),
    )
    hidden, weight = torch.randn(3, 2), torch.randn(5, 2, requires_grad=True)
    config = StepKTOConfig(reference_point=reference_point)
    loss, _ = fused_linear_step_kto_loss(
        hidden,
        weight,
        torch.tensor([0, 1, 2]),
        segments,
        torch.zeros(3),
        config=config,
        backend=name,
    )
    loss.backward()
    assert weight.grad.abs().sum() > 0
