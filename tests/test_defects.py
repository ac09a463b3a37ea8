"""What went wrong in other libraries, and the test here that would see it.

The defects are public: threads by number, and what was found when these libraries were run.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DEFECTS = {
    # TRL's KTO trainer
    "TRL: several workers break the KL rotation": "test_trainer::test_shuffling_and_workers",
    "TRL: the KL needs a sequential sampler": "test_trainer::test_shuffling_and_workers",
    "TRL: a batch of one is paired with itself": (
        "test_trainer::test_a_batch_of_one_is_not_paired_with_itself"
    ),
    "TRL: nanmean hides a NaN row": "test_trainer::test_a_nan_stops_the_run",
    "TRL: 1 - sigmoid(u) underflows": "test_step_kto::test_sigmoid_never_cancels",
    "TRL: z0 is a mean of rank means": (
        "test_trainer_ddp::test_two_processes_have_the_gradient_of_one"
    ),
    "TRL: evaluation rotates by the training batch size": (
        "test_trainer::test_evaluation_is_that_of_all_examples_as_one_batch"
    ),
    "TRL: logits are rounded to bf16 first": (
        "test_trainer::test_error_is_at_most_twice_that_of_eager"
    ),
    "TRL: prompt and padding are scored": "test_trl::test_only_scored_tokens_reach_the_head",
    # Liger's KTO and other losses
    "Liger: chunk_size > 1 broadcasts": "test_trainer::test_every_option_of_the_loss",
    "Liger: a KL of shape (B,) gives B times the loss": ("test_step_kto::test_refused_arguments"),
    "Liger: a masked row is NaN": "test_step_kto::test_loss_and_metrics_are_the_formulas",
    "Liger: class weights are dropped": "test_trainer::test_every_option_of_the_loss",
    "Liger: the reference is ignored under PEFT": "test_trainer::test_lora",
    "Liger: dweight accumulates in bf16": (
        "test_linear_logprobs::test_narrow_inputs_have_the_precision_of_fp32"
    ),
    "Liger: metrics count ignored tokens": "test_trainer::test_metrics_by_trls_names",
    "Liger: the grid ends at 65536 rows": "test_gpu::test_large_shapes",
    "Liger: one scale for dweight": "test_linear_logprobs::test_every_mode_with_every_option",
    "Liger: p - 1 after rounding to bf16": (
        "test_linear_logprobs::test_narrow_inputs_have_the_precision_of_fp32"
    ),
    "Liger: a wait for the device in forward": "test_waits::test_fused_loss",
    # torch, verl, Cut Cross-Entropy
    "torch: log-probs in the input's dtype": (
        "test_linear_logprobs::test_narrow_inputs_have_the_precision_of_fp32"
    ),
    "torch: all targets ignored, NaN gradients": "test_fused::test_all_targets_ignored",
    "torch: eager fallback under compile": "test_ops::test_compiled_head",
    "verl: padded columns count as logit 0": "test_linear_logprobs::test_masked_vocabulary",
    "verl: needs H % 128 == 0": "test_linear_logprobs::test_sizes",
    "verl: always both gradients": "test_linear_logprobs::test_mode_names_are_what_runs",
    "CCE: not deterministic": "test_bitwise::test_repeating_gives_the_same_bits",
    "CCE: DTensor is rejected": "test_parallel::test_a_dtensor_weight_brings_its_group",
    "CCE: all ignored divides by 0": "test_step_kto::test_a_term_divided_by_nothing_is_zero",
    # users of FSDP2, DDP and both
    "FSDP2: full_tensor() loses other ranks' gradients": (
        "test_parallel::test_fsdp2_head_gradients_are_summed_over_ranks"
    ),
    "FSDP2: in the trainer": "test_trainer_ddp::test_two_processes_have_the_gradient_of_one",
    "TRL 7245, 5282: a loss beside DDP's forward": (
        "test_trainer_ddp::test_two_processes_have_the_gradient_of_one"
    ),
    "TRL 1447, 1342, 1722: NaN or dead KL": (
        "test_trainer::test_gradient_is_that_of_one_big_batch"
    ),
    "TRL 1396: a hang where a rank has no desirable example": (
        "test_parallel::test_a_rank_without_desirable_examples_neither_hangs_nor_skews"
    ),
    "Liger 439, 721: memory of one long sequence": (
        "test_linear_logprobs::test_memory_budget_is_kept"
    ),
    "TRL 2554, 1911, 5864: odd batches and batches of one": (
        "test_trainer::test_gradient_is_that_of_one_big_batch"
    ),
    "unsloth 4098: LoRA on lm_head": "test_head_routing::test_lora_on_the_head",
    "TRL 7266: int32 overflow": "test_gpu::test_large_shapes",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_test_would_see(defect):
    module, name = DEFECTS[defect].split("::")
    tree = ast.parse((TESTS / f"{module}.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert found, f"{defect}: no {name} in {module}.py"
    unconditional = [ast.unparse(mark) for mark in found[0].decorator_list]
    assert not any(mark.startswith("pytest.mark.skip(") for mark in unconditional)
