"""TRL's trainers give on our head what they give on their own, and get theirs back."""

import importlib
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from transformers import TrainerCallback

from stepkto_kernels import reference
from stepkto_kernels.integrations import trl as integration
from stepkto_kernels.integrations.trl import use_stepkto_head

trl = pytest.importorskip("trl", reason="needs TRL: pip install '.[trl]'")

import datasets  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer import utils  # noqa: E402

OPS = importlib.import_module("stepkto_kernels.linear_logprobs")  # the function hides the module
ROOT = pathlib.Path(__file__).parent.parent
ROUNDING = torch.finfo(torch.float32).eps / 2
H, STEPS, BATCH = 16, 3, 4
LONGEST = 6  # tokens of a completion
WORDS = "one two three four five six seven eight nine ten and plus is".split()
VOCABULARY = ["<pad>", "<eos>", "<unk>", *WORDS]
PROMPTS = ["one plus one is", "two plus two is", "one plus two is", "two plus three and one is"]
GOOD = ["two", "four", "three and", "six and is"]
BAD = ["five", "one two three", "two", "eight"]
# What a run logs about time, or about what it did last.
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time"}


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("<eos>", "isolated"),
            pre_tokenizers.WhitespaceSplit(),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


TINY = {
    "vocab_size": 40,
    "hidden_size": H,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**TINY),
    "tied": lambda: transformers.LlamaConfig(**TINY | {"tie_word_embeddings": True}),
    "softcap": lambda: transformers.Gemma2Config(
        **TINY, head_dim=8, final_logit_softcapping=2.0, sliding_window=16
    ),
    "scale": lambda: transformers.CohereConfig(**TINY, logit_scale=0.4),
    "divisor": lambda: transformers.GraniteConfig(**TINY, logits_scaling=1.7),
    "bias": lambda: transformers.PhiConfig(**TINY | {"num_key_value_heads": 2}),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Folder with a model of a family of FAMILIES; trainers load the reference model from there."""
    made = {}

    def model_dir(family):
        if family not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
            if family == "bias":
                torch.nn.init.normal_(model.lm_head.bias)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return model_dir


def rows(kind):
    pairs = list(zip(PROMPTS, GOOD, BAD, strict=True)) * 2
    if kind == "kto":
        columns = ("prompt", "completion", "label")
        values = [(p, f" {c}", c == g) for p, g, b in pairs for c in (g, b)]
    elif kind == "dpo":
        columns, values = (
            ("prompt", "chosen", "rejected"),
            [(p, f" {g}", f" {b}") for p, g, b in pairs],
        )
    elif kind == "sft":
        columns, values = ("prompt", "completion"), [(p, f" {g}") for p, g, _ in pairs]
    else:
        columns, values = ("prompt",), [(p,) for p, _, _ in pairs]
    return datasets.Dataset.from_list([dict(zip(columns, v, strict=True)) for v in values])


def count_twos(completions, **columns):
    return [float(text.count("two") + 0.1 * len(text.split())) for text in completions]


ONLINE = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "temperature": 0.8}
TRAINERS = {
    "kto": (trl.KTOTrainer, trl.KTOConfig, {"beta": 0.5}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {"beta": 0.5}),
    "dpo, weighted": (trl.DPOTrainer, trl.DPOConfig, {"use_weighting": True}),
    "sft": (trl.SFTTrainer, trl.SFTConfig, {"learning_rate": 0.5}),  # learns to be right once
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, ONLINE),
    "grpo, entropy bonus": (trl.GRPOTrainer, trl.GRPOConfig, {**ONLINE, "entropy_coef": 0.3}),
    "grpo, fp32 head": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {**ONLINE, "cast_lm_head_to_fp32": True, "top_entropy_quantile": 0.5},
    ),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, ONLINE),
}


class Recorder(TrainerCallback):
    """Gradients as the optimizer sees them, and what TRL would call for the head."""

    def __init__(self):
        self.gradients, self.heads = [], set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.heads.add(utils._ChunkedLogProbFunction)
        named = model.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})


@pytest.fixture
def trainer(tokenizer, model_dir, tmp_path):
    """Maker of a TRL trainer with a tiny model, SGD, and a Recorder at `.recorder`."""

    def make(kind, family="llama", dtype=torch.float32, peft_config=None, **options):
        trainer_class, config_class, defaults = TRAINERS[kind]
        config = config_class(
            output_dir=str(tmp_path),
            **{
                "max_steps": STEPS,
                "per_device_train_batch_size": BATCH,
                "learning_rate": 0.05,
                # in Adam the sign of a gradient that is all rounding error makes a whole step
                "optim": "sgd",
                "lr_scheduler_type": "constant",
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "bf16": False,
                "gradient_checkpointing": False,
                "use_cpu": True,
                "disable_tqdm": True,
            }
            | defaults
            | options,
        )
        kind = kind.partition(",")[0]
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir(family), dtype=dtype)
        extra = {"reward_funcs": count_twos} if kind in ("grpo", "rloo") else {}
        recorder = Recorder()
        made = trainer_class(
            model=model,
            args=config,
            train_dataset=rows(kind),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[recorder],
            **extra,
        )
        made.recorder = recorder
        return made

    return make


@pytest.fixture
def calls(monkeypatch):
    """Arguments of each call of our head by TRL."""
    calls = []
    original = integration.linear_logprobs_with_stats

    def counted(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(integration, "linear_logprobs_with_stats", counted)
    return calls


def relative_error(model):
    """Bound on what the heads' rounding may change a probability by, as a fraction, twice.

    A logit is a sum of H products, a log-prob one of V exponentials, each with 4 + sqrt(H)
    roundings (tests/conftest.py, rounding_scale) of at most |h| |w| + log V: |h| is sqrt(H), or 1
    times the norm's weight. Both heads round. The absolute error of a log-prob is the relative one
    of its probability, and so of the gradient.
    """
    weight = model.get_output_embeddings().weight.detach().float()
    largest = 2 * H**0.5 * weight.norm(dim=1).max().item() + math.log(len(weight))
    return 2 * (4 + H**0.5) * ROUNDING * largest


def assert_same_run(ours, theirs, fraction):
    """Every logged number and gradient of two runs."""
    assert len(ours.recorder.gradients) == len(theirs.recorder.gradients) == STEPS
    for step, (got, want) in enumerate(
        zip(ours.recorder.gradients, theirs.recorder.gradients, strict=True), 1
    ):
        assert got.keys() == want.keys() and len(want) > 0
        # an error of one step is in the weights of the next. Elements are sums that cancel, so
        # their errors are fractions of the largest
        atol = step * fraction * max(g.abs().max().item() for g in want.values())
        assert atol > 0
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=atol, msg=name)
    logs = list(zip(ours.state.log_history, theirs.state.log_history, strict=True))
    assert len(logs) == STEPS + 1
    for step, (got, want) in enumerate(logs, 1):
        assert got.keys() == want.keys()
        for name in want.keys() - TIMES:
            # of the sum of log-probs over a completion, or less
            atol = step * fraction * max(LONGEST, abs(want[name]))
            assert abs(got[name] - want[name]) <= atol, (step, name, got[name], want[name])


def run_both(trainer, calls, *args, head=None, fraction=None, **kwargs):
    theirs = trainer(*args, **kwargs)
    theirs.train()
    assert not calls and theirs.recorder.heads == {ChunkedLogProbFunction}
    with use_stepkto_head(**head or {}) as installed:
        ours = trainer(*args, **kwargs)
        ours.train()
    assert len(calls) >= STEPS and ours.recorder.heads == {installed}
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert_same_run(ours, theirs, fraction or relative_error(theirs.model))
    return ours


@pytest.mark.parametrize("kind", TRAINERS)
def test_trainers_are_unchanged_on_our_head(trainer, calls, kind):
    ours = run_both(trainer, calls, kind)
    logged = set().union(*ours.state.log_history)
    assert "entropy" in logged
    if kind == "sft":
        assert any(log.get("mean_token_accuracy", 0) > 0 for log in ours.state.log_history)
    assert kind != "kto" or {"kl", "logits/chosen", "rewards/margins"} <= logged


@pytest.mark.parametrize("family", FAMILIES)
def test_model_families(trainer, calls, family):
    run_both(trainer, calls, "dpo", family)
    _, seen = calls[0]
    options = {name: seen[name] for name in ("softcap", "logit_scale")}
    want = {
        "softcap": {"softcap": 2.0, "logit_scale": 1.0},
        "scale": {"softcap": None, "logit_scale": 0.4},
        "divisor": {"softcap": None, "logit_scale": 1 / 1.7},
    }
    assert options == want.get(family, {"softcap": None, "logit_scale": 1.0})
    assert (calls[0][0][3] is not None) == (family == "bias")


@pytest.mark.parametrize("kind", ["kto", "grpo"])
def test_lora_runs_as_frozen_head(trainer, calls, monkeypatch, kind):
    """The head's gradient is not computed, though the entropy is logged."""
    peft = pytest.importorskip("peft", reason="needs PEFT")
    modes = count_modes(monkeypatch)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    ours = run_both(trainer, calls, kind, peft_config=adapter, gradient_checkpointing=True)
    assert all(".lora_" in name for name in ours.recorder.gradients[0])
    assert modes == {"forward_frozen": STEPS, "forward_cached": 0, "recompute_backward": 0}


def count_modes(monkeypatch):
    counts = {}

    def count(name, original):
        def counted(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        return counted

    for name in ("forward_frozen", "forward_cached", "recompute_backward"):
        counts[name] = 0
        monkeypatch.setattr(OPS, name, count(name, getattr(OPS, name)))
    return counts


def test_memory_budget_and_backend_are_passed_on(trainer, calls, monkeypatch):
    modes = count_modes(monkeypatch)
    run_both(trainer, calls, "kto", head={"memory_budget": 2**20, "backend": "torch"})
    assert modes == {"forward_frozen": 0, "forward_cached": STEPS, "recompute_backward": 0}
    assert all(call["backend"] == "torch" for _, call in calls)


def test_autocast_rounds_operands_and_not_logits(trainer, calls):
    # TRL rounds each logit, and the gradient of each, to bf16
    largest = 2 * H**0.5
    fraction = 2 * torch.finfo(torch.bfloat16).eps / 2 * largest
    run_both(trainer, calls, "kto", bf16=True, fraction=fraction)
    for (hidden, weight, *_), _ in calls:
        assert hidden.dtype == weight.dtype == torch.bfloat16


def test_only_scored_tokens_reach_the_head(trainer, calls):
    """On the CPU TRL alone scores prompt and padding too."""
    with use_stepkto_head():
        made = trainer("kto")
        made.train()
    batch = next(iter(made.get_train_dataloader()))
    scored = int(batch["completion_mask"][:, 1:].sum())
    assert scored < batch["input_ids"][:, 1:].numel()
    assert {scored} <= {len(args[0]) for args, _ in calls}
    assert all((args[2] >= 0).all() for args, _ in calls)


# ---- the head alone ----------------------------------------------------------------------------

OUTPUTS = ("log_probs", *integration.STATS)


def of_trl(apply, chunk_size=1000):
    """A head by TRL's interface as a function like linear_logprobs_with_stats."""

    def function(hidden, weight, target, bias, *, temperature=1.0, logit_scale=1.0, softcap=None):
        results = apply(
            *(hidden, weight, bias, target, temperature, chunk_size, softcap, logit_scale, OUTPUTS)
        )
        return dict(zip(OUTPUTS, results, strict=True))

    return function


def exact_head(hidden, weight, target, bias, **options):
    stats = tuple(integration.STATS.values())
    logps, values = reference.linear_logprobs_with_stats(
        hidden, weight, target, bias, stats=stats, **options
    )
    return {"log_probs": logps, **{n: values[ours] for n, ours in integration.STATS.items()}}


@pytest.fixture
def head():
    installed = use_stepkto_head()
    yield installed
    installed.undo()


def test_head_is_at_least_as_exact(
    assert_within_bound, evaluate, head, head_problem, dtype, logit_options
):
    """Each output, and the gradients through log-probs and entropy, against fp64."""
    problem = head_problem(dtype=dtype, ignored="none", **logit_options)
    heads = of_trl(head.apply), of_trl(ChunkedLogProbFunction.apply), exact_head
    exact_problem = problem.to(torch.float64)
    problems = problem, problem, exact_problem
    outputs = []
    for function, p in zip(heads, problems, strict=True):
        outputs.append(function(p.hidden, p.weight, p.target, p.bias, **p.options))
    for name in OUTPUTS:
        ours, theirs, exact = (result[name] for result in outputs)
        if name == "is_top1":
            assert ours.dtype == theirs.dtype == torch.bool
            assert torch.equal(ours, exact.bool())
            continue
        assert ours.dtype == theirs.dtype == torch.float32
        # the largest logit is about 12, log V is 5.7
        assert_within_bound(ours, theirs, exact, magnitude=12.0, name=name)
    both = lambda function: (
        lambda *args, **options: (lambda out: out["log_probs"] + 0.5 * out["entropy"])(
            function(*args, **options)
        )
    )
    ours, theirs, exact = (
        evaluate(both(function), p) for function, p in zip(heads, problems, strict=True)
    )
    assert ours.keys() == theirs.keys() == exact.keys()
    for name in ours.keys() - {"logps"}:
        assert ours[name].dtype == theirs[name].dtype
        assert_within_bound(ours[name], theirs[name], exact[name], name=name)


def test_head_under_autocast(assert_within_bound, evaluate, head, head_problem):
    problem = head_problem(ignored="none", bias=True, softcap=9.0)
    exact = evaluate(reference.linear_logprobs, problem.to(torch.bfloat16).to(torch.float64))
    results = []
    for function in map(of_trl, (head.apply, ChunkedLogProbFunction.apply)):
        with torch.autocast("cpu", torch.bfloat16):
            logps = lambda *args, _head=function, **call: _head(*args, **call)["log_probs"]
            results.append(evaluate(logps, problem))
    ours, theirs = results
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype == torch.float32
    assert_within_bound(ours["logps"], theirs["logps"], exact["logps"], magnitude=12.0)
    error = lambda result: (result["logps"] - exact["logps"]).abs().max()
    assert error(ours) < error(theirs) / 100  # logits in fp32, not bf16
    for name in ("dhidden", "dweight", "dbias"):
        narrow = ours[name].bfloat16()
        assert torch.equal(narrow.float(), ours[name])  # rounded once, as by any linear layer
        assert_within_bound(narrow, theirs[name], exact[name], name=name)


def test_what_needs_no_gradient_has_none(head, head_problem):
    problem = head_problem(ignored="none")
    hidden = problem.hidden.requires_grad_()
    arguments = hidden, problem.weight, None, problem.target, 1.0, 1000
    everything = head.apply(*arguments)
    assert [x.requires_grad for x in everything] == [True, True, False, False, False]
    logps, *others = head.apply(*arguments, outputs=("log_probs",))
    assert logps.requires_grad and others == [None] * 4
    with pytest.raises(ValueError, match="^stats: want one of .*, got 'perplexity'"):
        head.apply(*arguments, outputs=("log_probs", "perplexity"))


def test_no_scored_token(head, trainer):
    """TRL gives such a batch a loss of 0 with gradients; so it stays."""
    model = trainer("sft").model
    ids = torch.ones(2, 5, dtype=torch.int64)
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0 and out.is_top1.dtype == torch.bool
    assert all((p.grad == 0).all() for p in model.parameters())


def test_zero3_parameters_are_refused_in_training(head, head_problem):
    problem = head_problem(ignored="none")
    weight = torch.nn.Parameter(problem.weight)
    weight.ds_id = 0  # as DeepSpeed marks what it shards
    arguments = problem.hidden, weight, None, problem.target, 1.0, 1000
    with pytest.raises(ValueError, match="^weight: want a whole parameter, got .* ZeRO-3"):
        head.apply(*arguments)
    with torch.no_grad():
        head.apply(*arguments)


# ---- patching and undoing ----------------------------------------------------------------------


def current():
    return utils._ChunkedLogProbFunction, utils._use_triton


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = current()
    yield
    assert current() == before
    assert before[0] is ChunkedLogProbFunction
    assert not integration._installed and not integration._replaced


def test_context_undoes_after_an_exception():
    with pytest.raises(ZeroDivisionError), use_stepkto_head() as head:
        assert utils._ChunkedLogProbFunction is head
        raise ZeroDivisionError
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_plain_call_lasts_until_undo():
    head = use_stepkto_head()
    assert utils._ChunkedLogProbFunction is head
    head.undo()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    head.undo()  # nothing happens
    with head:  # and again
        assert utils._ChunkedLogProbFunction is head


def test_nested_and_out_of_order():
    with use_stepkto_head() as outer:
        with use_stepkto_head(memory_budget=0) as inner:
            assert utils._ChunkedLogProbFunction is inner
            with outer, inner:
                assert utils._ChunkedLogProbFunction is inner
            assert utils._ChunkedLogProbFunction is inner
        assert utils._ChunkedLogProbFunction is outer
    first, second = use_stepkto_head(), use_stepkto_head()
    first.undo()
    assert utils._ChunkedLogProbFunction is second
    second.undo()


def test_a_trainer_made_before_runs_on_our_head_too(trainer, calls):
    made = trainer("sft")
    with use_stepkto_head():
        made.train()
    assert len(calls) == STEPS


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"memory_budget": -1}, "^memory_budget: want a number of bytes >= 0 and .*, got -1"),
        ({"backend": "liger"}, "^backend: want one of 'auto', .*, got 'liger'"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        use_stepkto_head(**arguments)


def head_with_another_argument():
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, temperature, scales):
            pass

    return Function


class OtherOrder(ChunkedLogProbFunction):
    """Of another module, so with another OPTIONAL_OUTPUTS: none."""


def add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs):
    return utils.another_function(model)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("_ChunkedLogProbFunction", head_with_another_argument(), r"want \('ctx', .*'scales'\)"),
        ("_ChunkedLogProbFunction", OtherOrder, r"OPTIONAL_OUTPUTS: want \('entropy', .*got None"),
        ("_ChunkedLogProbFunction", None, "forward: want .*, got None"),
        ("_use_triton", lambda device, dtype: False, r"want \('device',\), got \('device', 'dtype"),
        ("add_fused_lm_head", lambda model: None, r"want \('model', .*, got \('model',\)"),
        ("add_fused_lm_head", add_fused_lm_head, "uses _ChunkedLogProbFunction: want True"),
    ],
)
def test_an_unknown_trl_is_refused(monkeypatch, name, value, match):
    with monkeypatch.context() as patch:
        patch.setattr(utils, name, value)
        before = current()
        with pytest.raises(ImportError, match=match):
            use_stepkto_head()
        assert current() == before  # refused before anything was replaced


def test_a_missing_name_is_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(utils, "_use_triton")
        with pytest.raises(ImportError, match="_use_triton exists: want True, got False"):
            use_stepkto_head()


@pytest.mark.parametrize("version", ["1.15.2", "0.29.0", "unknown"])
def test_an_old_trl_is_refused(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=rf"^trl: want >= 1\.16, got {version}"):
        use_stepkto_head()


def test_no_trl_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"^trl: want >= 1\.16, got none"):
        use_stepkto_head()


# ---- the example -------------------------------------------------------------------------------


@pytest.mark.parametrize("own_data", [False, True])
def test_example(tmp_path, model_dir, tokenizer, own_data):
    command = [sys.executable, "examples/trl_kto.py", "--output", str(tmp_path / "out")]
    if own_data:
        tokenizer.save_pretrained(model_dir("llama"))
        rows("kto").to_json(tmp_path / "rows.jsonl")
        command += ["--model", str(model_dir("llama")), "--data", str(tmp_path / "rows.jsonl")]
        command += ["--steps", "2", "--memory-budget", "100000"]
    # one thread: threads of a tiny model only wait for each other
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    logged = [
        json.loads(line.replace("'", '"')) for line in done.stdout.split("\n") if "kl" in line
    ]
    assert len(logged) == (2 if own_data else 25)
    if not own_data:
        assert float(logged[-1]["rewards/margins"]) > 0.5  # it learns
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    start = model_dir("llama") if own_data else tmp_path / "out/start"
    before = transformers.AutoModelForCausalLM.from_pretrained(start)
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)
