"""scaling.py: what a step costs on many GPUs. By hand, by consistency, beside measurements."""

import json
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest

from stepkto_kernels import plan
from stepkto_kernels.bench import predictions, scale_tables
from stepkto_kernels.bench.memory_suite import SLACK
from stepkto_kernels.scaling import (
    DEVICES,
    HEADS,
    LINK_RATE,
    MODELS,
    Device,
    Job,
    Model,
    all_reduce_bytes,
    estimate,
    head_cost,
    head_workspace,
    link_bytes_a_second,
    memory,
    passes,
    ring_bytes,
    sampling_seconds,
    sharded_head_bytes,
)

ROOT = pathlib.Path(__file__).parent.parent
H200 = DEVICES["h200"]
LLAMA = MODELS["llama3-8b"]
# Round rates; a tile of 10 tokens and 100 columns
TOY = Device("toy", 1e6, 2e6, 1e5, 1e12, 1e4, 1e3, node=4, mfu=0.5, itemsize=4, tile=(10, 100))
TINY = Model.of(8, 1000, 2, intermediate=16, heads=2, kv_heads=1)
JOB = Job(gpus=1, sequences=4, prompt=4, completion=16, micro_batch=2, checkpointing=False)


def seconds(found, name):
    return next(part.seconds for part in found.parts if part.name == name)


# ---- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("8b", 8030261248), ("70b", 70553706496), ("405b", 405853388800)],  # as published
)
def test_parameters_of_llama(name, parameters):
    assert MODELS[f"llama3-{name}"].total_parameters == parameters


def test_a_model_by_hand():
    # q 8 x 8, k and v 8 x 4 each, o 8 x 8, three of 8 x 16; two norms a layer and one at the end
    layer = 64 + 2 * 32 + 64 + 3 * 128 + 2 * 8
    assert TINY.backbone_parameters == 2 * layer + 8
    assert TINY.total_parameters == 2 * layer + 8 + 2 * 8000
    assert replace(TINY, tied=True).total_parameters == 2 * layer + 8 + 8000
    assert TINY.forward_flops(20) == 2 * (2 * layer + 8) + 2 * 4 * 8 * 10
    ends = 16 + 2 * 12 + 16 + 3 * 24
    assert TINY.lora_parameters(3) == 2 * 3 * ends
    assert replace(TINY, parameters=20000).backbone_parameters == 4000


def test_a_model_of_a_config():
    config = {
        "hidden_size": 4096,
        "vocab_size": 128256,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    assert Model.from_config(config) == LLAMA
    assert Model.from_config({"text_config": config}) == LLAMA
    assert Model.from_config({**config, "head_dim": 64}).head_size == 64
    assert Model.from_config({**config, "tie_word_embeddings": True}).tied


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"vocab_size": None}, "vocab_size: want a whole number"),
        ({"num_local_experts": 8}, "num_local_experts: want a dense model"),
        ({"hidden_size": "big"}, "hidden_size: want a whole number"),
        ({"num_attention_heads": 2.5}, "num_attention_heads: want a whole number"),
        ({"num_key_value_heads": -1}, "num_key_value_heads: want a whole number"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(changes, wanted):
    config = {"hidden_size": 8, "vocab_size": 9, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match=wanted):
        Model.from_config({**config, **changes})


# ---- the head ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "units", "moved", "sums"),
    [
        ("forward", 1, 8, 0),
        ("frozen", 2, 10, 8 * 20 * 10),  # dhidden of 20 tokens over 10 tiles of columns
        ("recompute", 4, 18, 8 * (20 * 10 + 1000 * 2)),  # and dweight over two tiles of tokens
        ("fused", 3, 14, 8 * 1000),  # a single block
        ("cached", 3, 14, 8 * 1000),
    ],
)
def test_a_head_by_hand(mode, units, moved, sums):
    """20 tokens, H = 1, V = 1000; fp32, so that the vendor's GEMM serves all of them."""
    cost = head_cost(TOY, mode, 20, 1, 1000)
    assert cost.units == units
    assert cost.gemm == pytest.approx(units * 2 * 20 * 1000 / 1e6)
    assert cost.rows == pytest.approx(moved * 20 * 1000 / 1e5)
    assert cost.sums == pytest.approx(sums / 1e5)
    assert cost.seconds == cost.gemm + cost.rows + cost.sums


@pytest.mark.parametrize("mode", ["forward", "frozen", "fused", "cached", "recompute"])
@pytest.mark.parametrize("H", [2048, 4096, 8192])
def test_a_head_costs_what_the_roofline_predicts(mode, H):
    """Both follow the planner's choice between the vendor's GEMM and our own."""
    cost = head_cost(H200, mode, 8192, H, 131072)
    path = predictions.PATHS[mode]
    ratio = predictions.vendor_ratio(path, H)
    if path.own and plan.epilogue_pays(H, 2):
        ratio = predictions.epilogue_ratio(path, H, plan.OWN_GEMM_RATE)
    assert (cost.gemm + cost.rows) / cost.gemm == pytest.approx(ratio, rel=1e-3)


def test_the_cached_head_lies_between_recompute_and_every_row():
    shape = 8192, 4096, 128256
    none, some, every = (
        head_cost(H200, "cached", *shape, budget) for budget in (1, 3 * 2**30, 2**40)
    )
    assert (none.units, every.units) == (4, 3) and 3 < some.units < 4
    assert none == head_cost(H200, "recompute", *shape)
    assert every == head_cost(H200, "cached", *shape)
    assert every.seconds < some.seconds < none.seconds
    rows = plan.cached_rows(8192, 128256, 2, 3 * 2**30, "cuda")
    assert some.units == pytest.approx(4 - rows / 8192)


def test_workspace():
    tile = 10 * 100 * 4
    assert head_workspace(TOY, "forward", 20, 3, 1000) == tile
    assert head_workspace(TOY, "forward", 5, 3, 50) == 5 * 50 * 4
    assert head_workspace(TOY, "frozen", 20, 3, 1000) == tile + 20 * 3 * 4
    assert head_workspace(TOY, "cached", 20, 3, 1000) == tile + 20 * 1000 * 4
    assert head_workspace(TOY, "fused", 20, 3, 1000, 16 * 4000) == tile + 16 * 1000 * 4


# ---- links ------------------------------------------------------------------------------------


def test_links():
    assert ring_bytes(800, 8) == 700 and all_reduce_bytes(800, 8) == 1400
    assert ring_bytes(800, 1) == 0
    # 3 statistics and H values a token, fp32
    assert sharded_head_bytes(10, 5, 2, gradient=False) == 2 * 10 * 3 * 4 / 2
    assert sharded_head_bytes(10, 5, 2, gradient=True) == 10 * 3 * 4 + 10 * 5 * 4
    rate = lambda members, stride: link_bytes_a_second(TOY, members, stride) / LINK_RATE
    assert rate(4, 1) == rate(2, 2) == 1e4  # on one node
    assert rate(8, 1) == 4e3  # 4 NICs of each node
    assert rate(2, 4) == 1e3  # one of them
    assert link_bytes_a_second(replace(TOY, network=1e5), 8, 1) == LINK_RATE * 1e4


# ---- a step -----------------------------------------------------------------------------------


def test_a_step_by_hand():
    """One device, 4 sequences of 4 + 16 tokens in two micro-batches."""
    found = estimate(TINY, JOB, TOY)
    forward = 4 * 20 * TINY.forward_flops(20)
    assert seconds(found, "policy backbone") == pytest.approx(3 * forward / 1e6)
    for name in ("reference", "KL policy", "KL reference"):
        assert seconds(found, f"{name} backbone") == pytest.approx(forward / 1e6)
        head = 2 * head_cost(TOY, "forward", 32, 8, 1000).seconds
        assert seconds(found, f"{name} head") == pytest.approx(head)
    fused = 2 * head_cost(TOY, "fused", 32, 8, 1000).seconds
    assert seconds(found, "policy head") == pytest.approx(fused)
    assert seconds(found, "optimizer") == pytest.approx(28 * TINY.total_parameters / 1e5)
    assert found.of("communication") == 0 and found.links == ()
    assert found.seconds == pytest.approx(
        6 * forward / 1e6 + fused + 3 * head + 28 * TINY.total_parameters / 1e5
    )
    assert found.naive_logits == 12 * 40 * 1000
    assert found.memory == {
        "weights, gradients, Adam": 16 * TINY.total_parameters,
        "reference weights": 4 * TINY.total_parameters,
        "activations": 2 * 40 * 4 * (4 * 8 + 2 * 3 * 4 + 3 * 16),
        "hidden states at the head": 32 * 8 * 8,
        "logits of the head": 10 * 100 * 4 + 32 * 1000 * 4,
    }
    assert found.bytes == sum(found.memory.values()) and found.fits


def test_passes_and_what_they_cost():
    names = lambda **changes: [run.name for run in passes(Job(**changes))]
    both = ["policy", "reference", "KL policy", "KL reference"]
    assert names() == both
    assert names(reference="cached") == [both[0], *both[2:]]
    assert names(reference="cached-pairs") == [both[0], both[2]]
    assert names(kl="zero") == names(kl="matched") == both[:2]
    assert names(kl="zero", reference="cached") == ["policy"]
    first = lambda **changes: passes(Job(**changes))[0]
    assert first().forwards == 4 and first(checkpointing=False).forwards == 3
    assert first(lora_rank=8).forwards == 3 and first(lora_rank=8).head == "frozen"
    assert first().head == "fused" and first(tensor=2).head == "recompute"
    for head in HEADS:
        assert first(head=head).head == first(head=head, tensor=2).head == head


def test_cached_pairs_take_a_third_off_where_nothing_is_recomputed():
    job = Job(gpus=8, checkpointing=False)
    live = estimate(LLAMA, job, H200)
    cached = estimate(LLAMA, replace(job, reference="cached-pairs"), H200)
    assert cached.of("backbone") == pytest.approx(live.of("backbone") * 2 / 3)


def test_twice_the_gpus_take_half_the_time():
    job = Job(gpus=16, sequences=1024, micro_batch=8)
    one, two = (estimate(LLAMA, replace(job, gpus=gpus), H200) for gpus in (16, 32))
    assert two.of("head") == pytest.approx(one.of("head") / 2)
    assert two.of("backbone") == pytest.approx(one.of("backbone") / 2)


def test_twice_the_sequences_take_twice_the_time():
    job = Job(gpus=64, sequences=1024, micro_batch=4, tensor=8, context=2)
    one, two = (estimate(LLAMA, replace(job, sequences=n), H200) for n in (1024, 2048))
    assert two.seconds - one.seconds == pytest.approx(one.seconds - one.of("optimizer"))


def test_a_shared_vocabulary_is_the_same_arithmetic():
    """As many operations on each GPU, of an eighth of the vocabulary and 8 times the tokens."""
    job = Job(gpus=64, sequences=512, micro_batch=1, head="recompute")
    whole = estimate(LLAMA, job, H200)
    shared = estimate(LLAMA, replace(job, tensor=8, micro_batch=8), H200)
    flops = lambda found: {p.name: p.flops for p in found.parts}
    assert flops(shared) == pytest.approx(flops(whole))
    names = lambda found: {link.name for link in found.links}
    assert names(whole) == {"FSDP: layers", "FSDP: head"}
    assert names(shared) == names(whole) | {"tensor: sums of layers", "tensor: sharded head"}
    # 3 numbers a token in each of four passes, dhidden in one
    sent = next(link.moved for link in shared.links if link.name == "tensor: sharded head")
    tokens = 64 * 2048  # of each group of 8
    assert sent == pytest.approx(2 * 7 / 8 * 4 * tokens * (4 * 3 + 4096))


def test_fsdp_sends_the_gathers_and_the_gradients():
    """One micro-batch: 2 bytes gathered twice by the policy, once by the others; 4 scattered."""
    job = Job(gpus=16, sequences=16, micro_batch=1)
    sent = {link.name: link.moved for link in estimate(LLAMA, job, H200).links}
    body = LLAMA.total_parameters - LLAMA.head_parameters
    assert sent["FSDP: layers"] == pytest.approx(15 / 16 * body * (2 * 2 + 4 + 3 * 2))
    assert sent["FSDP: head"] == pytest.approx(15 / 16 * LLAMA.head_parameters * (2 + 4 + 3 * 2))
    lora = estimate(LLAMA, replace(job, lora_rank=8), H200)
    sent = {link.name: link.moved for link in lora.links}
    assert sent["FSDP: layers"] == pytest.approx(15 / 16 * body * (2 * 2 + 3 * 2))


def test_replicas_add_up_gradients_once_a_step():
    job = Job(gpus=16, sequences=64, shard=1)
    for micro_batch in (1, 4):
        found = estimate(LLAMA, replace(job, micro_batch=micro_batch), H200)
        (link,) = found.links
        assert link.name == "replicas: gradients"
        assert link.moved == pytest.approx(2 * 15 / 16 * 4 * LLAMA.total_parameters)
    halves = estimate(LLAMA, replace(job, shard=8), H200)
    moved = {link.name: link.moved for link in halves.links}
    assert moved["replicas: gradients"] == pytest.approx(4 * LLAMA.total_parameters / 8)


def test_links_that_take_longer_than_the_pass_are_waited_for():
    job = Job(gpus=16, sequences=16, micro_batch=1)
    slow = replace(H200, network=1e7)
    found = estimate(LLAMA, job, slow)
    sent = sum(link.seconds for link in found.links)
    assert found.of("communication") == pytest.approx(
        sent - found.of("backbone") - found.of("head")
    )
    assert found.seconds == pytest.approx(sent + found.of("optimizer"))


def test_memory_adds_up_and_is_shared():
    job = Job(gpus=64, sequences=64, micro_batch=1)
    whole = memory(LLAMA, job, H200)
    assert whole["weights, gradients, Adam"] == 16 * LLAMA.total_parameters / 64
    assert whole["gathered head"] == 2 * LLAMA.head_parameters
    assert whole["gradient of the head"] == 4 * LLAMA.head_parameters
    shared = memory(LLAMA, replace(job, tensor=8, micro_batch=8), H200)
    for name in ("gathered head", "gradient of the head", "gathered layers"):
        assert shared[name] == pytest.approx(whole[name] / 8)
    for name in ("weights, gradients, Adam", "reference weights", "activations"):
        assert shared[name] == pytest.approx(whole[name])
    lora = memory(LLAMA, replace(job, lora_rank=16), H200)
    assert lora["frozen weights"] == 2 * LLAMA.total_parameters / 64
    assert "reference weights" not in lora and "gradient of the head" not in lora
    cached = memory(LLAMA, replace(job, reference="cached-pairs"), H200)
    assert set(whole) - set(cached) == {"reference weights"}
    long = memory(LLAMA, replace(job, completion=4096, context=2, micro_batch=2), H200)
    assert long["hidden states at the head"] == 2 * whole["hidden states at the head"]


def test_the_largest_micro_batch_that_fits_is_taken():
    job = Job(gpus=8, sequences=1024)
    found = estimate(LLAMA, job, H200)
    assert found.fits and 128 % found.job.micro_batch == 0
    assert not estimate(LLAMA, replace(job, micro_batch=2 * found.job.micro_batch), H200).fits
    small = estimate(MODELS["llama3-405b"], job, H200)
    assert small.job.micro_batch == 1 and not small.fits


def test_the_heads_share_falls_with_layers():
    shares = []
    for layers in (4, 16, 64):
        found = estimate(replace(LLAMA, layers=layers), Job(micro_batch=1), H200)
        shares.append(found.of("head") / found.seconds)
    assert shares[0] > 2 * shares[1] > 4 * shares[2]


def test_prompts_that_are_scored_cost_their_share():
    job = Job(micro_batch=1, prompt=2048, completion=2048)
    dropped, scored = (estimate(LLAMA, replace(job, drop_prompt=drop), H200) for drop in (1, 0))
    flops = lambda found: sum(p.flops for p in found.parts if p.name.endswith("head"))
    assert flops(scored) == 2 * flops(dropped)
    assert scored.of("backbone") == dropped.of("backbone")


def test_sampling_by_hand():
    """Weights are read once a token, with the caches of two sequences in the mean."""
    device = replace(TOY, copy_bytes=1e3, gemm_flops=1e12)
    job = replace(JOB, gpus=2, samples=1)
    weights, cache = 4 * TINY.total_parameters, 2 * 4 * 2 * 1 * 4
    token = (weights + 2 * cache * (4 + 8)) / 1e3
    assert sampling_seconds(TINY, job, device) == pytest.approx(16 * token)
    assert sampling_seconds(TINY, job, replace(device, capacity=weights / 3)) == float("inf")
    assert estimate(TINY, JOB, device).sampling == 0


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"gpus": 0}, "gpus: want a whole number > 0"),
        ({"gpus": 12, "tensor": 8}, "gpus: want a multiple of tensor x context, 8, got 12"),
        ({"gpus": 24, "sequences": 64}, "sequences: want a multiple of the data-parallel ranks"),
        ({"shard": 3}, "shard: want a divisor of gpus / tensor, 8, got 3"),
        ({"micro_batch": 3}, "micro_batch: want a divisor of a rank's sequences, 32, got 3"),
        ({"kl": "none"}, "kl: want one of"),
        ({"prompt": -1}, "prompt: want a whole number >= 0"),
        ({"lora_rank": 0}, "lora_rank: want a whole number > 0"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit(changes, wanted):
    with pytest.raises(ValueError, match=wanted):
        Job(**changes)


def test_rates_and_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="mfu: want a number in"):
        replace(H200, mfu=1.5)
    with pytest.raises(ValueError, match="nvlink: want a number > 0"):
        replace(H200, nvlink=0)
    with pytest.raises(ValueError, match="parameters: want more than embedding and head have"):
        replace(LLAMA, parameters=10**9)


# ---- beside what was measured, and the page ---------------------------------------------------

RESULTS = ROOT / "benchmarks/results"


def test_predicted_times_are_near_the_measured_ones():
    """A quarter: what separates two runs of `cached`. A model of one unit more is further off."""
    found = scale_tables.measured_times(RESULTS)
    assert {mode for _, mode, _ in found} == {"forward", "frozen", *HEADS}
    for row, mode, predicted in found:
        assert 0.75 < predicted / (row["ms_best"] / 1e3) < 1.25, (row["path"], mode)


def test_predicted_memory_is_near_the_measured_one():
    found = scale_tables.measured_memory(RESULTS)
    assert len(found) > 10
    for row, predicted in found:
        assert abs(predicted - row["extra_mib"]) < SLACK / 2, row


def test_a_whole_step_is_near_the_measured_one():
    result = json.loads((RESULTS / "step_cpu.json").read_text())
    found = scale_tables.small_step(result)
    predicted = found.seconds - found.of("optimizer")
    assert 0.75 < predicted / result["step_s"] < 1.25
    assert 0.75 < found.of("backbone") / result["backbone_s"] < 1.25


def test_the_page_holds_the_tables():
    command = [sys.executable, str(ROOT / "benchmarks/scaling.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, "run `python benchmarks/scaling.py`: " + done.stderr
