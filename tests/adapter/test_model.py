# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The life cycle of an adapter, through PEFT's own functions."""

import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Qwen3ForCausalLM

from trl_cuma import CuMAConfig, CuMAModel
from trl_cuma.adapter.layer import CuMALinear
from trl_cuma.testing import tiny_model


def base_model(architecture: str = "qwen3", **fields) -> nn.Module:
    return tiny_model(architecture, vocab_size=50, **fields)


def adapted(model: nn.Module, adapter: str = "default") -> set[str]:
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, CuMALinear) and adapter in module.cuma_experts
    }


# ---------------------------------------------------------------------- size
@pytest.mark.parametrize(("r", "parameters"), [(8, 125_209_152), (64, 339_905_088)])
def test_qwen3_8b_has_the_published_number_of_parameters(qwen3_8b: PreTrainedModel, r: int, parameters: int) -> None:
    """
    1.53 % and 4.15 % of Qwen3-8B in the paper. For a layer with input n = 4096 and output m: router
    256 (n + 1024 + 1) + 8 (256 + 1), experts 8 r (n + m); m = 4096 (q_proj) and 1024 (v_proj), 36 layers.
    """
    by_hand = 36 * sum(256 * (4096 + 1024 + 1) + 8 * 257 + 8 * r * (4096 + m) for m in (4096, 1024))
    assert by_hand == parameters
    model = get_peft_model(qwen3_8b, CuMAConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters()[0] == parameters


# ---------------------------------------------------------------------- saving and loading
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"demographic_projection": 3, "router_layers": 3},
        {"router_groups": [["q_proj", "k_proj", "v_proj"]], "target_modules": "all-linear", "share_a": True},
        {"routing": "demographic", "gate": "soft"},
        {"routing": "semantic", "router_layers": 1},
    ],
    ids=["joint", "projection", "groups", "demographic", "semantic"],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["default", "other"])
def test_an_adapter_loads_as_it_was_saved(
    make_model, make_batch, tmp_path, fields: dict, low_cpu_mem_usage: bool, name: str
) -> None:
    model, batch = make_model(**fields), make_batch(lengths=[6, 3])
    model.save_pretrained(tmp_path)
    assert not any("default" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = PeftModel.from_pretrained(
            base_model(), tmp_path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("name", ["1", "rest", "weight", "cuma_router"])
def test_an_adapter_may_have_the_name_of_a_part_of_itself(make_model, make_batch, tmp_path, name: str) -> None:
    model, batch = make_model(adapter_name=name, demographic_projection=3), make_batch()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / name, adapter_name="other").eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_auto_class_loads_base_and_adapter(make_batch, make_config, tmp_path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    base = Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, make_config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    batch = make_batch()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    assert loaded.generate(**batch, max_new_tokens=2, min_new_tokens=2).shape == (3, 8)


def test_modules_to_save_and_trainable_tokens_are_saved(make_model, make_batch, tmp_path) -> None:
    model = make_model(modules_to_save=["lm_head"], trainable_token_indices=[3, 4])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "cuma_" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = make_batch()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    with model.disable_adapter():
        assert (loaded(**batch).logits - model(**batch).logits).abs().max() > 0.1


# ---------------------------------------------------------------------- which modules
def test_targets_by_name_pattern_layer_and_exclusion(make_config) -> None:
    def targets(**fields) -> set[str]:
        return adapted(get_peft_model(base_model(), make_config(**fields)))

    def attention(layer: int, *names: str) -> set[str]:
        return {f"model.layers.{layer}.self_attn.{name}_proj" for name in names}

    assert targets() == attention(0, "q", "v") | attention(1, "q", "v")
    assert targets(target_modules=None) == attention(0, "q", "v") | attention(1, "q", "v")  # PEFT's for qwen3
    assert targets(target_modules=r".*\.1\..*[qk]_proj") == attention(1, "q", "k")
    assert targets(layers_to_transform=[1]) == attention(1, "q", "v")
    assert targets(layers_to_transform=0, layers_pattern="layers") == attention(0, "q", "v")
    assert targets(exclude_modules=["v_proj"]) == attention(0, "q") | attention(1, "q")
    everything = targets(target_modules="all-linear")
    assert len(everything) == 14
    assert "lm_head" not in everything


def test_all_linear_finds_the_layers_again_for_a_second_adapter(make_model, make_config) -> None:
    model = make_model(target_modules="all-linear")
    model.add_adapter("second", make_config(target_modules="all-linear"))
    assert adapted(model, "second") == adapted(model)


def test_rank_and_alpha_patterns(make_model, make_batch) -> None:
    model = make_model(rank_pattern={"v_proj": 2, r".*\.0\..*q_proj": 1}, alpha_pattern={"v_proj": 6})
    layers = model.base_model.model.model.layers
    ranks = {(i, n): getattr(layers[i].self_attn, n).r["default"] for i in (0, 1) for n in ("q_proj", "v_proj")}
    assert ranks == {(0, "q_proj"): 1, (1, "q_proj"): 4, (0, "v_proj"): 2, (1, "v_proj"): 2}
    assert layers[0].self_attn.v_proj.cuma_experts["default"].weight_a.shape == (4 * 2, 64)
    assert layers[0].self_attn.v_proj.scaling["default"] == 6 / 2
    assert layers[0].self_attn.q_proj.scaling["default"] == 32 / 1
    model(**make_batch())


@pytest.mark.parametrize("bad", ["embed_tokens", "norm"])
def test_a_layer_that_is_not_linear_is_refused_and_the_base_is_left_whole(make_config, make_batch, bad: str) -> None:
    base, batch = base_model(), make_batch()
    profiles = batch.pop("demographic_embeds")
    expected = base(**batch).logits
    with pytest.raises(ValueError, match=rf"cannot target `.*{bad}` of type .*'all-linear'"):
        get_peft_model(base, make_config(target_modules=["q_proj", bad]))
    assert not adapted(base)
    torch.testing.assert_close(base(**batch).logits, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(base, make_config(target_modules=["q_porj"]))
    model = get_peft_model(base, make_config())  # and another try succeeds
    assert (model(**batch, demographic_embeds=profiles).logits - expected).abs().max() > 1e-3


def test_a_second_wrapping_is_refused(make_model, make_config) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="already has CuMA layers.*`add_adapter`.*`unload\\(\\)`"):
        get_peft_model(model.base_model.model, make_config())


def test_injection_without_a_tuner_is_refused(make_config) -> None:
    """There would be nothing to bring the profile to the layers."""
    with pytest.raises(ValueError, match="CuMAModel|shared"):
        inject_adapter_in_model(make_config(), base_model())


def test_other_methods_are_not_mixed_in(make_model) -> None:
    with pytest.raises(ValueError, match="different peft types"):
        make_model().add_adapter("lora", LoraConfig(target_modules=["q_proj"]))


# ---------------------------------------------------------------------- several adapters
def test_several_adapters(make_model, make_config, make_batch) -> None:
    """Other targets, router groups, dimensions and numbers of experts; each gives what it gives alone."""
    model, batch = make_model(router_groups=[["q_proj", "v_proj"]]), make_batch()
    first = model(**batch).logits
    other = make_config(
        target_modules=["k_proj", "q_proj"],
        router_groups=[["k_proj", "q_proj"]],
        demographic_dim=9,
        demographic_projection=3,
        num_experts=3,
    )
    model.add_adapter("second", other)
    torch.testing.assert_close(model(**batch).logits, first, rtol=0, atol=0)
    model.set_adapter("second")
    wide = batch | {"demographic_embeds": torch.randn(3, 9)}
    second = model(**wide).logits
    assert (second - first).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"\(rows, 9\) for adapter 'second', got \(3, 6\)"):
        model(**batch)
    assert all((".second." in n) == p.requires_grad for n, p in model.named_parameters() if "cuma_" in n)

    model.delete_adapter("default")  # its layers lead the router groups
    torch.testing.assert_close(model(**wide).logits, second, rtol=0, atol=0)
    assert not any(".default." in name for name in model.state_dict())
    for module in model.modules():
        if isinstance(module, CuMALinear):  # nor do layers hold on to the leader's router
            assert "default" not in module.shared_router

    model.add_adapter("default", make_config(target_modules=["v_proj"]))
    model.set_adapter("default")
    model(**batch)
    model.set_adapter("second")
    torch.testing.assert_close(model(**wide).logits, second, rtol=0, atol=0)


def test_an_adapter_loads_again_after_it_was_deleted(make_model, make_config, make_batch, tmp_path) -> None:
    model, batch = make_model(demographic_projection=3), make_batch()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    model.add_adapter("second", make_config())
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


def test_loading_a_frozen_adapter_leaves_the_one_in_training_trainable(make_model, tmp_path) -> None:
    model = make_model(demographic_projection=3)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("cuma_demographic" in name for name in before)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "frozen")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    with model.disable_adapter():
        pass
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before


def test_two_active_adapters_add_up(make_model, make_config, make_batch) -> None:
    """One layer, so that the sum of residuals can be seen in the output."""
    torch.manual_seed(0)
    config = make_config(target_modules=["lm_head"], task_type=None)
    model = get_peft_model(base_model(), config).eval()
    model.add_adapter("second", config)
    batch = make_batch()
    outputs = {}
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        outputs[len(outputs)] = model(**batch).logits
    with model.disable_adapter():
        base = model(**batch).logits
    torch.testing.assert_close(outputs[2] - base, outputs[0] - base + outputs[1] - base, rtol=1e-4, atol=1e-5)


def test_peft_reports_its_state(make_model, make_config, capsys) -> None:
    model = make_model(router_groups=[["q_proj", "v_proj"]], demographic_projection=3)
    model.add_adapter("second", make_config(target_modules=["k_proj"]))
    status = model.get_model_status()
    assert status.peft_types == {"default": "CUMA", "second": "CUMA"}
    assert status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "second": False}
    assert status.merged_adapters == []
    assert {layer.module_type for layer in model.get_layer_status()} == {"CuMALinear"}
    model.print_trainable_parameters()
    # group router: 8 (64 + 3 + 1) + 4 (8 + 1); experts 4 x 4 (64 + 64) and 4 x 4 (64 + 32); 2 layers; projection 6 x 3
    expected = 2 * (8 * 68 + 36 + 16 * 128 + 16 * 96) + 18
    assert f"trainable params: {expected:,} " in capsys.readouterr().out


# ---------------------------------------------------------------------- leaving
def test_merging_is_refused_before_anything_is_merged(make_model, make_batch) -> None:
    model, batch = make_model(), make_batch()
    expected = model(**batch).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload, model.unmerge_adapter):
        with pytest.raises(NotImplementedError, match=r"cannot be merged.*unload\(\)"):
            merge()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


def test_unload_gives_the_base_model_back(make_model, make_batch) -> None:
    base = make_model(demographic_projection=3).unload()
    batch = make_batch()
    with pytest.raises(ValueError, match="demographic_embeds"):
        base.generate(**batch, max_new_tokens=1)  # nobody takes the keyword out any more
    del batch["demographic_embeds"]
    torch.testing.assert_close(base(**batch).logits, base_model()(**batch).logits, rtol=0, atol=0)
    assert base.state_dict().keys() == base_model().state_dict().keys()


# ---------------------------------------------------------------------- plain modules
class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(5, 8)
        self.lin1 = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.lin1(self.lin0(x).relu()) * scale


@pytest.mark.parametrize("shape", [(4, 5), (4, 7, 5)])
def test_a_plain_module_without_a_task_type(make_config, tmp_path, shape: tuple) -> None:
    torch.manual_seed(0)
    net = Net()
    x, profiles = torch.randn(shape), torch.randn(4, 6)
    expected = net(x, scale=2.0)
    config = make_config(target_modules=["lin0", "lin1"], task_type=None, demographic_projection=3)
    model = get_peft_model(net, config)
    assert type(model) is PeftModel
    output = model(x, scale=2.0, demographic_embeds=profiles)
    assert (output - expected).abs().max() > 1e-3
    torch.testing.assert_close(model(x[2:3], scale=2.0, demographic_embeds=profiles[2:3]), output[2:3])
    with pytest.raises(ValueError, match="`demographic_embeds` is missing"):
        model(x)

    with model.disable_adapter():  # with and without the keyword
        assert torch.equal(model(x, scale=2.0, demographic_embeds=profiles), expected)
        assert torch.equal(model(x, scale=2.0), expected)
    torch.testing.assert_close(model(x, scale=2.0, demographic_embeds=profiles), output, rtol=0, atol=0)

    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(loaded(x, scale=2.0, demographic_embeds=profiles), output, rtol=0, atol=0)
    base = model.unload()
    assert torch.equal(base(x, scale=2.0), expected)
    with pytest.raises(TypeError, match="demographic_embeds"):
        base(x, demographic_embeds=profiles)


def test_the_base_model_trains_nothing_but_the_adapter(make_model, make_batch) -> None:
    model, batch = make_model(demographic_projection=3).train(), make_batch()
    assert isinstance(model.base_model, CuMAModel)
    assert all(("cuma_" in name) == p.requires_grad for name, p in model.named_parameters())
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == ("cuma_" in name), name
