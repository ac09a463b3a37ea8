"""Times of the small ops, forward and backward: `pytest benchmarks/`, not in the default run.

Letters: N tokens, V vocabulary.
"""

import pytest
import torch

import stepkto_kernels as sk
from stepkto_kernels import reference
from stepkto_kernels.bench.problems import batch_layout

pytest.importorskip("pytest_benchmark")

BASELINE = sk.KLBaseline(0.3, 0.1)
WHOSE = {"ours": sk, "plain torch": reference}


@pytest.fixture(params=[8192, 65536], ids="N={}".format)
def batch(request):
    """Log-probs (N,) that need a gradient, reference log-probs (N,), layout."""
    torch.manual_seed(0)
    N = request.param
    return torch.randn(N).requires_grad_(), torch.randn(N), batch_layout(N, "cpu")


@pytest.fixture(params=list(WHOSE.values()), ids=list(WHOSE))
def library(request):
    return request.param


def test_segment_sums(benchmark, batch, library):
    logps, ref_logps, segments = batch

    def run():
        outcome, step = library.segment_sums(logps - ref_logps, segments)
        (outcome.sum() + step.sum()).backward()

    benchmark(run)


def test_step_kto_loss(benchmark, batch, library):
    logps, ref_logps, segments = batch

    def run():
        loss = library.step_kto_loss(logps, ref_logps, segments, BASELINE)
        (loss[0] if isinstance(loss, tuple) else loss).backward()

    benchmark(run)


def test_kl_baseline(benchmark, batch, library):
    logps, ref_logps, segments = batch
    benchmark(lambda: library.kl_baseline(logps.detach(), ref_logps, segments))


def test_token_logprobs(benchmark, library):
    torch.manual_seed(0)
    N, V = 256, 4096
    logits, target = torch.randn(N, V, requires_grad=True), torch.randint(0, V, (N,))
    benchmark(lambda: library.token_logprobs(logits, target).sum().backward())
