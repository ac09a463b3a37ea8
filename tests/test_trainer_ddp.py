"""StepKTOTrainer on two processes, DDP and FSDP2: the gradient of one process with all of a batch.

accelerate does not offer FSDP to CPU processes. A child that is to have it passes for one of
several GPUs while accelerate looks at it; what then shards and trains is the real thing.
"""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from trainer_helpers import FSDP, train_ranks  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from stepkto_kernels.training.tiny import make_data, make_model  # noqa: E402

TRAIN = """
trainer.train()
found["parameters"] = [full(p.detach()).clone() for p in trainer.model_wrapped.parameters()]
found["sharded"] = [hasattr(p, "full_tensor") for p in trainer.model_wrapped.parameters()]
if not any(found["sharded"]):  # full state dicts of DTensors on a CPU come without being waited for
    trainer.save_model(folder + "/saved")
"""


def train(
    folder: Path, batch: int, split: int, ranks: int, options: dict, settings: dict | None = None
) -> list[dict]:
    options = options | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": split}
    options |= {"save_strategy": "no"}
    return train_ranks(TRAIN, folder, ranks, options, settings=settings)


@pytest.fixture
def folder(tmp_path):
    """16 rows, of which the second process's first four have no labels and none is desirable."""
    make_model(tmp_path / "model")
    rows = [json.loads(line) for line in make_data(tmp_path / "all.jsonl", 16).open()]
    for row in rows[4:8]:
        row["labels"], row["label"] = [None] * len(row["labels"]), None
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    "split, options",
    [
        (1, {}),
        (1, {"reference_point": "matched"}),
        (2, {"reference_point": "zero", "precompute_ref_log_probs": True}),
    ],
    ids=["mismatched", "matched", "accumulated, cached"],
)
@pytest.mark.parametrize("more", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_have_the_gradient_of_one(folder, split, options, more):
    """TRL 7245, 5282: a gradient that is not synchronised. TRL 1396: a rank without desirable
    examples neither hangs nor skews. FSDP2: ranks' contributions to the head's gradient are
    summed, which full_tensor() would lose."""
    (alone,) = train(folder, 8, 1, 1, options)
    both = train(folder, 4 // split, split, 2, options, more)
    for found in both:
        assert all(found["sharded"]) == bool(more) and not any(alone["sharded"])
        assert len(found["gradients"]) == len(found["logs"]) == 2
        for got, want in zip(found["gradients"], alone["gradients"], strict=True):
            assert got.keys() == want.keys()
            largest = max(float(g.abs().max()) for g in want.values())
            for name in want:  # fp32 sums in another order
                torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-5 * largest)
    for name in ("loss", "outcome_loss", "step/loss", "kl", "step/kl", "tokens"):
        for k in range(2):
            want = alone["logs"][k][name]
            assert both[0]["logs"][k][name] == pytest.approx(want, rel=1e-4, abs=1e-5)
    for mine, other in zip(both[0]["parameters"], both[1]["parameters"], strict=True):
        assert torch.equal(mine, other)
    if more:
        return
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved")
    for mine, other in zip(both[0]["parameters"], saved.parameters(), strict=True):
        assert torch.equal(mine, other)
