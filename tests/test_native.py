"""The C++ row kernels: their exp and tanh, and the promise that bits depend on the row alone."""

import pytest
import torch

from stepkto_kernels import available_backends, linear_logprobs, native

pytestmark = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))


def ulps(ours, exact):
    """Error in units of the last place of the exact result rounded to fp32."""
    rounded = exact.float()
    spacing = torch.nextafter(rounded.abs(), torch.tensor(torch.inf)) - rounded.abs()
    return ((ours.double() - exact) / spacing.double()).abs()


def test_the_build_is_used():
    assert available_backends()["native"] == "ok"


def test_exp_error():
    x = torch.cat([torch.linspace(-87.3, 88.7, 2_000_001), torch.tensor([0.0, -0.0, 1e-30])])
    assert ulps(native.exp(x), x.double().exp()).max() <= 1.5


def test_exp_ends():
    x = torch.tensor([-torch.inf, -1e4, -87.4, 0.0, torch.nan])
    got = native.exp(x)
    assert got[:4].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert got[4].isnan()


def test_tanh_error():
    x = torch.cat([torch.linspace(-12, 12, 2_000_001), torch.tensor([1e4, -1e4, 1e-20, 0.0])])
    assert ulps(native.tanh(x), x.double().tanh()).max() <= 3


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads(threads):
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 48), torch.randn(5003, 48)
    target = torch.randint(0, 5003, (70,))
    before = torch.get_num_threads()
    logits = hidden @ weight.T  # the GEMM's own bits may depend on the threads
    try:
        torch.set_num_threads(threads)
        fold = native.Fold(70, 1, 5003, (), native.LogitOptions(), hidden.device)
        fold.add(native.Tile(logits, target, 0), slice(0, 70), 0)
        got = fold.finish()[0]
    finally:
        torch.set_num_threads(before)
    one_by_one = []
    for t in range(70):
        fold = native.Fold(1, 1, 5003, (), native.LogitOptions(), hidden.device)
        fold.add(native.Tile(logits[t : t + 1], target[t : t + 1], 0), slice(0, 1), 0)
        one_by_one.append(fold.finish()[0])
    assert torch.equal(got, torch.cat(one_by_one))


def test_agrees_with_torch_backend():
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 48), torch.randn(5003, 48)
    target = torch.randint(0, 5003, (70,))
    ours = linear_logprobs(hidden, weight, target, backend="native")
    theirs = linear_logprobs(hidden, weight, target, backend="torch")
    exact = linear_logprobs(hidden.double(), weight.double(), target, backend="reference")
    floor = 4 * 2**-24 * exact.abs().max()  # a few roundings of the result itself
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + floor
