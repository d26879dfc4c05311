# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Each dtype against float64. Top-k is discontinuous: a rounding that turns a near tie over swaps an expert, an error of
no size in particular. So the float64 model's choices of experts are replayed in the model under test, which leaves
rounding alone, and the choices that it would have made itself are held against the near ties.
"""

import copy

import pytest
import torch
from peft import PeftModel

from trl_cuma.adapter import router
from trl_cuma.testing import tiny_model

choose_experts = router.choose_experts


class Choices:
    """Stands in for `choose_experts`: keeps each call's logits and choice, and may return another run's choice."""

    def __init__(self, replayed: "Choices | None" = None) -> None:
        self.replayed = replayed
        self.logits: list[torch.Tensor] = []
        self.own: list[torch.Tensor] = []

    def __call__(self, logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.logits.append(logits.double())
        self.own.append(choose_experts(logits, top_k)[1].sort(-1).values)
        chosen = self.own[-1] if self.replayed is None else self.replayed.own[len(self.own) - 1]
        return logits.gather(-1, chosen), chosen

    def share_unlike(self, other: "Choices") -> float:
        """Share of (token, router) whose set of experts is another."""
        unlike = [(a != b).any(-1) for a, b in zip(self.own, other.own, strict=True)]
        return torch.cat([each.flatten() for each in unlike]).double().mean().item()


@pytest.fixture
def run(monkeypatch):
    def call(model, batch: dict, replayed: Choices | None = None) -> tuple[torch.Tensor, Choices]:
        choices = Choices(replayed)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(router, "choose_experts", choices)
            return model(**batch).logits.double(), choices

    return call


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def test_rounding_swaps_few_experts_and_costs_no_more_than_in_the_base(
    make_model, make_batch, run, case, precision: dict
) -> None:
    architecture, fields = case
    if "lora_alpha" in fields:
        fields["lora_alpha"] = 128  # not so loud that the base's rounding is no measure any more
    model, batch = make_model(architecture, **fields, **precision), make_batch(rows=8, length=8)
    exact = copy.deepcopy(model).double()  # of the same weights: no rounding of theirs is compared
    expected, reference = run(exact, batch)
    free, own = run(model, batch)
    replayed, forced = run(model, batch, reference)

    with model.disable_adapter(), exact.disable_adapter():
        base = run(exact, batch)[0]
        base_error = rms(run(model, batch)[0] - base)
    # The adapter's matrix products about double those of the base, so the variance of the rounding; the square root of
    # 2 of that, and as much for margin. Measured 1.0 to 1.5.
    assert rms(replayed - expected) < 2 * base_error
    assert rms(expected - base) > 20 * base_error  # the adapter's part is well above what would pass

    if fields.get("gate") == "soft":
        assert not own.own
        torch.testing.assert_close(replayed, free, rtol=0, atol=0)
        return
    # A router's logits are some ten roundings away from the embedding, each of at most half an eps, at random: some 2
    # eps of the largest. Measured 1 to 2; 4 for margin. A choice can differ only where the k-th logit is no further
    # than twice that from the next.
    dtype = next(p.dtype for name, p in model.named_parameters() if "embed" in name or "wte" in name)
    error = 4 * torch.finfo(dtype).eps * max(logits.abs().max().item() for logits in reference.logits)
    gaps = []
    for mine, theirs in zip(forced.logits, reference.logits, strict=True):
        assert (mine - theirs).abs().max() < error
        ordered = theirs.sort(-1, descending=True).values
        gaps.append((ordered[..., 1] - ordered[..., 2]).flatten())
    near_ties = (torch.cat(gaps) < 2 * error).double().mean().item()
    assert forced.share_unlike(reference) <= near_ties
    # Gaps have a median of 0.16, an error of 0.003 in bfloat16 turns 1 or 2 of a hundred; there are as few as 112.
    assert own.share_unlike(reference) <= (0.05 if dtype == torch.bfloat16 else 0.0)
    # The choices may spread what they change; without a swap there is nothing but rounding.
    if own.share_unlike(reference) == 0:
        assert rms(free - expected) < 2 * base_error


@pytest.mark.parametrize("fields", [{}, {"demographic_projection": 3}], ids=["plain", "projection"])
def test_a_float32_adapter_that_reads_the_profile_alone_swaps_no_expert_for_a_bfloat16_base(
    make_model, make_batch, run, fields: dict
) -> None:
    """Its routers see nothing that has been rounded to bfloat16."""
    model = make_model(routing="demographic", base={"dtype": torch.bfloat16}, target_modules="all-linear", **fields)
    batch = make_batch(rows=8, length=4)
    exact = copy.deepcopy(model).double()
    _, reference = run(exact, batch)
    _, own = run(model, batch)
    assert own.share_unlike(reference) == 0
    for mine, theirs in zip(own.logits, reference.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)  # float32: 8 eps of logits of size 1


def test_a_bfloat16_adapter_loads_as_it_was_at_its_own_dtype(make_model, make_batch, run, variant, tmp_path) -> None:
    """
    By default PEFT loads it in float32: the same numbers, but arithmetic with other roundings; its output differs by
    bfloat16's rounding, and where an expert is swapped by more.
    """
    bfloat16 = {"base": {"dtype": torch.bfloat16}, "autocast_adapter_dtype": False}
    model, batch = make_model(**variant, **bfloat16), make_batch(lengths=[6, 3, 4])
    expected, choices = run(model, batch)
    model.save_pretrained(tmp_path)

    def load(**kwargs) -> PeftModel:
        base = tiny_model("qwen3", vocab_size=50, dtype=torch.bfloat16)
        return PeftModel.from_pretrained(base, tmp_path, **kwargs).eval()

    same = load(autocast_adapter_dtype=False)
    assert {p.dtype for p in same.parameters()} == {torch.bfloat16}
    assert torch.equal(run(same, batch)[0], expected)

    default = load()
    weights = dict(model.named_parameters())
    for name, parameter in default.named_parameters():
        assert parameter.dtype == (torch.float32 if "cuma_" in name else torch.bfloat16)
        assert torch.equal(parameter, weights[name].to(parameter.dtype))
    # Logits of size 1 are rounded at some ten places in the one and not in the other: within 4 eps = 2 ** -5.
    torch.testing.assert_close(run(default, batch, choices)[0], expected, rtol=0, atol=2**-5)
