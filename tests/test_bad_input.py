"""One wrong argument in a call of a public function: a ValueError names it, and nothing changes.

Every mutation of every argument is tried once, and at random beside random shapes.
Letters: N tokens, H hidden size, V vocabulary, B sequences, S steps.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")

from fuzz_helpers import backends_of, fuzzed, served_by  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from stepkto_kernels import (  # noqa: E402
    KLBaseline,
    LossNormalizer,
    StepKTOConfig,
    StepKTOLoss,
    StepSegments,
    fused_linear_step_kto_loss,
    kl_baseline,
    kl_totals,
    linear_logprobs,
    linear_logprobs_with_stats,
    loss_normalizer,
    segment_sums,
    step_kto_loss,
    token_logprobs,
)

# ---- valid calls ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """Of a valid call. At least one of each, so that one more or less makes a difference."""

    B: int
    steps: int  # of a sequence
    tokens: int  # of a step
    H: int
    V: int
    backend: str
    seed: int


def segments_of(s: Shapes) -> StepSegments:
    S = s.B * s.steps
    step = torch.arange(S, dtype=torch.int32).repeat_interleave(s.tokens)
    sequence = step // s.steps
    return StepSegments(
        sequence_index=sequence.int(),
        step_index=step,
        outcome_label=(torch.arange(s.B) % 2).to(torch.int8),
        step_label=(torch.arange(S) % 2).to(torch.int8),
        step_sequence=torch.arange(S, dtype=torch.int32) // s.steps,
    )


class Valid:
    """Arguments by name that every function here accepts."""

    def __init__(self, s: Shapes):
        generator = torch.Generator().manual_seed(s.seed)
        randn = lambda *shape: torch.randn(shape, generator=generator)
        self.segments = segments_of(s)
        N = self.segments.num_tokens
        self.target = torch.randint(0, s.V, (N,), generator=generator)
        self.head = {
            "hidden": randn(N, s.H).requires_grad_(),
            "weight": randn(s.V, s.H).requires_grad_(),
            "target": self.target,
            "bias": randn(s.V).requires_grad_(),
        }
        self.options = {
            "temperature": 1.0,
            "logit_scale": 1.0,
            "softcap": None,
            "ignore_index": -100,
            "backend": s.backend,
        }
        self.budgets = {"memory_budget": None, "gradient_bound": 0.0, "group": None}
        self.log_probs = {
            "logps": randn(N).requires_grad_(),
            "ref_logps": randn(N),
            "segments": self.segments,
        }
        self.loss = {
            "baseline": KLBaseline(0.1, 0.1),
            "config": StepKTOConfig(),
            "normalizer": LossNormalizer(1.0, 1.0),
        }
        self.logits = randn(N, s.V).requires_grad_()
        self.B, self.K, self.T = s.B, s.steps, s.steps * s.tokens


def module_call(hidden, weight, target, segments, ref_logps, baseline, bias, **rest):
    call = {name: rest.pop(name) for name in ("normalizer", "update_running")}
    return StepKTOLoss(**rest)(
        hidden, weight, target, segments, ref_logps, baseline, bias, **call
    )  # fmt: skip


def calls(s: Shapes) -> dict[str, tuple[Callable, dict[str, Any]]]:
    """Name of a public function -> what is called, and its arguments."""
    v = Valid(s)
    ref = {"segments": v.segments, "ref_logps": v.log_probs["ref_logps"]}
    kl = {**v.log_probs, "config": StepKTOConfig()}
    token_options = dict(v.options)
    if s.backend == "native":
        token_options["backend"] = "torch"
    labels = v.segments.step_label.view(v.B, v.K)
    padded = {
        "step_ids": (torch.arange(v.T) // s.tokens).expand(v.B, v.T).clone(),
        "completion_mask": torch.ones(v.B, v.T, dtype=torch.bool),
        "outcome_label": v.segments.outcome_label,
        "step_labels": labels,
    }
    packed = {
        "cu_seqlens": torch.arange(v.B + 1) * v.T,
        "step_index": v.segments.step_index,
        "outcome_label": v.segments.outcome_label,
        "step_labels": labels.flatten(),
        "completion_mask": torch.ones(v.B * v.T, dtype=torch.bool),
    }
    fields_of = lambda x: {f.name: getattr(x, f.name) for f in fields(x) if f.init}
    head = {**v.head, **v.options, **v.budgets}
    return {
        "linear_logprobs": (linear_logprobs, head),
        "linear_logprobs_with_stats": (
            linear_logprobs_with_stats,
            {**head, "stats": ("entropy",)},
        ),
        "token_logprobs": (
            token_logprobs,
            {"logits": v.logits, "target": v.target, **token_options},
        ),
        "fused_linear_step_kto_loss": (fused_linear_step_kto_loss, {**head, **ref, **v.loss}),
        "StepKTOLoss": (module_call, {**head, **ref, **v.loss, "update_running": True}),
        "step_kto_loss": (step_kto_loss, {**v.log_probs, **v.loss, "context_group": None}),
        "kl_totals": (kl_totals, {**kl, "labelled_only": False, "context_group": None}),
        "kl_baseline": (kl_baseline, {**kl, "group": None}),
        "loss_normalizer": (
            loss_normalizer,
            {"segments": v.segments, "config": StepKTOConfig(), "group": None},
        ),
        "segment_sums": (segment_sums, {"ratio": v.log_probs["logps"], "segments": v.segments}),
        "StepSegments": (StepSegments, fields_of(v.segments)),
        "from_padded": (StepSegments.from_padded, padded),
        "from_packed": (StepSegments.from_packed, packed),
        "StepKTOConfig": (StepKTOConfig, fields_of(StepKTOConfig())),
    }


FUNCTIONS = list(calls(Shapes(1, 1, 1, 2, 3, "torch", 0)))

# ---- mutations --------------------------------------------------------------------------------

NUMBERS = {"a string": "1", "a list": [1.0], "a tensor": torch.tensor(1.0), "a bool": True}
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "too large": 10**400}
POSITIVE = {**NUMBERS, **NOT_FINITE, "0": 0, "negative": -1.5, "complex": 1j}
NOT_NEGATIVE = {k: x for k, x in POSITIVE.items() if k != "0"}
INTEGERS = {**NUMBERS, "a float": 1.5, "nan": math.nan, "None": None, "too large": 2**70}
CHOICES = {
    "unknown": "fastest",
    "None": None,
    "a number": 1,
    "a list": ["auto"],
    "a tensor": torch.zeros(2),
    "bytes": b"auto",
}
NO_OBJECT = {
    "None": None,
    "a string": "x",
    "a dict": {},
    "a tensor": torch.zeros(2),
    "a class": int,
}
GROUPS = {"a string": "x", "a number": 0, "a tensor": torch.zeros(2), "a class": int}
PAIRS = {
    "a tuple": (0.1, 0.1),
    "a number": 0.1,
    "a string": "zero",
    "a tensor": torch.zeros(2),
}


def parts_of(make: Callable, *, low: bool) -> dict[str, Any]:
    """Pairs of which one part is wrong."""
    wrong = {
        **{k: x for k, x in NUMBERS.items() if k != "a tensor"},
        **NOT_FINITE,
        "None": None,
        "(1,)": torch.zeros(1),
        "complex": torch.tensor(1j),
        "meta": torch.zeros((), device="meta"),
    }
    if low:
        wrong["negative"] = -1.0
    pairs = {}
    for name, value in wrong.items():
        pairs[f"first {name}"] = make(value, 1.0)
        pairs[f"second {name}"] = make(1.0, value)
    return pairs


BASELINES = {**PAIRS, "a normalizer": LossNormalizer(1.0, 1.0), **parts_of(KLBaseline, low=False)}
NORMALIZERS = {**PAIRS, "a baseline": KLBaseline(1.0, 1.0), **parts_of(LossNormalizer, low=True)}
BASELINES["None"] = None  # which the default reference_point does not allow
OPTIONS = {
    "temperature": {**POSITIVE, "None": None},
    "logit_scale": {**NUMBERS, **NOT_FINITE, "None": None},
    "softcap": POSITIVE,
    "ignore_index": INTEGERS,
    "memory_budget": {k: x for k, x in INTEGERS.items() if k != "None"} | {"negative": -1},
    "gradient_bound": {**NOT_NEGATIVE, "None": None},
    "backend": CHOICES,
    "group": GROUPS,
    "context_group": GROUPS,
    "config": NO_OBJECT,
    "baseline": BASELINES,
    "normalizer": NORMALIZERS,
    "labelled_only": {"None": None, "a string": "no", "a number": 2, "a tensor": torch.zeros(2)},
    "update_running": {"None": None, "a string": "no", "a number": 2, "a tensor": torch.zeros(2)},
    "stats": {
        "None": None,
        "a number": 5,
        "a name": "entropy",
        "unknown": ("entropy", "perplexity"),
        "a list of lists": [["entropy"]],
        "numbers": (1, 2),
        "a tensor": torch.zeros(2),
    },
    "beta": {**POSITIVE, "None": None},
    "step_beta": POSITIVE,
    "ema_decay": {**NOT_NEGATIVE, "None": None, "1": 1, "more": 1.5},
    "step_reduction": CHOICES,
    "loss_type": CHOICES,
    "reference_point": {
        **{k: x for k, x in NUMBERS.items() if k != "a string"},
        **NOT_FINITE,
        "unknown": "somewhere",
        "None": None,
    },
    "ratio_clip": {
        **NUMBERS,
        "one": (1.0,),
        "three": (1.0, 2.0, 3.0),
        "wrong order": (1.0, -1.0),
        "nan": (math.nan, 1.0),
        "none": (None, 1.0),
        "strings": ("a", "b"),
        "inf": (-math.inf, 1.0),
        "too large": (-(10**400), 1.0),
    },
    "length_normalize": {"None": None, "a string": "no", "a number": 1, "a tensor": torch.zeros(2)},
    **{
        name: {**NOT_NEGATIVE, "None": None}
        for name in (
            *("step_weight", "desirable_weight", "undesirable_weight"),
            *("step_desirable_weight", "step_undesirable_weight"),
        )
    },
}
FLOATS = ("hidden", "weight", "bias", "logits", "logps", "ref_logps", "ratio")
ANY_SHAPE = ("ratio",)  # as long as the number of elements is right


def resized(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Other numbers of elements along one dimension."""
    out = {}
    for dim, size in enumerate(x.shape):
        out[f"one more in {dim}"] = torch.cat([x, x.narrow(dim, 0, 1)], dim)
        out[f"none in {dim}"] = x.narrow(dim, 0, 0)
        if size > 1:
            out[f"one fewer in {dim}"] = x.narrow(dim, 0, size - 1)
    return out


def tensor_mutations(name: str, x: torch.Tensor, function: str) -> dict[str, Any]:
    """Wrong values of a tensor argument; those that begin with "~" are wrong beside another one."""
    x = x.detach()
    wrong: dict[str, Any] = {
        "a list": x.tolist(),
        "a number": 1.0,
        "a string": "x",
        "numpy": x.numpy(),
        "complex": x.to(torch.complex64),
        "sparse": x.to_sparse(),
    }
    if name not in ("bias", "completion_mask"):
        wrong["None"] = None
    others = {f"~{key}": value for key, value in resized(x).items()}
    others["~meta"] = x.to("meta")
    if name not in ANY_SHAPE:
        others["~one more dimension"] = x[None]
    if name in FLOATS:
        wrong["integers"] = x.to(torch.int64)
        wrong["bools"] = x > 0
        others["~bf16"] = x.bfloat16()
        if name in ("logits", "hidden"):
            others.pop("~bf16")  # by itself that is fine
            if name == "logits":  # and the head's other tensors are not there
                others = {key: x for key, x in others.items() if "in 1" not in key}
                others["~none in 1"] = x[:, :0]
        if name in ("hidden", "weight", "bias", "logits"):
            others["~fp64"] = x.double()
    else:
        wrong["floats"] = x.float()
        if name == "target":
            wrong |= {"int32": x.int(), "too large": x + 1000, "negative": x - 50}
        elif name != "completion_mask":
            wrong["bools"] = x > 0
    if name == "logps":
        others["~fp64"] = x.double()  # the reference's are fp32
    if function == "from_padded":
        if name == "step_ids":
            wrong |= {"too large": x + 1000, "negative": x - 50}
        if name == "step_labels":
            others.pop("~one more in 1")  # a step more, without tokens
    if function == "from_packed":
        if name == "step_index":
            wrong |= {"too large": x + 1000, "negative": x - 50}
        if name == "step_labels":
            others.pop("~one more in 0")
        if name == "cu_seqlens":
            wrong |= {"falling": -x, "too large": x + 1000, "backwards": x.flip(0)}
    if function in ("from_packed", "from_padded") and "label" in name:
        wrong |= {"labels of 2": x.long() + 2, "labels of 256": x.long() + 256}
        wrong["labels of -2"] = x.long() - 3
    if function == "StepSegments":
        narrow = x.long()
        wrong["int64"] = narrow
        others = {k: v for k, v in others.items() if name != "outcome_label" or "in 0" not in k}
    return {**wrong, **others}


def segment_mutations(segments: StepSegments) -> dict[str, Any]:
    """Not a layout, one of other tokens, and ones whose indices or labels point outside."""

    def changed(name: str, value: int) -> StepSegments:
        out = copy.deepcopy(segments)
        getattr(out, name)[0] = value
        return out

    index = [segments.sequence_index, segments.step_index]
    more = [torch.cat([x, x[:1]]) for x in index]
    rest = segments.outcome_label, segments.step_label, segments.step_sequence
    return {
        **NO_OBJECT,
        "~one token more": StepSegments(*more, *rest),
        "~meta": segments.to("meta"),
        "far sequence": changed("sequence_index", 1000),
        "far step": changed("step_index", 1000),
        "far sequence of a step": changed("step_sequence", 1000),
        "negative": changed("sequence_index", -5),
        "a label of 2": changed("outcome_label", 2),
        "a step label of -2": changed("step_label", -2),
    }


def mutations(function: str, arguments: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(argument, what is wrong, value) of all that is tried with a function."""
    out = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            wrong = tensor_mutations(name, value, function)
        elif name == "segments":
            wrong = segment_mutations(value)
            if function == "loss_normalizer":
                keep = (*NO_OBJECT, "far sequence of a step", "a label of 2")
                wrong = {k: x for k, x in wrong.items() if k in keep}
            if function == "segment_sums":  # which does not look at labels
                keep = (*NO_OBJECT, "~one token more", "~meta", "far sequence", "far step")
                wrong = {k: x for k, x in wrong.items() if k in (*keep, "negative")}
        else:
            wrong = dict(OPTIONS[name])
            if function == "StepKTOLoss" and name == "baseline":
                wrong.pop("None")  # it has a running value
        out += [(name, kind, each) for kind, each in wrong.items()]
    return out


# ---- the check --------------------------------------------------------------------------------


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, StepSegments):
        return [getattr(value, f.name) for f in fields(value) if f.init]
    return [x for x in value if isinstance(x, torch.Tensor)] if isinstance(value, tuple) else []


def check(function: str, shapes: Shapes, name: str, kind: str, wrong: Any) -> None:
    call, arguments = calls(shapes)[function]
    arguments = {**arguments, name: wrong}
    tensors = [x for value in arguments.values() for x in tensors_in(value)]
    tensors = [x for x in tensors if x.layout == torch.strided and not x.is_meta]
    for x in tensors:
        if x.requires_grad and x.is_leaf:
            x.grad = torch.ones_like(x)
    before = [(x.detach().clone(), x._version, x.grad, x.requires_grad) for x in tensors]
    level = served_by("native" if shapes.backend == "native" else "torch")
    with level, pytest.raises(ValueError) as caught:
        call(**arguments)
    assert type(caught.value) is ValueError, repr(caught.value)
    # A mismatch of two arguments may name either; the fields of a layout are its name.
    named = [name]
    if kind.startswith("~"):
        named += [k for k, v in arguments.items() if isinstance(v, (torch.Tensor, StepSegments))]
    if name == "segments":
        named += [f.name for f in fields(StepSegments)]
    message = str(caught.value)
    assert any(message.startswith((f"{n}:", f"{n}.", f"{n}[")) for n in named), message
    for x, (value, version, grad, requires) in zip(tensors, before, strict=True):
        assert torch.equal(x.detach(), value) and x._version == version
        assert x.requires_grad == requires
        assert x.grad is grad and (grad is None or bool((grad == 1).all()))


SMALL = Shapes(B=3, steps=2, tokens=2, H=4, V=7, backend="torch", seed=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_valid_calls_are_served(function):
    """So that what is refused below is refused for the one argument that was changed."""
    call, arguments = calls(SMALL)[function]
    call(**arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_mutation(function):
    problems = []
    for name, kind, wrong in mutations(function, calls(SMALL)[function][1]):
        try:
            check(function, SMALL, name, kind, wrong)
        except BaseException as error:  # pytest's own failures too
            problems.append(f"{name} = {kind}: {type(error).__name__}: {str(error)[:200]}")
    assert not problems, "\n".join(problems)


@dataclass(frozen=True)
class BadCase:
    function: str
    shapes: Shapes
    number: int  # of a mutation

    @property
    def backend(self) -> str:
        return self.shapes.backend


some = st.integers(1, 4)
bad_cases = st.builds(
    BadCase,
    function=st.sampled_from(FUNCTIONS),
    shapes=st.builds(
        Shapes,
        B=some,
        steps=some,
        tokens=some,
        H=some,
        V=st.integers(1, 40),
        backend=backends_of("torch", "native", "triton", "reference"),
        seed=st.integers(0, 2**20),
    ),
    number=st.integers(0, 10**6),
)


@fuzzed(100, 3.0)
@given(case=bad_cases)
def test_a_mutation_beside_random_shapes(case):
    tried = mutations(case.function, calls(case.shapes)[case.function][1])
    check(case.function, case.shapes, *tried[case.number % len(tried)])
