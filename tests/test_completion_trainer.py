"""CompletionTrainer: its loss and gradients against torch's cross_entropy, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from stepkto_kernels.training import StepKTOArguments  # noqa: E402
from stepkto_kernels.training.completion_trainer import CompletionTrainer  # noqa: E402
from stepkto_kernels.training.data import encode_example, parse_row  # noqa: E402

transformers.logging.set_verbosity_error()


@pytest.fixture
def make(tmp_path, tiny_model, tokenizer, row):
    def make(rows=8, model=None, **options):
        defaults = {
            **{"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.1},
            **{"optim": "sgd", "max_grad_norm": 1e9, "lr_scheduler_type": "constant"},
            **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
        }
        args = StepKTOArguments(output_dir=str(tmp_path / "out"), **defaults | options)
        return CompletionTrainer(
            model or tiny_model(),
            args=args,
            train_dataset=[row(i) for i in range(rows)],
            processing_class=tokenizer,
        )

    return make


def cross_entropy(model, tokenizer, rows):
    """Mean over the completion tokens of all rows, one by one, of full logits."""
    total, tokens = 0.0, 0
    for each in rows:
        example = encode_example(parse_row(each, "row"), tokenizer)
        ids = torch.tensor([example.input_ids])
        start = example.completion_start
        logits = model(ids).logits[0, start - 1 : -1]
        total = total + F.cross_entropy(logits, ids[0, start:], reduction="sum")
        tokens += ids.shape[1] - start
    return total / tokens


@pytest.mark.parametrize("size, accumulation", [(8, 1), (4, 2), (2, 4)])
def test_a_step_is_that_of_cross_entropy_however_it_is_cut(
    make, tiny_model, tokenizer, row, size, accumulation
):
    other = tiny_model()
    loss = cross_entropy(other, tokenizer, [row(i) for i in range(8)])
    loss.backward()
    trainer = make(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    found = trainer.train().training_loss
    assert found == pytest.approx(loss.item(), rel=1e-6)
    for (name, ours), wanted in zip(
        trainer.model.named_parameters(), other.parameters(), strict=True
    ):
        gradient = (before[name] - ours) / 0.1
        torch.testing.assert_close(gradient, wanted.grad, rtol=1e-4, atol=2e-6, msg=name)


def test_evaluation_is_the_mean_loss(make, tokenizer, row):
    trainer = make(per_device_eval_batch_size=8)
    rows = [row(i) for i in range(8)]
    with torch.no_grad():
        wanted = cross_entropy(trainer.model, tokenizer, rows).item()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(wanted, rel=1e-5)


def test_it_learns_and_keeps_no_reference(make):
    trainer = make(max_steps=30, learning_rate=1e-2, optim="adamw_torch", logging_steps=1)
    trainer.train()
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.reference.model is None


def test_a_loss_that_is_not_finite_stops_the_run(make, tiny_model):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises((FloatingPointError, ValueError)):
        make(model=model, logging_steps=1).train()
