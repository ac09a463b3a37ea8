"""Batched sampling against transformers' own, one prompt at a time, and its distribution."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stepkto_kernels.training.rewards.arithmetic import build_tokenizer, make_problem
from stepkto_kernels.training.sampling import generate

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def prompts():
    """Of several lengths, not sorted by length."""
    rng = random.Random(0)
    return [make_problem(rng).text for _ in range(7)] + ["Step 1:", "A clock with 7"]


def make_model(tokenizer, family: str = "llama"):
    """Random weights, wide enough that the next token depends on the prompt; eval mode."""
    torch.manual_seed(0)
    shared = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "gpt2":  # learned positions: wrong position ids of padded rows would show
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, **shared)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, **shared)).eval()


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_equals_generate_one_by_one(tokenizer, prompts, family, batch_size):
    model = make_model(tokenizer, family)
    # Every eighth token ends a completion, so that they have different lengths.
    model.generation_config.eos_token_id = list(range(1, len(tokenizer), 8))
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS
        )  # (1, T + new)
        expected.append([tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)])
    options = {"max_new_tokens": NEW_TOKENS, "batch_size": batch_size}
    got = generate(model, tokenizer, prompts, temperature=0, **options)
    assert got == expected
    assert len({len(tokenizer(text)["input_ids"]) for (text,) in got}) > 2


def test_greedy_samples_are_copies(model, tokenizer, prompts):
    options = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
    once = generate(model, tokenizer, prompts, **options)
    assert generate(model, tokenizer, prompts, num_samples=3, **options) == [3 * t for t in once]


def test_samples_depend_on_the_seed_only(model, tokenizer, prompts):
    def draw(seed):
        return generate(
            model, tokenizer, prompts, num_samples=3, max_new_tokens=NEW_TOKENS, seed=seed
        )

    first = draw(1)
    torch.rand(5)  # the global generator plays no part
    assert draw(1) == first
    assert draw(2) != first
    assert [len(texts) for texts in first] == [3] * len(prompts)
    assert any(len(set(texts)) > 1 for texts in first)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_global_random_state_is_untouched(model, tokenizer, prompts, device):
    def states():
        of_device = [torch.cuda.get_rng_state()] if device == "cuda" else []
        return [torch.get_rng_state(), *of_device]

    model.to(device)
    before, python_state = states(), random.getstate()
    first = generate(model, tokenizer, prompts, max_new_tokens=3)
    assert all(map(torch.equal, states(), before))
    assert random.getstate() == python_state
    torch.rand(1, device=device)
    assert generate(model, tokenizer, prompts, max_new_tokens=3) == first


def test_state_comes_back_after_an_error(model, tokenizer, prompts, monkeypatch):
    model.train()
    kept, state = model.generation_config, torch.get_rng_state()

    def fail(**_):
        torch.rand(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, tokenizer, prompts)
    assert model.training and model.generation_config is kept
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_come_back_module_by_module(model, tokenizer, prompts):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    generate(model, tokenizer, prompts, max_new_tokens=2)
    assert [module.training for module in model.modules()] == before


def test_dropout_is_off(tokenizer, prompts):
    model = make_model(tokenizer, "gpt2")  # dropout 0.1 in training mode
    options = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
    expected = generate(model, tokenizer, prompts, **options)
    assert generate(model.train(), tokenizer, prompts, **options) == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_follow_the_models_distribution(model, tokenizer, temperature):
    """First tokens of 4000 samples, though the generation config asks for something else."""
    model.generation_config.top_k = 2
    model.generation_config.top_p = 0.1
    model.generation_config.repetition_penalty = 50.0
    prompt, number = "A clock with 7 hours shows 3.", 4000
    texts = generate(
        model,
        tokenizer,
        [prompt],
        num_samples=number,
        temperature=temperature,
        max_new_tokens=1,
        batch_size=number,
    )[0]
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    expected = torch.softmax(logits / temperature, dim=-1)
    counts = Counter(texts)
    assert len(counts) > 10
    for token, p in enumerate(expected.tolist()):
        text = tokenizer.decode([token])
        if not tokenizer.decode([token], skip_special_tokens=True):
            continue  # special tokens all decode to nothing
        deviation = (p * (1 - p) / number) ** 0.5
        assert abs(counts[text] / number - p) < 5 * deviation + 1e-3, text
    assert model.generation_config.top_k == 2


def test_pad_and_end_ids_from_several_places(model, tokenizer, prompts):
    """Any id of the generation config's list ends a completion; no pad token is no problem."""
    options = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
    (full,) = generate(model, tokenizer, prompts[:1], **options)[0]
    stop = tokenizer(full)["input_ids"][3]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    bare = build_tokenizer()
    bare.pad_token = None
    (cut,) = generate(model, bare, prompts[:1], **options)[0]
    assert full.startswith(cut) and len(cut) < len(full)


def test_no_prompts(model, tokenizer):
    assert generate(model, tokenizer, []) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "num_samples: want an int >= 1, got 0"),
        ({"batch_size": 1.5}, "batch_size: want an int >= 1, got 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens: want an int >= 1, got True"),
        ({"temperature": -1.0}, "temperature: want"),
        ({"temperature": float("nan")}, "temperature: want"),
        ({"prompts": "one string"}, "prompts: want a sequence of strings, got one string"),
        ({"prompts": ["A clock", ""]}, r"prompts\[1\]: want at least one token, got ''"),
    ],
)
def test_bad_arguments(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, **{"prompts": ["A clock"], **options})
