"""Samplers and the file they fill: prompts, chunks, kills, ranks."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepkto_kernels.training.data import StepKTOExample, encode_example
from stepkto_kernels.training.prompts import make_prompt
from stepkto_kernels.training.records import Problem, RowWriter, read_samples
from stepkto_kernels.training.rewards.arithmetic import build_tokenizer
from stepkto_kernels.training.sample import chunk_seed, sample_into
from stepkto_kernels.training.sampler import (
    Completion,
    TransformersSampler,
    VLLMSampler,
    prompt_ids,
)
from stepkto_kernels.training.sampling import generate, generate_from_ids
from stepkto_kernels.training.steps import split_solution
from stepkto_kernels.training.tiny import make_model

TEMPLATE = "{% for m in messages %}A {{ m.content }}\n{% endfor %}Answer:"
PROBLEMS = [Problem(f"p{i}", f"A clock with 7 hours shows {i}.", str(i)) for i in range(7)]
DRAW = {"num_samples": 3, "temperature": 1.0, "seed": 5, "chunk": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def sampler(model, tokenizer):
    return TransformersSampler(model, tokenizer, max_new_tokens=6, batch_size=4)


def fill(path, sampler, problems=PROBLEMS, stop=None, **options):
    """sample_into a file, up to `stop` chunks; gives what it yielded."""
    with RowWriter(path) as writer:
        seen = []
        for rows in sample_into(writer, problems, sampler, **(DRAW | options)):
            seen.append(rows)
            if len(seen) == stop:
                break
    return seen


class Fake:
    """Completions that name their prompt, sample and seed; remembers the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, *, num_samples, temperature, seed):
        self.calls.append((tuple(prompts), seed))
        return [
            [Completion(f"{p} {k} {seed}", "stop") for k in range(num_samples)] for p in prompts
        ]


def test_finish_says_how_a_completion_ended(model, tokenizer, monkeypatch):
    pad, eos, word, other = tokenizer.pad_token_id, tokenizer.eos_token_id, 9, 10
    monkeypatch.setattr(model.generation_config, "eos_token_id", [eos, other])
    new = [[word, eos, pad], [word, word, word], [word, word, other], [other, pad, pad]]

    def decode(input_ids, **_):
        return torch.cat([input_ids, torch.tensor(new)], dim=1)

    monkeypatch.setattr(model, "generate", decode)
    ((*found,),) = generate_from_ids(model, tokenizer, [[word]], num_samples=4)
    assert [each.finish for each in found] == ["stop", "length", "stop", "stop"]
    texts = [tokenizer.decode(ids) for ids in ([word], [word] * 3, [word, word, other], [other])]
    assert [each.text for each in found] == texts


def test_finish_where_padding_is_the_end_token(model, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    ids = [prompt_ids(p.problem, tokenizer) for p in PROBLEMS]
    (cut,) = generate_from_ids(model, tokenizer, ids[:1], temperature=0, max_new_tokens=3)[0]
    assert cut.finish == "length" and cut.text


def test_text_prompts_sample_as_generate_does(sampler, model, tokenizer):
    prompts = [p.problem for p in PROBLEMS]
    found = sampler(prompts, num_samples=2, temperature=1.0, seed=3)
    options = {"num_samples": 2, "max_new_tokens": 6, "batch_size": 4, "seed": 3}
    assert [[c.text for c in each] for each in found] == generate(
        model, tokenizer, prompts, **options
    )


def test_prompts_have_the_tokens_of_training(tokenizer):
    """Of text and of messages, with special tokens around."""
    bos, eos = tokenizer.unk_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", bos), ("<eos>", eos)]
    )
    tokenizer.chat_template = TEMPLATE
    for prompt in ("A clock with 7\n", ({"role": "user", "content": "clock with 7"},)):
        encoded = encode_example(StepKTOExample(prompt, ("3 + 4",), (True,), True), tokenizer)
        ids = prompt_ids(prompt, tokenizer)
        assert ids == encoded.input_ids[: encoded.completion_start]
        assert (ids[0] == bos) == isinstance(prompt, str) and ids[-1] != eos
    assert prompt_ids("", tokenizer) == [bos, eos]


def test_messages_need_a_template(sampler):
    messages = ({"role": "user", "content": "clock"},)
    with pytest.raises(ValueError, match="prompt: want a string, as the tokenizer has no template"):
        sampler([messages], num_samples=1, temperature=1.0, seed=0)


def test_step_prompt_asks_for_what_is_cut_into_steps():
    problem = Problem("a", "What is {1 + 1}?\n", "2")
    (message,) = make_prompt(problem, "steps")
    assert message["role"] == "user" and message["content"].endswith("What is {1 + 1}?")
    for part in ("## Step 1: ", "The final answer is: $\\boxed{"):
        assert part in message["content"]
    text = make_prompt(problem, "steps-text")
    assert text.startswith(message["content"]) and text.endswith("\n")
    assert make_prompt(problem) == "What is {1 + 1}?\n"
    split = split_solution(
        "## Step 1: Add\n1+1\n\n## Step 2: b\nc\nThe final answer is: $\\boxed{2}$"
    )
    assert len(split.reasoning_steps) == 2 and split.answer == "2"
    with pytest.raises(ValueError, match="prompt: want one of 'plain', 'steps'"):
        make_prompt(problem, "other")


def test_samples_do_not_depend_on_where_a_run_was_killed(tmp_path, sampler):
    whole = tmp_path / "whole.jsonl"
    assert fill(whole, sampler) == [6, 12, 18, 21]
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len({json.loads(line)["completion"] for line in lines}) > 3
    for rows, torn in ((0, 9), (4, 0), (6, 5), (13, 30), (20, 1)):
        path = tmp_path / f"killed_{rows}.jsonl"
        path.write_bytes(b"".join(lines[:rows]) + lines[rows][:torn])
        fill(path, sampler)
        assert path.read_bytes() == whole.read_bytes()
    assert fill(whole, sampler) == []
    assert [s.key for s in read_samples(whole)] == [(p.id, k) for p in PROBLEMS for k in range(3)]


def test_a_chunk_is_on_disk_before_the_next_is_asked_for(tmp_path):
    fake, path = Fake(), tmp_path / "s.jsonl"
    fill(path, fake, stop=2)
    assert len(fake.calls) == 2 and len(read_samples(path)) == 12
    fill(path, fake)
    assert [len(prompts) for prompts, _ in fake.calls] == [2, 2, 2, 1]  # nothing twice
    assert len({seed for _, seed in fake.calls}) == 4


def test_seeds_of_chunks():
    assert chunk_seed(0, ["a", "b"]) == chunk_seed(0, ["a", "b"]) < 2**32
    others = [chunk_seed(1, ["a", "b"]), chunk_seed(0, ["b", "a"]), chunk_seed(0, ["ab"])]
    assert len({chunk_seed(0, ["a", "b"]), *others}) == 4


def test_ranks_share_the_chunks_and_sample_the_same(tmp_path):
    fill(tmp_path / "one", Fake())
    parts = []
    for rank in range(3):
        fill(tmp_path / f"rank{rank}", Fake(), rank=rank, world_size=3)
        parts.append(read_samples(tmp_path / f"rank{rank}"))
    key = lambda sample: sample.key
    assert sorted(sum(parts, []), key=key) == sorted(read_samples(tmp_path / "one"), key=key)
    fake = Fake()
    done = {s.key for s in parts[0] + parts[2]}
    fill(tmp_path / "rest", fake, done=done)
    assert read_samples(tmp_path / "rest") == parts[1] and len(fake.calls) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"problems": PROBLEMS[1:]}, "row 1: want a sample of one of the problems"),
        ({"num_samples": 2}, "row 3: want a sample of one of the problems"),
        ({"prompt": "steps-text"}, "row 1: want the steps-text prompt of its problem"),
        ({"problems": [PROBLEMS[0]] * 2}, "problems: want ids of their own"),
        ({"temperature": -1}, "temperature: want"),
        ({"rank": 1}, "rank: want less than world_size = 1, got 1"),
        ({"chunk": 0}, "chunk: want an int >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, message):
    path = tmp_path / "s.jsonl"
    fill(path, Fake(), stop=1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        fill(path, Fake(), **options)
    assert path.read_bytes() == before


def test_a_sampler_that_gives_too_few_is_refused(tmp_path):
    short = lambda prompts, **_: [[Completion("x", "stop")]] * len(prompts)
    with pytest.raises(ValueError, match="sampler: want 3 completions of each of 2 prompts"):
        fill(tmp_path / "s.jsonl", short)


@pytest.fixture
def vllm(monkeypatch):
    """The names of vLLM that are used, as in its documentation; remembers what it is given."""
    module = types.ModuleType("vllm")
    allowed = {"n", "temperature", "top_p", "top_k", "max_tokens", "seed"}

    class SamplingParams:
        def __init__(self, **given):
            assert set(given) <= allowed
            vars(self).update(given)

    class LLM:
        def __init__(self, model, **options):
            self.model, self.options, module.made = model, options, self

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
            assert len(prompts) == len(sampling_params)
            self.seen = list(zip(prompts, sampling_params, strict=True))
            named = lambda **fields: types.SimpleNamespace(**fields)
            return [
                named(
                    outputs=[
                        named(
                            text=f"{prompt['prompt_token_ids'][-1]} {k}",
                            finish_reason="length" if k else "stop",
                        )
                        for k in range(parameters.n)
                    ]
                )
                for prompt, parameters in self.seen
            ]

    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_vllm(vllm, tokenizer):
    tokenizer.chat_template = TEMPLATE
    sampler = VLLMSampler("some", max_new_tokens=9, tokenizer=tokenizer, tensor_parallel_size=2)
    assert (vllm.made.model, vllm.made.options) == ("some", {"tensor_parallel_size": 2})
    prompts = ["A clock", ({"role": "user", "content": "clock"},)]
    found = sampler(prompts, num_samples=2, temperature=0.7, seed=5)
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    assert [prompt for prompt, _ in vllm.made.seen] == [{"prompt_token_ids": row} for row in ids]
    assert found == [
        [Completion(f"{row[-1]} 0", "stop"), Completion(f"{row[-1]} 1", "length")] for row in ids
    ]
    one, two = (parameters for _, parameters in vllm.made.seen)
    assert (one.n, one.temperature, one.max_tokens, one.top_p, one.top_k) == (2, 0.7, 9, 1.0, -1)
    assert abs(one.seed - two.seed) >= 2  # no sample of one prompt has the seed of another's
    greedy = sampler(prompts, num_samples=2, temperature=0, seed=5)
    assert vllm.made.seen[0][1].n == 1 and greedy[0][0] == greedy[0][1]


def test_vllm_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="want vllm installed"):
        VLLMSampler("some", tokenizer=build_tokenizer())
