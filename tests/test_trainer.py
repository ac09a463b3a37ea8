"""StepKTOTrainer in one process: against fp64 with materialised logits, and what users do with it.

The rows of the peers' defect table that concern a trainer are named in the tests' docstrings.
"""

import copy
import json
import math
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from trainer_helpers import Recorder, recorded_trainer  # noqa: E402

from stepkto_kernels import KLBaseline, StepKTOConfig, StepSegments, reference  # noqa: E402
from stepkto_kernels.metrics import StepKTOMetrics  # noqa: E402
from stepkto_kernels.training import StepKTOArguments, StepKTOTrainer, reference_logps  # noqa: E402
from stepkto_kernels.training.arguments import LOSS_OPTIONS  # noqa: E402
from stepkto_kernels.training.data import encode_example, parse_row  # noqa: E402
from stepkto_kernels.training.dataset import StepKTODataset, encode_dataset  # noqa: E402
from stepkto_kernels.training.reference_model import ReferenceModel  # noqa: E402

transformers.logging.set_verbosity_error()
FP64 = torch.float64
EXACT = {"backend": "reference"}  # which takes fp64


# What it should compute


class Tokens:
    """An example as the oracle sees it: ids, where the completion starts, its steps and labels."""

    def __init__(self, example, prompt=None):
        before = (prompt or example).input_ids[: (prompt or example).completion_start]
        self.start = len(before)
        self.ids = before + example.input_ids[example.completion_start :]
        self.steps = example.step_ids[example.completion_start :]
        self.outcome_label, self.step_labels = example.outcome_label, example.step_labels


def tokens_of(examples: Sequence) -> list[Tokens]:
    return [Tokens(example) for example in examples]


def ring_of(examples: Sequence) -> list[Tokens]:
    """Each prompt with the completion of the next example."""
    following = [*examples[1:], examples[0]]
    return [Tokens(other, prompt=this) for this, other in zip(examples, following, strict=True)]


def layout_of(tokens: Sequence[Tokens]) -> StepSegments:
    sequence, step, labels, of_sequence = [], [], [], []
    for b, t in enumerate(tokens):
        sequence += [b] * len(t.steps)
        step += [-1 if s < 0 else len(labels) + s for s in t.steps]
        labels += t.step_labels
        of_sequence += [b if s in t.steps else -1 for s in range(len(t.step_labels))]
    return StepSegments(
        torch.tensor(sequence).int(),
        torch.tensor(step).int(),
        torch.tensor([t.outcome_label for t in tokens]).to(torch.int8),
        torch.tensor(labels).to(torch.int8),
        torch.tensor(of_sequence).int(),
    )


def materialised_logps(model, tokens: Sequence[Tokens]) -> torch.Tensor:
    out = []
    for t in tokens:
        ids = torch.tensor([t.ids])
        logits = model(input_ids=ids).logits[0, t.start - 1 : -1]
        out.append(logits.log_softmax(-1).gather(-1, ids[0, t.start :, None])[:, 0])
    return torch.cat(out)


def oracle_baseline(policy, ref, examples: Sequence, config: StepKTOConfig) -> KLBaseline | None:
    if config.reference_point != "mismatched" or config.loss_type == "apo_zero":
        return None
    ring = ring_of(examples)
    with torch.no_grad():
        logps = [materialised_logps(model, ring) for model in (policy, ref)]
    return reference.kl_baseline(*logps, layout_of(ring), config=config)


def oracle(policy, ref, examples: Sequence, config: StepKTOConfig) -> torch.Tensor:
    """The loss of these examples as one batch; the models are run one sequence at a time."""
    baseline = oracle_baseline(policy, ref, examples, config)
    tokens = tokens_of(examples)
    with torch.no_grad():
        ref_logps = materialised_logps(ref, tokens)
    logps = materialised_logps(policy, tokens)
    return reference.step_kto_loss(logps, ref_logps, layout_of(tokens), baseline, config)


def gradients_of(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def largest(gradients: dict[str, torch.Tensor]) -> float:
    return max(float(g.abs().max()) for g in gradients.values())


def difference(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(float((got[name].double() - want[name].double()).abs().max()) for name in want)


def assert_exact(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Two orders of the same fp64 sums."""
    assert difference(got, want) <= 1e-11 * largest(want)


# Trainers


@pytest.fixture
def models(tiny_model) -> Callable:
    """Policy and reference; the flatter policy likes random completions better, so z > 0."""

    def models(dtype=FP64, **options):
        policy, ref = tiny_model(1, 0.1, **options), tiny_model(2, 0.3, **options)
        return policy.to(dtype), ref.to(dtype)

    return models


@pytest.fixture
def rows(row) -> Callable[[int], list[dict]]:
    return lambda n: [row(i) for i in range(n)]


@pytest.fixture
def examples(tokenizer) -> Callable:
    return lambda rows: [encode_example(parse_row(r, "row"), tokenizer) for r in rows]


@pytest.fixture
def make(tmp_path, tokenizer) -> Callable[..., StepKTOTrainer]:
    """Trainer of one epoch in order, one step of 8 rows, with a Recorder as `recorder`."""

    def make(model, ref=None, rows=None, *, batch=8, split=1, **options) -> StepKTOTrainer:
        mine = {"eval_dataset", "peft_config", "processing_class", "optimizers"}
        extra = {"processing_class": tokenizer}
        extra |= {name: options.pop(name) for name in mine & options.keys()}
        shape = {"batch": batch, "split": split, "extra": extra}
        return recorded_trainer(model, ref, rows, tmp_path / "out", **shape, **options)

    return make


@pytest.fixture
def step(make) -> Callable[..., Recorder]:
    """Train a single step and return what it was."""

    def step(model, ref=None, rows=None, **options) -> Recorder:
        trainer = make(model, ref, rows, **options)
        trainer.train()
        assert trainer.state.global_step == 1
        return trainer.recorder

    return step


# Loss and gradients


@pytest.mark.parametrize("split", [(8, 1), (4, 2), (1, 8), (3, 3), (5, 2)], ids=str)
@pytest.mark.parametrize("point", ["mismatched", "matched", "zero"])
def test_gradient_is_that_of_one_big_batch(models, rows, examples, step, split, point):
    """TRL 2554, 1911, 5864: odd batches and batches of one. TRL 1447, 1342: a KL that is dead."""
    policy, ref = models()
    batch = examples(rows(8))
    config = StepKTOConfig(reference_point=point, beta=0.3)
    if point == "mismatched":
        z = oracle_baseline(policy, ref, batch, config)
        assert z.outcome > 1 and z.step > 0.3
    loss = oracle(policy, ref, batch, config)
    want = gradients_of(policy, loss)
    found = step(
        policy,
        ref,
        rows(8),
        batch=split[0],
        split=split[1],
        reference_point=point,
        beta=0.3,
        **EXACT,
    )
    assert_exact(found.gradients[0], want)
    assert found.steps[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
def test_every_option_of_the_loss(models, rows, examples, step, config, padding_free):
    """Liger: class weights dropped; chunks of more than one sequence."""
    policy, ref = models()
    want = gradients_of(policy, oracle(policy, ref, examples(rows(8)), config))
    options = {name: getattr(config, name) for name in LOSS_OPTIONS}
    options |= {"padding_free": padding_free, "pad_to_multiple_of": 16 if padding_free else None}
    found = step(policy, ref, rows(8), batch=3, split=3, **options, **EXACT)
    assert_exact(found.gradients[0], want)


EAGER = {"Gemma2", "eager"}  # whose softmax is in fp32 whatever the model is in
PACKING = {
    "Gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8, "sliding_window": 3},
    "Phi": {},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "Llama": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("family", PACKING)
def test_packed_equals_padded(models, rows, examples, step, family):
    policy, ref = models(family=family, **PACKING[family])
    want = gradients_of(policy, oracle(policy, ref, examples(rows(8)), StepKTOConfig()))
    for padding_free in (False, True):
        twin = copy.deepcopy(policy)
        found = step(twin, ref, rows(8), batch=4, split=2, padding_free=padding_free, **EXACT)
        if EAGER & {family, PACKING[family].get("attn_implementation")}:
            assert difference(found.gradients[0], want) <= 64 * 2**-24 * largest(want)
        else:
            assert_exact(found.gradients[0], want)


def test_packing_is_refused_where_sequences_would_run_into_each_other(models, rows, make):
    policy, ref = models(torch.float32, family="OPT", ffn_dim=32, word_embed_proj_dim=16)
    make(policy, ref, rows(4))
    with pytest.raises(ValueError, match="honours position_ids with padding_free, got OPTFor"):
        make(policy, ref, rows(4), padding_free=True)


@pytest.mark.parametrize("mixed", [None, "bf16"])
def test_error_is_at_most_twice_that_of_eager(models, rows, examples, step, mixed):
    """TRL: logits rounded to bf16 before the logsumexp, prompt and padding scored too."""
    policy, ref = models(torch.float32)
    batch, config = examples(rows(8)), StepKTOConfig()
    twins = [copy.deepcopy(model).double() for model in (policy, ref)]
    exact = gradients_of(twins[0], oracle(*twins, batch, config))
    # in torch 2.8, weights that were cast without gradient stay so within an autocast
    with torch.autocast("cpu", torch.bfloat16, mixed is not None, cache_enabled=False):
        eager = gradients_of(policy, oracle(policy, ref, batch, config))
    found = step(policy, ref, rows(8), batch=4, split=2, bf16=mixed is not None)
    error = lambda got: sum(float((got[n] - exact[n]).square().sum()) for n in exact) ** 0.5
    size = sum(float(g.square().sum()) for g in exact.values()) ** 0.5
    unit = torch.finfo(torch.bfloat16 if mixed else torch.float32).eps
    assert error(found.gradients[0]) <= 2 * error(eager) + unit * size
    assert error(eager) < 0.2 * size


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("mixed", [None, "bf16"])
def test_a_model_equals_itself_to_the_bit(tiny_model, rows, step, mixed, precompute):
    found = step(
        tiny_model(),
        rows=rows(8),
        bf16=mixed is not None,
        precompute_ref_log_probs=precompute,
        per_device_eval_batch_size=8,
    ).steps[0]
    half = pytest.approx(0.5, rel=4 * 2**-53)  # a mean of halves and thirds
    assert found["outcome_loss"] == half and found["step/loss"] == half
    assert found["loss"] == 1.0
    for level in ("", "step/"):
        assert found[f"{level}kl"] == 0.0
        assert found[f"{level}rewards/chosen"] == found[f"{level}rewards/rejected"] == 0.0
    assert found["grad_norm"] > 0


def test_fp16(models, rows, examples, step):
    policy, ref = models(torch.float32)
    want = gradients_of(policy, oracle(policy, ref, examples(rows(8)), StepKTOConfig()))
    found = step(policy, ref, rows(8), fp16=True).gradients[0]
    # the loss scale has been taken out, and a rounding is 2**-11
    assert difference(found, want) <= 32 * 2**-11 * largest(want)


def test_mixture_of_experts(models, rows, examples, step):
    options = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.4}
    policy, ref = models(family="Mixtral", num_local_experts=4, **options)
    batch = examples(rows(8))
    loss = oracle(policy, ref, batch, StepKTOConfig())
    aux = 0
    for half in (batch[:4], batch[4:]):  # as padded micro-batches
        ids = [torch.tensor(example.input_ids) for example in half]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        aux = aux + 0.4 * policy(input_ids=padded, attention_mask=mask).aux_loss / 2
    assert aux > 0.1
    want = gradients_of(policy, loss + aux)
    found = step(policy, ref, rows(8), batch=4, split=2, **EXACT)
    assert difference(found.gradients[0], want) <= 1e-6 * largest(want)  # the router is in fp32
    assert found.steps[0]["loss"] == pytest.approx((loss + aux).item(), rel=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing(tiny_model, rows, step, lora_config, lora):
    options = {"peft_config": lora_config()} if lora else {}
    plain, checkpointed = (
        step(tiny_model(), tiny_model(2), rows(8), gradient_checkpointing=on, **options)
        for on in (False, True)
    )
    assert difference(checkpointed.gradients[0], plain.gradients[0]) == 0.0
    assert largest(plain.gradients[0]) > 0


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("trained", ["backbone", "lm_head"])
def test_frozen_parts(models, rows, examples, step, trained, tie):
    policy, ref = models(tie_word_embeddings=tie)
    for _name, parameter in policy.named_parameters():
        is_head = parameter is policy.lm_head.weight
        parameter.requires_grad_(is_head == (trained == "lm_head"))
    want = gradients_of(policy, oracle(policy, ref, examples(rows(8)), StepKTOConfig()))
    frozen = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    found = step(policy, ref, rows(8), batch=4, split=2, **EXACT)
    assert_exact(found.gradients[0], want)
    after = dict(policy.named_parameters())
    assert frozen and all(torch.equal(after[name], frozen[name]) for name in frozen)


def test_dropout_is_switched_off_unless_asked_for(models, rows, examples, step):
    options = {"family": "OPT", "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.5}
    policy, ref = models(**options)
    want = gradients_of(policy, oracle(policy, ref, examples(rows(8)), StepKTOConfig()))
    twin = copy.deepcopy(policy)
    assert_exact(step(policy, ref, rows(8), **EXACT).gradients[0], want)
    dropped = step(twin, ref, rows(8), disable_dropout=False, **EXACT)
    assert difference(dropped.gradients[0], want) > 0.01 * largest(want)
    # it is in the policy's loss only: the reference points are those without
    z = oracle_baseline(*models(**options), examples(rows(8)), StepKTOConfig())
    assert dropped.steps[0]["kl"] == pytest.approx(z.outcome.item(), rel=1e-9)


def test_gradient_bound_drops_tokens(tiny_model, rows, step):
    all_of_them, none = (
        step(tiny_model(), tiny_model(2), rows(8), gradient_bound=bound) for bound in (0.0, 1e9)
    )
    assert largest(all_of_them.gradients[0]) > 0 == largest(none.gradients[0])


# LoRA


@pytest.fixture
def lora_config() -> Callable:
    peft = pytest.importorskip("peft")

    def lora_config(targets=("q_proj", "lm_head"), **options):
        return peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=list(targets), task_type="CAUSAL_LM", **options
        )

    return lora_config


@pytest.fixture
def adapted(tiny_model, lora_config) -> Callable:
    """A fp64 PEFT model with an adapter that does something."""
    peft = pytest.importorskip("peft")

    def adapted(seed: int = 4, **options):
        model = peft.get_peft_model(tiny_model(2), lora_config(**options))
        generator = torch.Generator().manual_seed(seed)
        for _name, parameter in model.named_parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model.double()

    return adapted


KINDS = {
    "layers": {"targets": ["q_proj", "v_proj"]},
    "layers and lm_head": {"targets": ["q_proj", "lm_head"]},
    "lm_head only": {"targets": ["lm_head"]},
    "a copy of lm_head": {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_lora(tiny_model, adapted, rows, examples, step, kind):
    """unsloth 4098: LoRA on lm_head. Liger: the reference is ignored under PEFT."""
    policy, base = adapted(**KINDS[kind]), tiny_model(2).double()
    batch, config = examples(rows(8)), StepKTOConfig(reference_point="matched")
    loss = oracle(policy, base, batch, config)
    assert abs(loss.item() - 1.0) > 1e-3, "the adapter does something"
    want = gradients_of(policy, loss)
    found = step(policy, rows=rows(8), batch=3, split=3, reference_point="matched", **EXACT)
    assert_exact(found.gradients[0], want)
    assert ("lm_head" in kind) == any("lm_head" in name for name in want)


def test_peft_config_makes_the_adapter(tiny_model, lora_config, rows, make):
    model = tiny_model(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make(model, rows=rows(8), batch=4, peft_config=lora_config(), num_train_epochs=2)
    trainer.train()
    assert trainer.reference.model is None, "no second model"
    first = trainer.recorder.steps[0]
    assert first["loss"] == 1.0 and first["kl"] == 0.0
    assert trainer.recorder.steps[-1]["loss"] != 1.0
    base = trainer.model.get_base_model().state_dict()
    assert all(
        torch.equal(
            base[
                name.replace("q_proj.", "q_proj.base_layer.").replace(
                    "lm_head.", "lm_head.base_layer."
                )
            ],
            before[name],
        )
        for name in before
    )
    with pytest.raises(ValueError, match="^peft_config: want None, as the model has an adapter"):
        make(trainer.model, rows=rows(8), peft_config=lora_config())
    with pytest.raises(ValueError, match="^peft_config: want "):
        make(tiny_model(), rows=rows(8), peft_config={"r": 4})


# The reference's log-probs, computed once


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Numbers of examples for which reference log-probs were computed in advance."""
    counts, compute = [], reference_logps.compute

    def counting(dataset, *args):
        counts.append(len(dataset))
        return compute(dataset, *args)

    monkeypatch.setattr(reference_logps, "compute", counting)
    return counts


PRECOMPUTE = {"precompute_ref_log_probs": True, "batch": 4, "split": 2}


@pytest.mark.parametrize("point", ["mismatched", "zero", "matched"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_precomputed_equals_on_the_fly(
    models, rows, step, computed, monkeypatch, point, padding_free
):
    policy, ref = models(torch.float32)
    options = {"reference_point": point, "padding_free": padding_free}
    plain = step(copy.deepcopy(policy), copy.deepcopy(ref), rows(8), batch=4, split=2, **options)
    assert computed == []
    calls = []
    log_probs = ReferenceModel._log_probs
    count = lambda self, *args: calls.append(1) or log_probs(self, *args)
    monkeypatch.setattr(ReferenceModel, "_log_probs", count)
    eval_batch = {"per_device_eval_batch_size": 3}
    found = step(policy, ref, rows(8), **PRECOMPUTE, **eval_batch, **options)
    assert computed == [8]
    # 3 batches in advance, and the mismatched pairs that are in no dataset
    assert len(calls) == 3 + (2 if point == "mismatched" else 0)
    unit = torch.finfo(torch.float32).eps
    error = difference(found.gradients[0], plain.gradients[0])
    assert error <= 100 * unit * largest(plain.gradients[0])


def test_precomputed_log_probs_are_those_of_the_tokens(models, rows, examples, make):
    policy, ref = models(torch.float32)
    trainer = make(policy, ref, rows(8), **PRECOMPUTE, eval_dataset=rows(3), eval_strategy="no")
    exact = copy.deepcopy(ref).double()
    trainer.train()
    for dataset, n in ((trainer.train_dataset, 8), (trainer.eval_dataset, 3)):
        want = materialised_logps(exact, tokens_of(examples(rows(n))))
        torch.testing.assert_close(dataset.ref_logps.double(), want, rtol=1e-5, atol=1e-5)


def test_the_cache_is_used_again_and_never_wrongly(
    tiny_model, tokenizer, rows, make, computed, tmp_path, lora_config
):
    def run(seed=2, n=8, model=None, **options):
        computed.clear()
        given = rows(n) if isinstance(n, int) else n
        extra = {"reference_point": "zero", "ref_logps_cache": str(tmp_path / "cache")}
        trainer = make(model or tiny_model(seed), rows=given, **PRECOMPUTE | extra | options)
        trainer.train()
        return len(computed)

    assert run() == 1
    assert run() == 0
    assert run(per_device_eval_batch_size=3, reference_point="matched", beta=0.7) == 0
    assert run(peft_config=lora_config()) == 0, "the same base model"
    changed = tiny_model(2)
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight[3, 5] += 1e-4
    assert run(model=changed) == 1
    assert run(n=7) == 1
    assert run(n=rows(8)[::-1]) == 1
    assert run(max_length=9) == 1
    assert run(add_eos=False) == 1
    assert run(bf16=True) == 1
    assert run(model=tiny_model(2).bfloat16()) == 1
    scaled = tiny_model(2)
    scaled.config.rope_parameters["rope_theta"] = 77.0
    assert run(model=scaled) == 1
    assert run() == 0
    assert len(list((tmp_path / "cache").iterdir())) == 9


def test_buffers_and_adapters_of_a_reference_change_the_cache(tiny_model, adapted):
    fingerprint = reference_logps.model_fingerprint
    one, other = adapted(seed=4), adapted(seed=5)
    assert fingerprint(one) != fingerprint(other)
    base = fingerprint(tiny_model(2).double())
    assert base not in (fingerprint(one), fingerprint(other))
    assert fingerprint(one, with_adapters=False) == fingerprint(other, with_adapters=False) == base
    copied = adapted(targets=["q_proj"], modules_to_save=["lm_head"])
    assert fingerprint(copied, with_adapters=False) == base
    model = tiny_model()
    model.register_buffer("correction", torch.zeros(3))
    before = fingerprint(model)
    model.correction += 1
    assert fingerprint(model) != before


def test_a_damaged_cache_is_refused(tiny_model, rows, make, tmp_path):
    options = PRECOMPUTE | {"reference_point": "zero", "ref_logps_cache": str(tmp_path / "cache")}
    run = lambda: make(tiny_model(2), rows=rows(8), **options).train()
    run()
    [path] = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="got an unreadable file.*delete it"):
        run()
    save_file({"ref_logps": torch.zeros(3)}, path, metadata={"key": "another"})
    with pytest.raises(ValueError, match=r"want \d+ reference log-probs of this model and dataset"):
        run()
    path.write_bytes(whole)
    run()


def test_a_dataset_is_not_changed_by_a_trainer(tiny_model, tokenizer, rows, make):
    """Log-probs of one trainer's reference must not turn up in another's batches."""
    dataset = encode_dataset(rows(8), tokenizer)
    first = make(tiny_model(2), rows=dataset, **PRECOMPUTE)
    first.train()
    assert dataset.ref_logps is None and first.train_dataset.ref_logps is not None
    given = StepKTODataset(dataset.examples, first.train_dataset.ref_logps)
    second = make(tiny_model(2), rows=given)
    second.train()
    assert second.recorder.steps[0]["loss"] == pytest.approx(1.0, abs=1e-6), "given ones are used"


def test_no_reference_is_better_than_the_trained_policy(tiny_model, rows, make):
    trainer = make(tiny_model(2), rows=rows(8), reference_point="zero", **PRECOMPUTE)
    trainer.train()
    assert trainer.reference.model is None
    with pytest.raises(
        ValueError, match="^args.precompute_ref_log_probs: want .*reference is gone"
    ):
        trainer.evaluate(rows(4))
    kept = make(tiny_model(2), rows=rows(8), **PRECOMPUTE)  # mismatched pairs need it
    kept.train()
    assert kept.evaluate(rows(4))["eval_loss"] != 1.0


# Steps, order and batches of one


def test_shuffling_and_workers(models, rows, examples, make):
    """TRL: KL needs a sequential sampler, more than one worker breaks its rotation."""
    options = {"train_sampling_strategy": "random", "batch": 5, "num_train_epochs": 2}
    runs = []
    for workers in (0, 2):
        policy, ref = models()
        trainer = make(policy, ref, rows(13), dataloader_num_workers=workers, **options, **EXACT)
        drawn, loss = [], trainer._loss
        trainer._loss = lambda m, b, c, d=drawn, f=loss: d.append(b["examples"]) or f(m, b, c)
        twin = copy.deepcopy(policy)
        trainer.train()
        runs.append((drawn, policy.state_dict(), trainer.recorder))
        want = gradients_of(twin, oracle(twin, ref, drawn[0], StepKTOConfig()))
        assert_exact(trainer.recorder.gradients[0], want)
        ids = lambda batches: [tuple(e.input_ids) for batch in batches for e in batch]
        assert [len(batch) for batch in drawn] == [5, 5, 3] * 2
        assert sorted(ids(drawn[:3])) == sorted(ids(drawn[3:])) == sorted(ids([examples(rows(13))]))
        assert ids(drawn[:3]) != ids(drawn[3:])
        assert ids(drawn[:3]) != ids([examples(rows(13))])
    (drawn, weights, _), (other_drawn, other_weights, _) = runs
    assert drawn == other_drawn
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_a_batch_of_one_is_not_paired_with_itself(models, rows, examples, make):
    """TRL pairs it with itself. Here the running mean serves, and one warning says so."""
    policy, ref = models(torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(policy, ref, rows(9), batch=4, num_train_epochs=2)
        trainer.train()
    assert len([w for w in caught if "no mismatched pair" in str(w.message)]) == 1
    kl = [(logs["kl"], logs["step/kl"]) for logs in trainer.recorder.steps]
    # batches of 4, 4 and 1, twice; each step moves the mean by 1 - ema_decay of 0.9
    for level in (0, 1):
        z = [values[level] for values in kl]
        assert z[0] > 0 and z[1] > 0 and z[3] > 0
        assert z[2] == pytest.approx(0.9 * z[0] + 0.1 * z[1])
        assert z[5] == pytest.approx(0.9 * (0.9 * z[2] + 0.1 * z[3]) + 0.1 * z[4])

    alone = make(*models(torch.float32), rows(1), batch=1)
    with pytest.warns(UserWarning, match="no mismatched pair"):
        alone.train()
    assert alone.recorder.steps[0]["kl"] == 0.0


def test_ema_follows_the_steps(models, rows, examples, make):
    policy, ref = models()
    trainer = make(
        policy, ref, rows(12), batch=2, split=2, reference_point="ema", learning_rate=0.0, **EXACT
    )
    trainer.train()
    kl = [logs["kl"] for logs in trainer.recorder.steps]
    means = []
    for part in (rows(12)[:4], rows(12)[4:8]):
        tokens = tokens_of(examples(part))
        layout = layout_of(tokens)
        with torch.no_grad():
            ratio = materialised_logps(policy, tokens) - materialised_logps(ref, tokens)
        r, _ = reference.segment_sums(ratio, layout)
        means.append(r[layout.outcome_label >= 0].mean().item())
    assert kl[0] == 0.0
    assert kl[1] == pytest.approx(max(means[0], 0.0))
    assert kl[2] == pytest.approx(max(0.9 * means[0] + 0.1 * means[1], 0.0))
    assert kl[2] > 0


RESUMES = {
    "mismatched": {},
    "ema": {"reference_point": "ema"},
    "padding_free": {"padding_free": True, "split": 2},
    "precomputed": {"precompute_ref_log_probs": True, "reference_point": "matched"},
    "dropout": {"disable_dropout": False},
    "workers": {"dataloader_num_workers": 1},
    "lora": {"lora": True},
}


@pytest.mark.parametrize("kind", RESUMES)
def test_resume_is_exact(tiny_model, rows, make, tmp_path, lora_config, kind):
    """In the middle of an epoch, shuffled, with a last batch of one that uses the running mean."""
    options = dict(RESUMES[kind])
    lora = options.pop("lora", False)
    shared = {
        **{"batch": 4, "num_train_epochs": 3, "train_sampling_strategy": "random"},
        **{"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 1.0},
        **{"lr_scheduler_type": "linear", "learning_rate": 5e-2},
    } | options

    def run(folder: str, resume: str | None = None, **more):
        model = tiny_model(1, 0.1, attention_dropout=0.3)
        extra = {"peft_config": lora_config(lora_dropout=0.3)} if lora else {}
        where = {"output_dir": str(tmp_path / folder)}
        ref = None if lora else tiny_model(2)
        trainer = make(model, ref, rows(9), **shared | where | extra | more)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == stop_after

    stop_after = -1
    whole = run("whole")
    steps = whole.state.global_step
    last = f"checkpoint-{steps // 2 * 2}"
    assert steps == (6 if "split" in options else 9)
    resumed = run("resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == steps
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    state = lambda folder: torch.load(tmp_path / folder / last / "step_kto.pt", weights_only=True)
    assert all(torch.equal(state("whole")[n], state("resumed")[n]) for n in ("running", "seen"))
    if kind in ("mismatched", "ema", "dropout"):
        assert state("whole")["seen"].min() > 3 and state("whole")["running"].abs().min() > 0
    tail = whole.recorder.steps[-(steps - 2) :]
    without_time = lambda logs: [{k: v for k, v in line.items() if k != "epoch"} for line in logs]
    assert without_time(resumed.recorder.steps) == without_time(tail)


# What stops a run


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_nan_stops_the_run(tiny_model, rows, make, tmp_path, logging_steps):
    """TRL: nanmean hides a NaN row while its gradient is NaN. No checkpoint is written of it.

    test_finite.py has what else can be wrong, and what is said of it."""
    trainer = make(
        tiny_model(1),
        tiny_model(2),
        rows(20),
        batch=4,
        logging_steps=logging_steps,
        save_strategy="steps",
        save_steps=2,
    )

    class Break(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:  # the embedding of a token that few rows have
                with torch.no_grad():
                    model.model.embed_tokens.weight[4] = math.nan

    trainer.add_callback(Break())
    stopped = r"hidden states: row 11 \(micro-batch 0, position 3\); parameters: \S+embed_tokens"
    with pytest.raises(FloatingPointError, match=f"^step 3: not finite: {stopped}"):
        trainer.train()
    saved = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert saved == ["checkpoint-2"]


def test_a_nan_at_the_very_end(tiny_model, rows, make):
    model = tiny_model(1)
    trainer = make(model, tiny_model(2), rows(8), logging_steps=100)
    with torch.no_grad():
        model.model.embed_tokens.weight[4] = math.nan
    with pytest.raises(FloatingPointError, match="^step 1: not finite: hidden states"):
        trainer.train()


def test_an_infinite_gradient_norm(tiny_model, rows, make, monkeypatch):
    trainer = make(tiny_model(1), tiny_model(2), rows(8))
    monkeypatch.setattr(trainer, "_get_grad_norm", lambda *a, **k: math.inf)
    with pytest.raises(FloatingPointError, match="step 1: grad_norm is inf"):
        trainer.train()


# Evaluation


@pytest.mark.parametrize("point", ["mismatched", "matched", "zero", "0.4"])
def test_evaluation_is_that_of_all_examples_as_one_batch(models, rows, examples, make, point):
    """TRL rotates an evaluation batch by the training batch size."""
    policy, ref = models()
    number = float(point) if point == "0.4" else point
    batch = examples(rows(10))
    with torch.no_grad():
        want = oracle(policy, ref, batch, StepKTOConfig(reference_point=number)).item()
    for size, packed in ((10, False), (3, True), (1, False), (4, False)):
        trainer = make(
            policy,
            ref,
            rows(8),
            eval_dataset=rows(10),
            per_device_eval_batch_size=size,
            padding_free=packed,
            reference_point=point,
            **EXACT,
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-9)


def test_datasets_to_evaluate(models, rows, examples, make, tmp_path):
    policy, ref = models()
    loss = lambda part: oracle(policy, ref, examples(part), StepKTOConfig()).item()
    with torch.no_grad():
        of_5, of_3 = loss(rows(5)), loss(rows(9)[5:8])
    trainer = make(policy, ref, rows(8), eval_dataset={"a": rows(5), "b": rows(9)[5:8]}, **EXACT)
    found = trainer.evaluate()
    assert (found["eval_a_loss"], found["eval_b_loss"]) == pytest.approx((of_5, of_3), rel=1e-9)
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows(9)[5:8]))
    for given in (rows(9)[5:8], str(path)):
        assert trainer.evaluate(given)["eval_loss"] == pytest.approx(of_3, rel=1e-9)
    assert trainer.evaluate({"c": rows(5)})["eval_c_loss"] == pytest.approx(of_5, rel=1e-9)
    predicted = trainer.predict(rows(5))
    assert predicted.metrics["test_loss"] == pytest.approx(of_5, rel=1e-9)
    assert predicted.predictions is None and predicted.metrics["test_kl"] > 0
    with pytest.raises(ValueError, match="row 1: label: want true, false or null"):
        trainer.evaluate([rows(1)[0], {"prompt": "w1", "completion": "w2"}])


def test_evaluation_changes_nothing(tiny_model, rows, make):
    run = lambda **options: make(
        tiny_model(1, 0.1), tiny_model(2), rows(9), batch=4, num_train_epochs=2, **options
    )
    plain, watched = (
        run(),
        run(eval_dataset=rows(7), eval_strategy="steps", eval_steps=1, eval_on_start=True),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for trainer in (plain, watched):
            trainer.train()
    evaluated = [logs for logs in watched.recorder.logs if "eval_loss" in logs]
    assert len(evaluated) == 7 and evaluated[0]["eval_kl"] > 0
    names = {"eval_loss", "eval_kl", "eval_rewards/margins", "eval_step/rewards/chosen"}
    assert names <= evaluated[0].keys()
    one, other = plain.model.state_dict(), watched.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [x["loss"] for x in plain.recorder.steps] == [x["loss"] for x in watched.recorder.steps]


def test_the_best_model_is_loaded_by_its_margin(tiny_model, rows, make):
    trainer = make(
        tiny_model(1, 0.1),
        tiny_model(2),
        rows(8),
        eval_dataset=rows(8),
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        greater_is_better=True,
    )
    trainer.train()
    margins = [
        logs["eval_rewards/margins"] for logs in trainer.recorder.logs if "eval_loss" in logs
    ]
    assert trainer.state.best_metric == max(margins)
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(max(margins), rel=1e-6)


# Metrics


def test_metrics_by_trls_names(models, rows, examples, make):
    """Liger: metrics count ignored tokens. Two steps of two micro-batches behind one log line."""
    policy, ref = models()
    trainer = make(
        policy,
        ref,
        rows(16),
        batch=4,
        split=2,
        logging_steps=2,
        learning_rate=0.0,
        step_beta=0.3,
        step_weight=0.5,
        undesirable_weight=1.5,
        **EXACT,
    )
    trainer.train()
    [logs] = trainer.recorder.steps
    config = trainer.args.step_kto_config()
    losses, z = [], []
    for part in (rows(16)[:8], rows(16)[8:]):
        batch = examples(part)
        with torch.no_grad():
            losses.append(oracle(policy, ref, batch, config).item())
            z.append(oracle_baseline(policy, ref, batch, config))
    tokens = tokens_of(examples(rows(16)))
    layout = layout_of(tokens)
    with torch.no_grad():
        logps = materialised_logps(policy, tokens)
        ratio = logps - materialised_logps(ref, tokens)
    r, logp = reference.segment_sums(ratio, layout), reference.segment_sums(logps, layout)
    labels = (layout.outcome_label, layout.step_label)
    want = {
        "loss": sum(losses) / 2,
        "kl": sum(float(each.outcome) for each in z) / 2,
        "step/kl": sum(float(each.step) for each in z) / 2,
        "learning_rate": 0.0,
    }
    for level, prefix in enumerate(("", "step/")):
        beta = (0.1, 0.3)[level]
        for name, value in (("chosen", 1), ("rejected", 0)):
            side = labels[level] == value
            want[f"{prefix}rewards/{name}"] = beta * r[level][side].mean().item()
            want[f"{prefix}logps/{name}"] = logp[level][side].mean().item()
        rewards = [want[f"{prefix}rewards/{name}"] for name in ("chosen", "rejected")]
        want[f"{prefix}rewards/margins"] = rewards[0] - rewards[1]
    in_labelled = [
        label >= 0 or (s >= 0 and step_labels[s] >= 0)
        for label, steps, step_labels in ((t.outcome_label, t.steps, t.step_labels) for t in tokens)
        for s in steps
    ]
    want["tokens"] = sum(in_labelled)
    assert 0 < want["tokens"] < len(in_labelled)
    for name, value in want.items():
        assert logs[name] == pytest.approx(value, rel=1e-6), name
    others = {"grad_norm", "epoch", "outcome_loss", "step/loss", "saturated", "step/saturated"}
    assert logs.keys() == want.keys() | others
    # sums of both steps, each with reference points of its own
    assert logs["outcome_loss"] + 0.5 * logs["step/loss"] == pytest.approx(logs["loss"], rel=0.02)


def test_metrics_are_computed_once_a_log_step(tiny_model, rows, make, monkeypatch):
    trainer = make(tiny_model(1), tiny_model(2), rows(8), batch=2, split=2, max_steps=2)
    waits, original = [], StepKTOMetrics.compute
    monkeypatch.setattr(StepKTOMetrics, "compute", lambda self: waits.append(1) or original(self))
    trainer.train()
    assert len(waits) == len(trainer.recorder.steps) == 2


def test_a_second_run_does_not_log_the_firsts_metrics(tiny_model, rows, make):
    trainer = make(tiny_model(1), tiny_model(2), rows(12), batch=4, logging_steps=2)
    for _ in range(2):
        trainer.train()
    first, second = trainer.recorder.steps
    assert first["tokens"] == second["tokens"] > 0


# Data


CHAT = (
    "{% for message in messages %}{{ 'w0 ' if message['role'] == 'user' else 'w1 ' }}"
    "{{ message['content'] }} \n {% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
)


def test_conversations_keep_their_steps(tiny_model, tokenizer, make):
    pytest.importorskip("jinja2")
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT
    prompt = [{"role": "user", "content": "w5 w6"}]
    stepwise = {"completions": ["w7 w8 ", "w9"], "labels": [True, False], "label": False}
    answer = [{"role": "assistant", "content": "w7 w8 w9"}]
    rows = [
        {"prompt": prompt, **stepwise},
        {"prompt": prompt, "completion": "w7 w8 w9", "label": True},
        {"prompt": prompt, "completion": answer, "label": True},  # TRL's
    ]
    trainer = make(tiny_model(), rows=rows, processing_class=chat)
    ours, text, trl = trainer.train_dataset.examples
    ids = chat.convert_tokens_to_ids("w0 w5 w6 \n w1 w7 w8 w9".split(" ")) + [1]
    assert ours.input_ids == text.input_ids == ids and ours.completion_start == 5
    assert ours.step_ids == [-1] * 5 + [0, 0, 1, -1] and ours.step_labels == [1, 0]
    assert trl == text and text.step_labels == []
    trainer.train()
    assert trainer.recorder.steps[0]["loss"] == 1.0


def test_datasets_of_the_library(tiny_model, rows, make, tmp_path):
    datasets = pytest.importorskip("datasets")
    plain = [r for r in rows(12) if "completions" in r]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in plain))
    sources = (plain, datasets.Dataset.from_list(plain), str(path), path)
    found = [make(tiny_model(), rows=source).train_dataset.examples for source in sources]
    assert all(examples == found[0] for examples in found) and len(found[0]) == len(plain)


MALFORMED = {
    "label": ({"label": "yes"}, "row 1: label: want true, false or null, got 'yes'"),
    "steps": ({"labels": [True]}, "row 1: labels: want one label for each of 2 completions"),
    "step": ({"labels": [True, 1.0]}, r"row 1: labels\[1\]: want true, false or null"),
    "text": ({"completions": ["w1", 2]}, r"row 1: completions\[1\]: want a string"),
    "prompt": ({"prompt": None}, "row 1: prompt: want a string or a list of messages"),
    "messages": ({"prompt": [{"role": "user", "content": "w1"}]}, "example 1: prompt: want a str"),
    "empty": ({"prompt": ""}, "example 1: prompt: want at least one token"),
}
ROLE = [{"role": "user", "content": "w1"}]
for _name, _completion in {
    "role": ROLE,
    "turns": ROLE + [{"role": "assistant", "content": "w1"}],
    "keys": [{"role": "assistant", "text": "w1"}],
    "none": [],
}.items():
    _change = {"completion": _completion, "completions": None, "labels": None}
    MALFORMED[f"completion, {_name}"] = (_change, "row 1: completion")


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_are_named(tiny_model, row, make, name):
    change, message = MALFORMED[name]
    good = row(1)
    assert len(good["completions"]) == 2
    with pytest.raises(ValueError, match=message):
        make(tiny_model(), rows=[row(0), good | change])


def test_too_long_rows(tiny_model, rows, make, step, models, examples, tokenizer):
    with pytest.raises(ValueError, match="example 1: max_length: want room for a completion"):
        make(tiny_model(), rows=rows(8), max_length=4)
    policy, ref = models()
    short = [encode_example(parse_row(r, ""), tokenizer, max_length=8) for r in rows(8)]
    assert (
        max(len(e.input_ids) for e in short) == 8 < max(len(e.input_ids) for e in examples(rows(8)))
    )
    # long prompts meet long completions, so that pairs are cut as well: see test_collator.py
    config = StepKTOConfig(reference_point="zero")
    want = gradients_of(policy, oracle(policy, ref, short, config))
    found = step(policy, ref, rows(8), max_length=8, reference_point="zero", **EXACT)
    assert_exact(found.gradients[0], want)


# Arguments


def test_wrong_arguments(tiny_model, rows, make, monkeypatch):
    model = tiny_model()
    with pytest.raises(ValueError, match="^ref_model: want another module than model"):
        make(model, model, rows(2))
    assert all(p.requires_grad for p in model.parameters())
    wrong = {
        "beta": (0.0, "beta: want a finite number in"),
        "step_reduction": ("max", "step_reduction: want one of"),
        "reference_point": ("moon", "reference_point: want one of"),
        "ratio_clip": ([1.0], "ratio_clip: want a pair"),
        "max_length": (1, "max_length: want"),
        "memory_budget": (-1, "memory_budget: want"),
        "gradient_bound": (-1.0, "gradient_bound: want"),
        "backend": ("magic", "backend: want one of"),
        "pad_to_multiple_of": (0, "pad_to_multiple_of: want"),
        "remove_unused_columns": (True, "remove_unused_columns: want False"),
        "label_smoothing_factor": (0.1, "label_smoothing_factor: want 0"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            make(model, None, rows(2), **{name: value})
    with pytest.raises(ValueError, match="^args: want"):
        StepKTOTrainer(model, args=transformers.TrainingArguments(use_cpu=True))
    with pytest.raises(ValueError, match="^model: want a module, a name or a folder"):
        make(None, None, rows(2))
    with pytest.raises(ValueError, match="^model: want a PreTrainedModel with an lm_head"):
        make(torch.nn.Linear(2, 2), None, rows(2))
    with pytest.raises(ValueError, match="^dataset: want at least one example"):
        make(model, None, [])
    with pytest.raises(ValueError, match="tokenizer: want a fast tokenizer"):
        make(model, None, rows(2), processing_class=object())


def test_liger_keeps_to_the_layers(monkeypatch):
    arguments = lambda **options: StepKTOArguments(use_liger_kernel=True, use_cpu=True, **options)
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert arguments().liger_kernel_config == off
    for given in ({"rms_norm": False}, '{"rms_norm": false}'):
        assert arguments(liger_kernel_config=given).liger_kernel_config == {"rms_norm": False} | off
    with pytest.raises(ValueError, match="^liger_kernel_config: want layers, no losses"):
        arguments(liger_kernel_config={"fused_linear_cross_entropy": True})


def test_arguments_from_a_command_line(tmp_path):
    parser = transformers.HfArgumentParser(StepKTOArguments)
    [args] = parser.parse_args_into_dataclasses(
        f"--output_dir {tmp_path} --use_cpu --beta 0.2 --step_beta 0.4 --reference_point 0.25 "
        "--ratio_clip -1.5 2 --length_normalize --step_reduction sum --precompute_ref_log_probs "
        "--max_length 77 --padding_free --add_eos False --memory_budget 1000000 "
        '--model_init_kwargs {"dtype":"float32"} --gradient_bound 1e-9 --backend torch'.split()
    )
    assert args.step_kto_config() == StepKTOConfig(
        beta=0.2,
        step_beta=0.4,
        reference_point=0.25,
        ratio_clip=(-1.5, 2.0),
        length_normalize=True,
        step_reduction="sum",
    )
    assert args.model_init_kwargs == {"dtype": "float32"}
    assert (args.max_length, args.add_eos, args.padding_free) == (77, False, True)
    assert (args.memory_budget, args.gradient_bound, args.backend) == (1000000, 1e-9, "torch")
    [default] = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu"])
    assert default.step_kto_config() == StepKTOConfig()
    assert default.learning_rate == 1e-6 and not default.remove_unused_columns
    json.dumps(args.to_sanitized_dict())
    [again] = parser.parse_json_file(str(written(tmp_path, args)))
    assert again.step_kto_config() == args.step_kto_config()


def written(folder, args):
    path = folder / "args.json"
    names = [*LOSS_OPTIONS, "model_init_kwargs", "max_length", "use_cpu"]
    values = {name: getattr(args, name) for name in names}
    path.write_text(json.dumps(values | {"output_dir": str(folder)}))
    return path


# Saving


def test_saved_models_know_nothing_of_the_routing(tiny_model, tokenizer, rows, make, tmp_path):
    folder = tmp_path / "start"
    tiny_model(1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = make(
        str(folder),
        rows=rows(8),
        processing_class=None,
        save_strategy="steps",
        save_steps=1,
        model_init_kwargs={"attn_implementation": "eager"},
    )
    assert trainer.model.config._attn_implementation == "eager"
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    checkpoint = tmp_path / "out" / "checkpoint-1"
    for saved in (tmp_path / "saved", checkpoint):
        weights = load_file(saved / "model.safetensors")
        assert weights.keys() == load_file(folder / "model.safetensors").keys()
        again = transformers.AutoModelForCausalLM.from_pretrained(saved)
        assert "forward" not in again.__dict__ and "forward" not in again.lm_head.__dict__
        trained = trainer.model.state_dict()
        assert all(torch.equal(trained[name], value) for name, value in again.state_dict().items())
        before, after = (json.loads((f / "config.json").read_text()) for f in (folder, saved))
        assert {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} <= {
            "use_cache"
        }
        assert transformers.AutoTokenizer.from_pretrained(saved)("w1 w2")["input_ids"] == [5, 6]
    assert b"head_fn" not in b"".join(p.read_bytes() for p in (tmp_path / "saved").iterdir())
    assert {p.name for p in checkpoint.iterdir()} >= {"step_kto.pt", "optimizer.pt", "scheduler.pt"}
    assert not any(p.name == "step_kto.pt" for p in (tmp_path / "saved").iterdir())


def test_a_saved_adapter_loads_into_the_base_model(tiny_model, rows, make, tmp_path, lora_config):
    peft = pytest.importorskip("peft")
    trainer = make(tiny_model(2), rows=rows(8), batch=4, peft_config=lora_config())
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    # of a head with an adapter, PEFT saves the weight beneath too
    adapters = [name for name in names if not name.endswith("lm_head.base_layer.weight")]
    assert len(adapters) == 2 * 3 and all("lora_" in name for name in adapters)
    again = peft.PeftModel.from_pretrained(tiny_model(2), tmp_path / "adapter")
    ids = torch.randint(3, 24, (2, 7))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
