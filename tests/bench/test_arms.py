# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Every arm gets CuMA's budget: parameters within 2 %, or its rank."""

import itertools

import pytest
import torch
from peft import get_peft_model

from trl_cuma import CuMAConfig
from trl_cuma.bench import METHODS, Arm, Reference
from trl_cuma.testing import tiny_model

DIMS = {"field": 31, "text": 48}
REFERENCE = Reference(
    config={"r": 4, "num_experts": 4, "top_k": 2, "router_hidden": 16, "demographic_projection": 16},
    target_modules=["q_proj", "v_proj"],
)


@pytest.fixture(scope="module")
def base():
    return tiny_model(
        vocab_size=100, architecture="llama", hidden_size=64, intermediate_size=128, num_key_value_heads=4
    )


def built(base, arm: Arm, alpha_ratio: float = 2.0) -> tuple[CuMAConfig, int, int]:
    """Configuration, the count that it came with, and the count of the model that is really made."""
    config, count = REFERENCE.adapter(arm, base, DIMS, alpha_ratio)
    if isinstance(config, CuMAConfig):
        config = CuMAConfig(**{**config.to_dict(), "demographic_dim": DIMS[arm.encoder], "inference_mode": False})
    with torch.device("meta"):
        model = get_peft_model(type(base)(base.config), config)
    return config, count, sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_budget_is_what_cuma_has(base):
    config, count, made = built(base, Arm("cuma"))
    assert (config.r, config.num_experts, config.router_hidden) == (4, 4, 16)
    # two layers × two modules of 64 → 64: experts 4·4·(64+64); routers 16·64 + 16·16 + 16 + 4·16 + 4; one projection
    assert count == made == 4 * (4 * 4 * 128 + 16 * 64 + 16 * 16 + 16 + 4 * 16 + 4) + 31 * 16


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.peft in ("lora", "cuma")])
def test_parameters_are_matched_within_two_percent(base, method):
    goal = REFERENCE.adapter(Arm("cuma"), base, DIMS, 2.0)[1]
    for prompt_profile in (False, True):
        config, count, made = built(base, Arm(method, prompt_profile=prompt_profile))
        assert count == made
        assert abs(made / goal - 1) <= 0.02
        assert config.r <= 32  # half of each module's 64 features
        assert config.lora_alpha == 2.0 * config.r


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "hydralora", "film"])
def test_rank_is_matched(base, method):
    assert built(base, Arm(method, matched="rank"))[0].r == 4


def test_methods_are_what_they_are_called():
    configs = {
        name: REFERENCE.adapter(Arm(name, matched="rank"), tiny_base(), DIMS, 2.0)[0] for name in METHODS_WITH_RANK
    }
    assert configs["dora"].use_dora and configs["rslora"].use_rslora and not configs["lora"].use_dora
    assert (configs["hydralora"].routing, configs["hydralora"].share_a, configs["hydralora"].gate) == (
        "semantic",
        True,
        "soft",
    )
    assert (configs["mixlora"].routing, configs["mixlora"].share_a, configs["mixlora"].top_k) == ("semantic", False, 2)
    assert configs["cuma_published"].gate == "double_softmax"
    film = configs["film"]
    assert (film.num_experts, film.film_hidden, film.demographic_projection) == (1, 16, 16)
    assert configs["cuma"].routing == "joint"


METHODS_WITH_RANK = [name for name, method in METHODS.items() if method.peft in ("lora", "cuma")]


def tiny_base():
    return tiny_model(
        vocab_size=100, architecture="llama", hidden_size=64, intermediate_size=128, num_key_value_heads=4
    )


def test_a_budget_that_no_low_rank_adapter_has_is_an_error(base):
    reference = Reference({**REFERENCE.config, "r": 16}, REFERENCE.target_modules)
    with pytest.raises(ValueError, match="'lora' can't have CuMA's .* rank of at most 32"):
        reference.adapter(Arm("lora"), base, DIMS, 2.0)


@pytest.mark.parametrize("arm", [Arm("cuma"), Arm("lora", matched="rank"), Arm("lora")], ids=lambda arm: arm.key)
def test_a_reference_of_no_low_rank_is_an_error(base, arm):
    """The modules are of 64 features."""
    config = REFERENCE.config
    with pytest.raises(ValueError, match="`reference.config.r` is 33, and a rank may be at most 32"):
        Reference({**config, "r": 33}, REFERENCE.target_modules).adapter(arm, base, DIMS, 2.0)
    half = Reference({**config, "r": 32}, REFERENCE.target_modules)
    assert half.adapter(Arm("cuma"), base, DIMS, 2.0)[0].r == 32


def test_a_router_of_default_width_is_matched_like_one_that_is_given(base):
    without = {name: value for name, value in REFERENCE.config.items() if name != "router_hidden"}
    reference = Reference(without, REFERENCE.target_modules)
    given = Reference({**without, "router_hidden": 256}, REFERENCE.target_modules)
    for arm in (Arm("cuma_published"), Arm("mixlora"), Arm("film", matched="rank")):
        assert reference.adapter(arm, base, DIMS, 2.0) == given.adapter(arm, base, DIMS, 2.0)
    published = reference.adapter(Arm("cuma_published"), base, DIMS, 2.0)[0]
    assert (published.r, published.router_hidden) == (4, 256)  # only the gate differs
    assert reference.adapter(Arm("film", matched="rank"), base, DIMS, 2.0)[0].film_hidden == 256


def test_unknown_target_modules_are_an_error(base):
    with pytest.raises(ValueError, match="no module named"):
        Reference(REFERENCE.config, ["query"]).adapter(Arm("lora"), base, DIMS, 2.0)


def test_keys_tell_arms_apart():
    arms = [
        Arm(method, matched=matched, prompt_profile=prompt)
        for method, prompt in itertools.product(("lora", "cuma"), (False, True))
        for matched in ("parameters", "rank")
    ]
    assert len({arm.key for arm in arms}) == len(arms)
    assert Arm("cuma", name="soft_gate", config={"gate": "soft"}).key == "soft_gate"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lorra"}, "'lorra', expected one of lora"),
        ({"method": "full"}, "`matched` 'parameters'"),
        ({"method": "lora", "matched": "none"}, "`matched` 'none'"),
        ({"method": "lora", "config": {"r": 3}}, "belongs to the CuMA adapter"),
        ({"method": "cuma", "encoder": "words"}, "expected one of \\('field'"),
    ],
)
def test_arms_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Arm(**fields)
