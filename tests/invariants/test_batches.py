# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The same person and text give the same answer, whatever shares the batch, pads it or packs it."""

import pytest
import torch

# Sums of up to 256 products in another order: 256 roundings of float32 (6e-8 each) would be 1.5e-5 at worst, of values
# up to about 1; what a padded position holds can be larger.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_a_sample_does_not_depend_on_its_batch(make_model, make_batch, case, alone) -> None:
    architecture, fields = case
    model, batch = make_model(architecture, **fields), make_batch(lengths=[6, 2, 4])
    right = model(**batch).logits
    for row, length in enumerate([6, 2, 4]):
        expected = model(**alone(batch, row)).logits[0]
        torch.testing.assert_close(right[row, :length], expected, **CLOSE)
    swapped = batch | {"demographic_embeds": batch["demographic_embeds"].flip(0)}
    change = (model(**swapped).logits[0] - right[0]).abs().max()
    assert change == 0 if fields.get("routing") == "semantic" else change > 1e-2  # the profile does matter


def test_no_gradient_reaches_another_persons_profile(make_model, make_batch, case) -> None:
    """Exactly none: what one row answers is no function of the other rows' profiles."""
    architecture, fields = case
    model, batch = make_model(architecture, **fields), make_batch(lengths=[6, 2, 4])
    embeds = batch["demographic_embeds"].requires_grad_()
    logits = model(**batch).logits
    for row in range(3):
        (gradient,) = torch.autograd.grad(logits[row].square().mean(), embeds, retain_graph=True, allow_unused=True)
        if fields.get("routing") == "semantic":
            assert gradient is None
            continue
        others = [other for other in range(3) if other != row]
        assert gradient[row].abs().max() > 1e-6
        assert not gradient[others].any()


def test_the_side_of_the_padding_does_not_matter(make_model, make_batch, case, left_padded) -> None:
    architecture, fields = case
    model, batch = make_model(architecture, **fields), make_batch(lengths=[6, 2, 4])
    left = left_padded(batch)
    if architecture != "bloom":  # it reads positions from the mask
        left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    right_logits, left_logits = model(**batch).logits, model(**left).logits
    for row, length in enumerate([6, 2, 4]):
        torch.testing.assert_close(left_logits[row, 6 - length :], right_logits[row, :length], **CLOSE)
    losses = [model(**each, output_router_losses="local")["aux_loss"].item() for each in (batch, left)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "case",
    [f"qwen3-{name}" for name in ("joint", "demographic", "semantic", "groups", "soft", "film")]
    + ["llama", "mistral", "gemma", "phi"],  # the others do not tell documents apart by `position_ids`
    indirect=True,
)
def test_packed_rows_equal_unpacked_rows(make_model, make_batch, case) -> None:
    """Logits, gradients and router losses; four documents of three people, told apart by `position_ids`."""
    architecture, fields = case
    lengths = [5, 3, 2, 6]
    people = torch.tensor([0, 1, 2, 1])
    batch = make_batch(lengths=lengths)
    profiles = batch.pop("demographic_embeds")[:3]
    documents = [batch["input_ids"][i, :length] for i, length in enumerate(lengths)]
    packed = {
        "input_ids": torch.stack([torch.cat(documents[:2]), torch.cat(documents[2:])]),
        "position_ids": torch.stack(
            [torch.cat([torch.arange(n) for n in pair]) for pair in (lengths[:2], lengths[2:])]
        ),
        "demographic_ids": torch.stack(
            [
                people[:2].repeat_interleave(torch.tensor(lengths[:2])),
                people[2:].repeat_interleave(torch.tensor([2, 6])),
            ]
        ),
        "demographic_embeds": profiles,
    }
    model = make_model(architecture, **fields).train()

    def run(inputs: dict) -> tuple[torch.Tensor, float, dict]:
        model.zero_grad()
        # transformers reads the documents from `position_ids` where there is no mask and no cache
        outputs = model(**inputs, use_cache=False, output_router_losses="local")
        if "demographic_ids" in inputs:
            logits = outputs.logits.flatten(0, 1)
        else:
            logits = outputs.logits[batch["attention_mask"].bool()]
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
        ((logits * weights).sum() / 100 + outputs["aux_loss"]).backward()
        return logits.detach(), outputs["aux_loss"].item(), {n: p.grad for n, p in model.named_parameters()}

    logits, aux_loss, gradients = run(packed)
    expected_logits, expected_aux_loss, expected_gradients = run(batch | {"demographic_embeds": profiles[people]})
    torch.testing.assert_close(logits, expected_logits, **CLOSE)
    assert aux_loss == pytest.approx(expected_aux_loss, rel=1e-5)
    compared = 0
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)
            compared += 1
    assert compared == sum(p.requires_grad for p in model.parameters())
