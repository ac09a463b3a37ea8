"""integrations/transformers.py: head_fn on hidden states, of many families and with adapters."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
from stepkto_kernels import linear_logprobs  # noqa: E402
from stepkto_kernels.integrations.transformers import (  # noqa: E402
    HeadOutput,
    causal_lm,
    check_head,
    check_packing,
    head_parameters,
    logit_options,
    route_head,
)

FP64 = torch.float64
MOE = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.3}
# name: (family, options, what logit_options reads; None: nothing)
FAMILIES = {
    "llama": ("Llama", {}, None),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}, None),
    "gemma2": (
        "Gemma2",
        {"final_logit_softcapping": 0.5, "head_dim": 8, "tie_word_embeddings": True},
        {"softcap": 0.5},
    ),
    "gemma3": ("Gemma3Text", {"final_logit_softcapping": 0.7, "head_dim": 8}, {"softcap": 0.7}),
    "cohere": ("Cohere", {"logit_scale": 0.25}, {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", {"logit_scale": 2.5}, {"logit_scale": 2.5}),
    "granite": ("Granite", {"logits_scaling": 4.0}, {"logit_scale": 0.25}),
    "falcon h1": (
        "FalconH1",
        {
            **{"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "head_dim": 8},
            **{"mamba_d_state": 8, "mamba_d_head": 8},
        },
        {"logit_scale": 0.3},
    ),
    "hyperclova x": ("HyperCLOVAX", {"logits_scaling": 0.5}, {"logit_scale": 0.5}),
    "minicpm3": (
        "MiniCPM3",
        {
            **{"dim_model_base": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8},
            **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
        },
        {"logit_scale": 0.25},
    ),
    "recurrent gemma": (
        "RecurrentGemma",
        {
            **{"logits_soft_cap": 0.5, "lru_width": 16, "head_dim": 8},
            **{"block_types": ("recurrent", "attention"), "attention_window_size": 16},
        },
        {"softcap": 0.5},
    ),
    "nanochat": ("NanoChat", {"final_logit_softcapping": 0.7}, {"softcap": 0.7}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "tie_word_embeddings": True}, None),
    "opt": ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 8}, None),
    "llama4": (
        "Llama4Text",
        {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 32},
        None,
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **MOE}, None),
    "qwen3 moe": (
        "Qwen3Moe",
        {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, **MOE},
        None,
    ),
    "mixtral, no aux loss": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, None),
    "phi, which has a bias": ("Phi", {}, None),
    "gpt-j, which has a bias": (
        "GPTJ",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
        None,
    ),
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 24, (2, 7))


def logps_of(options: dict, target: torch.Tensor):
    """A head_fn: log-probs of the next tokens by the reference, in whatever dtype."""
    return lambda hidden, weight, bias: linear_logprobs(
        hidden[:, :-1], weight, target, bias, backend="reference", **options
    )


def materialised(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict, want: dict) -> None:
    """Two ways to the same fp64 gradients: a few roundings of the largest of them."""
    assert got.keys() == want.keys()
    bound = 1e-11 * max(float(w.abs().max()) for w in want.values())
    for name in want:
        assert float((got[name] - want[name]).abs().max()) <= bound, name


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_model(tiny_model, ids, name):
    family, options, read = FAMILIES[name]
    model = tiny_model(family=family, **options).double()
    want_options = {"logit_scale": 1.0, "softcap": None} | (read or {})
    assert logit_options(model.config) == pytest.approx(want_options)
    upstream = torch.randn(2, 6, dtype=FP64)
    mask = torch.ones_like(ids)

    out = model(input_ids=ids, attention_mask=mask, labels=ids)
    want = materialised(out.logits, ids)
    aux = None
    if options.get("output_router_logits"):  # in the loss of labels, with its weight
        aux = MOE["router_aux_loss_coef"] * out.aux_loss
        torch.testing.assert_close(out.loss, aux - want.mean(), check_dtype=False)
    want_gradients = gradients(model, (want * upstream).sum() + (0 if aux is None else aux))

    check_head(model, "reference")
    got = model(input_ids=ids, attention_mask=mask, head_fn=logps_of(want_options, ids[:, 1:]))
    assert isinstance(got, HeadOutput)
    torch.testing.assert_close(got.value, want, rtol=0, atol=1e-12)
    loss = (got.value * upstream).sum()
    if aux is None:
        assert got.aux_loss is None
    else:
        assert aux > 0.1
        assert torch.equal(got.aux_loss, aux)
        loss = loss + got.aux_loss
    assert_same(gradients(model, loss), want_gradients)
    # and without head_fn it is the model that it was
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, out.logits)


def test_the_lm_head_is_never_run_for_logits(tiny_model, ids, monkeypatch):
    model = tiny_model()
    route_head(model)

    def refuse(*args, **kwargs):
        raise AssertionError("logits were computed")

    monkeypatch.setattr(F, "linear", lambda x, w, b=None: refuse() if w is head else x @ w.T)
    head = model.lm_head.weight
    assert model(input_ids=ids, head_fn=lambda h, w, b: w).value is head
    with pytest.raises(AssertionError, match="logits were computed"):
        model(input_ids=ids)


@pytest.mark.parametrize("wrong", ["scaled", "cut", "own forward"])
def test_a_model_that_does_something_else_to_its_logits_is_refused(tiny_model, wrong):
    model = tiny_model()
    if wrong == "own forward":
        head = model.lm_head
        head.forward = lambda hidden: F.linear(hidden, head.weight) * 1.01
    else:
        forward = model.forward

        def changed(*args, **kwargs):
            out = forward(*args, **kwargs)
            out.logits = out.logits * 1.01 if wrong == "scaled" else out.logits.clamp(max=0.1)
            return out

        model.forward = changed
    with pytest.raises(ValueError, match=r"^model: want a model whose log-probs .* off by [\d.]+"):
        check_head(model)
    check_head(tiny_model())


def test_a_wrong_config_is_refused(tiny_model):
    model = tiny_model(family="Granite", logits_scaling=4.0)
    model.config.logits_scaling = 4.01  # the forward pass reads model.config as well
    check_head(model)
    model = tiny_model(family="Cohere", logit_scale=0.25)
    model.config.logit_scale = 0.26  # Cohere keeps its own copy
    with pytest.raises(ValueError, match="off by"):
        check_head(model)


def test_load_balancing_that_is_not_known_is_refused(tiny_model, ids):
    model = tiny_model(family="Mixtral", num_local_experts=4, **MOE)
    route_head(model)
    del model.num_experts
    with pytest.raises(ValueError, match="^config.output_router_logits: want False"):
        model(input_ids=ids, head_fn=lambda h, w, b: h)


# Adapters on the lm_head


def with_lora(model, *, dropout: float = 0.0, names=("default",), seed: int = 5, **options):
    peft = pytest.importorskip("peft")
    targets = options.pop("target_modules", ["q_proj", "lm_head"])
    options = {"task_type": "CAUSAL_LM", "target_modules": targets} | options
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, **options)
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def assert_routed(model, ids, seed: int = 3) -> dict[str, torch.Tensor]:
    """Log-probs and gradients through head_fn equal those of the logits; the gradients."""
    options = logit_options(causal_lm(model).config)
    upstream = torch.randn(2, 6, dtype=FP64)
    torch.manual_seed(seed)
    want = materialised(model(input_ids=ids).logits, ids)
    want_gradients = gradients(model, (want * upstream).sum()) if want.requires_grad else {}
    route_head(model)
    torch.manual_seed(seed)
    got = model(input_ids=ids, head_fn=logps_of(options, ids[:, 1:])).value
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    if want_gradients:
        assert_same(gradients(model, (got * upstream).sum()), want_gradients)
    return want_gradients


@pytest.mark.parametrize("family", ["Llama", "Cohere", "Phi"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_on_the_head(tiny_model, ids, family, dropout):
    options = {"logit_scale": 0.25} if family == "Cohere" else {}
    model = with_lora(tiny_model(family=family, **options), dropout=dropout)
    model.train(dropout > 0)
    found = assert_routed(model, ids)
    heads = [name for name in found if "lm_head.lora_" in name]
    assert len(heads) == 2
    assert all(found[name].abs().max() > 1e-3 for name in heads)
    check_head(model, "reference")
    assert model.training == (dropout > 0)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_lora_with_a_bias_and_rank_stabilised_scale(tiny_model, ids):
    model = with_lora(tiny_model(), lora_bias=True, use_rslora=True)
    assert any("lora_B" in n and n.endswith("bias") for n, _ in model.named_parameters())
    assert_routed(model, ids)


def test_several_adapters_merged_and_disabled(tiny_model, ids):
    plain = tiny_model().double()
    logits = plain(input_ids=ids).logits.clone()
    model = with_lora(copy.deepcopy(plain), names=("one", "two"))
    model.base_model.set_adapter(["one", "two"])
    both = model(input_ids=ids).logits
    assert_routed(model, ids)
    model.set_adapter("two")
    assert (model(input_ids=ids).logits - both).abs().max() > 0.01
    assert_routed(model, ids)

    options = logit_options(plain.config)
    head_fn = logps_of(options, ids[:, 1:])
    want = materialised(logits, ids)
    with model.disable_adapter():
        got = model(input_ids=ids, head_fn=head_fn).value
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)

    model.merge_adapter()
    assert causal_lm(model).lm_head.merged
    assert_routed(model, ids)
    with model.disable_adapter():  # takes the merged adapter out, as PEFT does
        got = model(input_ids=ids, head_fn=head_fn).value
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_trained_copy_of_the_head(tiny_model, ids):
    plain = tiny_model().double()
    want = materialised(plain(input_ids=ids).logits, ids).detach()
    model = with_lora(plain, target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = assert_routed(model, ids)
    assert any("lm_head.modules_to_save" in name for name in found)
    check_head(model, "reference")
    head_fn = logps_of(logit_options(plain.config), ids[:, 1:])
    with model.disable_adapter():
        got = model(input_ids=ids, head_fn=head_fn).value
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_peft_without_a_task_type(tiny_model, ids):
    """Its wrapper then hands on other arguments."""
    assert_routed(with_lora(tiny_model(), task_type=None), ids)


def test_lora_in_fp32_on_a_bf16_model(tiny_model, ids):
    peft = pytest.importorskip("peft")
    model = tiny_model().bfloat16()
    config = peft.LoraConfig(r=4, target_modules=["lm_head"])
    model = peft.get_peft_model(model, config)
    torch.nn.init.normal_(causal_lm(model).lm_head.lora_B["default"].weight)
    assert causal_lm(model).lm_head.lora_A["default"].weight.dtype == torch.float32
    check_head(model)
    route_head(model)
    seen = model(input_ids=ids, head_fn=lambda *parameters: parameters).value
    assert [x.dtype for x in seen[:2]] == [torch.bfloat16] * 2
    assert [x.shape[-1] for x in seen[:2]] == [16 + 4] * 2


def test_adapters_and_heads_of_other_kinds_are_refused(tiny_model):
    peft = pytest.importorskip("peft")
    dora = with_lora(tiny_model(), use_dora=True)
    with pytest.raises(ValueError, match="^peft_config: want plain LoRA on lm_head, .*Dora"):
        route_head(dora)
    loha = peft.get_peft_model(tiny_model(), peft.LoHaConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="^lm_head: want LoRA if it has an adapter"):
        route_head(loha)
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        virtual = peft.get_peft_model(tiny_model(), config)
        with pytest.raises(ValueError, match="^peft_config: want an adapter without virtual tok"):
            route_head(virtual)
        assert "_forward_before_routing" not in causal_lm(virtual).__dict__

    quantised = tiny_model()
    quantised.lm_head.weight = torch.nn.Parameter(
        quantised.lm_head.weight.to(torch.int8), requires_grad=False
    )
    odd = tiny_model()
    odd.lm_head = torch.nn.Sequential(odd.lm_head)
    for model in (quantised, odd):
        with pytest.raises(ValueError, match="^lm_head: want a linear layer with a floating-point"):
            route_head(model)
    for model in (torch.nn.Linear(2, 2), tiny_model().model):
        with pytest.raises(ValueError, match="^model: want a PreTrainedModel with an lm_head"):
            route_head(model)


# What else is done with a model


def test_copies_and_second_calls(tiny_model, ids):
    model = tiny_model()
    route_head(model)
    first = model.forward
    route_head(model)
    assert model.forward == first
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
        twin.model.norm.weight.mul_(3)
    weight = lambda m: m(input_ids=ids, head_fn=lambda h, w, b: w).value
    assert weight(twin) is twin.lm_head.weight
    assert weight(model) is model.lm_head.weight
    hidden = lambda m: m(input_ids=ids, head_fn=lambda h, w, b: h).value
    torch.testing.assert_close(hidden(twin), 3 * hidden(model))


def test_generate_is_what_it_was(tiny_model):
    """generate() reads the signature of forward: masks, positions and which logits it needs."""
    model, routed = tiny_model(), tiny_model()
    route_head(routed)
    padded = torch.tensor([[0, 0, 0, 7, 9], [3, 8, 5, 11, 4]])  # without a mask: taken from pads
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    want = model.generate(padded, return_dict_in_generate=True, **options)
    calls = []
    forward = routed.lm_head.forward
    routed.lm_head.forward = lambda hidden: calls.append(hidden.shape[1]) or forward(hidden)
    got = routed.generate(padded, return_dict_in_generate=True, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(g, w) for g, w in zip(got.logits, want.logits, strict=True))
    assert calls == [1] * 5, "logits of the last token only"
    alone = model.generate(padded[:1, 3:], **options)
    assert torch.equal(want.sequences[:1, 5:], alone[:, 2:]), "pads matter to this model"


def test_autocast(tiny_model, ids):
    model = tiny_model()
    route_head(model)
    parameters = lambda: model(input_ids=ids, head_fn=lambda *values: values).value
    assert parameters()[0].dtype == parameters()[1].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        hidden, weight, bias = parameters()
        assert hidden.dtype == weight.dtype == torch.bfloat16 and bias is None
        check_head(model)
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, F.linear(hidden, weight))


def test_head_parameters_of_a_plain_layer():
    layer = torch.nn.Linear(3, 5)
    hidden = torch.randn(2, 3)
    got = head_parameters(layer, hidden)
    assert got[1] is layer.weight and got[2] is layer.bias and torch.equal(got[0], hidden)


PACKS = ("Llama", "Gemma2", "Phi", "GPT2", "Mixtral")
RUNS_ON = ("falcon h1", "recurrent gemma", "opt")


def test_packing_is_checked(tiny_model):
    named = {family: options for family, options, _ in FAMILIES.values()}
    for family in PACKS:
        check_packing(tiny_model(family=family, **named[family]))
    for name in RUNS_ON:
        family, options, _ = FAMILIES[name]
        with pytest.raises(ValueError, match=r"honours position_ids.* off by [\d.]+ nats"):
            check_packing(tiny_model(family=family, **options))
    bloom = tiny_model(family="Bloom", n_layer=2, n_head=2)
    with pytest.raises(ValueError, match=re.escape("BloomForCausalLM, which takes none")):
        check_packing(bloom)
