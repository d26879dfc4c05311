# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""FiLM inside the experts, against its formula written out; and one expert with it, a LoRA with FiLM."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from trl_cuma import CuMAConfig, grow_experts, reset_router
from trl_cuma.adapter.card_text import describe
from trl_cuma.adapter.film import FiLM
from trl_cuma.adapter.layer import CuMALinear
from trl_cuma.testing import tiny_model

FILM = {"film_hidden": 5}
ONE = {"film_hidden": 5, "num_experts": 1, "top_k": 1, "routing": "demographic"}  # a LoRA with FiLM
FIELDS = {
    "joint": FILM | {"demographic_projection": 3},
    "demographic": FILM | {"routing": "demographic", "gate": "softmax_topk"},
    "shared-a": FILM | {"share_a": True, "gate": "soft", "target_modules": "all-linear"},
    "groups": FILM | {"router_groups": [["q_proj", "v_proj"]]},
    "one": ONE,
}


@pytest.fixture(params=FIELDS)
def fields(request: pytest.FixtureRequest) -> dict:
    return dict(FIELDS[request.param])


def layer_by_the_formula(layer: CuMALinear, x: torch.Tensor, gates: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """`W0 x + s · sum_i g_i B_i ((1 + γ_i) A_i x + β_i)` of rows with the profiles `d`, expert by expert."""
    experts, film = layer.cuma_experts["default"], layer.cuma_film["default"]
    r, count = experts.r, experts.num_experts
    values = torch.relu(d @ film.first.weight.T + film.first.bias) @ film.last.weight.T + film.last.bias
    y = layer.base_layer(x)
    for i in range(count):
        gamma, beta = values[:, i * r : (i + 1) * r], values[:, (count + i) * r : (count + i + 1) * r]
        a = experts.weight_a if experts.share_a else experts.weight_a[i * r : (i + 1) * r]
        z = (1 + gamma).unsqueeze(1) * (x @ a.T) + beta.unsqueeze(1)
        y = y + layer.scaling["default"] * gates[..., i : i + 1] * (z @ experts.weight_b[:, i * r : (i + 1) * r].T)
    return y


def layers_of(model: nn.Module) -> list[CuMALinear]:
    return [module for module in model.modules() if isinstance(module, CuMALinear)]


def test_a_layer_computes_the_formula(make_model, make_batch, fields: dict) -> None:
    model, batch = make_model(**fields), make_batch()
    seen = {}
    for layer in layers_of(model):
        layer.register_forward_hook(lambda layer, args, y: seen.__setitem__(layer, (args[0], y)))
        if layer.cuma_router:
            layer.cuma_router["default"].register_forward_hook(lambda router, _, z: seen.__setitem__(router, z))
    model(**batch)
    profiles = batch["demographic_embeds"]
    if "demographic_projection" in fields:
        profiles = model.base_model.cuma_demographic["default"](profiles)
    for layer in layers_of(model):
        x, y = seen[layer]
        gates = torch.ones(1, 1, 1)
        if fields.get("num_experts") != 1:
            logits = seen[layer.shared_router["default"]]
            chosen = logits.topk(2).indices if fields.get("gate") != "soft" else torch.arange(4).expand(logits.shape)
            p = logits if fields.get("gate") in (None, "soft") else logits.softmax(-1).log()
            kept = torch.full_like(logits, -torch.inf).scatter(-1, chosen, p.gather(-1, chosen))
            gates = kept.exp() if fields.get("gate") == "softmax_topk" else kept.softmax(-1)
        expected = layer_by_the_formula(layer, x, gates, profiles)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_at_the_start_the_experts_are_plain(make_model, make_batch, fields: dict) -> None:
    """B is at random here, so that they say something; only γ and β start at zero."""
    model, batch = make_model(**fields), make_batch()
    for layer in layers_of(model):
        layer.cuma_film["default"]._start_at_zero()
    plain = make_model(**{name: value for name, value in fields.items() if name != "film_hidden"})
    weights = {name: value for name, value in model.state_dict().items() if "cuma_film" not in name}
    missing = plain.load_state_dict(weights, strict=False).missing_keys  # the router of one expert, whose gate is 1
    assert not missing or fields["num_experts"] == 1
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)
    new = make_model(init_weights=True, **fields)  # as a user makes it
    for layer in layers_of(new):
        assert not layer.cuma_film["default"].last.weight.any() and layer.cuma_film["default"].first.weight.any()


def test_one_expert_has_no_router_and_is_a_lora_with_film(make_model, make_batch) -> None:
    """Its parameters are the LoRA's and the MLP's, and with γ = β = 0 its logits are the LoRA's."""
    model, batch = make_model(**ONE, target_modules=["q_proj"]), make_batch()
    lora = get_peft_model(
        tiny_model("qwen3", vocab_size=50), LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"])
    ).eval()
    film = sum(p.numel() for layer in layers_of(model) for p in layer.cuma_film.parameters())
    assert film == 2 * (6 * 5 + 5 + 5 * 8 + 8)  # layers × (demographic_dim → film_hidden → 2 · r)
    assert model.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0] + film
    lora.base_model.model.load_state_dict(model.get_base_model().state_dict(), strict=False)
    others = [module for module in lora.modules() if hasattr(module, "lora_A")]
    for layer, other in zip(layers_of(model), others, strict=True):
        other.lora_A["default"].weight.data = layer.cuma_experts["default"].weight_a.data
        other.lora_B["default"].weight.data = layer.cuma_experts["default"].weight_b.data
        layer.cuma_film["default"]._start_at_zero()
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**batch).logits, lora(**tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_profile_is_read_once_for_each_profile_and_not_for_each_token(make_model, make_batch) -> None:
    model, batch = make_model(**ONE), make_batch(rows=3, length=6)
    shapes = []
    for layer in layers_of(model):
        layer.cuma_film["default"].register_forward_hook(lambda film, args, y: shapes.append(tuple(y.shape)))
    model(**batch)
    assert shapes == [(3, 8)] * 4  # 3 profiles, 2 · r; 2 layers × (q_proj, v_proj)
    shapes.clear()
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask", "demographic_embeds")}
    model.generate(**prompts, max_new_tokens=5, do_sample=False)
    assert shapes == [(3, 8)] * 4  # once in a generation


def test_a_missing_profile_is_an_error_or_the_average(make_model, make_batch, fields: dict) -> None:
    batch = make_batch()
    embeds = batch.pop("demographic_embeds")
    with pytest.raises(ValueError, match="`demographic_embeds` is missing"):
        make_model(**fields)(**batch)
    model = make_model(**fields, missing_demographics="zero")
    zeros = model(**batch, demographic_embeds=torch.zeros_like(embeds)).logits
    torch.testing.assert_close(model(**batch).logits, zeros)
    assert (model(**batch, demographic_embeds=embeds).logits - zeros).abs().max() > 1e-2


def test_what_film_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="`film_hidden=5` reads profiles, and with `routing='semantic'`"):
        CuMAConfig(film_hidden=5, routing="semantic")
    with pytest.raises(ValueError, match="`film_hidden` must be a positive integer, got 0"):
        CuMAConfig(film_hidden=0)


def test_a_saved_adapter_is_loaded_and_an_older_library_would_say_that_it_is_too_old(
    make_model, make_batch, fields: dict, tmp_path
) -> None:
    model, batch = make_model(**fields), make_batch()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(tiny_model("qwen3", vocab_size=50), tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["format_version"], saved["film_hidden"]) == (2, 5)
    assert CuMAConfig().format_version == 1
    assert "(FiLM)" in describe(model.peft_config["default"])
    assert ("mixed by a router" in describe(model.peft_config["default"])) == (fields.get("num_experts") != 1)

    saved["film_hidden"] = None  # as one that ignored the unknown key: the tensors give it away
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="have no place in this model .*cuma_film"):
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(tiny_model("qwen3", vocab_size=50), tmp_path)


@pytest.mark.parametrize("name", ["joint", "shared-a", "groups"])
def test_grown_experts_compute_what_they_did(make_model, make_batch, name: str, tmp_path) -> None:
    model, batch = make_model(**FIELDS[name]), make_batch()
    before = model(**batch).logits
    grow_experts(model, 8)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(tiny_model("qwen3", vocab_size=50), tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_one_expert_with_film_does_not_grow(make_model) -> None:
    with pytest.raises(ValueError, match="`num_experts=1` and `film_hidden=5` has no router, so it can't grow"):
        grow_experts(make_model(**ONE), 2)


def test_another_encoder_starts_film_anew(make_model, make_batch, fields: dict) -> None:
    model, batch = make_model(**fields), make_batch()
    b = layers_of(model)[0].cuma_experts["default"].weight_b.clone()
    reset_router(model, demographic_dim=9)
    with_nine = batch | {"demographic_embeds": torch.randn(3, 9)}
    if "demographic_projection" not in fields:
        assert {tuple(m.first.weight.shape) for m in model.modules() if isinstance(m, FiLM)} == {(5, 9)}
    model(**with_nine)
    for layer in layers_of(model):
        assert not layer.cuma_film["default"](torch.randn(2, layer.cuma_film["default"].first.in_features)).any()
    assert torch.equal(layers_of(model)[0].cuma_experts["default"].weight_b, b)  # the experts stay


def test_an_adapter_without_routers_has_no_router_losses(make_model, make_batch) -> None:
    model, batch = make_model(**ONE).train(), make_batch()
    outputs = model(**batch, labels=batch["input_ids"], output_router_losses="local")
    assert not {"aux_loss", "router_load"} & outputs.keys()
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name  # DDP needs all


# ---------------------------------------------------------------------- one expert with FiLM, without a router
# The other forms are among the cases of tests/invariants, whose router losses this one hasn't.
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_every_checkpointing_mode_gives_the_same_gradients(
    make_model, make_batch, autocast: bool, packed: bool
) -> None:
    """Two forwards with different profiles before one backward, and a reference forward in between."""
    batch = make_batch(rows=3, length=6)
    if packed:
        batch["demographic_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 1, 1], [0, 0, 0, 0, 0, 0]])
        del batch["attention_mask"]
    other = batch | {"demographic_embeds": -2 * batch["demographic_embeds"]}
    # A projection's gradient is added up over the layers in autocast's dtype, and by checkpoints in another order.
    fields = ONE if autocast else ONE | {"demographic_projection": 3}
    results = []
    for use_reentrant in (None, False, True):
        model = make_model(**fields).train()
        if use_reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch, labels=batch["input_ids"]).loss
            with torch.no_grad(), model.disable_adapter():
                model(**batch)
            loss = loss + 3 * model(**other, labels=batch["input_ids"]).loss
        loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for gradients in results[1:]:
        assert gradients.keys() == results[0].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][name], rtol=1e-5, atol=1e-7)
    assert all(gradient.any() for gradient in results[0].values())


def test_a_packed_document_reads_its_own_profile(make_model, make_batch) -> None:
    model, batch = make_model(**ONE), make_batch(rows=2, length=4)
    packed = {
        "input_ids": batch["input_ids"].view(1, 8),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
        "demographic_ids": torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]]),
        "demographic_embeds": batch["demographic_embeds"].flip(0),
    }
    expected = model(**batch).logits.view(1, 8, -1)
    torch.testing.assert_close(model(**packed, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}])
def test_each_prompt_is_continued_for_its_own_person(make_model, make_batch, options: dict) -> None:
    model, batch = make_model(**ONE), make_batch()
    copies = options.get("num_return_sequences", 1)
    together = model.generate(**batch, max_new_tokens=4, do_sample=False, **options)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        single = model.generate(**alone, max_new_tokens=4, do_sample=False, **options)
        assert torch.equal(single[:, 6:], together[row * copies : (row + 1) * copies, 6:])
    swapped = batch | {"demographic_embeds": batch["demographic_embeds"].roll(1, 0)}
    assert not torch.equal(model.generate(**swapped, max_new_tokens=4, do_sample=False, **options), together)


def test_a_disabled_adapter_is_the_base(make_model, make_batch) -> None:
    model, batch = make_model(**ONE), make_batch()
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.manual_seed(1)
    with model.disable_adapter():
        assert torch.equal(model(**tokens).logits, tiny_model("qwen3", vocab_size=50).eval()(**tokens).logits)


def test_an_input_that_a_model_flattens_reads_the_profile_of_its_row(make_model, make_batch) -> None:
    """OPT hands its layers `(batch · seq, hidden)`."""
    model, batch = make_model("opt", **ONE, target_modules="all-linear"), make_batch()
    together = model(**batch).logits
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in batch.items()}).logits
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-5)
