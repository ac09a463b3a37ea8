"""The peers, each called through its public functions.

A peer is imported when it runs, and only where it is installed; who is missing is listed with the
reason.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from stepkto_kernels import reference
from stepkto_kernels.bench.contenders import (
    Contender,
    Run,
    Skip,
    our_backends,
    our_heads,
    our_losses,
)
from stepkto_kernels.bench.problems import HALF_PROMPT, IGNORED, HeadProblem, LossProblem

# Each peer gets the chunks that serve it best. On a CPU those are not its defaults: torch's few
# rows and TRL's 32768 columns took 8 and 1.6 times as long (1024 x 512 x 64000, fp32, two cores).
# As they are shipped they run as torch-default and trl-default.
TORCH_ROWS = {"cpu": 512}
TRL_COLUMNS = {"cpu": 2048}
TRL_DEFAULT_COLUMNS = 32768  # what its trainer passes


def naive_head(problem: HeadProblem, hidden: Tensor, weight: Tensor, path: str) -> Tensor:
    return reference.linear_logprobs(hidden, weight, problem.target)


def torch_head(
    rows: Mapping[str, int], problem: HeadProblem, hidden: Tensor, weight: Tensor, path: str
) -> Tensor:
    chunk = rows.get(hidden.device.type)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return -torch.nn.functional.linear_cross_entropy(
        hidden, weight, problem.target, reduction="none", options=options
    )


def trl_head(
    columns: Mapping[str, int], problem: HeadProblem, hidden: Tensor, weight: Tensor, path: str
) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    chunk = columns.get(hidden.device.type, TRL_DEFAULT_COLUMNS)
    options = (1.0, chunk, None, 1.0, ())  # temperature, columns, softcap, scale, statistics
    if path != HALF_PROMPT:
        return ChunkedLogProbFunction.apply(hidden, weight, None, problem.target, *options)[0]
    # it knows no ignored tokens: they are scored with some target and masked, as its trainer does
    target = problem.target.clamp(min=0)
    logps = ChunkedLogProbFunction.apply(hidden, weight, None, target, *options)[0]
    return logps.masked_fill(problem.target == IGNORED, 0.0)


def cce_head(problem: HeadProblem, hidden: Tensor, weight: Tensor, path: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, problem.target, reduction="none", impl="cce")


def kto_of(head: Run, problem: LossProblem, hidden: Tensor, weight: Tensor, path: str) -> Tensor:
    """The loss in plain torch on somebody's log-probs, as TRL's trainer composes it."""
    logps = head(problem, hidden, weight, path)
    ref_logps = problem.ref_logps()
    if path == "kto+ref":
        with torch.no_grad():
            ref_logps = head(problem, problem.ref_hidden, weight.detach(), path).float()
    return reference.step_kto_loss(
        logps, ref_logps, problem.segments, problem.baseline, problem.config
    )


def liger_kto(problem: LossProblem, hidden: Tensor, weight: Tensor, path: str) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    B, T, H = problem.B, problem.T, problem.shape.H
    z = float(problem.baseline.outcome)
    reference_pass = {}
    if path == "kto+ref":
        reference_pass = {
            "ref_input": problem.ref_hidden.view(B, T, H),
            "ref_weight": weight.detach(),
        }
    else:  # it takes no log-probs of a reference, so their constant sum is made part of z
        z += T * problem.ref_logp
    loss = LigerFusedLinearKTOLoss(
        beta=problem.config.beta,
        compiled=hidden.device.type == "cuda" or shutil.which("c++") is not None,
        use_ref_model=bool(reference_pass),
    )
    return loss(
        hidden.view(B, T, H),
        weight,
        problem.target.view(B, T),
        preference_labels=problem.segments.outcome_label > 0,
        kl=torch.tensor(z, device=hidden.device),
        **reference_pass,
    )[0]


@dataclass(frozen=True)
class Peer:
    package: str  # name of the distribution
    label: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    attribute: str | None = None  # of torch.nn.functional, where the peer is torch itself
    head: tuple[Mapping[str, int], Run] | None = None  # units and function
    loss: tuple[Mapping[str, int], Run, str] | None = None  # and what it includes
    on_request: bool = False  # not one of --peers all

    def why_not(self, device: str) -> str | None:
        """Why it cannot run here, None where it can."""
        if version(self.package) is None:
            return f"not installed: pip install {self.package}"
        if device not in self.devices:
            return f"runs on {' or '.join(self.devices)} only"
        if self.attribute and not hasattr(torch.nn.functional, self.attribute):
            return f"torch {torch.__version__} has no functional.{self.attribute}"
        return None

    @property
    def who(self) -> str:
        return self.label if self.package == "torch" else f"{self.label} {version(self.package)}"

    def shipped(self, label: str, head: Run) -> Peer:
        """The same peer with its default chunks, on a CPU, where they are not the best."""
        own = (_RECOMPUTE, head)
        return replace(self, label=label, devices=("cpu",), head=own, loss=None, on_request=True)


# They compute the ignored tokens of half_prompt too; Cut Cross-Entropy drops them.
_RECOMPUTE = {"forward": 1, "frozen": 3, "recompute": 4, HALF_PROMPT: 4}
PEERS = {
    "naive": Peer(
        "torch",
        "naive",
        head=({"forward": 1, "frozen": 2, "cached": 3, HALF_PROMPT: 3}, naive_head),
        loss=(
            {"kto": 3, "kto+ref": 4, "step_kto": 3},
            partial(kto_of, naive_head),
            "log_softmax of all logits, then the loss in plain torch",
        ),
    ),
    "torch": Peer(
        "torch",
        "torch linear_cross_entropy",
        attribute="linear_cross_entropy",
        head=(_RECOMPUTE, partial(torch_head, TORCH_ROWS)),
    ),
    "trl": Peer(
        "trl",
        "TRL chunked",
        head=(_RECOMPUTE, partial(trl_head, TRL_COLUMNS)),
        loss=(
            {"kto": 4, "kto+ref": 5, "step_kto": 4},
            partial(kto_of, partial(trl_head, TRL_COLUMNS)),
            "its log-probs, then the loss in plain torch",
        ),
    ),
    "liger": Peer(
        "liger-kernel",
        "Liger chunked KTO",
        loss=(
            {"kto": 3, "kto+ref": 4},
            liger_kto,
            "log-probs, loss, both gradients; kto: reference sums as part of z",
        ),
    ),
    "cce": Peer(
        "cut-cross-entropy",
        "Cut Cross-Entropy",
        devices=("cuda",),
        head=({**_RECOMPUTE, HALF_PROMPT: 2}, cce_head),
    ),
}
PEERS["torch-default"] = PEERS["torch"].shipped("torch, its default", partial(torch_head, {}))
PEERS["trl-default"] = PEERS["trl"].shipped("TRL default", partial(trl_head, {}))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def contenders(
    suite: str,
    device: str,
    peers: Sequence[str] = tuple(PEERS),
    budget: int | None = None,
) -> tuple[list[Contender], list[Skip]]:
    """Who runs suite "head" or "loss" on `device`: ours, then `peers`; and who cannot, and why.

    budget: bytes, of our modes that take one.
    """
    backends, skipped = our_backends(device)
    ours = our_heads if suite == "head" else our_losses
    found = [contender for backend in backends for contender in ours(backend, budget)]
    for name in peers:
        peer = PEERS[name]
        own = peer.head if suite == "head" else peer.loss
        why_not = peer.why_not(device)
        if own is None and why_not is None:
            what = "per-token log-probs" if suite == "head" else "KTO loss"
            why_not = f"has no {what} of its own"
        if own is None or why_not is not None:
            skipped.append(Skip(peer.label, str(why_not)))
        else:
            found.append(Contender(name, peer.who, "-", *own))
    return found, skipped


def find(suite: str, key: str, device: str, budget: int | None = None) -> Contender:
    """The contender of that key; for a fresh process, which is told the key only."""
    return next(c for c in contenders(suite, device, budget=budget)[0] if c.key == key)
