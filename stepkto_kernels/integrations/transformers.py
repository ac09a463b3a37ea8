"""The lm_head of a transformers model, called on hidden states and never for logits.

`route_head` gives a causal language model an argument more, `head_fn`: with it the backbone runs,
and the model returns what head_fn makes of the hidden states and of the head's parameters, from
inside the head module's own forward. So whatever wraps model or head (DistributedDataParallel,
FSDP, hooks that move or gather parameters) sees an ordinary forward pass. Without it the model is
what it was.

Letters: B sequences, T length, H hidden size, V vocabulary, r rank of an adapter.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
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
        ValueError: as `causal_lm`, the head is of a kind that has no weight of its own, or PEFT
            puts virtual tokens in front of the text.
    """
    inner = causal_lm(model)
    peft_config = getattr(model, "active_peft_config", None)
    virtual = getattr(peft_config, "is_prompt_learning", False)
    want = "an adapter without virtual tokens, as LoRA"
    checks.require(not virtual, "peft_config", want, type(peft_config).__name__)
    head: Any = inner.get_output_embeddings()
    _plain_head(head)
    for module, forward in ((head, _head_forward), (inner, _model_forward)):
        if "_forward_before_routing" not in module.__dict__:
            module.__dict__["_forward_before_routing"] = module.forward
            module.forward = _method(module, forward)
    return inner


def _method(module: Any, forward: Callable[..., Any]) -> MethodType:
    """`forward` bound to the module, which copy.deepcopy binds to the copy.

    With the signature of the module's own: generate() looks there for what it can pass.
    """

    def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    routed.__signature__ = inspect.signature(type(module).forward)  # type: ignore[attr-defined]
    return MethodType(routed, module)


def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    head_fn = kwargs.pop("head_fn", None)
    if head_fn is None:
        return self._forward_before_routing(*args, **kwargs)
    ours = ("labels", "logits_to_keep", "use_cache", "return_dict")
    # PEFT passes on None for what it was not given
    kwargs = {k: v for k, v in kwargs.items() if v is not None and k not in ours}
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
    dtype = _compute_dtype(weight)
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
        active = [] if head.disable_adapters else head.active_adapters
        trained = [head.modules_to_save[name] for name in active if name in head.modules_to_save]
        head = trained[0] if trained else head.original_module
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
def check_head(model: nn.Module, backend: str = "auto") -> None:
    """Compare a few log-probs through `route_head` with those of the model's own logits.

    A family that does something to its logits which logit_options does not know would train on a
    wrong loss; this refuses it. Runs the model twice on CHECKED_TOKENS tokens.

    Raises:
        ValueError: they differ by more than rounding in the model's dtype.
    """
    inner = route_head(model)
    ids = _checked_ids(inner)
    logps = functools.partial(_checked_logps, model, inner, backend)
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        ours = logps(input_ids=ids)
    theirs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    bound = _rounding(inner, float(logits.abs().max()))
    error = float((ours - theirs).abs().max())
    want = f"a model whose log-probs are those of {logit_options(inner.config)} on its lm_head"
    got = f"{type(inner).__name__}, off by {error:.3g} nats (rounding: {bound:.3g})"
    checks.require(error <= bound, "model", want, got)


@torch.no_grad()
def check_packing(model: nn.Module, backend: str = "auto") -> None:
    """Compare log-probs of sequences laid end to end, position_ids starting again, with their own.

    State-space and linear-attention layers, and positions that a model counts by itself, run on
    from one sequence into the next: it would train on wrong log-probs.

    Raises:
        ValueError: they differ by more than rounding in the model's dtype, or the model takes no
            position_ids.
    """
    inner = route_head(model)
    takes = "position_ids" in inspect.signature(inner.forward).parameters
    want, name = "a model that honours position_ids with padding_free", type(inner).__name__
    checks.require(takes, "model", want, f"{name}, which takes none")
    ids = _checked_ids(inner)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    logps = functools.partial(_checked_logps, model, inner, backend)
    with evaluating(model):
        alone = logps(input_ids=ids, position_ids=positions)
        row = logps(input_ids=ids.repeat(1, 2), position_ids=positions.repeat(1, 2))
    error = float((row[:, -alone.shape[1] :] - alone).abs().max())
    bound = _rounding(inner, float(alone.abs().max()))
    got = f"{name}, off by {error:.3g} nats (rounding: {bound:.3g})"
    checks.require(error <= bound, "model", want, got)


def _checked_ids(inner: PreTrainedModel) -> Tensor:
    embedding: Any = inner.get_input_embeddings()
    ids = torch.arange(1, 1 + CHECKED_TOKENS, device=embedding.weight.device)
    return ids[None] % inner.config.get_text_config().vocab_size


def _checked_logps(
    model: nn.Module, inner: PreTrainedModel, backend: str, **inputs: Tensor
) -> Tensor:
    target = inputs["input_ids"][:, 1:]
    options: dict[str, Any] = {"backend": backend, **logit_options(inner.config)}

    def head_fn(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_logprobs(hidden[:, :-1], weight, target, bias, **options)

    return model(**inputs, head_fn=head_fn).value


def _rounding(inner: PreTrainedModel, largest: float) -> float:
    """What a log-prob may be off by, where logits of this size are rounded to the model's dtype."""
    head: Any = inner.get_output_embeddings()
    weight = _plain_head(head)[0].weight
    # a GEMM may sum in another order
    eps = max(torch.finfo(_compute_dtype(weight)).eps, 2.0**-20)
    return 16 * eps * max(largest, 1.0)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Of matrix products with it: autocast's, as for any linear layer, or its own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and back in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
