"""One wrong argument in a call of `parallel`: a ValueError names it, before anything is exchanged.

One process is a group of its own here. test_parallel.py has several.
Letters: N tokens, H hidden size, V vocabulary, B sequences, S steps.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from stepkto_kernels import StepSegments, parallel, shards

N, H, V = 5, 4, 7
NO_TENSOR = {"none": None, "a list": [[1.0]], "a number": 1.0, "a string": "x"}
GROUPS = {"none": None, "a string": "world", "a number": 0}
COUNTS = {
    "a number": N,
    "a string": str(N),
    "a float": (float(N),),
    "a bool": (True,),
    "a tensor": torch.tensor([N]),
    "negative": (-1,),
    "none": (),
    "of two ranks": (N, 0),
    "too many": (N + 1,),
}
# of two arguments that do not fit, either may be named
FIT = ("too many", "plain", "whole", "one more", "another H")
REDUCE = {"unknown": "max", "none": None, "a list": ["mean"]}


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def valid_calls(mesh):
    """Name of a public function -> what is called, its arguments, wrong values of some of them."""
    group = mesh.get_group()
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    target = torch.randint(0, V, (N,))
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    columns = distribute_tensor(weight, mesh, [Shard(1)])
    none = torch.full((N,), -1, dtype=torch.int32)
    segments = StepSegments(
        torch.zeros(N, dtype=torch.int32),
        none,
        torch.ones(1, dtype=torch.int8),
        torch.ones(0, dtype=torch.int8),
        torch.ones(0, dtype=torch.int32),
    )
    head = {
        "integers": weight.long(),
        "fp64": weight.double(),
        "sparse": weight.to_sparse(),
        "1-D": bias,
    }
    whole = distribute_tensor(weight, mesh, [Replicate()])
    tokens = {**NO_TENSOR, "0-D": torch.tensor(1.0), "sparse": hidden.to_sparse()}
    return {
        "vocab_parallel": (
            parallel.vocab_parallel,
            {"weight": weight, "group": group},
            {"weight": NO_TENSOR | head | {"none": None, "columns": columns}, "group": GROUPS},
        ),
        "gathered_weight": (
            parallel.gathered_weight,
            {"weight": sharded, "reduce": "mean", "dtype": torch.float32},
            {
                "weight": NO_TENSOR | {"columns": columns, "whole": whole},
                "reduce": REDUCE,
                "dtype": {"integers": torch.int64, "a name": "float32", "a class": float},
            },
        ),
        "own_token_logprobs": (
            parallel.own_token_logprobs,
            {"hidden": hidden, "weight": sharded, "target": target, "reduce": "sum"}
            | {"bias": distribute_tensor(bias, mesh, [Shard(0)])},
            {
                "hidden": {k: x for k, x in tokens.items() if k != "0-D"}
                | {"another H": torch.randn(N, H + 1), "fp64": hidden.double()}
                | {"0-D": torch.tensor(1.0), "integers": hidden.long()},
                "weight": NO_TENSOR | {"plain": weight, "columns": columns, "whole": whole},
                "target": NO_TENSOR
                | {"int32": target.int(), "one more": torch.cat([target, target[:1]])},
                "bias": {"a list": [1.0], "plain": bias}
                | {"whole": distribute_tensor(bias, mesh, [Replicate()])}
                | {"one more": distribute_tensor(torch.randn(V + 1), mesh, [Shard(0)])},
                "reduce": REDUCE,
            },
        ),
        "token_counts": (
            parallel.token_counts,
            {"x": hidden, "group": group},
            {"x": tokens, "group": GROUPS},
        ),
        "gather_tokens": (
            parallel.gather_tokens,
            {"x": hidden, "group": group, "counts": (N,)},
            {"x": tokens | {"one fewer": hidden[1:]}, "group": GROUPS, "counts": COUNTS},
        ),
        "split_tokens": (
            parallel.split_tokens,
            {"x": hidden, "group": group, "counts": (N,)},
            {
                "x": tokens | {"one fewer": hidden[1:]},
                "group": GROUPS,
                "counts": COUNTS | {"None": None},
            },
        ),
        "own_segments": (
            parallel.own_segments,
            {"segments": segments, "rows": slice(1, 3)},
            {
                "segments": {"none": None, "a tensor": none, "a class": StepSegments},
                "rows": NO_TENSOR
                | {"a range": range(2), "2-D": torch.zeros(1, 1, dtype=torch.int64)}
                | {"floats": torch.ones(2), "uint8": torch.ones(N, dtype=torch.uint8)}
                | {"a short mask": torch.ones(N - 1, dtype=torch.bool)}
                | {"far": torch.tensor([N]), "far below": torch.tensor([-N - 1])},
            },
        ),
        "of_tokens": (
            shards.VocabParallel((V,), 0, group.group_name).of_tokens,
            {"counts": (N,)},
            {"counts": {k: x for k, x in COUNTS.items() if k != "too many"} | {"None": None}},
        ),
    }


FUNCTIONS = (
    *("vocab_parallel", "gathered_weight", "own_token_logprobs", "token_counts"),
    *("gather_tokens", "split_tokens", "own_segments", "of_tokens"),
)


def test_every_public_function_is_here(mesh):
    public = set(parallel.__all__) - {"VocabParallel"} | {"of_tokens"}
    assert set(valid_calls(mesh)) == set(FUNCTIONS) == public


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_wrong_argument(mesh, monkeypatch, function):
    call, arguments, wrong = valid_calls(mesh)[function]
    call(**arguments)  # so that what is refused below is refused for the one that was changed

    def collective(*args, **kwargs):
        raise AssertionError("exchanged")

    for name in ("_all_gather", "_reduce_scatter"):
        monkeypatch.setattr(shards, name, collective)
    monkeypatch.setattr(dist, "all_reduce", collective)
    problems = []
    for name, kinds in wrong.items():
        for kind, value in kinds.items():
            changed = {**arguments, name: value}
            try:
                call(**changed)
            except ValueError as error:
                named = (name, "x", "weight") if kind in FIT else (name,)
                if not str(error).startswith(tuple(f"{each}:" for each in named)):
                    problems.append(f"{name} = {kind}: {error}")
            except BaseException as error:
                problems.append(f"{name} = {kind}: {type(error).__name__}: {error}")
            else:
                problems.append(f"{name} = {kind}: nothing raised")
    assert not problems, "\n".join(problems)
