"""What README.md shows runs, and its tables are the results."""

import pathlib
import re
import subprocess
import sys

import stepkto_kernels

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_and_after_is_before():
    """All blocks in one namespace; the trainer's two versions give the same gradients."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    space: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, space)  # our own README
    assert space["hidden"].grad.abs().sum() > 0

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    batch = {
        "input_ids": torch.randint(0, 50, (2, 6)),
        "step_ids": space["step_ids"],
        "completion_mask": space["completion"],
        "outcome_label": torch.tensor([1, 0]),
        "step_labels": torch.tensor([[1, 1], [1, 0]]),
    }

    def log_ratio_loss(ratio, batch):
        segments = stepkto_kernels.StepSegments.from_padded(
            batch["step_ids"][:, 1:],
            batch["completion_mask"][:, 1:],
            batch["outcome_label"],
            batch["step_labels"],
        )
        return stepkto_kernels.reference.step_kto_loss(
            ratio, torch.zeros_like(ratio), segments, config=space["loss_fn"].config
        )

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    before = gradients(space["before"](model, reference, batch, log_ratio_loss))
    after = gradients(space["after"](model, reference, batch)[0])
    largest = max(g.abs().max() for g in before)
    for a, b in zip(after, before, strict=True):
        # fp32 sums in another order; 2**-24 a rounding, some tens of them on the way
        torch.testing.assert_close(a, b, rtol=0, atol=float(64 * 2**-24 * largest))


def test_every_public_name_is_in_the_table():
    for name in stepkto_kernels.__all__:
        # LogprobStats is what linear_logprobs_with_stats returns
        modules = ("parallel", "reference")
        assert name in ("LogprobStats", *modules) or f"`{name}`" in README, name


def test_tables_come_from_the_results():
    command = [sys.executable, str(ROOT / "benchmarks/readme.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, "run `python benchmarks/readme.py`: " + done.stdout + done.stderr
