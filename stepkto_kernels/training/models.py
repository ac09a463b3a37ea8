"""Loading and preparing the models that are trained or referred to."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from stepkto_kernels import checks
from stepkto_kernels.training.arguments import StepKTOArguments


def load_model(model: Any, args: StepKTOArguments) -> nn.Module:
    """A causal language model by its name or folder; a module is taken as it is."""
    if isinstance(model, nn.Module):
        return model
    checks.require(isinstance(model, str), "model", "a module, a name or a folder", repr(model))
    options: Any = args.model_init_kwargs or {}  # parsed by TrainingArguments, if it was text
    return AutoModelForCausalLM.from_pretrained(model, **options)


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
