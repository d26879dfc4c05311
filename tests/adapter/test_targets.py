# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trl_cuma.adapter.layer import CuMALinear
from trl_cuma.testing import tiny_model


def mixture_of_experts(kind: str) -> PreTrainedModel:
    """Transformers keeps the experts' weights of a layer in two tensors, `gate_up_proj` and `down_proj`."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(kind, vocab_size=50, num_experts=4, num_local_experts=4, **sizes, **heads)
    return AutoModelForCausalLM.from_config(config)


def adapted(model: torch.nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, CuMALinear)}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        *((name, {"q_proj", "v_proj"}) for name in ("llama", "qwen3", "mistral", "gemma", "phi", "opt")),
        ("gpt2", {"c_attn"}),
        ("bloom", {"query_key_value"}),
    ],
)
def test_the_published_targets_are_the_default(make_config, architecture: str, expected: set) -> None:
    model = get_peft_model(tiny_model(architecture, vocab_size=50), make_config(target_modules=None))
    assert adapted(model) == expected


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen2_moe"])
def test_the_attention_of_a_mixture_of_experts_is_the_default(make_config, make_batch, kind: str) -> None:
    model = get_peft_model(mixture_of_experts(kind), make_config(target_modules=None))
    assert adapted(model) == {"q_proj", "v_proj"}
    batch = make_batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_router_losses_do_not_replace_those_of_the_base(make_config, make_batch) -> None:
    model, batch = get_peft_model(mixture_of_experts("qwen3_moe"), make_config(target_modules=None)), make_batch()
    arguments = batch | {"labels": batch["input_ids"], "output_router_losses": "local"}
    with pytest.raises(ValueError, match="`aux_loss` of its own.*output_router_logits=False"):
        model(**arguments, output_router_logits=True)
    assert 0.9 < model(**arguments)["aux_loss"] < 4  # and what was refused left nothing behind


def test_phi3_has_one_fused_attention_layer(make_config) -> None:
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    model = get_peft_model(AutoModelForCausalLM.from_config(config), make_config(target_modules=None))
    assert adapted(model) == {"qkv_proj"}


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["gate_up_proj"],
            "cannot target `model.layers.0.mlp.experts.gate_up_proj`: it is a bare tensor of .*Experts",
        ),
        (["q_proj", "down_proj"], "cannot target `model.layers.0.mlp.experts.down_proj`: it is a bare tensor"),
        (r".*experts\.down_proj", "cannot target `model.layers.0.mlp.experts.down_proj`"),
        (["q_proj", "experts"], "cannot target `model.layers.0.mlp.experts` of type .*Experts"),
        (["gate"], "cannot target `model.layers.0.mlp.gate` of type .*Router"),
        (["q_proj", "embed_tokens"], "cannot target `model.embed_tokens` of type Embedding"),
        (["q_proj", "gate_proj"], "`target_modules` names 'gate_proj', which no module of the base has"),
    ],
)
def test_what_cannot_be_targeted_is_named_with_what_can(make_config, make_batch, kind, targets, message) -> None:
    base, batch = mixture_of_experts(kind).eval(), make_batch()
    del batch["demographic_embeds"]
    expected = base(**batch).logits
    with pytest.raises(ValueError, match=message + r".* Target its linear layers \(k_proj, o_proj, q_proj, v_proj\)"):
        get_peft_model(base, make_config(target_modules=targets))
    assert not adapted(base)
    assert torch.equal(base(**batch).logits, expected)


def test_the_layers_of_an_adapted_model_are_named_as_those_of_its_base(make_model, make_config) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"Target its linear layers \(down_proj, gate_proj, k_proj, o_proj, q_proj, "):
        model.add_adapter("other", make_config(target_modules=["q_proj", "no_such"]))
    assert list(model.peft_config) == ["default"]


def test_all_linear_leaves_the_fused_experts_of_a_mixture_alone(make_config) -> None:
    model = get_peft_model(mixture_of_experts("qwen3_moe"), make_config(target_modules="all-linear"))
    assert adapted(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("second", [False, True])
def test_a_router_group_of_modules_that_are_not_targeted_is_refused(make_model, make_config, second: bool) -> None:
    groups = {"router_groups": [["q_proj", "k_proj", "v_prj"]]}
    message = "`router_groups` names 'k_proj', 'v_prj'.* it finds q_proj, v_proj"
    if not second:
        with pytest.raises(ValueError, match=message):
            make_model(**groups)
        return
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", make_config(**groups, demographic_projection=3))
    assert list(model.peft_config) == ["default"]
    assert not any(".other." in name for name, _ in model.named_parameters())
    model.add_adapter("other", make_config())  # and another try succeeds
