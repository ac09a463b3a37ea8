"""Sample completions from a causal language model: batched, seeded, without side effects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from stepkto_kernels import checks

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Args:
        text: without special tokens.
        finish: "stop" where it ended by itself, "length" where it was cut off.
    """

    text: str
    finish: str


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
) -> list[list[str]]:
    """Sample `num_samples` completions of each prompt.

    Tokens come from the model's own distribution at `temperature`: top-k, top-p and penalties of
    the model's generation config are set aside, its end-of-sequence ids are kept. The global random
    state and the training mode of every module are as before when it returns. The same arguments
    on the same machine give the same samples; `batch_size` is one of them.

    Args:
        model: any transformers causal language model; on the device where it should run.
        tokenizer: its tokenizer. A missing pad token is replaced by the end-of-sequence token.
        prompts: texts, tokenized with special tokens; none may tokenize to nothing.
        num_samples: completions of a prompt, >= 1.
        temperature: >= 0; 0 is greedy decoding (and then all samples of a prompt are the same).
        max_new_tokens: longest completion in tokens, the end of sequence included, >= 1.
        batch_size: sequences that are decoded at the same time, >= 1.
        seed: of this call's random numbers.
    Returns:
        For each prompt, in order, its `num_samples` completions: text without special tokens.
    Raises:
        ValueError: an argument outside of the above.
    """
    checks.require(not isinstance(prompts, str), "prompts", "a sequence of strings", "one string")
    prompt_ids = tokenizer(list(prompts))["input_ids"] if prompts else []
    for i, ids in enumerate(prompt_ids):
        checks.require(len(ids) > 0, f"prompts[{i}]", "at least one token", repr(prompts[i]))
    found = generate_from_ids(
        model,
        tokenizer,
        prompt_ids,
        num_samples=num_samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    return [[completion.text for completion in each] for each in found]


def generate_from_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
) -> list[list[Completion]]:
    """As `generate`, of prompts that are token ids, each at least one; tells how each ended.

    Raises:
        ValueError: an argument outside of those of `generate`.
    """
    for name, value in (
        ("num_samples", num_samples),
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        checks.require(is_count, name, "an int >= 1", value)
    checks.number("temperature", temperature, low=0)
    for i, ids in enumerate(prompt_ids):
        checks.require(len(ids) > 0, f"prompt_ids[{i}]", "at least one token", ids)
    if not prompt_ids:
        return []

    copies = 1 if temperature == 0 else num_samples
    # Prompts of a like length share a batch, so that little is padding.
    by_length = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    rows = [i for i in by_length for _ in range(copies)]
    options = _generation_options(model, tokenizer, temperature, max_new_tokens)
    completions: list[list[Completion]] = [[] for _ in prompt_ids]
    with _eval_mode(model), _own_generation_config(model), _own_rng(model.device, seed):
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            found = _decode_batch(model, tokenizer, [prompt_ids[i] for i in batch], options)
            for i, completion in zip(batch, found, strict=True):
                completions[i].append(completion)
    return [found * (num_samples // copies) for found in completions]


def _decode_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    options: GenerationConfig,
) -> list[Completion]:
    input_ids, attention_mask = _pad_left(prompt_ids, options.pad_token_id)
    with torch.no_grad():
        # PreTrainedModel itself has no `generate`; every causal language model has.
        output = cast(Any, model).generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=options,
        )  # (B, T + new)
    new_ids = output[:, input_ids.shape[1] :].tolist()
    texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    eos_id: Any = options.eos_token_id
    ends = set(eos_id) if isinstance(eos_id, list) else {eos_id}
    finishes = ["length" if ends.isdisjoint(ids) else "stop" for ids in new_ids]
    return list(map(Completion, texts, finishes))


def _pad_left(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, longest row) int64; rows end together."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids, mask


def _generation_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    max_new_tokens: int,
) -> GenerationConfig:
    from transformers import GenerationConfig

    # Chat models list several end-of-sequence ids there; the tokenizer knows only one.
    eos_id = getattr(model.generation_config, "eos_token_id", None)
    eos_id = tokenizer.eos_token_id if eos_id is None else eos_id
    checks.require(eos_id is not None, "tokenizer", "one with an end-of-sequence token", "none")
    first_eos = eos_id[0] if isinstance(eos_id, list) else eos_id
    pad_id = first_eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    return GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        use_cache=True,
        **sampling,
    )


@contextmanager
def _own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Empty the model's generation config, which `generate` would fill unset options from."""
    from transformers import GenerationConfig

    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    # Module by module: a frozen part may have been in eval mode inside a model in training mode.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _own_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generators of the CPU and of `device`; put back their state afterwards."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which seeds every accelerator too.
            torch.default_generator.manual_seed(seed)
            yield
        return
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    with torch.random.fork_rng(devices=[index], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        with module.device(index):
            module.manual_seed(seed)
            yield
