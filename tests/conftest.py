"""What all tests share: problem makers, how they are evaluated, and the one error bound.

Letters: N tokens, H hidden size, V vocabulary, B sequences, S steps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

# Triton kernels run in its interpreter where there is no GPU; Triton reads this at its import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from stepkto_kernels import (  # noqa: E402
    KLBaseline,
    StepKTOConfig,
    StepSegments,
    available_backends,
    native,
    reference,
)

# Ops with a deterministic variant take it, and torch.empty comes filled with NaN (integers: the
# largest): an output that was not written in full shows up.
torch.use_deterministic_algorithms(True, warn_only=True)

FP32 = torch.finfo(torch.float32)
SCALARS = ("temperature", "logit_scale", "softcap")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU, torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems are tiny here, threads would only wait for each other. Undoes `set_num_threads`.

    STEPKTO_TEST_THREADS: more, for ThreadSanitizer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("STEPKTO_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(before)


def cpu_backend(name: str) -> object:
    state = available_backends()[name]
    return pytest.param(name, marks=pytest.mark.skipif(state != "ok", reason=f"{name}: {state}"))


@pytest.fixture(params=[cpu_backend("torch"), cpu_backend("native"), cpu_backend("triton")])
def backend(request: pytest.FixtureRequest) -> str:
    """Every implementation but the reference; all of them keep the same error bound."""
    if request.param == "triton" and "dtype" in request.fixturenames:
        if request.getfixturevalue("dtype") == torch.bfloat16:
            pytest.skip("Triton's interpreter truncates bf16 stores and its bf16 dot is wrong")
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[cpu_backend("torch"), cpu_backend("native")])
def auto_is(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What "auto" resolves to, for functions that take no backend by name."""
    if request.param == "torch":
        monkeypatch.setattr(native, "WHY_NOT", "hidden by the test")
    return request.param


LOGIT_OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "logit_scale": {"logit_scale": 0.4},
    "softcap": {"softcap": 5.0},
    "all together": {"bias": True, "temperature": 1.3, "logit_scale": -0.6, "softcap": 7.0},
}


@pytest.fixture(params=list(LOGIT_OPTIONS.values()), ids=list(LOGIT_OPTIONS))
def logit_options(request: pytest.FixtureRequest) -> dict:
    """Options of the logits; "bias" is for `head_problem`, the others are keyword arguments."""
    return request.param


# ---- an lm_head -------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadProblem:
    """Arguments of linear_logprobs, an upstream gradient, and the options of the logits."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    target: Tensor  # (...) int64
    bias: Tensor | None  # (V,)
    upstream: Tensor  # (...) fp32, d loss / d logp
    options: dict

    def to(self, where: torch.dtype | str) -> HeadProblem:
        """Same values in another dtype (target and upstream keep theirs), or on another device."""
        names = ["hidden", "weight", "bias"]
        if isinstance(where, str):
            names += ["target", "upstream"]
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{k: None if v is None else v.to(where) for k, v in values.items()})


@pytest.fixture
def head_problem() -> Callable[..., HeadProblem]:
    """Maker of random problems. Every fifth target is ignored and every third gradient is 0."""

    def make(
        N: int | tuple[int, ...] = 40,
        V: int = 300,
        H: int = 64,
        dtype: torch.dtype = torch.float32,
        *,
        bias: bool = False,
        ignored: str = "some",
        spread: float = 3.0,
        seed: int = 0,
        **options: float,
    ) -> HeadProblem:
        generator = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(shape, generator=generator)
        shape = (N,) if isinstance(N, int) else N
        target = torch.randint(0, V, shape, generator=generator)
        upstream = randn(*shape)
        upstream.view(-1)[::3] = 0
        if ignored == "some":
            target.view(-1)[1::5] = -100
        elif ignored == "all":
            target.fill_(-100)
        return HeadProblem(
            hidden=randn(*shape, H).to(dtype),
            weight=(randn(V, H) * (spread / H**0.5)).to(dtype),  # logits ~ N(0, spread**2)
            target=target,
            bias=randn(V).to(dtype) if bias else None,
            upstream=upstream,
            options=options,
        )

    return make


def _evaluate(
    function: Callable[..., Tensor],
    problem: HeadProblem,
    needs: Sequence[str] = ("hidden", "weight", "bias"),
    **extra: object,
) -> dict[str, Tensor]:
    """logps, and the gradients of (logps * upstream).sum() as dhidden, dweight, dbias."""
    leaves = {}
    for name in ("hidden", "weight", "bias"):
        value = getattr(problem, name)
        leaves[name] = None if value is None else value.detach().requires_grad_(name in needs)
    hidden, weight, bias = leaves.values()
    logps = function(hidden, weight, problem.target, bias, **problem.options, **extra)
    results = {"logps": logps.detach()}
    if any(leaf is not None and leaf.requires_grad for leaf in leaves.values()):
        logps.backward(problem.upstream.to(logps.dtype))
    for name, leaf in leaves.items():
        if leaf is not None and leaf.requires_grad:
            results["d" + name] = leaf.grad
    return results


@pytest.fixture
def evaluate() -> Callable[..., dict[str, Tensor]]:
    return _evaluate


@pytest.fixture
def rounding_scale() -> Callable[[HeadProblem], dict[str, Tensor]]:
    """For each element of `evaluate`'s results, what an fp32 ulp on the way can change it by.

    A logit is known to an ulp of the sum of |h * W|, and so is log p. That absolute error is a
    relative one in p, which may also be flushed to 0 where it is not a normal number. A gradient is
    a sum of g * (onehot - p) * W. For each sum of n terms: 4 roundings of every term, and sqrt(n)
    of the sum, as the signs of rounding errors are random.
    """

    def scale(problem: HeadProblem) -> dict[str, Tensor]:
        exact, options = problem.to(torch.float64), problem.options
        h, w = exact.hidden.reshape(-1, exact.hidden.shape[-1]), exact.weight
        N, V, H = h.shape[0], *w.shape
        target, g = problem.target.flatten(), problem.upstream.flatten().double().abs()
        chain = abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
        of_logit = h.abs() @ w.abs().T * chain  # (N, V)
        if exact.bias is not None:
            of_logit += exact.bias.nan_to_num(neginf=0).abs() * chain
        scored = target != options.get("ignore_index", -100)
        of_logp = (4 + H**0.5) * (of_logit.amax(1) + math.log(V)) * scored
        scalars = {name: options[name] for name in SCALARS if name in options}
        z = reference.transform_logits(F.linear(h, w, exact.bias), **scalars)
        onehot = F.one_hot(target.where(scored, 0), V)
        # p * (e**d - 1) for an error of d in log p; for small d that is p * d
        of_exp = torch.expm1(FP32.eps * of_logp).div(FP32.eps).clamp(max=1e30)
        of_p = z.softmax(1) * (1 + of_exp)[:, None] + FP32.smallest_normal / FP32.eps
        of_dlogit = (g * scored * chain)[:, None] * (onehot + of_p)
        if "softcap" in options:  # the slope of the cap bends within `softcap` of its argument
            of_slope = (4 + H**0.5) * of_logit.amax(1, keepdim=True) / options["softcap"]
            of_dlogit += (g * scored * chain)[:, None] * (onehot + z.softmax(1)) * of_slope
        # in a narrow dtype a dlogit is also rounded where it is not a normal number
        of_dlogit += (g.clamp(min=1) * scored)[:, None] * torch.finfo(problem.weight.dtype).tiny
        return {
            "logps": of_logp.view(problem.target.shape),
            "largest logit": z.abs().nan_to_num(posinf=0).amax() if z.numel() else z.new_zeros(()),
            "dhidden": (4 + V**0.5) * (of_dlogit @ w.abs()).view(problem.hidden.shape),
            "dweight": (4 + N**0.5) * (of_dlogit.T @ h.abs()),
            "dbias": (4 + N**0.5) * of_dlogit.sum(0),
        }

    return scale


# ---- a batch of sequences ---------------------------------------------------------------------

# Batches of sequences: (outcome label, ((label, tokens) of each step, ...), tokens in no step).
BATCHES = {
    "typical": (
        (1, ((1, 3), (0, 2), (-1, 4)), 2),
        (0, ((1, 1), (0, 5)), 0),
        (1, (), 6),
        (-1, ((0, 2), (1, 3)), 1),
        (0, ((0, 4),), 3),
    ),
    "right only": ((1, ((1, 3), (1, 2)), 2), (1, ((1, 4),), 1)),
    "wrong only": ((0, ((0, 3), (0, 2)), 2), (0, ((0, 4),), 1)),
    "outcomes unlabelled": ((-1, ((1, 3), (0, 2)), 2), (-1, ((1, 4),), 1)),
    "steps unlabelled": ((1, ((-1, 3), (-1, 2)), 2), (0, ((-1, 4),), 1)),
    "nothing labelled": ((-1, ((-1, 3), (-1, 2)), 2), (-1, ((-1, 4),), 1)),
    "no steps": ((1, (), 5), (0, (), 3), (1, (), 1)),
    "steps without tokens": ((1, ((1, 0), (0, 3), (0, 0)), 1), (0, ((1, 0),), 2)),
    "sequence without tokens": ((1, (), 0), (0, ((1, 2), (0, 1)), 1)),
    "one token": ((1, ((0, 1),), 0),),
    "long": ((1, ((1, 2),), 1), (1, ((1, 30), (0, 9)), 3), (0, ((1, 2),), 1), (0, ((0, 20),), 0)),
    "no tokens": ((1, ((1, 0),), 0), (0, (), 0)),
    "no sequences": (),
}


@pytest.fixture
def layout() -> Callable[..., StepSegments]:
    """Segments of a batch as in BATCHES, built token by token.

    order: "packed", sequence after sequence with an unscored token before each, or "interleaved",
    the same tokens shuffled.
    """

    def layout(sequences: Sequence, order: str = "packed") -> StepSegments:
        sequence_index, step_index, step_label, step_sequence = [], [], [], []
        for b, (_, steps, loose) in enumerate(sequences):
            sequence_index.append(-1)
            step_index.append(-1)
            for label, tokens in steps:
                sequence_index += [b] * tokens
                step_index += [len(step_label)] * tokens
                step_label.append(label)
                step_sequence.append(b)
            sequence_index += [b] * loose
            step_index += [-1] * loose
        N = len(sequence_index)
        shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        at = slice(None) if order == "packed" else shuffled
        return StepSegments(
            sequence_index=torch.tensor(sequence_index, dtype=torch.int32)[at],
            step_index=torch.tensor(step_index, dtype=torch.int32)[at],
            outcome_label=torch.tensor([s[0] for s in sequences], dtype=torch.int8),
            step_label=torch.tensor(step_label, dtype=torch.int8),
            step_sequence=torch.tensor(step_sequence, dtype=torch.int32),
        ).validate()

    return layout


@pytest.fixture
def batches() -> dict[str, Sequence]:
    return BATCHES


@pytest.fixture
def long() -> Sequence:
    """Sequences of 3, 42, 3 and 20 tokens."""
    return BATCHES["long"]


@pytest.fixture(params=list(BATCHES.values()), ids=list(BATCHES))
def sequences(request: pytest.FixtureRequest) -> Sequence:
    return request.param


@pytest.fixture(params=["packed", "interleaved"])
def segments(request: pytest.FixtureRequest, layout, sequences) -> StepSegments:
    """Every batch of BATCHES, in both orders."""
    return layout(sequences, request.param)


@pytest.fixture
def typical(layout) -> StepSegments:
    return layout(BATCHES["typical"])


LOSS_CONFIGS = {
    "default": {},
    "step_beta": {"step_beta": 0.3},
    "mean": {"step_reduction": "mean"},
    "sum": {"step_reduction": "sum"},
    "weights": {
        **{"desirable_weight": 0.7, "undesirable_weight": 1.3},
        **{"step_desirable_weight": 0.2, "step_undesirable_weight": 1.9, "step_weight": 0.6},
    },
    "without steps": {"step_weight": 0.0},
    "apo_zero": {"loss_type": "apo_zero"},
    "zero": {"reference_point": "zero"},
    "a number": {"reference_point": 0.35},
    "matched": {"reference_point": "matched"},
    "ratio_clip": {"ratio_clip": (-0.5, 0.8)},
    "length_normalize": {"length_normalize": True, "beta": 2.0},
    "all together": {
        **{"beta": 0.7, "step_beta": 1.1, "step_weight": 2.0, "step_reduction": "sum"},
        **{"undesirable_weight": 0.3, "step_desirable_weight": 1.7, "length_normalize": True},
        **{"ratio_clip": (-1.0, 0.4), "reference_point": "matched"},
    },
}


@pytest.fixture(params=list(LOSS_CONFIGS.values()), ids=list(LOSS_CONFIGS))
def config(request: pytest.FixtureRequest) -> StepKTOConfig:
    return StepKTOConfig(**request.param)


@pytest.fixture
def baseline(config) -> KLBaseline | None:
    """Reference points for `config`: none where it says itself where they come from."""
    from_caller = config.fixed_reference_point is None and config.reference_point != "matched"
    return KLBaseline(0.21, 0.13) if from_caller else None


# ---- cost -------------------------------------------------------------------------------------


@pytest.fixture
def allocations() -> Callable[[Callable[[], object]], tuple[int, int]]:
    """Bytes of the largest block that torch allocates in a call, and the peak of their sum."""

    def allocations(function: Callable[[], object]) -> tuple[int, int]:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            function()
        events = profile.profiler.kineto_results.events()
        events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
        total = peak = largest = 0
        for event in events:
            total += event.nbytes()
            peak, largest = max(peak, total), max(largest, event.nbytes())
        return largest, peak

    return allocations


@pytest.fixture
def gemm_flops() -> Callable[[Callable[[], object]], int]:
    """Floating-point operations of all matrix products in a call: 2 * n * k * m each."""

    def gemm_flops(function: Callable[[], object]) -> int:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        ) as profile:
            function()
        total = 0
        for event in profile.events():
            if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
                (n, k), (_, m) = event.input_shapes[0 if event.name == "aten::mm" else 1 :][:2]
                total += 2 * n * k * m
        return total

    return gemm_flops


# ---- the error bound --------------------------------------------------------------------------


def _assert_within_bound(
    ours: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    magnitude: float = 0.0,
    scale: Tensor | None = None,
    unit: float = FP32.eps,
    whole: bool = True,
    name: str = "result",
) -> None:
    """error of ours <= 2 * error of eager + floor, both against fp64.

    For the largest error of the tensor the floor is 1 ulp of the largest result, which is rounded
    when stored and again when scaled, 4 fp32 ulps of it, for the logit, exp, product and sum behind
    it, and 1 fp32 ulp of `magnitude`, the largest number on the way: an eager result that is exact
    by luck must not ask the same of ours.
    With `scale` (see rounding_scale) also for every single element, with a floor of 1 ulp of itself
    and `unit` of its scale. Not `whole`: only that, as the largest of a few errors is luck.
    """
    ours, eager, exact = (x.detach().cpu() for x in (ours, eager, exact))
    assert exact.dtype == torch.float64
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert eager.shape == exact.shape, f"{name}: the eager result has another shape"
    finite = exact.isfinite()
    same = torch.equal(ours.double()[~finite], exact[~finite])
    assert same, f"{name}: not the infinities of the exact result"
    assert ours[finite].isfinite().all(), f"{name}: not finite where the exact result is"
    if not finite.any():
        return
    ulp = torch.finfo(ours.dtype).eps
    smallest = torch.finfo(ours.dtype).smallest_normal * ulp
    size = exact[finite].abs()
    error = (ours.double() - exact)[finite].abs()
    # an eager result that left the range of its dtype allows nothing
    allowed = 2 * (eager.double() - exact)[finite].abs().nan_to_num(nan=0.0, posinf=0.0)
    floor = ulp * size.max() + FP32.eps * (4 * size.max() + magnitude) + smallest
    bound = allowed.max() + floor
    if whole or scale is None:
        assert error.max() <= bound, f"{name}: error {error.max():.3g} > bound {bound:.3g}"
    if scale is not None:
        bounds = allowed + ulp * size + unit * scale.cpu()[finite] + smallest
        worst = (error / bounds).max()
        assert worst <= 1, f"{name}: an element's error is {worst:.3g} times its bound"


@pytest.fixture
def assert_within_bound() -> Callable[..., None]:
    return _assert_within_bound


@pytest.fixture
def assert_head_within_bound(rounding_scale) -> Callable[..., None]:
    """Check every entry of `results` against the reference in the same dtype and in fp64.

    precision: dtype of the eager computation, the problem's where None.
    unit: relative rounding of dlogits on the way to the gradients.
    whole: see _assert_within_bound.
    """

    def check(
        results: dict[str, Tensor],
        problem: HeadProblem,
        needs: Sequence[str] = ("hidden", "weight", "bias"),
        *,
        precision: torch.dtype | None = None,
        unit: float = FP32.eps,
        whole: bool = True,
    ) -> None:
        eager_problem = problem if precision is None else problem.to(precision)
        eager = _evaluate(reference.linear_logprobs, eager_problem, needs)
        exact = _evaluate(reference.linear_logprobs, problem.to(torch.float64), needs)
        assert results.keys() == exact.keys()
        scale = rounding_scale(problem)
        for name, ours in results.items():
            of_logps = name == "logps"
            wanted = torch.float32 if of_logps else problem.weight.dtype
            assert ours.dtype == wanted, f"{name}: {ours.dtype}, not {wanted}"
            _assert_within_bound(
                ours,
                eager[name],
                exact[name],
                magnitude=scale["largest logit"].item() if of_logps else 0.0,
                scale=scale[name],
                unit=FP32.eps if of_logps else unit,
                whole=whole,
                name=name,
            )

    return check


# ---- training ---------------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture(scope="session")
def row() -> Callable[[int], dict]:
    """Training row number i; steps and labels differ in number, kind and length."""

    def row(i: int) -> dict:
        word = lambda k: WORDS[(7 * i + 3 * k) % len(WORDS)]
        prompt = " ".join(word(k) for k in range(2 + i % 4)) + "\n"
        label = (True, False, None)[i % 3 if i % 5 == 0 else i % 2]
        if i % 6 == 5:
            return {"prompt": prompt, "completion": f"{word(5)} {word(6)}", "label": label}
        steps = [f"{word(j)} " * (1 + (i + j) % 4) + "\n" for j in range(1 + i % 4)]
        labels = [(True, False, None)[(i + j) % 3] for j in range(len(steps))]
        return {"prompt": prompt, "completions": steps, "labels": labels, "label": label}

    return row


@pytest.fixture(scope="session")
def tokenizer():
    """A word a token: <pad>, <eos>, <unk>, newline, w0 to w19."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "\n", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


TINY = {
    **{"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False},
}


@pytest.fixture(scope="session")
def tiny_model():
    """Maker of causal language models of any family with random weights."""
    transformers = pytest.importorskip("transformers")

    def make(seed: int = 0, std: float = 0.3, family: str = "Llama", **options):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**TINY | options)
        config._experts_implementation = "eager"  # the grouped products take no fp64
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=std)
                elif "bias" in name:
                    parameter.normal_(std=0.1)
        return model

    return make
