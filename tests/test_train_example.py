"""examples/train_step_kto.py: the loss it trains with, exact resume, and what it refuses."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

import stepkto_kernels  # noqa: E402
from stepkto_kernels.training.collator import StepKTOCollator  # noqa: E402
from stepkto_kernels.training.data import EncodedExample, encode_example, parse_row  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "examples" / "train_step_kto.py"
WORDS = [f"w{i}" for i in range(20)]
# 19 rows in batches of 6 are 4 steps an epoch, the last of them a batch of one.
ROWS, BATCH, MICRO = 19, 6, 3
EPOCH_STEPS = 4

pytestmark = pytest.mark.filterwarnings("ignore:no baseline for this batch")


def row(i: int) -> dict:
    """A training row; steps and labels differ in number, kind and length."""
    word = lambda k: WORDS[(7 * i + 3 * k) % len(WORDS)]
    prompt = " ".join(word(k) for k in range(2 + i % 4)) + "\n"
    label = (True, False, None)[i % 3 if i % 5 == 0 else i % 2]
    if i % 6 == 5:
        return {"prompt": prompt, "completion": f"{word(5)} {word(6)}", "label": label}
    steps = [f"{word(j)} " * (1 + (i + j) % 4) + "\n" for j in range(1 + i % 4)]
    labels = [(True, False, None)[(i + j) % 3] for j in range(len(steps))]
    return {"prompt": prompt, "completions": steps, "labels": labels, "label": label}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_step_kto", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "\n", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(seed: int, initializer_range: float = 0.3) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=initializer_range,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer) -> SimpleNamespace:
    """`model`, a folder, and `data`, a file."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = write_rows(folder / "data.jsonl", [row(i) for i in range(ROWS)])
    return SimpleNamespace(model=folder / "model", data=data)


@pytest.fixture
def train(script, inputs, monkeypatch):
    """Run the script's main and return its lines of metrics. Options override the defaults here."""
    monkeypatch.setattr(script, "plot_training_curves", lambda *paths, **options: None)

    def train(output: Path, *flags: str, **options) -> list[dict]:
        script.main(arguments(inputs, output, *flags, **options))
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]

    return train


def arguments(inputs: SimpleNamespace, output: Path, *flags: str, **options) -> list[str]:
    defaults = {
        "model": inputs.model,
        "data": inputs.data,
        "output": output,
        "batch_size": BATCH,
        "micro_batch_size": MICRO,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_steps": 0,
        "device": "cpu",
    }
    argv = list(flags)
    for name, value in (defaults | options).items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return argv


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# The loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_equals_itself_to_the_bit(train, tmp_path, monkeypatch, dtype):
    def refuse(*args, **kwargs):
        raise AssertionError("the whole model was run, with its lm_head")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", refuse)
    [line] = train(tmp_path / "out", max_steps=1, dtype=dtype)
    # sigmoid(0) of every labelled outcome, and of every labelled step
    assert line["outcome_loss"] == line["step/loss"] == 0.5
    assert line["loss"] == 1.0
    for level in ("", "step/"):
        assert line[f"{level}kl"] == 0.0
        assert line[f"{level}rewards/chosen"] == line[f"{level}rewards/rejected"] == 0.0
    assert line["grad_norm"] > 0


def test_overfits_a_few_rows(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1, "of": "an older run"}\n')
    lines = train(tmp_path / "out", epochs=12)
    assert len(lines) == 12 * EPOCH_STEPS
    mean = lambda name, part: (
        sum(line[name] for line in part if name in line) / sum(name in line for line in part)
    )
    first, last = lines[:EPOCH_STEPS], lines[-EPOCH_STEPS:]
    for level in ("", "step/"):
        margin = f"{level}rewards/margins"
        assert mean(margin, last) > mean(margin, first) + 0.5
    assert mean("loss", last) < 0.8 * mean("loss", first)


def encoded(tokenizer, rows: list[dict]) -> list[EncodedExample]:
    return [encode_example(parse_row(r, f"row {i}"), tokenizer) for i, r in enumerate(rows)]


def collated(tokenizer, rows: list[dict]) -> dict[str, torch.Tensor]:
    return StepKTOCollator(tokenizer.pad_token_id)(encoded(tokenizer, rows))


def policy_and_reference(dtype: torch.dtype) -> list[transformers.LlamaForCausalLM]:
    """The flatter of two random models likes random completions better, so z > 0."""
    return [tiny_model(1, 0.1).to(dtype), tiny_model(2, 0.3).to(dtype)]


def accumulate(
    script, batch: dict, micro_batch_size: int, dtype: str, reduction: str = "sequence_mean"
) -> tuple[torch.Tensor, stepkto_kernels.StepKTOLoss]:
    """Gradient of one optimizer step, in one row, fp64, and the loss module after it."""
    backend = "reference" if dtype == "float64" else "auto"
    policy, reference = policy_and_reference(getattr(torch, dtype))
    config = stepkto_kernels.StepKTOConfig(step_reduction=reduction)
    args = SimpleNamespace(
        micro_batch_size=micro_batch_size, device="cpu", dtype=dtype, reference_point="mismatched"
    )
    loss_fn = stepkto_kernels.StepKTOLoss(config, backend=backend)
    with pytest.MonkeyPatch.context() as patch:
        log_probs = functools.partial(stepkto_kernels.linear_logprobs, backend=backend)
        patch.setattr(stepkto_kernels, "linear_logprobs", log_probs)
        script.accumulate_gradient(policy, reference, loss_fn, batch, args)
    return torch.cat([p.grad.double().flatten() for p in policy.parameters()]), loss_fn


def gradient(*args) -> torch.Tensor:
    return accumulate(*args)[0]


@pytest.mark.parametrize("micro_batch_size", [8, 3])
def test_reference_points_are_those_of_mismatched_pairs(script, tokenizer, micro_batch_size):
    examples = encoded(tokenizer, [row(i) for i in range(8)])
    sequences, steps = [], []
    for this, other in zip(examples, examples[1:] + examples[:1], strict=True):
        prompt = this.input_ids[: this.completion_start]
        completion = other.input_ids[other.completion_start :]
        ids = torch.tensor([prompt + completion])
        scores = []
        for model in policy_and_reference(torch.float64):
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            scores.append(logps[len(prompt) - 1 :])
        ratio = (scores[0] - scores[1]).tolist()
        sequences.append(sum(ratio))
        step_ids = other.step_ids[other.completion_start :]
        for step in sorted(set(step_ids) - {-1}):
            steps.append(sum(r for r, s in zip(ratio, step_ids, strict=True) if s == step))
    want = torch.tensor([sum(r) / len(r) for r in (sequences, steps)], dtype=torch.float64)
    assert want.min() > 0
    batch = collated(tokenizer, [row(i) for i in range(8)])
    _, loss_fn = accumulate(script, batch, micro_batch_size, "float64")
    assert (loss_fn.seen == 1).all(), "the running mean moves once a step"
    torch.testing.assert_close(loss_fn.running, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["sequence_mean", "mean", "sum"])
def test_gradient_does_not_depend_on_the_micro_batches(script, tokenizer, reduction):
    batch = collated(tokenizer, [row(i) for i in range(8)])
    whole = gradient(script, batch, 8, "float64", reduction)
    # Sums of 8 sequences in another order: a few roundings of numbers as large as the gradient.
    bound = 1000 * torch.finfo(torch.float64).eps * whole.abs().max()
    for size in (1, 2, 3, 4):
        split = gradient(script, batch, size, "float64", reduction)
        assert (split - whole).abs().max() <= bound
    # The bound is far below what normalizers of each micro-batch would change.
    halves = [collated(tokenizer, [row(i) for i in part]) for part in (range(4), range(4, 8))]
    parts = [gradient(script, half, 4, "float64", reduction) / 2 for half in halves]
    assert (sum(parts) - whole).abs().max() > 1e6 * bound


def test_fp32_gradient_is_as_exact_split_as_whole(script, tokenizer):
    batch = collated(tokenizer, [row(i) for i in range(8)])
    exact = gradient(script, batch, 8, "float64")
    floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    error = lambda size: (gradient(script, batch, size, "float32") - exact).abs().max()
    bound = 2 * error(8) + floor
    for size in (1, 2, 4):
        assert error(size) <= bound


FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 0.5, "head_dim": 8}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "phi, which has a bias": ("PhiConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_model(script, tokenizer, family):
    name, options = FAMILIES[family]
    if name != "GPT2Config":
        options = options | {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
    config = getattr(transformers, name)(
        vocab_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=1, **options
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    batch = collated(tokenizer, [row(i) for i in range(4)])
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    mask, target = batch["completion_mask"][:, 1:], batch["input_ids"][:, 1:]
    want = logits.double().log_softmax(-1).gather(-1, target[..., None])[..., 0]
    got = script.log_probs(model, batch, "float32")
    assert torch.equal(got[~mask], torch.zeros_like(got[~mask]))
    # Two ways through attention and lm_head in fp32: a few roundings of the largest logit.
    bound = 100 * torch.finfo(torch.float32).eps * max(1.0, logits.abs().max().item())
    assert (got - want)[mask].abs().max() <= bound


@pytest.mark.parametrize("point", ["zero", "0.5", "matched", "ema"])
def test_reference_points(train, tmp_path, point):
    lines = train(
        tmp_path / "out", reference_point=point, micro_batch_size=BATCH, max_steps=EPOCH_STEPS
    )
    if point in ("zero", "0.5"):
        assert {line["kl"] for line in lines} == {0.0 if point == "zero" else 0.5}
    else:
        assert lines[0]["kl"] == 0 < max(line["kl"] for line in lines)


def test_a_batch_of_one_warns_once(train, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = train(tmp_path / "out", batch_size=1, micro_batch_size=1, max_steps=5)
    assert len([w for w in caught if "no baseline" in str(w.message)]) == 1
    assert [line["kl"] for line in lines] == [0.0] * 5


def test_rows_without_steps_and_rows_without_labels(train, tmp_path, inputs):
    plain = [{"prompt": "w1\n", "completion": f"w{i}", "label": i % 2 == 0} for i in range(6)]
    lines = train(tmp_path / "plain", data=write_rows(tmp_path / "plain.jsonl", plain))
    assert lines[0]["outcome_loss"] == lines[0]["loss"] == 0.5
    assert "step/loss" not in lines[0]

    unlabelled = [row(i) | {"label": None} for i in range(5)]
    unlabelled = [r | {"labels": [None] * len(r["labels"])} for r in unlabelled]
    [line] = train(tmp_path / "none", data=write_rows(tmp_path / "none.jsonl", unlabelled))
    assert line["loss"] == line["grad_norm"] == line["tokens"] == 0
    assert_same_weights(tmp_path / "none", inputs.model)


def test_every_epoch_takes_every_example_once(train, script, tmp_path, monkeypatch):
    batches = []

    class Collator(StepKTOCollator):
        def __call__(self, examples):
            batches.append([tuple(example.input_ids) for example in examples])
            return super().__call__(examples)

    monkeypatch.setattr(script, "StepKTOCollator", Collator)
    train(tmp_path / "out", epochs=2)
    assert [len(batch) for batch in batches] == [6, 6, 6, 1] * 2
    epochs = [sum(batches[:EPOCH_STEPS], []), sum(batches[EPOCH_STEPS:], [])]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == ROWS
    assert epochs[0] != epochs[1]
    batches.clear()
    train(tmp_path / "other", seed=7)
    assert sum(batches, []) not in epochs


def test_warm_up(train, tmp_path, inputs):
    lines = train(tmp_path / "out", warmup_steps=4, epochs=2)
    rates = [0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    # Adam's first step is the learning rate in every parameter with a gradient to speak of.
    train(tmp_path / "one", warmup_steps=4, max_steps=1)
    before, after = weights(inputs.model), weights(tmp_path / "one")
    change = max((after[name] - before[name]).abs().max().item() for name in before)
    assert change == pytest.approx(rates[0], rel=1e-3)


def test_clipping(train, tmp_path, inputs):
    # Clipped to far below AdamW's eps of 1e-8, a gradient changes next to nothing.
    [line] = train(tmp_path / "clipped", max_grad_norm=1e-12, max_steps=1)
    before, after = weights(inputs.model), weights(tmp_path / "clipped")
    assert max((after[name] - before[name]).abs().max() for name in before) < 1e-4 * 1e-2
    assert line["grad_norm"] > 1e-2, "the norm before clipping"
    train(tmp_path / "never", max_grad_norm=0, max_steps=3)
    train(tmp_path / "high", max_grad_norm=1e9, max_steps=3)
    assert_same_weights(tmp_path / "never", tmp_path / "high")


# Stopping and going on

RUN = {"epochs": 3, "logging_steps": 2, "save_steps": 4, "warmup_steps": 5, "weight_decay": 0.1}


@pytest.fixture
def undisturbed(train, tmp_path) -> Path:
    train(tmp_path / "undisturbed", **RUN)
    return tmp_path / "undisturbed"


def assert_same_run(output: Path, undisturbed: Path) -> None:
    lines = (undisturbed / "metrics.jsonl").read_text()
    assert (output / "metrics.jsonl").read_text() == lines
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [2, 4, 6, 8, 10, 12]
    assert_same_weights(output, undisturbed)


def test_resume_is_exact(train, tmp_path, undisturbed):
    output = tmp_path / "out"
    # Stops with an incomplete line of metrics, 1 and 2 steps after a checkpoint.
    train(output, "--resume", **RUN, max_steps=5)
    moved = output.rename(tmp_path / "elsewhere")
    assert [path.name for path in moved.glob("checkpoint-*")] == ["checkpoint-00000004"]
    train(moved, "--resume", **RUN, max_steps=10)
    train(moved, "--resume", **RUN)
    assert_same_run(moved, undisturbed)
    [checkpoint] = moved.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-00000012"
    # The batch of one that ends an epoch leans on the running reference point.
    last = torch.load(checkpoint / "state.pt", weights_only=True)
    assert last["loss_fn"]["running"].min() > 0
    train(moved, "--resume", **RUN)
    assert_same_run(moved, undisturbed)


def test_a_run_killed_while_it_writes_a_checkpoint(train, tmp_path, undisturbed, monkeypatch):
    save = torch.save

    def die_half_way(state: dict, path: Path) -> None:
        save(state, path)
        if state["step"] == 8:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die_half_way)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", **RUN)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [
        "checkpoint-00000004"
    ]
    monkeypatch.setattr(torch, "save", save)
    train(tmp_path / "out", "--resume", **RUN)
    assert_same_run(tmp_path / "out", undisturbed)


def test_resume_goes_on_with_the_random_numbers(train, script, tmp_path, monkeypatch):
    accumulate, drawn = script.accumulate_gradient, []

    def draw(*args):
        drawn.append(torch.rand(()).item())
        return accumulate(*args)

    monkeypatch.setattr(script, "accumulate_gradient", draw)
    train(tmp_path / "undisturbed", **RUN)
    undisturbed = drawn.copy()
    drawn.clear()
    train(tmp_path / "out", **RUN, max_steps=4)
    train(tmp_path / "out", "--resume", **RUN)
    assert drawn == undisturbed


def test_resume_refuses_other_settings(train, tmp_path):
    output = tmp_path / "out"
    train(output, max_steps=2, save_steps=2)
    with pytest.raises(SystemExit, match=r"another beta, step_reduction$"):
        train(output, "--resume", save_steps=2, beta=0.2, step_reduction="sum")
    other = write_rows(tmp_path / "other.jsonl", [row(i) for i in range(1, ROWS)])
    with pytest.raises(SystemExit, match="another data$"):
        train(output, "--resume", save_steps=2, data=other)
    with pytest.raises(SystemExit, match="--output: .*--resume"):
        train(output, save_steps=2)
    assert [line["step"] for line in train(output, "--resume", max_steps=3)] == [1, 2, 3]


def test_stops_at_the_first_step_that_is_not_finite(train, script, tmp_path, monkeypatch):
    accumulate, calls = script.accumulate_gradient, []

    def break_third(*args):
        calls.append(None)
        return accumulate(*args) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(script, "accumulate_gradient", break_third)
    with pytest.raises(SystemExit, match="^step 3: stopped, as loss is nan"):
        train(tmp_path / "out", epochs=3, logging_steps=4, save_steps=4)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.jsonl"}
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == ""


# What users get wrong, and the whole thing as a command

BAD_OPTIONS = {
    "data": ({"data": "no/such.jsonl"}, "no/such.jsonl: no such file"),
    "model": ({"model": "/no/such/model"}, "/no/such/model"),
    "device": ({"device": "moon"}, "moon"),
    "ref_model": ({"ref_model": "/no/such/model"}, "/no/such/model"),
    "batch_size": ({"batch_size": 7}, "--batch-size: want a multiple"),
    "micro_batch_size": ({"micro_batch_size": 0}, "--micro-batch-size: want a finite number >= 1"),
    "reduction": ({"step_reduction": "max"}, "--step-reduction: invalid choice: 'max'"),
    "dtype": ({"dtype": "int8"}, "--dtype: invalid choice: 'int8'"),
    "point": ({"reference_point": "moon"}, "reference_point: want one of 'mismatched', 'zero'"),
    "split": ({"reference_point": "ema"}, "--reference-point ema: want one micro-batch"),
    "beta": ({"beta": 0}, "beta: want a finite number in (0, inf]"),
    "rate": ({"learning_rate": "nan"}, "--learning-rate: want a finite number >= 0.0"),
    "save_steps": ({"save_steps": 3, "logging_steps": 2}, "--save-steps: want a multiple"),
    "max_length": ({"max_length": 4}, "data.jsonl, example 2: max_length"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_refuses(train, tmp_path, capsys, name):
    options, want = BAD_OPTIONS[name]
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "out", **options)
    assert stop.value.code not in (None, 0)
    # argparse writes its message and exits with 2; other messages are the exit's.
    message = capsys.readouterr().err if stop.value.code == 2 else str(stop.value)
    assert want in message.splitlines()[-1]


def test_refuses_bad_data_and_the_model_as_output(train, tmp_path, capsys, inputs):
    with pytest.raises(SystemExit, match="^--model, --ref-model"):
        train(tmp_path / "out", ref_model=tmp_path)  # a folder without a model
    bad = write_rows(tmp_path / "bad.jsonl", [row(0), row(1) | {"labels": ["yes", True]}])
    with pytest.raises(SystemExit, match=r"bad.jsonl, line 2: labels\[0\]"):
        train(tmp_path / "out", data=bad)
    with pytest.raises(SystemExit, match="want at least one example"):
        train(tmp_path / "out", data=write_rows(tmp_path / "empty.jsonl", []))
    with pytest.raises(SystemExit):
        train(inputs.model)
    assert "--output: want another folder than --model" in capsys.readouterr().err


def test_command(inputs, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), *arguments(inputs, output, max_steps=3)]
    # With two threads on a busy machine this tiny model waits for its threads most of the time.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(f"curves.png are in {output}")
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert tokenizer("w1 w2\n")["input_ids"] == [5, 6, 3]
    trained, start = weights(output), weights(inputs.model)
    assert any(not torch.equal(trained[name], start[name]) for name in start)
