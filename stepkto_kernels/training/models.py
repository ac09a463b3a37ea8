"""Loading and preparing the models that are trained or referred to."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stepkto_kernels import checks
from stepkto_kernels.training.arguments import StepKTOArguments

if TYPE_CHECKING:
    from stepkto_kernels.training.iterate_config import SamplingConfig
    from stepkto_kernels.training.sampler import Sampler


# Where nothing is said, transformers asks on the terminal whether to run a model's code, and reads
# pickles where there are no safetensors.
SAFE = {"trust_remote_code": False, "use_safetensors": True}


def trusts_code(args: StepKTOArguments) -> bool:
    """Whether model_init_kwargs ask for the code that comes with a model, by name."""
    options: Any = args.model_init_kwargs or {}
    return options.get("trust_remote_code", False) is True


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's tokenizer; code that comes with it is refused unless asked for."""
    load: Any = AutoTokenizer.from_pretrained
    found: PreTrainedTokenizerBase = load(name, trust_remote_code=trust_remote_code)
    return found


def load_model(model: Any, args: StepKTOArguments) -> nn.Module:
    """A causal language model by its name or folder; a module is taken as it is.

    Raises:
        ValueError: no name and no module; options that would have pickles read.
        OSError: no such model, or none with safetensors.
    """
    if isinstance(model, nn.Module):
        return model
    checks.require(isinstance(model, str), "model", "a module, a name or a folder", repr(model))
    options: Any = args.model_init_kwargs or {}  # parsed by TrainingArguments, if it was text
    for name in ("use_safetensors", "weights_only"):
        value = options.get(name, True)
        checks.require(value is True, f"model_init_kwargs: {name}", "true", repr(value))
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(model, **SAFE | options)
    return loaded


def add_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """The model with a new PEFT adapter, everything else frozen."""
    from peft import PeftConfig, PeftModel, get_peft_model

    checks.instance("peft_config", peft_config, PeftConfig)
    is_peft = isinstance(model, PeftModel)
    checks.require(not is_peft, "peft_config", "None, as the model has an adapter", peft_config)
    return get_peft_model(model, peft_config)


def disable_dropout(model: nn.Module) -> None:
    """Every dropout layer, and what layers keep as a number and apply as a function."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def load_for_sampling(model: str, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """A causal language model by its name or folder, in eval mode.

    Args:
        device: auto takes a GPU where there is one.
        dtype: name of a torch dtype; auto takes the one it was saved in.
    Raises:
        ValueError: no such dtype, or weights that the folder does not have.
        OSError: no such model, or none with safetensors.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = dtype if dtype == "auto" else getattr(torch, dtype, None)
    is_dtype = wanted == "auto" or isinstance(wanted, torch.dtype)
    checks.require(is_dtype, "dtype", "auto or a torch dtype", repr(dtype))
    load: Any = AutoModelForCausalLM.from_pretrained
    loaded, info = load(model, dtype=wanted, output_loading_info=True, **SAFE)
    missing = sorted(info["missing_keys"])
    checks.require(not missing, f"model {model}", "all weights of it", f"none for {missing[:4]}")
    return loaded.to(device).eval()


@contextmanager
def sampling_model(settings: SamplingConfig, model: str) -> Iterator[Sampler]:
    """A sampler of a model by the backend that is asked for; its memory is given back at the end.

    Raises:
        ValueError: an argument does not fit.
        OSError: no such model.
        ImportError: vLLM is asked for and not installed.
    """
    from stepkto_kernels.training.sampler import TransformersSampler, VLLMSampler

    sampler: Any
    length = settings.max_new_tokens
    if settings.backend == "vllm":
        options: dict[str, Any] = {"dtype": settings.dtype} | settings.backend_options
        sampler, held = VLLMSampler(model, max_new_tokens=length, **options), "llm"
    else:
        sampler, held = (
            TransformersSampler(
                load_for_sampling(model, settings.device, settings.dtype),
                load_tokenizer(model),
                max_new_tokens=length,
                batch_size=settings.batch_size,
            ),
            "model",
        )
    try:
        yield sampler
    finally:
        delattr(sampler, held)  # the caller may still hold the sampler
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
