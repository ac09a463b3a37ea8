"""What solutions are sampled from: a model in this process, vLLM, or a server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from stepkto_kernels import checks
from stepkto_kernels.training.data import Prompt, prompt_text
from stepkto_kernels.training.openai_client import ChatClient, Choice
from stepkto_kernels.training.sampling import Completion, generate_from_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Completion",
    "Sampler",
    "ServerSampler",
    "TransformersSampler",
    "VLLMSampler",
    "prompt_ids",
]


class Sampler(Protocol):
    """Gives `num_samples` completions of each prompt, in order.

    Tokens come from the model's own distribution at `temperature`, 0 is greedy. The same arguments
    give the same completions as far as the backend keeps to its seeds.
    """

    def __call__(
        self, prompts: Sequence[Prompt], *, num_samples: int, temperature: float, seed: int
    ) -> list[list[Completion]]: ...


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, written: str = "") -> list[int]:
    """The tokens of a prompt as encode_example has them in training.

    Messages go through the chat template, which has its own special tokens; of text, the special
    tokens that the tokenizer puts behind it are left out.

    Args:
        prompt: text or messages.
        tokenizer: of the model.
        written: what the model has written so far, to go on from.
    Raises:
        ValueError: no tokens, or messages that the chat template does not take.
    """
    text = prompt_text(prompt, tokenizer) + written
    encoding = tokenizer(
        text, add_special_tokens=isinstance(prompt, str), return_special_tokens_mask=True
    )
    ids, special = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
    while not all(special) and special[-1]:
        ids.pop()
        special.pop()
    checks.require(bool(ids), "prompt", "at least one token", repr(prompt))
    return ids


class TransformersSampler:
    """Samples from a transformers model with a KV cache, in batches of prompts of a like length.

    The same call on the same machine gives the same completions.

    Args:
        model: a causal language model, on the device where it should run.
        tokenizer: its tokenizer, with a chat template where prompts are messages.
        max_new_tokens: of a completion, its end of sequence included, >= 1.
        batch_size: sequences that are decoded at the same time, >= 1.
    Raises:
        ValueError: an argument outside of the above.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int = 256,
        batch_size: int = 64,
    ):
        checks.integer("max_new_tokens", max_new_tokens, low=1)
        checks.integer("batch_size", batch_size, low=1)
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def __call__(
        self, prompts: Sequence[Prompt], *, num_samples: int, temperature: float, seed: int
    ) -> list[list[Completion]]:
        return generate_from_ids(
            self.model,
            self.tokenizer,
            [prompt_ids(prompt, self.tokenizer) for prompt in prompts],
            num_samples=num_samples,
            temperature=temperature,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=seed,
        )


class VLLMSampler:
    """Samples with vLLM, on one or several GPUs.

    Prompts are tokenized here, so that they are those of training. Every prompt has a seed of its
    own; vLLM's results may still depend on which requests share a batch.

    Args:
        model: folder or hub name.
        max_new_tokens: of a completion, >= 1.
        tokenizer: of the model; None loads it.
        options: of vllm.LLM, such as tensor_parallel_size, dtype or gpu_memory_utilization.
    Raises:
        ValueError: an argument outside of the above.
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        max_new_tokens: int = 256,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ):
        checks.integer("max_new_tokens", max_new_tokens, low=1)
        try:
            import vllm
        except ImportError as error:
            raise ImportError("want vllm installed for this sampler: pip install vllm") from error
        if tokenizer is None:
            from stepkto_kernels.training.models import load_tokenizer

            trusted = options.get("trust_remote_code", False) is True
            tokenizer = load_tokenizer(model, trusted)
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self._parameters = vllm.SamplingParams
        self.llm = vllm.LLM(model=model, **options)

    def __call__(
        self, prompts: Sequence[Prompt], *, num_samples: int, temperature: float, seed: int
    ) -> list[list[Completion]]:
        checks.integer("num_samples", num_samples, low=1)
        checks.number("temperature", temperature, low=0)
        if not prompts:
            return []
        copies = 1 if temperature == 0 else num_samples
        # with n > 1, vLLM's samples have the seeds seed, seed + 1, ...
        parameters = [
            self._parameters(
                n=copies,
                temperature=temperature,
                top_p=1.0,
                top_k=-1,
                max_tokens=self.max_new_tokens,
                seed=(seed + i * copies) % 2**63,
            )
            for i in range(len(prompts))
        ]
        ids = [{"prompt_token_ids": prompt_ids(prompt, self.tokenizer)} for prompt in prompts]
        outputs = self.llm.generate(ids, sampling_params=parameters, use_tqdm=False)
        return [
            [_completion(one.text, one.finish_reason) for one in each.outputs]
            * (num_samples // copies)
            for each in outputs
        ]


class ServerSampler:
    """Samples from a server that speaks OpenAI's protocol, such as vLLM's or transformers'.

    Messages go to its chat endpoint, text to its completions endpoint. Every request has a seed of
    its own; whether the same seed gives the same text is up to the server, as is the distribution:
    top_p is 1, other settings of the server stay unless `body` has them.

    Args:
        client: of the server; not open, it is opened for every call.
        max_new_tokens: of a completion, >= 1.
        per_request: completions that one request asks for, >= 1. More than 1 needs a server that
            knows the field n.
        body: further fields of every request; null leaves a field of ours out, such as seed.
    Raises:
        ValueError: an argument outside of the above; when called: the server gave another number
            of completions than asked for.
        ChatError: when called: a request failed for good.
    """

    def __init__(
        self,
        client: ChatClient,
        *,
        max_new_tokens: int = 256,
        per_request: int = 1,
        body: Mapping[str, Any] | None = None,
    ):
        checks.integer("max_new_tokens", max_new_tokens, low=1)
        checks.integer("per_request", per_request, low=1)
        self.client, self.per_request = client, per_request
        self.max_new_tokens, self.body = max_new_tokens, dict(body or {})

    def __call__(
        self, prompts: Sequence[Prompt], *, num_samples: int, temperature: float, seed: int
    ) -> list[list[Completion]]:
        checks.integer("num_samples", num_samples, low=1)
        checks.number("temperature", temperature, low=0)
        return asyncio.run(self._all(prompts, num_samples, temperature, seed))

    async def _all(
        self, prompts: Sequence[Prompt], num_samples: int, temperature: float, seed: int
    ) -> list[list[Completion]]:
        copies = 1 if temperature == 0 else num_samples
        sizes = [
            min(self.per_request, copies - first) for first in range(0, copies, self.per_request)
        ]
        async with self.client:
            requests = [
                self._ask(prompt, size, temperature, seed + i * copies + k)
                for i, prompt in enumerate(prompts)
                for k, size in enumerate(sizes)
            ]
            replies = iter(await asyncio.gather(*requests))
        return [
            [_completion(one.text, one.finish) for _ in sizes for one in next(replies)]
            * (num_samples // copies)
            for _ in prompts
        ]

    async def _ask(
        self, prompt: Prompt, number: int, temperature: float, seed: int
    ) -> list[Choice]:
        fields = {
            "temperature": temperature,
            "top_p": 1.0,
            "max_tokens": self.max_new_tokens,
            "seed": seed % 2**31,
            "n": number if self.per_request > 1 else None,
        } | self.body
        body = {name: value for name, value in fields.items() if value is not None}
        found = await self.client.choices(prompt, **body)
        checks.require(len(found) == number, "per_request", "as many completions", len(found))
        return found


def _completion(text: str, finish: str | None) -> Completion:
    """Of the word of vLLM and of OpenAI's protocol for how it ended.

    Halves of surrogate pairs, which JSON can spell and UTF-8 cannot, become question marks.
    """
    writable = text.encode(errors="replace").decode()
    return Completion(writable, "length" if finish == "length" else "stop")
