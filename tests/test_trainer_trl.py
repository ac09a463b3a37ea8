"""With step_weight 0, StepKTOTrainer trains as TRL's KTOTrainer does."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from stepkto_kernels.training import StepKTOArguments, StepKTOTrainer  # noqa: E402

BATCH, STEPS = 4, 5


class Recorder(transformers.TrainerCallback):
    """Gradients before every optimizer step, and losses."""

    def __init__(self):
        self.gradients, self.losses, self.kl = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.kl.append(logs["kl"])


def kto_rows() -> list[dict]:
    """One word is one token, with the completion's first space in neither text's tokens."""
    word = lambda i: f"w{i % 20}"
    return [
        {
            "prompt": " ".join(word(3 * i + k) for k in range(2 + i % 3)),
            "completion": " " + " ".join(word(7 * i + 2 * k) for k in range(3 + i % 4)),
            "label": i % 3 != 0,
        }
        for i in range(BATCH * STEPS)
    ]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_same_losses_and_gradients_as_trl(tiny_model, tokenizer, tmp_path, lora):
    """Five steps on the same pairs. TRL pairs prompt i with completion i - 1 of a batch, we with
    i + 1: our batches hold the same rows in reverse."""
    peft = pytest.importorskip("peft")
    folder = tmp_path / "model"
    tiny_model(1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    common = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "max_length": 64,
        "learning_rate": 3e-2,  # so that policy and reference come apart
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "beta": 0.5,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.5,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    rows = kto_rows()
    found = {}
    for who in ("trl", "ours"):
        recorder = found[who] = Recorder()
        given = {"processing_class": tokenizer, "callbacks": [recorder]}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if lora:
            torch.manual_seed(0)  # the same adapter for both
            config = peft.LoraConfig(
                r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            )
            model = peft.get_peft_model(model, config)
        if who == "trl":
            args = trl.KTOConfig(str(tmp_path / who), **common)
            trainer = trl.KTOTrainer(
                model, args=args, train_dataset=Dataset.from_list(rows), **given
            )
            theirs = [p + c for p, c in zip(*(trainer.train_dataset[n] for n in IDS), strict=True)]
        else:
            args = StepKTOArguments(str(tmp_path / who), step_weight=0.0, **common)
            batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            reverse = [row for batch in batches for row in batch[::-1]]
            trainer = StepKTOTrainer(model, args=args, train_dataset=reverse, **given)
            ours = [example.input_ids for example in trainer.train_dataset.examples]
        trainer.train()
    batches = [theirs[i : i + BATCH] for i in range(0, len(theirs), BATCH)]
    assert ours == [ids for batch in batches for ids in batch[::-1]]

    assert max(found["trl"].kl) > 0.01  # the reference point takes part
    assert found["ours"].kl == pytest.approx(found["trl"].kl, abs=1e-5)
    assert found["ours"].losses == pytest.approx(found["trl"].losses, abs=1e-5)
    assert len(found["ours"].gradients) == len(found["trl"].gradients) == STEPS
    for got, want in zip(found["ours"].gradients, found["trl"].gradients, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-5)


IDS = ("prompt_ids", "completion_ids")
