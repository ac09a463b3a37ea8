"""Heads, tokens and sequences that are split over ranks, against one process with all of it.

Two and four processes are started once and run the functions that tests hand to them (`ranks`).
Letters: P ranks, N tokens, H hidden size, V vocabulary.
"""

import multiprocessing
import os
import pathlib
import pickle
import re
import traceback
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from rank_helpers import NO_MEANS, takes_means
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

from stepkto_kernels import (
    KLBaseline,
    LossNormalizer,
    StepKTOConfig,
    StepKTOLoss,
    available_backends,
    fused_linear_step_kto_loss,
    kl_baseline,
    kl_totals,
    linear_logprobs,
    linear_logprobs_with_stats,
    loss_normalizer,
    parallel,
    reference,
    step_kto_loss,
)
from stepkto_kernels import plan as plans
from stepkto_kernels.shards import VocabParallel, torch_chunks

README = pathlib.Path(__file__).parent.parent / "README.md"
V = 301  # 151 + 150 or 76 + 76 + 76 + 73 in torch's chunks
SIZES = {2: (200, 101), 4: (150, 0, 101, 50)}
EQUAL = {2: (151, 150), 4: (76, 76, 76, 73)}
ALL = ("hidden", "weight", "bias")
STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_prob")
SECONDS = 180  # for one call; a rank that waits for another gives up before that
CONFIG = StepKTOConfig(beta=0.2, step_beta=0.5, step_weight=0.7)
BASELINE = KLBaseline(0.21, 0.13)
OPTIONS = {
    "plain": {},
    "all": {"bias": True, "temperature": 1.3, "logit_scale": -0.6, "softcap": 7.0},
}
# inputs that need a gradient, rows of (onehot - p) that the largest shard may keep
MODES = {
    "forward": ((), None),
    "frozen": (("hidden",), None),
    "cached": (ALL, 9),
    "cached, all rows": (ALL, 1000),
    "recompute": (ALL, None),
    "frozen hidden": (("weight", "bias"), None),
}


# ---- processes ----------------------------------------------------------------------------------


def serve(rank, world, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = True, function(rank, dist.group.WORLD, *args)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


class Ranks:
    """`ranks(function, *args)` is the list of function(rank, group, *args) of every rank."""

    def __init__(self, world, store):
        self.world, self.store = world, store
        self.processes = []

    def start(self):
        spawn = multiprocessing.get_context("spawn")
        self.store.unlink(missing_ok=True)
        for rank in range(self.world):
            ours, theirs = spawn.Pipe()
            args = rank, self.world, str(self.store), theirs
            process = spawn.Process(target=serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.processes.append((process, ours))

    def stop(self):
        for process, pipe in self.processes:
            pipe.close()
            process.terminate()
            process.join()
        self.processes = []

    def __call__(self, function, *args):
        if not self.processes:
            self.start()
        for _, pipe in self.processes:
            pipe.send_bytes(pickle.dumps((function, args)))
        answers = []
        for _, pipe in self.processes:
            done = pipe.poll(SECONDS)
            answers.append(pickle.loads(pipe.recv_bytes()) if done else (False, "hangs"))
        failed = [f"rank {i}: {what}" for i, (ok, what) in enumerate(answers) if not ok]
        if failed:
            self.stop()  # what was under way between the ranks is lost
        assert not failed, "\n".join(failed)
        return [what for _, what in answers]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request, tmp_path_factory):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = Ranks(request.param, tmp_path_factory.mktemp("ranks") / "store")
    yield ranks
    ranks.stop()


# ---- vocabulary-parallel heads ------------------------------------------------------------------


def local_problem(problem, split):
    mine = slice(split.start, split.start + split.sizes[split.rank])
    bias = None if problem.bias is None else problem.bias[mine].clone()
    return replace(problem, weight=problem.weight[mine].clone(), bias=bias)


def make_split(group, sizes):
    return VocabParallel(sizes, group.rank(), group.group_name)


def run_head(rank, group, evaluate, problem, sizes, needs, call, bare=False):
    split = make_split(group, sizes)
    local = local_problem(problem, split)
    return evaluate(linear_logprobs, local, needs, group=group if bare else split, **call)


def joined(results):
    """Results of the ranks as those of one process; what is on all of them has the same bits."""
    out = {}
    for name in results[0]:
        parts = [r[name] for r in results]
        if name in ("dweight", "dbias"):
            out[name] = torch.cat(parts)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), name
            out[name] = parts[0]
    return out


def budget(rows, sizes, itemsize):
    if rows is None:
        return None
    scratch = 0 if itemsize == 4 else plans.token_chunk("cpu") * max(sizes) * 4
    return rows * max(sizes) * itemsize + scratch


@pytest.fixture
def check(ranks, evaluate, assert_head_within_bound):
    def check(problem, mode, backend, sizes=None, bare=False):
        needs, rows = MODES[mode]
        sizes = sizes or SIZES[ranks.world]
        itemsize = problem.weight.element_size()
        call = {"backend": backend, "memory_budget": budget(rows, sizes, itemsize)}
        results = ranks(run_head, evaluate, problem, sizes, needs, call, bare)
        narrow = mode.startswith("cached") or backend == "triton"
        unit = torch.finfo(problem.weight.dtype if narrow else torch.float32).eps
        assert_head_within_bound(joined(results), problem, needs, unit=unit)

    return check


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["torch", "native"])
def test_a_sharded_head_keeps_the_error_bound(check, head_problem, name, dtype, mode, options):
    """Uneven shards, one of them empty; every rank has all log-probs and the whole dhidden."""
    check(head_problem(V=V, dtype=dtype, **options), mode, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="these ranks are on the CPU")
@pytest.mark.skipif(available_backends()["triton"] != "ok", reason="Triton is not there")
@pytest.mark.parametrize("mode", ["frozen", "cached", "recompute"])
def test_a_sharded_head_in_triton(check, ranks, head_problem, mode):
    """The interpreter's kernels, by the same exchange."""
    sizes = {2: (50, 20), 4: (50, 0, 0, 20)}[ranks.world]
    check(head_problem(N=9, V=70, H=16, **OPTIONS["all"]), mode, "triton", sizes)


@pytest.mark.parametrize("mode", ["frozen", "cached", "recompute"])
def test_a_bare_process_group_is_asked_for_the_sizes(check, head_problem, mode):
    check(head_problem(V=V, bias=True), mode, "auto", bare=True)


@pytest.mark.parametrize("ignored", ["none", "all"])
@pytest.mark.parametrize("N", [0, 1, 17])
def test_token_numbers(check, head_problem, N, ignored):
    for mode in ("frozen", "cached", "recompute"):
        check(head_problem(N=N, V=V, ignored=ignored), mode, "auto")


@pytest.mark.parametrize("mode", ["frozen", "cached", "recompute"])
def test_any_strides_of_hidden(check, head_problem, mode):
    """A gradient inherits them, and a collective takes memory as it lies."""
    problem = head_problem(V=V, ignored="none")
    check(replace(problem, hidden=problem.hidden.T.contiguous().T), mode, "auto")


@pytest.mark.parametrize("name", ["torch", "native"])
def test_a_shard_of_masked_columns(check, ranks, head_problem, name):
    """Padding of the vocabulary, bias -inf, that fills the last shards: no mass, no NaN."""
    problem = head_problem(V=V, bias=True)
    start = sum(SIZES[ranks.world][:-1]) - 3
    bias = problem.bias.clone()
    bias[start:] = -torch.inf
    target = torch.where(problem.target >= start, 0, problem.target)
    problem = replace(problem, bias=bias, target=target)
    for mode in ("forward", "frozen", "cached", "recompute"):
        check(problem, mode, name)


def run_stats(rank, group, problem, sizes, backend, gradient):
    local = local_problem(problem, make_split(group, sizes))
    hidden = local.hidden.clone().requires_grad_(gradient)
    weight = local.weight.requires_grad_(gradient)
    logps, stats = linear_logprobs_with_stats(
        hidden,
        weight,
        local.target,
        local.bias,
        stats=STATS,
        backend=backend,
        group=make_split(group, sizes),
        **local.options,
    )
    out = {"logps": logps.detach(), **{k: v.detach() for k, v in stats._asdict().items()}}
    if gradient:
        (logps @ local.upstream + stats.entropy @ local.upstream.flip(0)).backward()
        out.update(dhidden=hidden.grad, dweight=weight.grad)
    return out


@pytest.mark.parametrize("gradient", [False, True], ids=["logged", "differentiated"])
@pytest.mark.parametrize("name", ["torch", "native"])
def test_statistics_of_a_sharded_head(ranks, head_problem, assert_within_bound, name, gradient):
    problem = head_problem(V=V, **OPTIONS["all"])
    got = joined(ranks(run_stats, problem, SIZES[ranks.world], name, gradient))

    def whole(problem):
        hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
        logps, stats = reference.linear_logprobs_with_stats(
            hidden, weight, problem.target, problem.bias, stats=STATS, **problem.options
        )
        up = problem.upstream.to(logps.dtype)
        (logps @ up + stats["entropy"] @ up.flip(0)).backward()
        return {"logps": logps, **stats, "dhidden": hidden.grad, "dweight": weight.grad}

    eager, exact = whole(problem), whole(problem.to(torch.float64))
    assert torch.equal(got.pop("is_top1").double(), exact["is_top1"].double())
    for key, value in got.items():
        assert_within_bound(value, eager[key], exact[key], magnitude=12.0, name=key)


def run_some_rows(rank, group, problem, sizes):
    split = make_split(group, sizes)
    local = local_problem(problem, split)
    frozen = lambda h, t, **call: linear_logprobs(h, local.weight, t, group=split, **call).detach()
    h, t = local.hidden, local.target
    wants = h.clone().requires_grad_()
    trained = linear_logprobs(h, local.weight.requires_grad_(), t, group=split, memory_budget=10**5)
    local.weight.requires_grad_(False)
    return {
        "all": frozen(h, t),
        "some": frozen(h[5:12], t[5:12]),
        "frozen": frozen(wants, t),
        "cached": trained.detach(),
    }


def test_the_log_ratio_of_a_sharded_model_with_itself_is_zero(ranks, head_problem):
    """A token's bits depend on no other token, on no gradient, budget or rank."""
    got = joined(ranks(run_some_rows, head_problem(V=V, ignored="none"), SIZES[ranks.world]))
    assert torch.equal(got["some"], got["all"][5:12])
    assert torch.equal(got["frozen"], got["all"]) and torch.equal(got["cached"], got["all"])


# ---- fused loss ---------------------------------------------------------------------------------


def loss_function(segments, ref_logps, function=fused_linear_step_kto_loss, **fixed):
    def loss(hidden, weight, target, bias, **options):
        ref = ref_logps.double() if hidden.dtype == torch.float64 else ref_logps
        call = {**fixed, **options}
        baseline = call.pop("baseline", BASELINE)
        out = function(hidden, weight, target, segments, ref, baseline, bias, **call)
        return out[0] if isinstance(out, tuple) else out

    return loss


def run_fused(rank, group, evaluate, problem, sizes, segments, ref_logps, needs, call):
    split = make_split(group, sizes)
    loss = loss_function(segments, ref_logps, **call)
    return evaluate(loss, local_problem(problem, split), needs, group=split)


@pytest.fixture
def loss_problem(head_problem):
    def loss_problem(segments, dtype=torch.float32, **options):
        problem = head_problem(N=segments.num_tokens, V=V, dtype=dtype, bias=True, **options)
        exact = problem.to(torch.float64)
        ref = reference.linear_logprobs(
            exact.hidden, exact.weight, exact.target, exact.bias, **exact.options
        )
        ref = ref.float() + torch.randn(ref.shape, generator=torch.Generator().manual_seed(1))
        return replace(problem, upstream=torch.tensor(1.7)), ref

    return loss_problem


@pytest.fixture
def check_fused(ranks, evaluate, assert_within_bound, loss_problem):
    def check_fused(segments, config, baseline, needs=ALL, dtype=torch.float32, rows=None, **call):
        problem, ref_logps = loss_problem(segments, dtype)
        sizes = SIZES[ranks.world]
        fixed = {"config": config, "baseline": baseline}
        call = {**fixed, **call, "memory_budget": rows and rows * max(sizes) * 4}
        args = evaluate, problem, sizes, segments, ref_logps, needs, call
        got = joined(ranks(run_fused, *args))
        function = reference.fused_linear_step_kto_loss
        whole = loss_function(segments, ref_logps, function, **fixed)
        eager, exact = (evaluate(whole, problem.to(d), needs) for d in (dtype, torch.float64))
        assert got.keys() == exact.keys()
        for name, value in got.items():
            # the sum of log-ratios keeps the rounding of logits of up to 16
            assert_within_bound(value, eager[name], exact[name], magnitude=16.0, name=name)

    return check_fused


@pytest.mark.parametrize("name", ["torch", "native"])
@pytest.mark.parametrize("rows", [None, 30, 16], ids=["one block", "blocks", "long sequences"])
@pytest.mark.parametrize("needs", [(), ("hidden",), ALL], ids=["forward", "frozen", "all"])
def test_the_fused_loss_of_a_sharded_head(check_fused, layout, long, dtype, needs, rows, name):
    check_fused(layout(long), CONFIG, BASELINE, needs, dtype, rows, backend=name)


def test_every_batch_with_a_sharded_head(check_fused, segments):
    check_fused(segments, CONFIG, BASELINE)


def test_every_config_with_a_sharded_head(check_fused, typical, config, baseline):
    check_fused(typical, config, baseline)


def run_module(rank, group, problem, sizes, segments, ref_logps):
    split = make_split(group, sizes)
    local = local_problem(problem, split)
    call = local.hidden, local.weight, local.target, segments, ref_logps, BASELINE, local.bias
    module = StepKTOLoss(CONFIG, group=split)(*call)
    plain = fused_linear_step_kto_loss(*call, config=CONFIG, group=split)
    return {"module": module[0], "plain": plain[0], "totals": plain[1].totals}


def test_the_module_takes_a_group(ranks, typical, loss_problem):
    problem, ref_logps = loss_problem(typical)
    got = joined(ranks(run_module, problem, SIZES[ranks.world], typical, ref_logps))
    assert got["module"] == got["plain"]


def run_compiled(rank, group, problem, sizes):
    split = make_split(group, sizes)
    local = local_problem(problem, split)
    leaves = [x.clone().requires_grad_() for x in (local.hidden, local.weight)]

    def function(hidden, weight):
        return linear_logprobs(hidden, weight, local.target, group=split).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    same = []
    for one in (function, compiled):
        loss = one(*leaves)
        same.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    return all(torch.equal(a, b) for a, b in zip(*same, strict=True))


def test_a_sharded_head_compiles(ranks, head_problem):
    if ranks.world == 2:  # 4 compilers on 2 cores take as long as all other tests
        assert all(ranks(run_compiled, head_problem(V=V), SIZES[2]))


# ---- DTensor ------------------------------------------------------------------------------------


def run_dtensor(rank, group, evaluate, problem, named, hidden_dtensor, call):
    mesh = init_device_mesh("cpu", (group.size(),), mesh_dim_names=(named,) if named else None)
    place = lambda x, where: DTensor.from_local(x, mesh, [where], run_check=False)
    split = make_split(group, torch_chunks(V, group.size()))
    local = local_problem(problem, split)
    shard = lambda x: DTensor.from_local(
        x, mesh, [Shard(0)], run_check=False, shape=(V, *x.shape[1:]), stride=x.stride()
    )
    dp = replace(local, weight=shard(local.weight), bias=shard(local.bias))
    if hidden_dtensor:
        dp = replace(dp, hidden=place(local.hidden, Replicate()))
    results = evaluate(linear_logprobs, dp, **call)
    for name in ("dweight", "dbias"):
        if name in results:
            assert results[name].placements == (Shard(0),) and results[name].shape[0] == V
            results[name] = results[name].to_local()
    if hidden_dtensor and "dhidden" in results:
        assert results["dhidden"].placements == (Replicate(),)
        results["dhidden"] = results["dhidden"].to_local()
    return results


@pytest.mark.parametrize(("named", "hidden_dtensor"), [("tp", False), ("tp", True), (None, True)])
def test_a_dtensor_weight_brings_its_group(
    ranks, head_problem, evaluate, assert_head_within_bound, named, hidden_dtensor
):
    """V is not a multiple of the ranks: the gradients follow torch's uneven chunks."""
    problem = head_problem(V=V, bias=True)
    results = ranks(run_dtensor, evaluate, problem, named, hidden_dtensor, {"needs": ALL})
    assert_head_within_bound(joined(results), problem)


def run_fused_dtensor(rank, group, problem, segments, ref_logps):
    mesh = init_device_mesh("cpu", (group.size(),), mesh_dim_names=("tp",))
    place = lambda x: torch.distributed.tensor.distribute_tensor(x, mesh, [Shard(0)])
    weight, bias = place(problem.weight).requires_grad_(), place(problem.bias)
    call = problem.target, segments, ref_logps, BASELINE
    loss, _ = StepKTOLoss(CONFIG)(problem.hidden, weight, *call, bias)
    loss.backward()
    return {"logps": loss.detach(), "dweight": weight.grad.to_local()}


def test_the_fused_loss_takes_dtensors(ranks, typical, loss_problem):
    problem, ref_logps = loss_problem(typical)
    got = joined(ranks(run_fused_dtensor, problem, typical, ref_logps))
    weight = problem.weight.requires_grad_()
    call = problem.target, typical, ref_logps, BASELINE
    loss, _ = StepKTOLoss(CONFIG)(problem.hidden, weight, *call, problem.bias)
    loss.backward()
    torch.testing.assert_close(got["logps"], loss.detach())
    torch.testing.assert_close(got["dweight"], weight.grad)


def test_torch_chunks_are_those_of_dtensor(ranks):
    for V in (1, 3, 5, 7, 8, 301):
        assert ranks(run_chunks, V) == list(torch_chunks(V, ranks.world))


def run_chunks(rank, group, V):
    mesh = init_device_mesh("cpu", (group.size(),))
    weight = torch.distributed.tensor.distribute_tensor(torch.zeros(V, 2), mesh, [Shard(0)])
    split = parallel.vocab_parallel(weight)
    assert split.sizes[rank] == len(weight.to_local())
    return len(weight.to_local())


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def run_ambiguous(rank, group, problem):
    mesh = init_device_mesh("cpu", (group.size(),))
    place = torch.distributed.tensor.distribute_tensor
    weight = place(problem.weight, mesh, [Shard(0)])
    columns = place(problem.weight, mesh, [Shard(1)])
    hidden = place(problem.hidden, mesh, [Shard(0)])
    args = problem.hidden, weight, problem.target
    whole = linear_logprobs(problem.hidden, problem.weight, problem.target)
    replicated = place(problem.weight, mesh, [Replicate()])
    assert torch.equal(linear_logprobs(problem.hidden, replicated, problem.target), whole)
    explicit = linear_logprobs(*args, group=parallel.vocab_parallel(weight))
    torch.testing.assert_close(explicit, whole)
    torch.testing.assert_close(linear_logprobs(*args, group=group), whole)
    return {
        "plain hidden": error_of(linear_logprobs, *args),
        "columns": error_of(linear_logprobs, problem.hidden, columns, problem.target),
        "sharded hidden": error_of(linear_logprobs, hidden, weight, problem.target),
        "plain bias": error_of(linear_logprobs, *args, torch.zeros(V), group=group),
        "replicated": error_of(
            linear_logprobs, problem.hidden, replicated, problem.target, group=group
        ),
    }


def test_a_dtensor_that_may_be_data_parallel_is_refused(ranks, head_problem):
    """FSDP2 shards the same way, with other tokens on each rank: the call has to say which."""
    for errors in ranks(run_ambiguous, head_problem(V=V)):
        assert errors["plain hidden"].startswith("weight: want parallel.gathered_weight(weight)")
        assert errors["columns"].startswith("weight: want a DTensor that is Shard(0) or Repl")
        assert errors["sharded hidden"].startswith("hidden: want Replicate(), or a plain tensor")
        assert errors["plain bias"].startswith("bias: want a DTensor split as weight")
        assert errors["replicated"].startswith("group: want None, as weight is a DTensor that")


# ---- refused arguments --------------------------------------------------------------------------


def run_refused(rank, group, problem, sizes):
    split = make_split(group, sizes)
    local = local_problem(problem, split)
    args = local.hidden, local.weight, local.target
    at = lambda value, other: value if rank else other
    narrow = local.weight[:, :9]
    return {
        "group": error_of(linear_logprobs, *args, group="tp"),
        "reference": error_of(linear_logprobs, *args, group=split, backend="reference"),
        "sizes": error_of(linear_logprobs, *args, group=make_split(group, sizes[::-1])),
        "target": error_of(linear_logprobs, *args[:2], args[2].abs() + V, group=split),
        "budget": error_of(linear_logprobs, *args, group=group, memory_budget=at(3, 4)),
        "tokens": error_of(
            linear_logprobs, local.hidden[rank:], local.weight, local.target[rank:], group=group
        ),
        "stats": error_of(linear_logprobs_with_stats, *args, group=group, stats=STATS[: at(2, 3)]),
        "split": error_of(parallel.vocab_parallel, at(narrow, local.weight), group),
        "nobody": error_of(parallel.vocab_parallel, local.weight[:0], group),
    }


def test_what_differs_between_ranks_raises_on_all_of_them(ranks, head_problem):
    """With a bare group; nobody is left waiting."""
    for rank, errors in enumerate(ranks(run_refused, head_problem(V=V), SIZES[ranks.world])):
        assert (
            errors["group"]
            == "group: want None, a ProcessGroup or a parallel.VocabParallel, got tp"
        )
        assert errors["reference"].startswith("backend: want torch, native or triton where group")
        assert errors["sizes"].startswith("weight: want V_local = ")
        assert "in [0, V) = [0, 301)" in errors["target"]
        for name, argument in (
            ("budget", "memory_budget"),
            ("tokens", "hidden.shape"),
            ("stats", "stats"),
            ("split", "weight.shape[1]"),
        ):
            assert errors[name].startswith(f"{argument}: want the same on all ranks of group, got")
            assert "unlike rank 0" in errors[name], rank
        assert errors["nobody"].startswith("weight: want at least one row on some rank")


# ---- FSDP2 and data parallel --------------------------------------------------------------------


class Tiny(torch.nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = torch.nn.Embedding(V, 16)
        self.body = torch.nn.Linear(16, 16)
        self.lm_head = torch.nn.Linear(16, V, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        return self.body(self.embed(tokens)).tanh()


def tiny(tied=False):
    torch.manual_seed(0)
    return Tiny(tied)


# batches of every rank: rank 0 has something of everything
PARTS = {
    "alike": lambda rank: ((1, ((1, 3), (0, 2)), 2), (0, ((0, 4),), rank)),
    "rank 1 has no desirable example": lambda rank: (
        ((0, ((0, 3),), 1),) if rank == 1 else ((1, ((1, 3), (0, 2)), 2), (0, ((1, 2),), 0))
    ),
    "rank 1 has no label": lambda rank: (
        ((-1, ((-1, 3),), 1),) if rank == 1 else ((1, ((1, 3), (0, 2)), 2), (0, ((1, 2),), 0))
    ),
    "rank 1 has no token": lambda rank: (
        () if rank == 1 else ((1, ((1, 3), (0, 2)), 2), (0, ((1, 2),), rank))
    ),
    "nobody has a label": lambda rank: ((-1, ((-1, 3),), 1),),
    "nobody has a token": lambda rank: (),
}


def inputs_of(segments, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(0, V, (segments.num_tokens,), generator=generator)
    ref_logps = -6 + torch.randn(segments.num_tokens, generator=generator)
    return draw(), draw(), segments, ref_logps


def run_fsdp(rank, group, batches, separate, how):
    batch, model = batches[rank], tiny("tied" in how)
    if separate and "tied" not in how:
        fully_shard(model.lm_head)
        fully_shard(model.body)
    fully_shard(model, reshard_after_forward=separate)
    normalizer = loss_normalizer(batch[2], CONFIG, group)
    with torch.no_grad():
        zero = torch.zeros_like(batch[3])
        baseline = kl_baseline(zero + 0.5, zero, batch[2], group)
    # the model's forward pass comes first: only then is it known what FSDP leaves unsharded
    tokens, target, segments, ref_logps = batch
    hidden = model(tokens)
    weight = model.lm_head.weight
    assert isinstance(weight, DTensor) == separate
    if how == "tokens travel":
        logps = parallel.own_token_logprobs(hidden, weight, target)
        loss, _ = step_kto_loss(logps, ref_logps, segments, baseline, CONFIG, normalizer)
    else:
        weight = parallel.gathered_weight(weight)
        call = {"config": CONFIG, "normalizer": normalizer}
        loss, _ = fused_linear_step_kto_loss(
            hidden, weight, target, segments, ref_logps, baseline, **call
        )
    (loss * group.size()).backward()  # FSDP2 takes the mean over ranks
    out = {"loss": loss.detach()}
    dist.all_reduce(out["loss"], group=group)
    out.update({name: p.grad.full_tensor() for name, p in model.named_parameters()})
    return out


def run_means(rank, group):
    return takes_means(group)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("separate", "how"),
    [
        (True, "weight travels"),
        (True, "tokens travel"),
        (True, "tied weight travels"),
        (False, "weight travels"),
    ],
    ids=["gathered weight", "tokens travel", "tied embeddings", "left unsharded"],
)
def test_fsdp2_head_gradients_are_summed_over_ranks(ranks, layout, part, separate, how):
    """One process with the whole batch gives the same; a rank without anything neither hangs nor
    skews."""
    if not all(ranks(run_means)):
        pytest.skip(NO_MEANS)
    parts = [PARTS[part](rank) for rank in range(ranks.world)]
    batches = [inputs_of(layout(p), seed) for seed, p in enumerate(parts)]
    got = joined(ranks(run_fsdp, batches, separate, how))

    whole = layout(sum(parts, ()))
    tokens, target, _, ref_logps = (
        torch.cat([b[i] for b in batches]) if i != 2 else None for i in range(4)
    )
    model = tiny("tied" in how)
    zero = torch.zeros_like(ref_logps)
    baseline = kl_baseline(zero + 0.5, zero, whole)
    loss, _ = fused_linear_step_kto_loss(
        *(model(tokens), model.lm_head.weight, target, whole, ref_logps, baseline), config=CONFIG
    )
    loss.backward()
    assert (loss > 0) == (not part.startswith("nobody"))
    torch.testing.assert_close(got["loss"], loss.detach(), rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        # fp32 sums in another order
        atol = 1e-5 * float(parameter.grad.abs().max())
        torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=atol, msg=name)


def run_gathered(rank, group, dtype):
    mesh = init_device_mesh("cpu", (group.size(),))
    whole = torch.randn(V, 5)
    weight = torch.distributed.tensor.distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
    out = {}
    for reduce in ("mean", "sum"):
        weight.grad = None
        gathered = parallel.gathered_weight(weight, reduce=reduce, dtype=dtype)
        assert torch.equal(gathered, whole.to(dtype or whole.dtype))
        gathered.backward(torch.full_like(gathered, rank + 1.0))
        out[reduce] = weight.grad.full_tensor()
    twice = init_device_mesh("cpu", (1, group.size()), mesh_dim_names=("replicate", "shard"))
    hybrid = torch.distributed.tensor.distribute_tensor(whole, twice, [Replicate(), Shard(0)])
    out["hybrid"] = error_of(parallel.gathered_weight, hybrid)
    out["reduce"] = error_of(parallel.gathered_weight, weight, reduce="avg")
    assert parallel.gathered_weight(whole) is whole
    return out


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_gathered_weight_takes_the_sum_or_the_mean(ranks, dtype):
    total = sum(range(1, ranks.world + 1))
    for got in ranks(run_gathered, dtype):
        assert torch.equal(got["sum"], torch.full((V, 5), float(total)))
        assert torch.equal(got["mean"], torch.full((V, 5), total / ranks.world))
        assert got["hybrid"].startswith("weight: want a DTensor that is Shard(0)")
        assert got["reduce"] == "reduce: want one of 'mean', 'sum', got 'avg'"


def run_micro_batches(rank, group, micro_batches, weight, hidden_of):
    mine = micro_batches[rank]
    totals = [kl_totals(b[3] + 0.3, b[3] * 0.99, b[2], config=CONFIG) for b in mine]
    baseline = sum(totals[1:], totals[0]).baseline(group)
    counts = [loss_normalizer(b[2], CONFIG, group) for b in mine]
    normalizer = LossNormalizer(sum(n.outcome for n in counts), sum(n.step for n in counts))
    weight = weight.clone().requires_grad_()
    losses = []
    for tokens, target, segments, ref_logps in mine:
        loss, _ = fused_linear_step_kto_loss(
            *(hidden_of[tokens], weight, target, segments, ref_logps, baseline),
            config=CONFIG,
            normalizer=normalizer,
        )
        loss.backward()
        losses.append(loss.detach())
    out = {"loss": sum(losses), "dw": weight.grad}
    for value in out.values():
        dist.all_reduce(value, group=group)
    return {**out, "z_o": baseline.outcome, "z_s": baseline.step}


@pytest.mark.parametrize("part", PARTS)
def test_a_rank_without_desirable_examples_neither_hangs_nor_skews(ranks, layout, part):
    """DDP with gradient accumulation: normalizers and reference points of the whole batch."""
    parts = [[PARTS[part](rank), PARTS["alike"](rank)] for rank in range(ranks.world)]
    if part.startswith("nobody"):
        parts = [[p[0], p[0]] for p in parts]
    batches = [
        [inputs_of(layout(p), 10 * rank + i) for i, p in enumerate(ps)]
        for rank, ps in enumerate(parts)
    ]
    weight, hidden_of = torch.randn(V, 16), torch.randn(V, 16)
    got = joined(ranks(run_micro_batches, batches, weight, hidden_of))
    flat = [b for bs in batches for b in bs]
    whole = layout(sum((p for ps in parts for p in ps), ()))
    tokens, target, ref_logps = (torch.cat([b[i] for b in flat]) for i in (0, 1, 3))
    z = kl_baseline(ref_logps + 0.3, ref_logps * 0.99, whole, config=CONFIG)
    for key, value in (("z_o", z.outcome), ("z_s", z.step)):
        torch.testing.assert_close(got[key], value, rtol=1e-12, atol=0)
    weight.requires_grad_()
    loss, _ = fused_linear_step_kto_loss(
        hidden_of[tokens], weight, target, whole, ref_logps, z, config=CONFIG
    )
    loss.backward()
    torch.testing.assert_close(got["loss"], loss.detach(), rtol=1e-5, atol=0)
    atol = 1e-5 * float(weight.grad.abs().max())
    torch.testing.assert_close(got["dw"], weight.grad, rtol=0, atol=atol)


def run_readme(rank, group, block, problem, sizes, batch):
    space = {"linear_logprobs": linear_logprobs, "loss_fn": StepKTOLoss(CONFIG)}
    exec(block, space)  # our own README
    local = local_problem(problem, make_split(group, sizes))
    logps = space["tensor_parallel"](local.hidden, local.weight, local.target, group)
    torch.testing.assert_close(
        logps, linear_logprobs(problem.hidden, problem.weight, problem.target)
    )
    model = tiny()
    whole = model.lm_head.weight.detach().clone().requires_grad_()
    fully_shard(model.lm_head)
    tokens, *rest = batch
    hidden = model(tokens).detach()
    space["fsdp2"](hidden, model, *rest, BASELINE)[0].backward()
    space["loss_fn"](hidden, whole, *rest, BASELINE)[0].backward()
    torch.testing.assert_close(model.lm_head.weight.grad.full_tensor(), whole.grad)


def test_what_readme_shows_runs(ranks, head_problem, typical):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    block = next(block for block in blocks if "parallel." in block)
    ranks(run_readme, block, head_problem(V=V), SIZES[ranks.world], inputs_of(typical, 0))


# ---- sequence and context parallel --------------------------------------------------------------


def run_sequence_parallel(rank, group, problem, sizes, counts, trained):
    split = make_split(group, sizes).of_tokens(counts)
    local = local_problem(problem, split)
    start = sum(counts[:rank])
    mine = slice(start, start + counts[rank])
    hidden = local.hidden[mine].clone().requires_grad_()
    weight = local.weight.requires_grad_(trained)
    gathered = parallel.gather_tokens(hidden, group)
    target = parallel.gather_tokens(local.target[mine], group, counts)
    assert torch.equal(gathered, problem.hidden) and torch.equal(target, problem.target)
    logps = linear_logprobs(gathered, weight, target, local.bias, group=split)
    logps.backward(local.upstream)
    everyone = parallel.gather_tokens(hidden.grad, group, counts)
    results = {"logps": logps.detach(), "dhidden": everyone}
    return {**results, "dweight": weight.grad} if trained else results


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_tokens_cut_over_the_ranks_of_a_sharded_head(
    ranks, head_problem, evaluate, assert_head_within_bound, trained, even
):
    problem = head_problem(V=V)
    counts = {2: (25, 15), 4: (11, 0, 20, 9)}[ranks.world]
    if even:
        counts = (40 // ranks.world,) * ranks.world
    results = ranks(run_sequence_parallel, problem, SIZES[ranks.world], counts, trained)
    needs = ("hidden", "weight") if trained else ("hidden",)
    assert_head_within_bound(joined(results), problem, needs)


def run_context_parallel(rank, group, logps, ref_logps, segments, cuts, config, baseline):
    mine = slice(cuts[rank], cuts[rank + 1])
    own = parallel.own_segments(segments, mine)
    logps = logps[mine].clone().requires_grad_()
    loss, metrics = step_kto_loss(
        logps, ref_logps[mine], own, baseline, config, context_group=group
    )
    loss.backward()
    z = kl_totals(
        logps.detach(), ref_logps[mine], own, config=config, context_group=group
    ).baseline()
    g = parallel.gather_tokens(logps.grad, group)
    return {"loss": loss.detach(), "totals": metrics.totals, "g": g, "z": torch.stack([*z])}


def test_sequences_cut_over_ranks_are_summed(ranks, layout, long, config, baseline):
    segments = layout(long)
    N = segments.num_tokens
    cuts = {2: (0, 20, N), 4: (0, 9, 9, 33, N)}[ranks.world]
    logps, ref_logps = -3 + torch.randn(2, N, dtype=torch.float64).float()
    args = logps, ref_logps, segments, cuts, config, baseline
    got = joined(ranks(run_context_parallel, *args))
    logps.requires_grad_()
    loss, metrics = step_kto_loss(logps, ref_logps, segments, baseline, config)
    loss.backward()
    torch.testing.assert_close(got["loss"], loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(got["totals"], metrics.totals, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["g"], logps.grad, rtol=1e-6, atol=1e-12)
    z = kl_baseline(logps.detach(), ref_logps, segments, config=config)
    torch.testing.assert_close(got["z"], torch.stack([*z]), rtol=1e-12, atol=1e-12)
