"""What solutions are sampled from: a model in this process, vLLM, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from stepkto_kernels import checks
from stepkto_kernels.training.data import Prompt, prompt_text
from stepkto_kernels.training.sampling import Completion, generate_from_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Completion", "Sampler", "TransformersSampler", "VLLMSampler", "prompt_ids"]


class Sampler(Protocol):
    """Gives `num_samples` completions of each prompt, in order.

    Tokens come from the model's own distribution at `temperature`, 0 is greedy. The same arguments
    give the same completions as far as the backend keeps to its seeds.
    """

    def __call__(
        self, prompts: Sequence[Prompt], *, num_samples: int, temperature: float, seed: int
    ) -> list[list[Completion]]: ...


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a prompt as encode_example has them in training.

    Messages go through the chat template, which has its own special tokens; of text, the special
    tokens that the tokenizer puts behind it are left out.

    Raises:
        ValueError: no tokens, or messages that the chat template does not take.
    """
    text = prompt_text(prompt, tokenizer)
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
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model)
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
            [_completion(one) for one in each.outputs] * (num_samples // copies) for each in outputs
        ]


def _completion(output: Any) -> Completion:
    """Of a vllm.CompletionOutput."""
    return Completion(output.text, "length" if output.finish_reason == "length" else "stop")
