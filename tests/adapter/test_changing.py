# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model

from trl_cuma import grow_experts, reset_router
from trl_cuma.testing import tiny_model

GROUPS = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
VARIANTS = {
    "joint": {},
    "softmax-topk": {"gate": "softmax_topk"},
    "soft": {"gate": "soft"},
    "demographic-top-1": {"routing": "demographic", "gate": "softmax_topk", "top_k": 1},
    "semantic-linear": {"routing": "semantic", "router_layers": 1},
    "deep-joint-shared-a": {"router_layers": 3, "share_a": True, "demographic_projection": 3},
    "linear-joint-groups": {"router_layers": 1, "router_groups": GROUPS, "target_modules": "all-linear"},
    "one-expert": {"num_experts": 1, "top_k": 1},
    "ranks": {"rank_pattern": {"v_proj": 2}, "use_rslora": True},
}
variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
CHANGES = {
    "grow": lambda model: grow_experts(model, 8),
    "reset": lambda model: reset_router(model, demographic_dim=9),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())


@variants
@pytest.mark.parametrize("factor", [2, 3])
def test_growing_changes_no_output(make_model, make_batch, fields: dict, factor: int) -> None:
    """In float64, where the copies' perturbations, as large as B itself, cancel to 1e-12 of the logits."""
    model, batch = make_model(**fields).double(), make_batch(lengths=[6, 3, 4])
    batch["demographic_embeds"] = batch["demographic_embeds"].double()
    expected = model(**batch).logits
    experts, top_k = model.peft_config["default"].num_experts, model.peft_config["default"].top_k
    grow_experts(model, factor * experts, perturbation=1.0)
    grown = model(**batch).logits
    torch.testing.assert_close(grown, expected, rtol=1e-11, atol=1e-11)
    assert model.peft_config["default"].num_experts == factor * experts
    assert model.peft_config["default"].top_k == factor * top_k
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    by_copy = layer.cuma_experts["default"].weight_b.unflatten(1, (experts, factor, -1))
    assert (by_copy[:, :, 0] - by_copy[:, :, 1]).abs().mean() > 0.5 * by_copy.abs().mean()  # they do differ


@variants
def test_a_grown_adapter_trains_saves_and_loads(make_model, make_batch, tmp_path, fields: dict) -> None:
    model, batch = make_model(**fields), make_batch(8)
    before = model(**batch, labels=batch["input_ids"]).loss
    experts = 2 * model.peft_config["default"].num_experts
    grow_experts(model, experts)
    torch.testing.assert_close(model(**batch, labels=batch["input_ids"]).loss, before, rtol=1e-5, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(5):
        model.zero_grad()
        outputs = model(**batch, labels=batch["input_ids"], output_router_losses="local")
        (outputs.loss + outputs["aux_loss"]).backward()
        optimizer.step()
    assert outputs["router_load"].shape[1] == experts
    assert outputs.loss < before - 0.1  # five steps of memorising 48 tokens
    for copies in model.base_model.model.model.layers[0].self_attn.q_proj.shared_router["default"].parameters():
        if copies.shape[0] == experts:  # the copies' logits, equal at first, have come apart
            assert not torch.equal(copies[0], copies[1])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("qwen3", vocab_size=50), tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        *((count, rf"`num_experts={count}` must be 2, 3, … times the adapter's 4") for count in (3, 4, 6)),
        *((count, rf"`num_experts` must be a positive integer, got {count}") for count in (0, -8, 8.0, True)),
    ],
)
def test_only_whole_copies_are_made(make_model, experts, message) -> None:
    with pytest.raises(ValueError, match=message):
        grow_experts(make_model(), experts)


def test_what_cannot_grow_is_refused_and_left_as_it_was(make_model, make_batch) -> None:
    batch = make_batch()
    for fields, arguments, message in (
        ({"gate": "double_softmax"}, {}, "gate='double_softmax'` can't grow"),
        ({}, {"perturbation": 0.0}, "`perturbation` must be positive"),
        ({}, {"perturbation": float("inf")}, "`perturbation` must be positive.* and finite; got inf"),
        ({"init_weights": True}, {}, "untrained .* nothing to copy"),
        ({}, {"adapter_name": "other"}, "no CuMA adapter 'other'"),
    ):
        model = make_model(**fields)
        expected = model(**batch).logits
        with pytest.raises(ValueError, match=message):
            grow_experts(model, 8, **arguments)
        assert torch.equal(model(**batch).logits, expected)
        assert model.peft_config["default"].num_experts == 4
    with pytest.raises(ValueError, match="Pass a PeftModel"):
        grow_experts(tiny_model("qwen3", vocab_size=50), 8)


def test_only_the_named_adapter_changes(make_model, make_config, make_batch) -> None:
    model, batch = make_model(), make_batch()
    model.add_adapter("other", make_config(num_experts=2, top_k=2))
    expected = model(**batch).logits
    grow_experts(model, 4, adapter_name="other")
    reset_router(model, adapter_name="other")
    assert torch.equal(model(**batch).logits, expected)
    assert model.peft_config["default"].num_experts == 4 == model.peft_config["other"].num_experts
    assert model.peft_config["default"].top_k == 2


@variants
def test_reset_routers_are_new_and_the_experts_are_kept(make_model, make_batch, tmp_path, fields: dict) -> None:
    model, batch = make_model(**fields, demographic_encoder={"type": "field"}), make_batch()
    expected = model(**batch).logits
    experts = {name: p.detach().clone() for name, p in model.named_parameters() if "cuma_experts" in name}
    routing = {name: p.detach().clone() for name, p in model.named_parameters() if "cuma_experts" not in name}
    reset_router(model, demographic_dim=9)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in experts.items())
    new = [n for n, v in routing.items() if "cuma" in n and not torch.equal(parameters[n], v)]
    assert new == [name for name in routing if "cuma" in name]
    assert all(parameters[name].requires_grad for name in new)
    assert model.peft_config["default"].demographic_encoder is None
    if fields.get("routing") == "semantic":  # reads no profile, whatever its length
        assert model.peft_config["default"].demographic_dim == 6
    else:
        assert model.peft_config["default"].demographic_dim == 9
        batch["demographic_embeds"] = torch.randn(3, 9)
    logits = model(**batch).logits
    if fields.get("num_experts") != 1:  # with one expert there is nothing to route
        assert (logits - expected).abs().max() > 1e-3
    (logits.square().mean()).backward()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("qwen3", vocab_size=50), tmp_path)
    assert torch.equal(again(**batch).logits, logits)


def test_a_reset_router_starts_as_a_new_one_does(make_model) -> None:
    """The bounds of the initialisation: 1 / sqrt(fan-in) for each half of the first layer and each later layer."""
    model = make_model(router_hidden=512)
    for parameter in model.parameters():
        parameter.data.fill_(100.0)
    reset_router(model, demographic_dim=16)
    router = model.base_model.model.model.layers[0].self_attn.q_proj.shared_router["default"]
    for weight, fan_in in (
        (router.hidden_weight, 64),
        (router.demographic_weight, 16),
        (router.bias, 80),
        (router.rest[1].weight, 512),
        (router.rest[1].bias, 512),
    ):
        assert 0.5 * fan_in**-0.5 < weight.abs().max() <= fan_in**-0.5


@changes
def test_the_reference_stays_as_it_was(make_model, make_batch, tmp_path, change: Callable) -> None:
    """TRL makes its reference from the configuration object of the adapter that it trains."""
    model, batch = make_model(), make_batch()
    model.add_adapter("ref", model.peft_config["default"])
    config = model.peft_config["ref"].to_dict()
    model.set_adapter("ref")
    expected = model(**batch).logits
    change(model)
    assert model.peft_config["ref"].to_dict() == config
    assert torch.equal(model(**batch).logits, expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("qwen3", vocab_size=50), tmp_path / "ref")
    assert torch.equal(again(**batch).logits, expected)
    again.load_adapter(tmp_path, "changed")  # and what was changed fits its own configuration


@changes
def test_models_made_of_one_configuration_change_apart(make_config, make_batch, change: Callable) -> None:
    config, batch = make_config(target_modules=None), make_batch()
    first, second = (get_peft_model(tiny_model("qwen3", vocab_size=50), config).eval() for _ in range(2))
    expected, own = second(**batch).logits, second.peft_config["default"].to_dict()
    change(first)
    assert second.peft_config["default"].to_dict() == own
    assert torch.equal(second(**batch).logits, expected)
    assert (config.num_experts, config.demographic_dim) == (4, 6)
    grow_experts(second, 12)  # three copies of each of its own four
    torch.testing.assert_close(second(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_one_configuration_serves_one_type_of_base_model(make_config) -> None:
    """PEFT writes the first base's target modules into it."""
    config = make_config(target_modules=None)
    get_peft_model(tiny_model("qwen3", vocab_size=50), config)
    with pytest.raises(ValueError, match="for a base model of type 'qwen3', not 'gpt2'.*make a new CuMAConfig"):
        get_peft_model(tiny_model("gpt2", vocab_size=50), config)


@changes
@pytest.mark.parametrize("part", ["cuma_router", "cuma_experts", "cuma_demographic"])
def test_what_is_frozen_stays_frozen(make_model, part: str, change: Callable) -> None:
    model = make_model(demographic_projection=3)
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(False)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    change(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable


@pytest.mark.parametrize("share_a", [False, True])
def test_growing_in_bfloat16_is_exact_up_to_its_rounding(make_model, make_batch, share_a: bool) -> None:
    """
    bfloat16 rounds to 8 bits: by at most u = 2^-8 of a number. With two copies, A x is computed from equal rows and
    the gates are halved without an error, so that the experts' sum of terms t = g (B A x) moves by the rounding of the
    copies of B (u Σ|t|) and by that of the two results that are compared (u |Σt| each, not more than u Σ|t|).
    """
    model, batch = make_model(share_a=share_a).bfloat16(), make_batch()
    experts = model.base_model.model.model.layers[0].self_attn.q_proj.cuma_experts["default"]
    seen = []
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))

    def residual(top_k: int) -> torch.Tensor:
        model(**batch)
        return experts.forward(*seen[-1], torch.zeros(3, 6, len(experts.weight_b), dtype=torch.bfloat16), top_k)

    before = residual(2)
    grow_experts(model, 8)
    assert {p.dtype for name, p in model.named_parameters() if "cuma" in name} == {torch.bfloat16}
    after, (x, gates) = residual(4), seen[-1]
    low = F.linear(x, experts.weight_a)
    low = low.unsqueeze(-2) if share_a else low.unflatten(-1, (8, -1))
    terms = F.linear((low * gates.unsqueeze(-1)).flatten(-2).double().abs(), experts.weight_b.double().abs())
    assert ((after.double() - before.double()).abs() <= 3 * 2**-8 * terms).all()
