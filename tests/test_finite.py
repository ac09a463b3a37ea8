"""StepKTOTrainer where something is not finite: what it says, leaves unchanged, and skips.

The model's weights stay finite here unless a test is about them: a hook on the embedding poisons
what reads the tokens of a chosen row, so every layer behind it computes with NaN.
"""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from trainer_helpers import FSDP, recorded_trainer, train_ranks  # noqa: E402

from stepkto_kernels.training import (  # noqa: E402
    StepKTOArguments,
    StepKTOTrainer,
    command,
    reference_logps,
)
from stepkto_kernels.training.batch import TrainerCollator, mismatched_pairs  # noqa: E402
from stepkto_kernels.training.completion_trainer import CompletionTrainer  # noqa: E402
from stepkto_kernels.training.dataset import StepKTODataset, encode_dataset  # noqa: E402
from stepkto_kernels.training.tiny import make_data, make_model  # noqa: E402

transformers.logging.set_verbosity_error()
BAD = 3  # row of the training dataset that is not finite: labelled, and so are steps of it
UNLABELLED = 5
POINTS = ["mismatched", "matched", "zero"]


def windows(ids: torch.Tensor, wanted: list[int]) -> torch.Tensor:
    """Where in ids (B, T) the sequence `wanted` stands; bool (B, T)."""
    out = torch.zeros_like(ids, dtype=torch.bool)
    size = len(wanted)
    if ids.shape[1] >= size:
        found = (ids.unfold(1, size, 1) == torch.tensor(wanted)).all(-1)
        for b, t in found.nonzero().tolist():
            out[b, t : t + size] = True
    return out


def poison(model, wanted: list[int], value: float = math.nan) -> None:
    """Embeddings of that sequence of tokens become `value`, whatever the weights are."""

    def hook(module, inputs, output):
        return output.masked_fill(windows(inputs[0], wanted)[..., None], value)

    model.get_input_embeddings().register_forward_hook(hook)


class AtStep(transformers.TrainerCallback):
    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.change(model)


@pytest.fixture
def rows(row):
    return lambda n: [row(i) for i in range(n)]


@pytest.fixture
def policy(tiny_model):
    return lambda **options: tiny_model(1, 0.1, **options)


@pytest.fixture
def make(tmp_path, tokenizer, tiny_model):
    """Trainer of one epoch of 8 rows in order, a step of 8, with a Recorder as `recorder`."""

    def make(model, rows, *, ref=None, batch=8, split=1, kind=StepKTOTrainer, **options):
        if ref is None and kind is StepKTOTrainer:
            ref = tiny_model(2, 0.3)
        extra = {"processing_class": tokenizer}
        extra |= {k: options.pop(k) for k in ("eval_dataset",) if k in options}
        shape = {"batch": batch, "split": split, "kind": kind, "extra": extra}
        options = {"optim": "sgd"} | options
        return recorded_trainer(model, ref, rows, tmp_path / "out", **shape, **options)

    return make


def tokens(trainer, row: int, part: str = "all") -> list[int]:
    example = trainer.train_dataset.examples[row]
    start = example.completion_start
    return {
        "all": example.input_ids,
        "prompt": example.input_ids[:start],
        "completion": example.input_ids[start:],
    }[part]


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before) -> bool:
    same = lambda a, b: torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
    return all(same(value, before[name]) for name, value in model.state_dict().items())


def assert_close(got, want, factor=1e-5):
    """fp32 sums in another order."""
    assert got.keys() == want.keys()
    largest = max(float(g.abs().max()) for g in want.values())
    assert largest > 0
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=factor * largest)


# What stops a run


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("split", [(8, 1), (3, 3)], ids=["one batch", "accumulated"])
@pytest.mark.parametrize("point", POINTS)
def test_hidden_states_are_named_and_nothing_is_applied(
    make, policy, rows, point, split, padding_free
):
    model = policy()
    options = {"reference_point": point, "padding_free": padding_free}
    trainer = make(model, rows(8), batch=split[0], split=split[1], **options)
    poison(model, tokens(trainer, BAD))
    before = state_of(model)
    place = divmod(BAD, split[0])
    want = f"hidden states: row 3 .micro-batch {place[0]}, position {place[1]}.;"
    with pytest.raises(FloatingPointError, match=f"^step 1: not finite: {want}"):
        trainer.train()
    assert unchanged(model, before) and not trainer.recorder.gradients


def overflow(model):
    """Finite hidden states whose logits are not."""
    model.lm_head.weight.mul_(100)
    model.base_model.norm.register_forward_hook(lambda module, x, output: output.sign() * 3e38)


def fill(name: str, index: list[int], value: float):
    index = torch.tensor(index)
    return lambda model: model.get_parameter(name).index_fill_(0, index, value)


FIRST_ROWS = "row 8 .micro-batch 0, position 0., row 9 .*, row 10 .*, row 11 .*"
SHARED = {
    "weight": (
        fill("lm_head.weight", [3, 11], math.inf),
        "lm_head weight: vocabulary row 3, vocabulary row 11; parameters: lm_head.weight;",
    ),
    "bias": (
        fill("lm_head.bias", [7], math.nan),
        "lm_head bias: vocabulary entry 7; parameters: lm_head.bias;",
    ),
    "backbone": (
        fill("model.layers.1.mlp.up_proj.weight", [0], math.nan),
        f"hidden states: {FIRST_ROWS}; parameters: model.layers.1.mlp.up_proj.weight;",
    ),
    "logits": (overflow, f"logits: {FIRST_ROWS};"),
}


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("what", SHARED)
def test_what_all_rows_share_is_named(make, policy, rows, tmp_path, what, nonfinite):
    """At step 3 of 5, of which checkpoints are written: none from then on."""
    change, told = SHARED[what]
    model = policy(family="Phi" if what == "bias" else "Llama")
    trainer = make(
        model,
        rows(20),
        batch=2,
        split=2,
        nonfinite=nonfinite,
        save_strategy="steps",
        save_steps=1,
        logging_steps=100,
        reference_point="zero",
    )
    trainer.add_callback(AtStep(2, change))
    with pytest.raises(FloatingPointError, match=f"^step 3: not finite: {told}"):
        trainer.train()
    saved = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2"]
    assert trainer.state.global_step == len(trainer.recorder.gradients) == 2


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("point", POINTS)
def test_reference_log_probs_are_named(make, policy, tiny_model, rows, point, padding_free):
    ref = tiny_model(2)
    options = {"reference_point": point, "padding_free": padding_free}
    trainer = make(policy(), rows(8), ref=ref, batch=4, split=2, **options)
    poison(ref, tokens(trainer, BAD))
    with pytest.raises(FloatingPointError, match="^step 1: not finite: reference log-probs: row 3"):
        trainer.train()


def test_an_unlabelled_row_still_poisons_the_backbones_gradient(make, policy, rows):
    """Whose loss is finite: 0 times NaN flows back from there."""
    model = policy()
    trainer = make(model, rows(8), reference_point="zero")
    poison(model, tokens(trainer, UNLABELLED))
    with pytest.raises(FloatingPointError, match="^step 1: not finite: hidden states: row 5 "):
        trainer.train()


def with_ref_logps(trainer, row: int, value: float) -> None:
    """The training rows with cached log-probs, one of which is `value`."""
    dataset = trainer.train_dataset
    logps = -torch.ones(dataset.completion_tokens)
    logps[dataset.starts[row]] = value
    dataset.ref_logps = logps


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, [-1.0, 1.0]])
def test_cached_reference_log_probs(make, policy, rows, value, clip):
    """Also an infinity that ratio_clip would hide."""
    trainer = make(policy(), rows(8), ratio_clip=clip)
    with_ref_logps(trainer, BAD, value)
    with pytest.raises(FloatingPointError, match="^step 1: not finite: reference log-probs: row 3"):
        trainer.train()


def test_an_unlabelled_row_may_have_any_reference_log_probs(make, policy, rows):
    trainer = make(policy(), rows(8), reference_point="zero")
    with_ref_logps(trainer, UNLABELLED, math.nan)
    trainer.train()
    assert math.isfinite(trainer.recorder.logs[0]["loss"])


def test_a_mismatched_pair_is_named_by_its_rows(make, policy, rows):
    model = policy()
    trainer = make(model, rows(8), batch=4, split=2)
    pair = mismatched_pairs(trainer.train_dataset.examples)[BAD]
    poison(model, pair.input_ids)
    told = (
        "log-probs of a mismatched pair: prompt of row 3 with completion of row 4 "
        ".micro-batch 0, position 3"
    )
    with pytest.raises(FloatingPointError, match=f"^step 1: not finite: {told}"):
        trainer.train()


@pytest.mark.parametrize("clip", [0.0, 1.0], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_gradient_that_is_not_finite(make, policy, rows, value, clip, nonfinite):
    model = policy()
    trainer = make(model, rows(8), max_grad_norm=clip, nonfinite=nonfinite)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        model.get_parameter(name).register_hook(lambda grad: grad * value)
    before = state_of(model)
    told = "gradient of model.layers.0.mlp.up_proj.weight, model.norm.weight;"
    with pytest.raises(FloatingPointError, match=f"^step 1: not finite: {told}"):
        trainer.train()
    assert unchanged(model, before)


def test_fp16_leaves_infinite_gradients_to_its_scaler(make, policy, rows):
    model = policy()
    trainer = make(model, rows(8), fp16=True, batch=4)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # which accelerate has on GPUs only
    infinite = model.get_parameter("model.norm.weight").register_hook(lambda grad: grad * math.inf)
    trainer.add_callback(AtStep(1, lambda model: infinite.remove()))
    before = state_of(model)
    trainer.train()
    assert trainer.state.global_step == 2 and not unchanged(model, before)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    poison(model, tokens(trainer, BAD))
    with pytest.raises(FloatingPointError, match="not finite: hidden states: row 3"):
        trainer.train()


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
def test_an_unlabelled_row_is_not_left_to_the_scaler_of_fp16(make, policy, rows, padding_free):
    """It would skip each of its steps for good, as if its scale were too large."""
    model = policy()
    options = {"fp16": True, "reference_point": "zero", "padding_free": padding_free}
    trainer = make(model, rows(8), **options)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    poison(model, tokens(trainer, UNLABELLED))
    with pytest.raises(FloatingPointError, match="^step 1: not finite: hidden states: row 5 "):
        trainer.train()


def test_rows_keep_their_numbers_when_shuffled_and_loaded_elsewhere(make, policy, rows):
    model = policy()
    trainer = make(
        model,
        rows(20),
        batch=4,
        train_sampling_strategy="random",
        dataloader_num_workers=2,
    )
    poison(model, tokens(trainer, 13))
    with pytest.raises(FloatingPointError, match="hidden states: row 13 .micro-batch 0"):
        trainer.train()


# Before training, and evaluation


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
def test_precomputed_log_probs_stop_before_they_are_kept(
    make, policy, tiny_model, rows, tmp_path, padding_free
):
    ref = tiny_model(2)
    options = {"precompute_ref_log_probs": True, "padding_free": padding_free}
    trainer = make(policy(), rows(8), ref=ref, **options)
    poison(ref, tokens(trainer, BAD))
    told = "^train dataset: not finite: reference log-probs: row 3$"
    with pytest.raises(FloatingPointError, match=told):
        trainer.train()
    assert not list((tmp_path / "out").glob("ref_logps_*"))


def test_a_cache_that_is_not_finite_is_refused(make, policy, rows, tmp_path):
    options = {"precompute_ref_log_probs": True, "max_steps": 1}
    make(policy(), rows(8), **options).train()
    [path] = (tmp_path / "out").glob("ref_logps_*.safetensors")
    logps = load_file(path)["ref_logps"]
    logps[3:5] = math.nan
    with reference_logps.safe_open(path, "pt") as file:
        key = file.metadata()
    save_file({"ref_logps": logps}, path, metadata=key)
    want = "want finite reference log-probs, got 2 that are not; delete it"
    with pytest.raises(ValueError, match=f"{path.name}: {want}"):
        make(policy(), rows(8), **options).train()


@pytest.mark.parametrize("kind", [StepKTOTrainer, CompletionTrainer])
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
def test_an_evaluation_stops_with_the_row(make, policy, rows, kind, nonfinite, padding_free):
    model = policy()
    trainer = make(
        model,
        rows(8),
        kind=kind,
        eval_dataset=rows(8),
        per_device_eval_batch_size=3,
        nonfinite=nonfinite,
        padding_free=padding_free,
    )
    poison(model, tokens(trainer, BAD))
    told = "^evaluation after step 0: not finite: hidden states: row 3 .batch 1, position 0.$"
    with pytest.raises(FloatingPointError, match=told):
        trainer.evaluate()


def test_an_evaluations_pairs(make, policy, rows):
    model = policy()
    data = rows(8)
    trainer = make(model, data, eval_dataset=data, per_device_eval_batch_size=3)
    pair = mismatched_pairs(trainer.train_dataset.examples)[7]
    poison(model, pair.input_ids)
    told = "log-probs of a mismatched pair: prompt of row 7 with completion of row 0"
    with pytest.raises(FloatingPointError, match=f"^evaluation after step 0: not finite: {told}"):
        trainer.evaluate()


# What is skipped


def without_labels(data: list[dict], *numbers: int) -> list[dict]:
    out = list(data)
    for number in numbers:
        labels = {"label": None}
        if "labels" in out[number]:
            labels["labels"] = [None] * len(out[number]["labels"])
        out[number] = out[number] | labels
    return out


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("split", [(8, 1), (3, 3)], ids=["one batch", "accumulated"])
@pytest.mark.parametrize("what", ["hidden", "reference", "cached"])
@pytest.mark.parametrize("point", POINTS)
def test_a_skipped_row_is_as_one_without_labels(
    make, policy, tiny_model, rows, point, what, split, padding_free
):
    options = {"reference_point": point, "padding_free": padding_free, "beta": 0.5}
    options |= {"batch": split[0], "split": split[1], "max_grad_norm": 1.0}
    ref = tiny_model(2, 0.3)
    plain = make(policy(), without_labels(rows(8), BAD), ref=ref, **options)
    if what == "cached":
        with_ref_logps(plain, BAD, -1.0)
    plain.train()
    model = policy()
    trainer = make(model, rows(8), ref=ref, nonfinite="skip", **options)
    if what == "cached":
        with_ref_logps(trainer, BAD, math.nan)
    else:
        poison(model if what == "hidden" else ref, tokens(trainer, BAD))
    tensor = "hidden states" if what == "hidden" else "reference log-probs"
    with pytest.warns(UserWarning, match=f"step 1: not finite: {tensor}: row 3 .*left out"):
        trainer.train()
    assert_close(trainer.recorder.gradients[0], plain.recorder.gradients[0])
    logs, want = trainer.recorder.logs[0], plain.recorder.logs[0]
    assert logs.pop("skipped") == 1 and "skipped" not in want
    for name in ("loss", "kl", "step/kl", "outcome_loss", "step/loss", "tokens", "grad_norm"):
        assert logs[name] == pytest.approx(want[name], rel=1e-5), name
    assert trainer.recorder.logs[-1]["train_loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def mean_log_ratio(model, ref, pairs) -> float:
    total = 0.0
    for pair in pairs:
        ids, start = torch.tensor([pair.input_ids]), pair.completion_start
        for sign, each in ((1, model), (-1, ref)):
            logits = each(input_ids=ids).logits[0, start - 1 : -1].double()
            logps = logits.log_softmax(-1).gather(-1, ids[0, start:, None])
            total += sign * float(logps.sum())
    return max(0.0, total / len(pairs))


@pytest.mark.parametrize("part, gone", [("completion", {2}), ("prompt", {3})])
def test_the_reference_point_is_of_the_pairs_that_are_finite(
    make, policy, tiny_model, rows, part, gone
):
    """Pair i is the prompt of row i with the completion of row i + 1."""
    model, ref = policy(), tiny_model(2, 0.3)
    trainer = make(model, rows(8), ref=ref, batch=3, split=3, nonfinite="skip")
    pairs = mismatched_pairs(trainer.train_dataset.examples)
    with torch.no_grad():
        want = mean_log_ratio(model, ref, [p for i, p in enumerate(pairs) if i not in gone])
        every = mean_log_ratio(model, ref, pairs)
    poison(model, tokens(trainer, BAD, part))
    told = r"hidden states: row 3 \(micro-batch 1, position 0\); left out"
    with pytest.warns(UserWarning, match=told):
        trainer.train()
    logs = trainer.recorder.logs[0]
    assert want > 0 and logs["kl"] == pytest.approx(want, rel=1e-5) != pytest.approx(every)
    assert float(trainer.loss_fn.running[0]) == pytest.approx(want, rel=1e-5)
    assert logs["skipped"] == 1
    twin = make(policy(), without_labels(rows(8), BAD), ref=ref)
    twin._baseline = lambda model, batches: trainer._context.baseline
    twin.train()
    assert_close(trainer.recorder.gradients[0], twin.recorder.gradients[0])


def test_a_pair_alone_skips_the_row_of_its_prompt(make, policy, rows):
    model = policy()
    trainer = make(model, rows(8), nonfinite="skip")
    poison(model, mismatched_pairs(trainer.train_dataset.examples)[BAD].input_ids)
    with pytest.warns(UserWarning, match="prompt of row 3 with completion of row 4 .*left out"):
        trainer.train()
    assert trainer.recorder.logs[0]["skipped"] == 1
    assert trainer.recorder.logs[0]["outcome_loss"] > 0


def test_training_goes_on(make, policy, rows):
    """Of 5 steps two have a bad row, one of them two; counted by log, and gone from the sums."""
    model = policy()
    trainer = make(model, rows(20), batch=2, split=2, nonfinite="skip", logging_steps=2)
    for number in (1, 9, 10):
        poison(model, tokens(trainer, number))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    left_out = [str(w.message) for w in told if "left out" in str(w.message)]
    assert [text.partition(":")[0] for text in left_out] == ["step 1", "step 3"]
    steps = [logs for logs in trainer.recorder.logs if "loss" in logs]
    assert [logs["skipped"] for logs in steps] == [1, 2]
    assert trainer.state.global_step == len(trainer.recorder.gradients) == 5
    assert all(math.isfinite(value) for logs in trainer.recorder.logs for value in logs.values())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert trainer.loss_fn.running.isfinite().all()


def test_a_micro_batch_of_which_nothing_is_left(make, policy, rows):
    options = {"batch": 1, "split": 8, "reference_point": "zero"}
    plain = make(policy(), without_labels(rows(8), BAD), **options)
    plain.train()
    model = policy()
    trainer = make(model, rows(8), nonfinite="skip", **options)
    poison(model, tokens(trainer, BAD))
    with pytest.warns(UserWarning, match="left out"):
        trainer.train()
    assert_close(trainer.recorder.gradients[0], plain.recorder.gradients[0])
    assert trainer.recorder.logs[0]["tokens"] == plain.recorder.logs[0]["tokens"]


def test_skipping_everything_stops(make, policy, rows):
    model = policy()
    trainer = make(model, rows(2), nonfinite="skip")
    for number in (0, 1):
        poison(model, tokens(trainer, number))
    with pytest.raises(
        FloatingPointError, match="^step 1: not finite: hidden states: row 0 .*row 1"
    ):
        trainer.train()


def test_completions_are_skipped_too(make, policy, rows):
    data = rows(8)
    kept = [row for number, row in enumerate(data) if number != BAD]
    options = {"kind": CompletionTrainer, "batch": 1, "split": 8}
    plain = make(policy(), kept, **options)
    plain.train()
    model = policy()
    trainer = make(model, data, nonfinite="skip", **options)
    poison(model, tokens(trainer, BAD))
    with pytest.warns(UserWarning, match="hidden states: row 3 .*left out"):
        trainer.train()
    assert_close(trainer.recorder.gradients[0], plain.recorder.gradients[0])
    assert trainer.recorder.logs[0]["loss"] == pytest.approx(plain.recorder.logs[0]["loss"])


def test_fp16_skips_too(make, policy, rows):
    model = policy()
    trainer = make(model, rows(8), nonfinite="skip", fp16=True, reference_point="zero")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    poison(model, tokens(trainer, BAD))
    before = state_of(model)
    with pytest.warns(UserWarning, match="hidden states: row 3 .*left out"):
        trainer.train()
    assert not unchanged(model, before)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_option_has_two_values():
    with pytest.raises(ValueError, match="^nonfinite: want one of 'stop', 'skip', got 'average'"):
        StepKTOArguments("out", nonfinite="average", use_cpu=True)


def test_the_option_of_the_command_line(tmp_path):
    own = {"output": str(tmp_path)}
    parsed = [command.parse(own, {"use_cpu": True} | more) for more in ({}, {"nonfinite": "skip"})]
    assert [args.nonfinite for args in parsed] == ["stop", "skip"]


def test_skipping_does_not_hide_a_gradient(make, policy, rows):
    """A row is left out, and what is left still has a bad gradient."""
    model = policy()
    trainer = make(model, rows(8), nonfinite="skip")
    poison(model, tokens(trainer, BAD))
    model.get_parameter("model.norm.weight").register_hook(lambda grad: grad * math.inf)
    told = "row 3 .*; without these rows not finite: gradient of model.norm.weight$"
    with pytest.raises(FloatingPointError, match=f"^step 1: not finite: hidden states: {told}"):
        trainer.train()


def test_gradients_too_large_for_their_norm(make, policy, rows):
    model = policy()
    trainer = make(model, rows(8))
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: torch.full_like(grad, 7e17))
    with pytest.raises(FloatingPointError, match="^step 1: not finite: gradient of all parameters"):
        trainer.train()


def test_examples_know_their_rows(rows, tokenizer):
    dataset = encode_dataset(rows(4), tokenizer)
    assert [example.row for example in dataset] == [0, 1, 2, 3]
    again = StepKTODataset(dataset.examples[2:], -torch.ones(dataset.starts[4] - dataset.starts[2]))
    assert [example.row for example in again] == [0, 1]
    batch = TrainerCollator(0)(list(again))
    assert [example.row for example in batch["examples"]] == [0, 1]


# Two processes

POISONED = """
import math
wanted = [torch.tensor(trainer.train_dataset.examples[row].input_ids) for row in given]

def poison(module, inputs, output):
    ids = inputs[0]
    for row in wanted:
        size = len(row)
        if ids.shape[1] >= size:
            hit = (ids[:, :size] == row).all(1)
            output = output.masked_fill(hit[:, None, None], math.nan)
    return output

trainer.model.get_input_embeddings().register_forward_hook(poison)
found["error"] = None
try:
    trainer.train()
except FloatingPointError as error:
    found["error"] = str(error)
out = folder + "/out"
names = os.listdir(out) if os.path.exists(out) else []
found["saved"] = [name for name in names if "checkpoint" in name]
found["finite"] = all(bool(full(p.detach()).isfinite().all()) for p in trainer.model.parameters())
"""


def train(folder: Path, options: dict, bad: list[int], ranks: int, settings: dict | None = None):
    """What each process found."""
    return train_ranks(POISONED, folder, ranks, options, given=bad, settings=settings)


@pytest.fixture
def folder(tmp_path):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.jsonl", 16)
    return tmp_path


@pytest.mark.parametrize("more", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_all_processes_stop_together(folder, more):
    """Row 13 is of the second step, and only the second process has it."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"save_strategy": "steps" if not more else "no", "save_steps": 1}
    both = train(folder, options, [13], 2, more)
    for found in both:
        told = "step 2: not finite: hidden states: row 13 (rank "
        assert found["error"].startswith(told) and found["error"] == both[0]["error"]
        assert len(found["gradients"]) == len(found["logs"]) == 1 and found["finite"]
        assert found["saved"] == ([] if more else ["checkpoint-1"])


@pytest.mark.parametrize(
    "options, told",
    [
        (
            {"eval_strategy": "steps", "eval_on_start": True, "per_device_eval_batch_size": 3},
            "evaluation after step 0: not finite: hidden states: row 13 (rank ",
        ),
        (
            {"precompute_ref_log_probs": True, "per_device_eval_batch_size": 3},
            "train dataset: not finite: reference log-probs: row 13",
        ),
    ],
    ids=["evaluation", "precomputed"],
)
def test_all_processes_stop_outside_of_steps(folder, options, told):
    for found in train(folder, options, [13], 2):
        assert found["error"].startswith(told) and not found["gradients"]
    assert not list((folder / "out").glob("ref_logps_*"))


@pytest.mark.parametrize("point", ["mismatched", "zero"])
@pytest.mark.parametrize("more", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_all_processes_skip_together(folder, more, point):
    """Of the second process, first a row, then a whole micro-batch."""
    bad = [5, 14, 15]
    options = {"reference_point": point, "save_strategy": "no"}
    mine = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    both = train(folder, options | mine | {"nonfinite": "skip"}, bad, 2, more)
    lines = [json.loads(line) for line in (folder / "data.jsonl").open()]
    lines = without_labels(lines, *bad)
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    (alone,) = train(folder, options | mine, [], 1)
    for found in both:
        assert found["error"] is None and found["finite"]
        assert [logs["skipped"] for logs in found["logs"]] == [1, 2]
        for got, want in zip(found["gradients"], alone["gradients"], strict=True):
            assert_close(got, want)
        for got, want in zip(both[0]["logs"], alone["logs"], strict=True):
            for name in ("loss", "kl", "tokens"):
                assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5)
