"""The lm_head of a transformers model, called on hidden states and never for logits.

`route_head` gives a causal language model an argument more, `head_fn`: with it the backbone runs,
and the model returns what head_fn makes of the hidden states and of the head's parameters, from
inside the head module's own forward. So whatever wraps model or head (DistributedDataParallel,
FSDP, hooks that move or gather parameters) sees an ordinary forward pass. Without it the model is
what it was.

Letters: B sequences, T length, H hidden size, V vocabulary, r rank of an adapter.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from stepkto_kernels import checks
from stepkto_kernels.linear_logprobs import linear_logprobs

# What head_fn is called with: hidden (..., H), weight (V, H), bias (V,) or None, all in one dtype.
HeadFunction = Callable[[Tensor, Tensor, Tensor | None], Any]
LoRA = tuple[nn.Linear, nn.Linear, float, nn.Module]  # A, B, scaling, dropout
CHECKED_TOKENS = 8


class HeadOutput(NamedTuple):
    """What a routed model returns.

    value: what head_fn made; aux_loss: () the load-balancing loss of a mixture of experts, weighted
    as its config says, None where there is none or it is switched off.
    """

    value: Any
    aux_loss: Tensor | None


def logit_options(config: PretrainedConfig) -> dict[str, float | None]:
    """logit_scale and softcap that a model family applies to the lm_head's output.

    Read from the config of the (text) model: softcap of Gemma, RecurrentGemma, nanochat; factors of
    Cohere, Falcon-H1, HyperCLOVA X; divisors of Granite and MiniCPM3. `check_head` finds what this
    does not know.
    """
    config = config.get_text_config()
    read = lambda *names: next(filter(None, (getattr(config, name, None) for name in names)), None)
    scale = read("logit_scale", "lm_head_multiplier", "output_multiplier") or 1.0
    scaling = read("logits_scaling")
    if scaling:
        scale = scale * scaling if config.model_type == "hyperclovax" else scale / scaling
    softcap = read("final_logit_softcapping", "logits_soft_cap")
    return {"logit_scale": float(scale), "softcap": None if softcap is None else float(softcap)}


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, or the model itself.

    Raises:
        ValueError: it is no PreTrainedModel, or has no lm_head.
    """
    wrapper: Any = model
    inner: Any = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    want = "a PreTrainedModel with an lm_head, or a PEFT model of one"
    has_head = isinstance(inner, PreTrainedModel) and inner.get_output_embeddings() is not None
    checks.require(has_head, "model", want, type(model).__name__)
    return inner


def route_head(model: nn.Module) -> PreTrainedModel:
    """Let a model take `head_fn`, see above; a second call changes nothing.

    Returns:
        the causal language model that was changed, without PEFT's wrapper.
    Raises:
        ValueError: as `causal_lm`, or the head is of a kind that has no weight of its own.
    """
    inner = causal_lm(model)
    head: Any = inner.get_output_embeddings()
    # bound methods, which copy.deepcopy binds to the copy
    for module, forward in ((head, _head_forward), (inner, _model_forward)):
        if "_forward_before_routing" not in module.__dict__:
            module.__dict__["_forward_before_routing"] = module.forward
            module.forward = MethodType(forward, module)
    _plain_head(head)
    return inner


def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    head_fn = kwargs.pop("head_fn", None)
    if head_fn is None:
        return self._forward_before_routing(*args, **kwargs)
    for name in ("labels", "logits_to_keep", "return_dict", "use_cache"):
        kwargs.pop(name, None)  # PEFT passes on None for what was not given
    experts = _aux_loss_function(self)
    if experts is not None:
        kwargs["output_router_logits"] = True
    # where base_model_prefix names no module (Llama 4), base_model is the model itself
    backbone: Any = self.model if self.base_model is self else self.base_model
    outputs = backbone(*args, use_cache=False, return_dict=True, **kwargs)
    aux_loss = None
    if experts is not None:
        aux_loss = experts(outputs.router_logits, attention_mask=kwargs.get("attention_mask"))
    head: Any = self.get_output_embeddings()
    value = head(outputs.last_hidden_state, head_fn=head_fn)
    return HeadOutput(value, aux_loss)


def _head_forward(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    head_fn = kwargs.pop("head_fn", None)
    if head_fn is None:
        return self._forward_before_routing(hidden, *args, **kwargs)
    return head_fn(*head_parameters(self, hidden))


def _aux_loss_function(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """The weighted load-balancing loss of a mixture of experts, where its config asks for one."""
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    balance: Any = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    named = [getattr(model, n, None) for n in ("num_experts", "num_experts_per_tok")]
    coefficient = getattr(model, "router_aux_loss_coef", None)
    known = balance is not None and coefficient is not None and None not in named
    want = "False, as this model's load-balancing loss is not known"
    checks.require(known, "config.output_router_logits", want, True)

    def loss(router_logits: Any, attention_mask: Tensor | None) -> Tensor:
        return coefficient * balance(router_logits, *named, attention_mask)

    return loss


def head_parameters(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias with hidden @ weight.T + bias the head's output, in one dtype.

    Under autocast that is autocast's, as for any linear layer. LoRA on the head, with s its scale:
    hidden W^T + s (hidden A^T) B^T = [hidden, s hidden A^T] [W, B]^T, a head of hidden size H + r.

    Args:
        head: a linear layer, or PEFT's LoRA or modules_to_save of one.
        hidden: (..., H).
    Raises:
        ValueError: another kind of layer or adapter.
    """
    layer, adapters = _plain_head(head)
    weight, bias = layer.weight, layer.bias
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    hidden = hidden.to(dtype)
    columns, rows = [hidden], [weight.to(dtype)]
    for A, B, scaling, dropout in adapters:
        columns.append((A(dropout(hidden.to(A.weight.dtype))) * scaling).to(dtype))
        rows.append(B.weight.to(dtype))
        if B.bias is not None:
            bias = scaling * B.bias if bias is None else bias + scaling * B.bias
    if adapters:
        hidden, weight = torch.cat(columns, -1), torch.cat(rows, -1)
    else:
        weight = rows[0]
    return hidden, weight, None if bias is None else bias.to(dtype)


def _plain_head(head: Any) -> tuple[Any, list[LoRA]]:
    """The linear layer under PEFT's wrappers, and the active LoRAs on it."""
    adapters: list[LoRA] = []
    if hasattr(head, "modules_to_save"):  # PEFT's trained copy of the layer
        name = head.active_adapter
        name = name[0] if isinstance(name, (list, tuple)) else name
        trained = head.modules_to_save
        use = not head.disable_adapters and name in trained
        head = trained[name] if use else head.original_module
    elif hasattr(head, "base_layer"):
        adapters = _active_loras(head)
        head = head.get_base_layer()
    plain = isinstance(head, nn.Linear) or type(head).__name__ == "Linear"
    is_float = plain and head.weight.is_floating_point() and head.weight.ndim == 2
    want = "a linear layer with a floating-point weight, LoRA or modules_to_save on it at most"
    checks.require(is_float, "lm_head", want, type(head).__name__)
    return head, adapters


def _active_loras(layer: Any) -> list[LoRA]:
    is_lora = hasattr(layer, "lora_A")
    checks.require(is_lora, "lm_head", "LoRA if it has an adapter", type(layer).__name__)
    if layer.merged and layer.disable_adapters:
        layer.unmerge()
    if layer.merged or layer.disable_adapters:
        return []
    found = []
    for name in layer.active_adapters:
        if name in layer.lora_A:
            variant = getattr(layer, "lora_variant", {}).get(name)
            want = "plain LoRA on lm_head, which is linear in the hidden states"
            checks.require(variant is None, "peft_config", want, type(variant).__name__)
            parts = layer.lora_A[name], layer.lora_B[name]
            found.append((*parts, layer.scaling[name], layer.lora_dropout[name]))
    return found


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare a few log-probs through `route_head` with those of the model's own logits.

    A family that does something to its logits which logit_options does not know would train on a
    wrong loss; this refuses it. Runs the model twice on CHECKED_TOKENS tokens.

    Raises:
        ValueError: they differ by more than rounding in the model's dtype.
    """
    inner = route_head(model)
    embedding: Any = inner.get_input_embeddings()
    device = embedding.weight.device
    training = model.training
    model.eval()
    V = inner.config.get_text_config().vocab_size
    ids = torch.arange(1, 1 + CHECKED_TOKENS, device=device)[None] % V
    try:
        logits = model(input_ids=ids).logits[:, :-1].float()
        fn = functools.partial(
            _target_logps, target=ids[:, 1:], options=logit_options(inner.config)
        )
        ours = model(input_ids=ids, head_fn=fn).value
    finally:
        model.train(training)
    theirs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    # the model rounds its logits to its dtype, and a GEMM may sum in another order
    eps = max(torch.finfo(inner.dtype).eps, 2.0**-20)
    bound = 16 * eps * max(float(logits.abs().max()), 1.0)
    error = float((ours - theirs).abs().max())
    want = f"a model whose log-probs are those of {logit_options(inner.config)} on its lm_head"
    got = f"{type(inner).__name__}, off by {error:.3g} nats (rounding: {bound:.3g})"
    checks.require(error <= bound, "model", want, got)


def _target_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, target: Tensor, options: dict[str, Any]
) -> Tensor:
    return linear_logprobs(hidden[:, :-1], weight, target, bias, **options)
