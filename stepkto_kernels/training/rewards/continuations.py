"""What MonteCarlo draws from: a model in this process, or a server, goes on from a prefix."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stepkto_kernels import checks
from stepkto_kernels.training.data import Prompt
from stepkto_kernels.training.openai_client import ChatClient, ChatError
from stepkto_kernels.training.rewards.base import Solution
from stepkto_kernels.training.sampler import prompt_ids
from stepkto_kernels.training.sampling import generate_from_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Text = str | None
# Of one text and not of the endpoint: too long, or turned down by a filter.
TURNED_DOWN = (400, 403, 413, 422)
# vLLM's and SGLang's words for: go on with the last message instead of answering it.
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


class ModelContinuations:
    """Continuations by a transformers model, in batches.

    What it goes on from are the tokens of prompt and prefix as in training: the prompt through the
    chat template with the generation prompt, then the prefix as it was written. Templates that are
    given the prefix as a message may take whitespace off it. A prefix that leaves no room for a
    whole continuation has none. The same call on the same machine gives the same texts.

    Args:
        model: a causal language model, on the device where it should run.
        tokenizer: its tokenizer, with a chat template where prompts are messages.
        temperature: > 0.
        max_new_tokens: of a continuation, >= 1; one that is cut off there is judged as it stands.
        batch_size: sequences that are decoded at the same time, >= 1.
        max_length: tokens that the model takes, >= 1; None for what its config says.
        seed: of the random numbers.
    Raises:
        ValueError: an argument outside of the above; when called: a solution without a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        batch_size: int = 32,
        max_length: int | None = None,
        seed: int = 0,
    ):
        check_drawing(temperature, max_new_tokens, seed)
        checks.integer("batch_size", batch_size, low=1)
        if max_length is None:
            max_length = getattr(model.config, "max_position_embeddings", None) or 2**31
        checks.integer("max_length", max_length, low=1)
        self.model, self.tokenizer = model, tokenizer
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed

    def __call__(self, prefixes: Sequence[Solution], number: int, drawn: int) -> list[list[Text]]:
        texts: list[list[Text]] = [[None] * number for _ in prefixes]
        ids = [prompt_ids(prompt_of(each), self.tokenizer, each.text) for each in prefixes]
        room = self.max_length - self.max_new_tokens
        fitting = [i for i, each in enumerate(ids) if len(each) <= room]
        found = generate_from_ids(
            self.model,
            self.tokenizer,
            [ids[i] for i in fitting],
            num_samples=number,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=derive_seed(self.seed, drawn, prefixes),
        )
        for i, completions in zip(fitting, found, strict=True):
            texts[i] = [completion.text for completion in completions]
        return texts


class ServerContinuations:
    """Continuations by a server that speaks OpenAI's protocol, one a request.

    After a text prompt, prompt and prefix go to the completions endpoint. After messages, the
    prefix is the last message, of the assistant, at the chat endpoint, with vLLM's fields
    `continue_final_message` and `add_generation_prompt`. The server must know them and give back
    the new text alone: one that begins a new answer instead lets every step look right.

    A request that is turned down, as for its length, gives no text; where all of a call are, that
    is an error. Every request has a seed of its own; whether it is kept to is up to the server.

    Args:
        client: of the server; not open, it is opened for every call.
        temperature: > 0.
        max_new_tokens: of a continuation, >= 1; one that is cut off there is judged as it stands.
        seed: of the random numbers.
        body: further fields of every request; null leaves a field of ours out, such as seed.
    Raises:
        ValueError: an argument outside of the above; when called: a solution without a prompt.
        ChatError: when called: a request failed for good.
    """

    def __init__(
        self,
        client: ChatClient,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        seed: int = 0,
        body: Mapping[str, Any] | None = None,
    ):
        check_drawing(temperature, max_new_tokens, seed)
        self.client, self.temperature, self.max_new_tokens = client, temperature, max_new_tokens
        self.seed, self.body = seed, dict(body or {})

    def __call__(self, prefixes: Sequence[Solution], number: int, drawn: int) -> list[list[Text]]:
        for each in prefixes:  # before anything is paid for
            prompt_of(each)
        return asyncio.run(self._all(prefixes, number, drawn))

    async def _all(self, prefixes: Sequence[Solution], number: int, drawn: int) -> list[list[Text]]:
        async with self.client:
            requests = [
                self._ask(each, derive_seed(self.seed, drawn + k, [each]))
                for each in prefixes
                for k in range(number)
            ]
            found = await asyncio.gather(*requests, return_exceptions=True)
        texts: list[Text] = []
        turned_down = []
        for result in found:
            if isinstance(result, ChatError) and result.status in TURNED_DOWN:
                turned_down.append(result)
                texts.append(None)
            elif isinstance(result, BaseException):
                raise result
            else:
                texts.append(result)
        if turned_down and len(turned_down) == len(found):
            raise turned_down[0]
        return [texts[i : i + number] for i in range(0, len(texts), number)]

    async def _ask(self, prefix: Solution, seed: int) -> str:
        fields: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": 1.0,
            "max_tokens": self.max_new_tokens,
            "seed": seed % 2**31,
        }
        prompt = prompt_of(prefix)
        if isinstance(prompt, str):
            prompt += prefix.text
        else:
            prompt = (*prompt, {"role": "assistant", "content": prefix.text})
            fields |= CONTINUE
        fields |= self.body
        body = {name: value for name, value in fields.items() if value is not None}
        found = await self.client.choices(prompt, **body)
        checks.require(len(found) == 1, "choices of the server", "one", len(found))
        return found[0].text


def check_drawing(temperature: float, max_new_tokens: int, seed: int) -> None:
    """Raises ValueError: rollouts at temperature 0 would all be the same."""
    checks.number("temperature", temperature, low=0, low_open=True)
    checks.integer("max_new_tokens", max_new_tokens, low=1)
    checks.integer("seed", seed, low=0)


def prompt_of(prefix: Solution) -> Prompt:
    """What the solution's model was given; raises ValueError where that is not known."""
    if prefix.prompt is None:
        raise ValueError(f"problem {prefix.problem.id!r}: prompt: want one to go on from, got none")
    return prefix.prompt


def derive_seed(seed: int, drawn: int, prefixes: Sequence[Solution]) -> int:
    """Another for every call: of what is gone on from, and of how often that was done before."""
    parts = [seed, drawn, [[each.problem.id, each.prompt, each.text] for each in prefixes]]
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1
