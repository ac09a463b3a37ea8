"""What a Step-KTO step costs on many GPUs, on paper: arithmetic on shapes, no tensors.

A step is the policy's forward and backward pass, the reference's forward pass and, for mismatched
reference points, a forward pass of both over the mismatched pairs. A unit is one pass of the
lm_head GEMM, 2 * N * H * V floating-point operations; a forward is one pass of the backbone.

Times are seconds of one GPU over a whole optimizer step, sizes bytes of one GPU. Of the CPU's head
the figures have been measured (docs/SCALING.md); nothing that says GPU has.
Letters: N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from stepkto_kernels.bench.predictions import PATHS
from stepkto_kernels.checks import require
from stepkto_kernels.plan import (
    EPILOGUE_TILE,
    FP32_BYTES,
    MIB,
    OWN_GEMM_RATE,
    cached_rows,
    cpu_tile,
    epilogue_pays,
    fused_rows,
)

Head = Literal["fused", "cached", "recompute"]
KL = Literal["mismatched", "zero", "matched"]
Reference = Literal["live", "cached", "cached-pairs"]
HEADS: tuple[Head, ...] = ("fused", "cached", "recompute")
KLS: tuple[KL, ...] = ("mismatched", "zero", "matched")
REFERENCES: tuple[Reference, ...] = ("live", "cached", "cached-pairs")

GB = 1e9
# Of a link's data sheet that large collectives reach: an assumption until it is measured.
LINK_RATE = 0.8
# Of a device's memory that a step may fill: the rest is the allocator's and the collectives'.
FILL = 0.92
# fp32 weight, gradient and Adam's two moments of a parameter that is trained; what a step of Adam
# moves: four of them read, three written.
TRAINED_BYTES, ADAM_BYTES = 16, 28
# Logits, log_softmax and its gradient in fp32 at once, as measured on the CPU for the naive head.
NAIVE_LOGIT_BYTES = 12
# Statistics that ranks of a sharded vocabulary add up for each token: the maximum, then the sum of
# exponentials and the target's logit.
SHARDED_STATS = 3
# Bytes moved for a logit on the CPU beyond those of the bare GEMM, whose row work is done in the
# cache: whole rows are written (4) and become dlogits in place (8) where a backward GEMM follows.
CPU_LOGIT_BYTES = {"forward": 0, "frozen": 0, "recompute": 0, "fused": 12, "cached": 12}


@dataclass(frozen=True)
class Device:
    """Rates of one device: floating-point operations and bytes a second, one direction of links."""

    name: str
    gemm_flops: float  # that a large GEMM reaches
    peak_flops: float  # of the data sheet, dense: what utilisation is a share of
    copy_bytes: float  # read and written by a large copy
    capacity: float  # bytes
    nvlink: float  # to the other devices of the node
    network: float  # to other nodes
    node: int = 8  # devices
    # Share of peak_flops that the backbone's operations run at, recomputed ones counted too. 0.45
    # is the upper end of what is published for large dense models: the Llama 3 paper reports 0.38
    # to 0.43 for 405B on up to 16k H100, pipeline bubbles included.
    mfu: float = 0.45
    itemsize: int = 2  # bytes of weights and hidden states as they are multiplied
    tile: tuple[int, int] = EPILOGUE_TILE  # tokens and vocabulary columns of a logits tile
    kind: Literal["cpu", "cuda"] = "cuda"

    def __post_init__(self) -> None:
        rates = ("gemm_flops", "peak_flops", "copy_bytes", "capacity", "nvlink", "network", "node")
        for name in rates:
            require(getattr(self, name) > 0, name, "a number > 0", getattr(self, name))
        require(0 < self.mfu <= 1, "mfu", "a number in (0, 1]", self.mfu)


# Peak, capacity and links are NVIDIA's data sheets (dense bf16; NVLink's total halved to one
# direction; networks of the DGX systems: 200 Gb/s a GPU for A100, 400 Gb/s after). Copies reach
# 90 % of the memory's data sheet, as an H200's 4.3 of 4.8 TB/s do. GEMM rates: H200 is plan.py's;
# H100 a published bare GEMM of 8192 x 4096 x 151936 (three units in 42 ms); A100 and B200 are 80 %
# of peak, which is the H200's share, and no more than that. cpu: 2 cores of an AMD EPYC in fp32,
# the bare GEMM of results/head_cpu.json and `measure_copy`; its links stand for none.
DEVICES = {
    "a100": Device("A100 SXM", 250e12, 312e12, 1.8e12, 80 * GB, 300 * GB, 25 * GB),
    "h100": Device("H100 SXM", 728e12, 989e12, 3.0e12, 80 * GB, 450 * GB, 50 * GB),
    "h200": Device("H200 SXM", 790e12, 989e12, 4.3e12, 141 * GB, 450 * GB, 50 * GB),
    "b200": Device("B200 SXM", 1800e12, 2250e12, 7.2e12, 180 * GB, 900 * GB, 50 * GB),
    "cpu": Device(
        "CPU, 2 cores",
        *(197e9, 197e9, 42 * GB, 16 * GB, 42 * GB, 1 * GB),
        node=1,
        mfu=0.9,  # fp32 GEMMs of these sizes run at nearly the rate of the head's
        itemsize=4,
        tile=cpu_tile(32 * MIB),
        kind="cpu",
    ),
}


@dataclass(frozen=True)
class Model:
    """A dense decoder of the Llama family: gated MLP, grouped attention heads."""

    hidden: int
    vocabulary: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool = False  # the embedding is the head
    # Of all parameters, where shapes do not tell; what is not embedding and head counts as layers.
    parameters: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "vocabulary", "layers", "intermediate", "heads", "kv_heads"):
            require(getattr(self, name) > 0, name, "a whole number > 0", getattr(self, name))
        require(self.head_size > 0, "head_size", "a whole number > 0", self.head_size)
        least = self.head_parameters * (1 if self.tied else 2)
        if self.parameters is not None:
            want = f"more than embedding and head have, {least}"
            require(self.parameters > least, "parameters", want, self.parameters)

    @classmethod
    def of(
        cls,
        hidden: int,
        vocabulary: int,
        layers: int,
        *,
        intermediate: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_size: int | None = None,
        tied: bool = False,
        parameters: int | None = None,
    ) -> Model:
        """With what is not given as Llama has it: 8/3 H in the MLP, heads of 128, no grouping."""
        heads = max(hidden // 128, 1) if heads is None else heads
        return cls(
            hidden,
            vocabulary,
            layers,
            -(-8 * hidden // 3) if intermediate is None else intermediate,
            heads,
            heads if kv_heads is None else kv_heads,
            hidden // max(heads, 1) if head_size is None else head_size,
            tied,
            parameters,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Model:
        """Of a transformers config.json.

        Raises:
            ValueError: it lacks a size, or is of a mixture of experts, whose operations a token
                are not those of its parameters.
        """
        config = config.get("text_config", config)
        for name in ("num_local_experts", "num_experts", "n_routed_experts"):
            require(not config.get(name), name, "a dense model, without it", config.get(name))
        names = ("hidden_size", "vocab_size", "num_hidden_layers")
        optional = {
            "intermediate": "intermediate_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_size": "head_dim",
        }
        for name in (*names, *optional.values()):
            value = config.get(name)
            fits = _is_size(value) or (value is None and name not in names)
            require(fits, name, "a whole number > 0", value)
        given: dict[str, Any] = {ours: config.get(name) for ours, name in optional.items()}
        tied = bool(config.get("tie_word_embeddings", False))
        return cls.of(*(config[name] for name in names), **given, tied=tied)

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the matrices of a layer: q, k, v, o, gate, up, down."""
        H, I = self.hidden, self.intermediate
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return (H, q), (H, kv), (H, kv), (q, H), (H, I), (H, I), (I, H)

    @property
    def layer_parameters(self) -> int:
        """Of one layer, norms included."""
        return self.backbone_parameters // self.layers

    @property
    def backbone_parameters(self) -> int:
        """Of all layers: what multiplies every token."""
        if self.parameters is not None:
            return self.parameters - self.head_parameters * (1 if self.tied else 2)
        layer = sum(i * o for i, o in self.matrices) + 2 * self.hidden
        return self.layers * layer + self.hidden

    @property
    def total_parameters(self) -> int:
        return self.backbone_parameters + self.head_parameters * (1 if self.tied else 2)

    def lora_parameters(self, rank: int) -> int:
        """Of adapters on every matrix of every layer."""
        return self.layers * rank * sum(i + o for i, o in self.matrices)

    def forward_flops(self, length: int) -> float:
        """Operations of the backbone for one token of a sequence of that length, causal."""
        attention = 4 * self.heads * self.head_size * length / 2
        return 2.0 * self.backbone_parameters + self.layers * attention


MODELS = {
    "llama3-8b": Model.of(4096, 128256, 32, intermediate=14336, kv_heads=8),
    "llama3-70b": Model.of(8192, 128256, 80, intermediate=28672, kv_heads=8),
    "llama3-405b": Model.of(16384, 128256, 126, intermediate=53248, kv_heads=8),
}


@dataclass(frozen=True)
class Job:
    """An optimizer step and how it is laid out. Ranks of `tensor` are neighbours."""

    gpus: int = 8
    sequences: int = 256  # of a step, on all GPUs
    prompt: int = 512  # tokens of each
    completion: int = 2048
    tensor: int = 1  # GPUs that share every matrix, the head along its vocabulary
    context: int = 1  # GPUs that share a sequence
    shard: int | None = None  # GPUs that share the state (FSDP); None: all; 1: replicas
    micro_batch: int | None = None  # sequences at once on a data-parallel rank; None: what fits
    lora_rank: int | None = None  # None: every parameter is trained
    # "cached": log-probs of the batch's own sequences come with the data; "cached-pairs": those of
    # the mismatched pairs too, which then have to be fixed beforehand.
    reference: Reference = "live"
    kl: KL = "mismatched"
    head: Head | None = None  # None: fused, or recompute where the vocabulary is sharded
    budget: int | None = None  # bytes that the fused or the cached head may hold
    drop_prompt: bool = True  # only the completion reaches the head
    checkpointing: bool = True  # a layer's activations are recomputed in the backward pass
    samples: int = 0  # solutions that are sampled for each that is trained on

    def __post_init__(self) -> None:
        for name in ("gpus", "sequences", "completion", "tensor", "context"):
            require(getattr(self, name) > 0, name, "a whole number > 0", getattr(self, name))
        for name in ("prompt", "samples"):
            require(getattr(self, name) >= 0, name, "a whole number >= 0", getattr(self, name))
        for name in ("shard", "micro_batch", "lora_rank", "budget"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "a whole number > 0", value)
        for name, choices in (("reference", REFERENCES), ("kl", KLS), ("head", (None, *HEADS))):
            require(getattr(self, name) in choices, name, f"one of {choices}", getattr(self, name))
        parts = self.tensor * self.context
        require(
            self.gpus % parts == 0, "gpus", f"a multiple of tensor x context, {parts}", self.gpus
        )
        shards = self.gpus // self.tensor
        want = f"a divisor of gpus / tensor, {shards}"
        require(shards % self.shards == 0, "shard", want, self.shards)
        want = f"a multiple of the data-parallel ranks, {self.ranks}"
        require(self.sequences % self.ranks == 0, "sequences", want, self.sequences)
        if self.micro_batch is not None:
            want = f"a divisor of a rank's sequences, {self.own_sequences}"
            fits = self.own_sequences % self.micro_batch == 0
            require(fits, "micro_batch", want, self.micro_batch)

    @property
    def ranks(self) -> int:
        """Data-parallel."""
        return self.gpus // (self.tensor * self.context)

    @property
    def shards(self) -> int:
        return self.gpus // self.tensor if self.shard is None else self.shard

    @property
    def own_sequences(self) -> int:
        """Of a step, on one data-parallel rank."""
        return self.sequences // self.ranks

    @property
    def length(self) -> int:
        return self.prompt + self.completion

    @property
    def scored(self) -> int:
        """Tokens of a sequence that reach the head."""
        return self.completion if self.drop_prompt else self.length

    @property
    def head_mode(self) -> str:
        """Of the policy's head. Adapters leave the head alone."""
        if self.lora_rank is not None:
            return "frozen"
        return self.head or ("fused" if self.tensor == 1 else "recompute")


class HeadCost(NamedTuple):
    """Of one pass of a head over its tokens, seconds."""

    units: float
    gemm: float  # of the units at the device's rate
    rows: float  # what the row work adds: bytes of logits, and our own GEMM's slower rate
    sums: float  # adding up gradients over tiles

    @property
    def seconds(self) -> float:
        return self.gemm + self.rows + self.sums


class Pass(NamedTuple):
    """What a step runs over all of its sequences."""

    name: str
    forwards: int  # of the backbone
    gathers: int  # times that every parameter is gathered
    reduces: int  # times that the layers' outputs are added up over ranks of `tensor`
    head: str  # mode


class Part(NamedTuple):
    name: str
    seconds: float
    flops: float = 0.0
    moved: float = 0.0  # bytes on links, or in memory for the optimizer


@dataclass(frozen=True)
class Estimate:
    """What a step costs one GPU."""

    model: Model
    job: Job  # micro_batch is set
    device: Device
    parts: tuple[Part, ...]  # one after the other: their sum is the step
    links: tuple[Part, ...]  # all communication, the hidden part of it included
    memory: Mapping[str, float] = field(hash=False)  # bytes by what they hold, all at once
    naive_logits: float  # bytes that the naive head would hold of the same micro-batch
    sampling: float  # seconds before the step; 0 without samples

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= FILL * self.device.capacity

    def of(self, name: str) -> float:
        """Seconds of the parts whose name ends so, such as "head" or "communication"."""
        return sum(part.seconds for part in self.parts if part.name.endswith(name))


# ---- the head ---------------------------------------------------------------------------------


def held_rows(device: Device, mode: str, N: int, V: int, budget: int | None = None) -> int:
    """Tokens whose logits, or what became of them, a head holds at once beyond a tile."""
    if mode == "fused":
        return min(N, fused_rows(V, budget, device.kind))
    if mode != "cached":
        return 0
    return N if budget is None else cached_rows(N, V, device.itemsize, budget, device.kind)


def head_cost(
    device: Device, mode: str, N: int, H: int, V: int, budget: int | None = None
) -> HeadCost:
    """Of one pass over N tokens.

    Args:
        mode: forward, frozen, fused, cached or recompute.
        budget: bytes of the fused and the cached mode. None: what the fused loss takes by itself,
            every row of the cached mode.
    """
    rows = held_rows(device, mode, N, V, budget)
    if mode == "cached" and rows < N:
        rest = head_cost(device, "recompute", N - rows, H, V)
        both = zip(head_cost(device, mode, rows, H, V), rest, strict=True)
        units, *seconds = (a + b for a, b in both)
        return HeadCost((3 * rows + 4 * (N - rows)) / N, *seconds)
    path = PATHS[mode]
    unit = 2.0 * N * H * V / device.gemm_flops
    if device.kind == "cpu":
        moved, slower = float(CPU_LOGIT_BYTES[mode]), 0.0
    elif path.own and epilogue_pays(H, device.itemsize):
        moved, slower = path.epilogue, path.own * (1 / OWN_GEMM_RATE - 1)
    else:
        moved, slower = float(path.vendor), 0.0
    row_work = slower * unit + moved * N * V / device.copy_bytes
    tokens, columns = device.tile
    # fp32 sums that are read and written: dhidden over tiles of the vocabulary, where a row's
    # logits are not all there at once; dweight over tiles or blocks of tokens
    dhidden = N * H * -(-V // columns) if mode in ("frozen", "recompute") else 0
    block = {"fused": rows, "cached": rows, "recompute": tokens}.get(mode, 0)
    dweight = V * H * -(-N // block) if block else 0
    sums = 2 * FP32_BYTES * (dhidden + dweight) / device.copy_bytes
    return HeadCost(path.units, path.units * unit, row_work, sums)


def head_workspace(
    device: Device, mode: str, N: int, H: int, V: int, budget: int | None = None
) -> float:
    """Bytes that a head holds beyond hidden states, weight and their gradients."""
    tokens, columns = device.tile
    itemsize = device.itemsize if mode == "cached" else FP32_BYTES
    held = held_rows(device, mode, N, V, budget) * V * itemsize
    if mode == "frozen":
        held += N * H * FP32_BYTES
    return float(held + min(tokens, N) * min(columns, V) * FP32_BYTES)


# ---- links ------------------------------------------------------------------------------------


def link_bytes_a_second(device: Device, members: int, stride: int) -> float:
    """What each of `members` GPUs gets in a ring, `stride` GPUs from one to the next.

    Members on one node use their NICs side by side, and no more than NVLink carries.
    """
    if members * stride <= device.node:
        return LINK_RATE * device.nvlink
    together = max(device.node // stride, 1)
    return LINK_RATE * min(device.nvlink, device.network * together)


def ring_bytes(size: float, members: int) -> float:
    """That each GPU sends in an all-gather or a reduce-scatter of `size` bytes."""
    return size * (members - 1) / members


def all_reduce_bytes(size: float, members: int) -> float:
    return 2 * ring_bytes(size, members)


def sharded_head_bytes(N: int, H: int, members: int, *, gradient: bool) -> float:
    """That each GPU sends for a vocabulary-sharded head: statistics, and fp32 dhidden."""
    size = N * SHARDED_STATS * FP32_BYTES + (N * H * FP32_BYTES if gradient else 0)
    return all_reduce_bytes(size, members)


# ---- a step -----------------------------------------------------------------------------------


def passes(job: Job) -> list[Pass]:
    """Of a step. The backward pass is two forwards, or one where only adapters are trained."""
    again = int(job.checkpointing)
    backward = 1 if job.lora_rank is not None else 2
    found = [Pass("policy", 1 + backward + again, 2, 2 + again, job.head_mode)]
    forward = Pass("", 1, 1, 1, "forward")
    if job.reference == "live":
        found.append(forward._replace(name="reference"))
    if job.kl == "mismatched":
        found.append(forward._replace(name="KL policy"))
        if job.reference != "cached-pairs":
            found.append(forward._replace(name="KL reference"))
    return found


def estimate(model: Model, job: Job, device: Device) -> Estimate:
    """Time and memory of a step. Without a micro-batch, the largest that fits, or else 1."""
    if job.micro_batch is None:
        sizes = [m for m in range(1, job.own_sequences + 1) if job.own_sequences % m == 0]
        jobs = [replace(job, micro_batch=m) for m in sizes]
        room = FILL * device.capacity
        fitting = [j for j in jobs if sum(memory(model, j, device).values()) <= room]
        job = fitting[-1] if fitting else jobs[0]
    assert job.micro_batch is not None
    pieces = job.own_sequences // job.micro_batch  # micro-batches of a step
    tokens = job.micro_batch * job.length // job.context
    scored = job.micro_batch * job.scored // job.context
    columns = -(-model.vocabulary // job.tensor)

    parts, links = [], []
    for run in passes(job):
        flops = pieces * tokens * run.forwards * model.forward_flops(job.length) / job.tensor
        backbone = flops / (device.peak_flops * device.mfu)
        cost = head_cost(device, run.head, scored, model.hidden, columns, job.budget)
        unit = 2.0 * scored * model.hidden * columns
        parts.append(Part(f"{run.name} backbone", backbone, flops))
        parts.append(Part(f"{run.name} head", pieces * cost.seconds, pieces * cost.units * unit))
        sent = _sent(model, job, device, run, tokens, scored, pieces)
        links += sent.waited + sent.overlapped
        waited = sum(link.seconds for link in sent.waited)
        # parameters are gathered, gradients scattered and keys passed on beside the arithmetic
        beside = sum(link.seconds for link in sent.overlapped)
        exposed = waited + max(0.0, beside - backbone - pieces * cost.seconds)
        parts.append(Part(f"{run.name} communication", exposed))
    moved = ADAM_BYTES * _trained(model, job) / (job.tensor * job.shards)
    parts.append(Part("optimizer", moved / device.copy_bytes, 0.0, moved))
    return Estimate(
        model=model,
        job=job,
        device=device,
        parts=tuple(parts),
        links=_merged(links),
        memory=memory(model, job, device),
        naive_logits=NAIVE_LOGIT_BYTES * tokens * columns,
        sampling=sampling_seconds(model, job, device) if job.samples else 0.0,
    )


class _Sent(NamedTuple):
    waited: list[Part]
    overlapped: list[Part]


def _sent(
    model: Model, job: Job, device: Device, run: Pass, tokens: int, scored: int, pieces: int
) -> _Sent:
    """What one GPU sends in a pass over all of its micro-batches."""

    def part(name: str, size: float, members: int, stride: int) -> Part:
        rate = link_bytes_a_second(device, members, stride)
        return Part(name, pieces * size / rate, 0.0, pieces * size)

    H, t, c, f = model.hidden, job.tensor, job.context, job.shards
    trains = run.name == "policy"
    waited, overlapped = [], []
    if t > 1:
        # attention and MLP each end in a sum over the ranks
        size = 2 * model.layers * run.reduces * all_reduce_bytes(tokens * H * device.itemsize, t)
        waited.append(part("tensor: sums of layers", size, t, 1))
        size = sharded_head_bytes(scored, H, t, gradient=trains)
        waited.append(part("tensor: sharded head", size, t, 1))
    if c > 1:
        # keys and values go round, in the backward pass with their gradients
        pairs = 2 * tokens * model.kv_heads * model.head_size * device.itemsize * (c - 1) / t
        rounds = run.reduces + int(trains)
        overlapped.append(part("context: keys and values", model.layers * rounds * pairs, c, t))
    if f > 1:
        body = (model.total_parameters - model.head_parameters) / t
        head = model.head_parameters / t
        gather = run.gathers * device.itemsize
        scatter = FP32_BYTES if trains and job.lora_rank is None else 0
        size = ring_bytes((gather + scatter) * body, f)
        overlapped.append(part("FSDP: layers", size, f, t))
        # the head is gathered once, as its backward pass follows its forward pass
        size = ring_bytes((device.itemsize + scatter) * head, f)
        overlapped.append(part("FSDP: head", size, f, t))
    replicas = job.gpus // (t * f)
    if trains and replicas > 1:
        # once a step, whatever the micro-batches
        size = all_reduce_bytes(FP32_BYTES * _trained(model, job) / (t * f), replicas)
        overlapped.append(part("replicas: gradients", size / pieces, replicas, t * f))
    return _Sent(waited, overlapped)


def _merged(links: list[Part]) -> tuple[Part, ...]:
    """One part for each name."""
    sums: dict[str, Part] = {}
    for link in links:
        known = sums.get(link.name, Part(link.name, 0.0))
        moved = known.moved + link.moved
        sums[link.name] = known._replace(seconds=known.seconds + link.seconds, moved=moved)
    return tuple(sums.values())


def _trained(model: Model, job: Job) -> int:
    if job.lora_rank is None:
        return model.total_parameters
    return model.lora_parameters(job.lora_rank)


def memory(model: Model, job: Job, device: Device) -> dict[str, float]:
    """Bytes of one GPU by what they hold, as if all of it were there at once. micro_batch: set."""
    assert job.micro_batch is not None
    H, t, b = model.hidden, job.tensor, device.itemsize
    shards = t * job.shards
    tokens = job.micro_batch * job.length / job.context
    scored = job.micro_batch * job.scored // job.context
    columns = -(-model.vocabulary // t)
    full = job.lora_rank is None
    found = {"weights, gradients, Adam": TRAINED_BYTES * _trained(model, job) / shards}
    if not full:
        found["frozen weights"] = b * model.total_parameters / shards
    elif any(run.name in ("reference", "KL reference") for run in passes(job)):
        found["reference weights"] = b * model.total_parameters / shards
    if job.shards > 1:
        # the layer that runs and the next one, and the gradient of one
        layer = model.layer_parameters / t
        found["gathered layers"] = layer * (2 * b + (FP32_BYTES if full else 0))
        found["gathered head"] = b * model.head_parameters / t
        if full:
            found["gradient of the head"] = FP32_BYTES * model.head_parameters / t
    elif full and b < FP32_BYTES:
        found["weights as they are multiplied"] = b * model.total_parameters / t
    # inputs of norms, attention and MLP; keys, values, queries; three of the MLP's inner width
    inner = 2 * (model.heads + model.kv_heads) * model.head_size + 3 * model.intermediate
    layer = tokens * b * (4 * H + inner) / t
    if job.checkpointing:
        found["activations"] = model.layers * tokens * b * H / t + layer
    else:
        found["activations"] = model.layers * layer
    found["hidden states at the head"] = scored * H * (b + FP32_BYTES)
    held = head_workspace(device, job.head_mode, scored, H, columns, job.budget)
    found["logits of the head"] = held
    return found


def sampling_seconds(model: Model, job: Job, device: Device) -> float:
    """Of sampling `samples` solutions for every sequence of a step, before it, on all GPUs.

    Groups of as few GPUs as hold the weights in half of their memory decode as many sequences at
    once as their caches of keys and values fit. A token takes the longer of its operations, at the
    rate of a GEMM, and of reading the weights and caches once. What ranks of a group tell each
    other, prefill and sequences that end early are left out.
    """
    weights = device.itemsize * model.total_parameters
    group = 1
    while weights > device.capacity * group / 2 and group < job.gpus:
        group *= 2
    cache = 2 * device.itemsize * model.layers * model.kv_heads * model.head_size  # a token
    room = FILL * device.capacity * group - weights
    share = -(-job.samples * job.sequences * group // job.gpus)
    slots = int(min(share, room // (cache * job.length)))
    if slots < 1:
        return float("inf")
    read = weights + slots * cache * (job.prompt + job.completion / 2)
    flops = 2.0 * slots * (model.backbone_parameters + model.head_parameters)
    token = max(flops / (group * device.gemm_flops), read / (group * device.copy_bytes))
    return -(-share // slots) * job.completion * token


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
