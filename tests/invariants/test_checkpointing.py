# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Gradients are the same with checkpointing off, non-reentrant and reentrant, whatever ran between a forward and its
backward: each recomputation sees the people of its own forward.
"""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel

MODES = (None, False, True)  # `use_reentrant`; None is without checkpointing


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointed(model: PeftModel, use_reentrant: bool | None) -> PeftModel:
    model = model.train()
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


@pytest.fixture
def gradients_of(make_model) -> Callable[..., list[dict[str, torch.Tensor]]]:
    """Gradients of `work` in each checkpointing mode; the first without checkpointing."""

    def measure(architecture: str, fields: dict, work: Callable[[PeftModel], None], modes=MODES, **kwargs) -> list:
        results = []
        for use_reentrant in modes:
            model = checkpointed(make_model(architecture, **fields, **kwargs), use_reentrant)
            torch.manual_seed(0)  # of dropout
            work(model)
            results.append(gradients(model))
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(result.keys() == trainable for result in results)
        return results

    return measure


def assert_same(results: list[dict[str, torch.Tensor]]) -> None:
    """
    A recomputation repeats the forward's operations: bitwise. But for a projection, whose gradient is a sum over all
    routers (at most 14 in two layers): reentrant checkpointing adds up layer by layer, which rounds at other places.
    """
    for result in results[1:]:
        for name, gradient in results[0].items():
            if "cuma_demographic" in name:
                bound = 14 * torch.finfo(gradient.dtype).eps * gradient.abs().max().item()
                torch.testing.assert_close(result[name], gradient, rtol=0, atol=bound)
            else:
                assert torch.equal(result[name], gradient), name


def loss_of(model: PeftModel, inputs: dict) -> torch.Tensor:
    outputs = model(**inputs, labels=inputs["input_ids"], output_router_losses="local")
    return outputs.loss + 0.7 * outputs["aux_loss"] + 0.05 * outputs["z_loss"]


def test_two_people_and_a_reference_before_the_backward(make_batch, case, gradients_of) -> None:
    """
    Two forwards with different profiles, and between them both kinds of reference forward (a frozen copy that is
    switched to, the disabled adapter) and a generation; then one backward.
    """
    architecture, fields = case
    fields["lora_dropout"] = 0.1
    batch = make_batch(lengths=[6, 2, 4])
    other = batch | {"demographic_embeds": -2 * batch["demographic_embeds"]}

    def work(model: PeftModel) -> None:
        model.add_adapter("ref", model.peft_config["default"])
        first = loss_of(model, batch)
        with torch.no_grad():
            model.set_adapter("ref")
            model(**(batch | {"demographic_embeds": 5 * batch["demographic_embeds"]}))
            model.set_adapter("default")
            with model.disable_adapter():
                model(**batch)
        model.eval().generate(**make_batch(seed=1), max_new_tokens=2)
        second = loss_of(model.train(), other)
        (first + second).backward()

    results = gradients_of(architecture, fields, work)
    assert_same(results)

    if fields.get("routing") != "semantic":  # the control: with the first people twice, routers learn something else

        def same_people(model: PeftModel) -> None:
            (loss_of(model, batch) + loss_of(model, batch)).backward()

        (wrong,) = gradients_of(architecture, fields, same_people, modes=(None,))
        assert any((wrong[name] - results[0][name]).abs().max() > 1e-3 for name in wrong)


@pytest.mark.parametrize("order", [1, -1], ids=["in-order", "reversed"])
def test_two_forwards_with_a_backward_each(make_batch, variant, gradients_of, order: int) -> None:
    batch = make_batch(lengths=[6, 2, 4])
    other = batch | {"demographic_embeds": -2 * batch["demographic_embeds"]}

    def work(model: PeftModel) -> None:
        losses = [loss_of(model, batch), loss_of(model, other)]
        for loss in losses[::order]:
            loss.backward()

    assert_same(gradients_of("qwen3", variant, work))


def test_accumulated_micro_batches_keep_their_people(make_batch, variant, gradients_of) -> None:
    """Forward, backward, forward, backward: the gradients of the second are added to those of the first."""

    def work(model: PeftModel) -> None:
        for seed in (0, 1):
            batch = make_batch(lengths=[6, 2, 4], seed=seed)
            model(**batch, labels=batch["input_ids"]).loss.backward()

    assert_same(gradients_of("qwen3", variant, work))


def test_packed_rows_are_recomputed_with_the_profile_of_each_token(make_batch, variant, gradients_of) -> None:
    batch = make_batch(rows=2, length=6)
    del batch["attention_mask"]
    ids = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]])

    def work(model: PeftModel) -> None:
        packed = {**batch, "position_ids": positions, "use_cache": False, "output_router_losses": "local"}
        first = model(**packed, demographic_ids=ids)
        second = model(**packed, demographic_ids=1 - ids)
        (first.logits.square().mean() + second.logits.mean() + first["aux_loss"] + second["z_loss"]).backward()

    assert_same(gradients_of("qwen3", variant, work))


@pytest.mark.parametrize("autocast", [True, False], ids=["float32-adapter", "bfloat16-adapter"])
def test_bfloat16_recomputes_the_same(make_batch, variant, gradients_of, autocast: bool) -> None:
    """A recomputation rounds as the forward did, and so chooses the same experts."""
    batch = make_batch(lengths=[6, 2, 4])
    other = batch | {"demographic_embeds": -2 * batch["demographic_embeds"]}

    def work(model: PeftModel) -> None:
        (loss_of(model, batch) + loss_of(model, other)).backward()

    base = {"dtype": torch.bfloat16}
    assert_same(gradients_of("qwen3", variant, work, base=base, autocast_adapter_dtype=autocast))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_nothing_of_a_step_outlives_it(make_model, make_batch, use_reentrant: bool) -> None:
    """Also where a layer outside of the checkpointed ones is adapted: its input must not be held by their graph."""
    model = checkpointed(make_model(target_modules=["lm_head", "q_proj"]), use_reentrant)
    inputs: list[weakref.ref] = []
    head = model.get_base_model().lm_head
    head.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    for losses in ({}, {"output_router_losses": "local"}):
        outputs = model(**make_batch(), **losses)
        (outputs.logits.square().mean() + outputs.get("aux_loss", 0)).backward()
        del outputs
    gc.collect()
    assert len(inputs) == 2 and [each() for each in inputs] == [None, None]
