# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
What a forward leaves in memory for its backward, in bytes and dtypes: a recomputed layer keeps what a LoRA's does, any
other layer not much more than a LoRA's, and nothing is kept in float32 that came in bfloat16.

Measured are the storages that are alive, not those that autograd says it has saved: what a closure, a context or the
conditioning of a checkpointed call holds takes the same memory, and `saved_tensors_hooks` don't see it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_cuma import CuMAConfig
from trl_cuma.adapter.experts import CuMAExperts
from trl_cuma.adapter.layer import CuMALinear
from trl_cuma.adapter.router import CuMARouter
from trl_cuma.testing import tiny_model

GROUPS = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
FLOAT32 = 4  # bytes


class Made(NamedTuple):
    """A storage that an operation has made, without holding it."""

    storage: StorageWeakRef
    nbytes: int
    shape: torch.Size
    dtype: torch.dtype


class LiveStorages(TorchDispatchMode):
    """The storages that operations make while this is on; parameters and inputs were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Made] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in inputs:  # else a view, or written in place
                inputs.add(storage._cdata)
                self.made.append(Made(StorageWeakRef(storage), storage.nbytes(), t.shape, t.dtype))
                self.after_making()
        return result

    def after_making(self) -> None:
        """For a subclass that looks at every moment."""

    def alive(self) -> list[Made]:
        self.made = [each for each in self.made if not each.storage.expired()]
        return self.made


def kept_by(forward: Callable[[], Any]) -> list[Made]:
    """What is alive after `forward`, while its result is."""
    with LiveStorages() as storages:
        result = forward()
        alive = list(storages.alive())
    del result
    return alive


def total(kept: list[Made]) -> int:
    return sum(each.nbytes for each in kept)


def routers_of(model: nn.Module) -> list[CuMARouter]:
    return [module for module in model.modules() if isinstance(module, CuMARouter)]


# ---------------------------------------------------------------------------------------------- with checkpointing
def bytes_of_router_losses(routers: int, experts: int, tokens: int) -> int:
    """
    What the router losses of a forward keep beside the layers: the weight of each token and the number of documents;
    for each router load and importance of each expert, `z_loss` and entropy; all loads once more, as the output; and
    the two losses with their probes, and the mean entropy.
    """
    return FLOAT32 * (tokens + 1 + routers * (2 * experts + 2) + routers * experts + 2 * 3 + 1)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("losses", [False, True], ids=["task-loss", "router-losses"])
def test_a_checkpointed_layer_keeps_what_a_lora_keeps(
    make_model, make_config, make_batch, variant: dict, use_reentrant: bool, losses: bool
) -> None:
    """And the profiles beside, once for all layers; nothing of the gates, which are recomputed."""
    batch = make_batch(rows=3, length=8)
    cuma = make_model(**variant)
    config = make_config()
    rank = config.top_k * config.r
    lora = get_peft_model(
        tiny_model("qwen3", vocab_size=50), LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )

    def kept(model: PeftModel, inputs: dict, checkpointing: bool) -> int:
        model.train().enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        else:
            model.gradient_checkpointing_disable()
        return total(kept_by(lambda: model(**inputs, labels=inputs["input_ids"], use_cache=False)))

    plain = {name: value for name, value in batch.items() if name != "demographic_embeds"}
    extra = FLOAT32 * batch["demographic_embeds"].shape[0] * (variant.get("demographic_projection") or 0)
    if losses:
        extra += bytes_of_router_losses(len(routers_of(cuma)), config.num_experts, batch["input_ids"].numel())
        batch["output_router_losses"] = "local"
    recomputed = kept(cuma, batch, True)
    assert recomputed <= kept(lora, plain, True) + extra
    assert kept(cuma, batch, False) > 3 * recomputed  # the control: the layers' own would be seen


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
def test_nothing_but_the_gradients_outlives_a_step(make_model, make_batch, variant: dict, use_reentrant) -> None:
    model, batch = make_model(**variant).train(), make_batch(rows=3, length=8)
    model.enable_input_require_grads()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    def step() -> None:
        outputs = model(**batch, labels=batch["input_ids"], output_router_losses="local", use_cache=False)
        (outputs.loss + outputs["aux_loss"]).backward()

    trainable = [p for p in model.parameters() if p.requires_grad]
    assert total(kept_by(step)) == sum(p.grad.nbytes for p in trainable)


# ------------------------------------------------------------------------------------------- without checkpointing
EXPERTS, TOP_K, R, DIM, ROUTER_HIDDEN = 8, 2, 8, 1024, 256
ROWS, SEQ = 2, 32


class PerExpertLoop(nn.Module):
    """
    The mixture as one writes it first: the router reads the hidden state with the profile concatenated to it, and a
    loop picks each expert's tokens by a boolean mask.
    """

    def __init__(self, cuma: CuMALinear, profiles: torch.Tensor) -> None:
        super().__init__()
        experts, router = cuma.cuma_experts["default"], cuma.cuma_router["default"]
        self.base, self.profiles, self.scaling = cuma.base_layer, profiles, cuma.scaling["default"]
        self.a = nn.ParameterList([nn.Parameter(a.clone()) for a in experts.weight_a.data.split(R)])
        self.b = nn.ParameterList([nn.Parameter(b.clone()) for b in experts.weight_b.data.split(R, dim=1)])
        self.router = nn.Sequential(
            nn.Linear(cuma.in_features + DIM, ROUTER_HIDDEN), nn.ReLU(), nn.Linear(ROUTER_HIDDEN, EXPERTS)
        )
        first, last = self.router[0], self.router[2]
        with torch.no_grad():
            first.weight.copy_(torch.cat([router.hidden_weight, router.demographic_weight], dim=1))
            first.bias.copy_(router.bias)
            last.load_state_dict(router.rest[1].state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        profiles = self.profiles.unsqueeze(1).expand(-1, x.shape[1], -1)
        values, chosen = self.router(torch.cat([x, profiles], dim=-1)).topk(TOP_K)
        gates = values.softmax(-1)
        result = self.base(x)
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            picked = chosen == i  # (batch, seq, k)
            tokens = picked.any(-1)
            if tokens.any():
                gate = gates[picked].unsqueeze(-1)
                result[tokens] = result[tokens] + self.scaling * gate * F.linear(F.linear(x[tokens], a), b)
        return result


@pytest.fixture(scope="module")
def wide() -> Callable[..., nn.Module]:
    """
    One block at the sizes of the benchmark's model, hidden 512, with adapters on all linear layers: `"base"` (without
    any), `"lora"` of rank k·r, `"cuma"`, or the `"loop"` with the weights of a CuMA without groups.
    """

    def make(kind: str, **fields: Any) -> nn.Module:
        sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 1}
        base = tiny_model("qwen3", vocab_size=50, **sizes)
        base.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        if kind == "base":
            return base.requires_grad_(False)
        if kind == "lora":
            return get_peft_model(base, LoraConfig(r=TOP_K * R, target_modules="all-linear", task_type="CAUSAL_LM"))
        torch.manual_seed(0)
        config = CuMAConfig(
            num_experts=EXPERTS,
            top_k=TOP_K,
            r=R,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            demographic_dim=DIM,
            router_hidden=ROUTER_HIDDEN,
            init_weights=False,
            **fields,
        )
        model = get_peft_model(base, config)
        if kind == "loop":
            model = model.get_base_model()
            for name, layer in list(model.named_modules()):
                if isinstance(layer, CuMALinear):
                    model.set_submodule(name, PerExpertLoop(layer, people()))
        return model

    return make


def people() -> torch.Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1))


def forward_of(model: nn.Module, **kwargs: Any) -> Callable[[], Any]:
    tokens = torch.randint(3, 50, (ROWS, SEQ), generator=torch.Generator().manual_seed(0))
    if isinstance(model, PeftModel) and model.active_peft_config.peft_type == "CUMA":
        kwargs["demographic_embeds"] = people()
    return lambda: model(input_ids=tokens, use_cache=False, **kwargs)


@pytest.fixture(scope="module")
def kept_beyond_the_base(wide) -> Callable[..., int]:
    base = total(kept_by(forward_of(wide("base"))))

    def measure(kind: str, forward: dict[str, Any] | None = None, **fields: Any) -> int:
        return total(kept_by(forward_of(wide(kind, **fields), **(forward or {})))) - base

    return measure


def test_the_loop_of_this_test_is_the_mixture(wide) -> None:
    with torch.no_grad():
        expected, base = forward_of(wide("cuma"))().logits, forward_of(wide("base"))().logits
        got = forward_of(wide("loop"))().logits
    assert (got - expected).abs().max() < 1e-4 * (expected - base).abs().max()


@pytest.mark.parametrize("share_a", [False, True], ids=["separate-a", "shared-a"])
@pytest.mark.parametrize("losses", [False, True], ids=["task-loss", "router-losses"])
def test_a_layer_keeps_little_beside_a_lora_of_rank_kr(kept_beyond_the_base, losses: bool, share_a: bool) -> None:
    """
    Both keep the inputs of the layers, which q, k, v and gate, up have in common: 2 · 512 + 2048 numbers per token
    (the input of o is the attention's own). A LoRA keeps `A x` beside it, 7 · 16; a mixture its router's hidden layer
    and, around the gates, some numbers per expert: with groups, of 4 routers, less than 256 + 5 · 8. That makes 1.3.
    """
    forward = {"output_router_losses": "local"} if losses else {}
    cuma = kept_beyond_the_base("cuma", forward, router_groups=GROUPS, share_a=share_a)
    lora = kept_beyond_the_base("lora")
    tokens = ROWS * SEQ
    assert lora == pytest.approx(FLOAT32 * tokens * (2 * 512 + 2048 + 7 * TOP_K * R), rel=0.01)
    assert cuma <= 1.4 * lora
    assert cuma <= kept_beyond_the_base("loop") / 8


@pytest.mark.parametrize("groups", [GROUPS, None], ids=["groups", "router-per-module"])
def test_router_losses_keep_logits_and_probabilities_alone(kept_beyond_the_base, groups: list | None) -> None:
    """
    For each router and token a logit and a probability per expert, and the normaliser. The rest doesn't grow with the
    tokens' number times the routers'.
    """
    routers, tokens = 4 if groups else 7, ROWS * SEQ
    with_losses = kept_beyond_the_base("cuma", {"output_router_losses": "local"}, router_groups=groups)
    added = with_losses - kept_beyond_the_base("cuma", router_groups=groups)
    bound = FLOAT32 * routers * tokens * (2 * EXPERTS + 1) + bytes_of_router_losses(routers, EXPERTS, tokens)
    assert 0 < added <= bound


def test_a_mixture_for_each_row_keeps_less_than_a_lora(kept_beyond_the_base) -> None:
    """With one A, and gates that the profile alone decides: `A x` has rank r, and a router runs once per profile."""
    fields = {"routing": "demographic", "share_a": True, "router_groups": GROUPS}
    assert kept_beyond_the_base("cuma", **fields) <= kept_beyond_the_base("lora")


class WideTemporaries(LiveStorages):
    """The most storages that were alive at once of `tokens · experts · r` numbers or more, of a layer's own."""

    most = 0

    def after_making(self) -> None:
        self.most = max(self.most, sum(each.nbytes >= FLOAT32 * TOKENS * EXPERTS * R for each in self.alive()))


TOKENS = 512  # more than a layer has inputs or outputs: no gradient of a parameter is as large


@pytest.mark.parametrize("share_a", [False, True], ids=["separate-a", "shared-a"])
def test_at_most_two_temporaries_of_a_layer_are_as_wide_as_all_experts(share_a: bool) -> None:
    """In the forward and in the backward, where `A x` and the gradient of its gated copy are needed at once."""
    experts = CuMAExperts(24, 40, R, EXPERTS, share_a, init_weights=False)
    x, base = torch.randn(1, TOKENS, 24, requires_grad=True), torch.randn(1, TOKENS, 40)
    gates = torch.randn(1, TOKENS, EXPERTS).softmax(-1).requires_grad_()
    with WideTemporaries() as forward:
        y = experts(x, gates, base, EXPERTS)
    with WideTemporaries() as backward:
        y.backward(torch.ones_like(y))
    assert 1 <= forward.most <= 2 and 1 <= backward.most <= 2


# ------------------------------------------------------------------------------------------------- dtypes
BFLOAT16_BASE = {"base": {"dtype": torch.bfloat16}}  # PEFT's default for it: float32 adapters


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_no_float32_copy_of_bfloat16_hidden_states_is_kept(make_model, make_batch, variant: dict, autocast) -> None:
    model, batch = make_model(**variant, **BFLOAT16_BASE), make_batch(rows=3, length=8)
    base = tiny_model("qwen3", vocab_size=50, dtype=torch.bfloat16)
    lora = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    hidden_states = 24 * model.config.hidden_size  # experts · r, the vocabulary and a router's layers are narrower

    def wide_float32(model: PeftModel, inputs: dict) -> int:
        model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept = kept_by(lambda: model(**inputs, labels=inputs["input_ids"], use_cache=False))
        return total([each for each in kept if each.dtype == torch.float32 and each.shape.numel() >= hidden_states])

    plain = {name: value for name, value in batch.items() if name != "demographic_embeds"}
    with lora.disable_adapter():
        of_base = wide_float32(lora, plain)  # of its norms
    assert wide_float32(model, batch | {"output_router_losses": "local"}) == of_base
    if not autocast:
        assert wide_float32(lora, plain) > of_base  # the control: a LoRA keeps its input as it cast it
