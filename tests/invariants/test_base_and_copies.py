# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The adapter and its base, its reference, its copies: bitwise the same, in every dtype."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from trl_cuma.adapter.layer import CuMALinear
from trl_cuma.adapter.router import CuMARouter
from trl_cuma.testing import tiny_model


# ---------------------------------------------------------------------- adapter and base
def test_a_disabled_adapter_is_the_base_bitwise(make_model, make_batch, case, precision: dict) -> None:
    architecture, fields = case
    model, batch = make_model(architecture, **fields, **precision), make_batch(lengths=[6, 3, 4])
    profiles = batch.pop("demographic_embeds")
    expected = tiny_model(architecture, vocab_size=50, **precision.get("base", {}))(**batch).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch, demographic_embeds=profiles).logits, expected)
        assert torch.equal(model(**batch).logits, expected)
    assert not torch.equal(model(**batch, demographic_embeds=profiles).logits, expected)


def test_a_new_adapter_changes_nothing_at_first(make_model, make_batch, case, precision: dict) -> None:
    architecture, fields = case
    model, batch = make_model(architecture, **fields, **precision, init_weights=True), make_batch()
    profiles = batch.pop("demographic_embeds")
    expected = tiny_model(architecture, vocab_size=50, **precision.get("base", {}))(**batch).logits
    assert torch.equal(model(**batch, demographic_embeds=profiles).logits, expected)


def test_a_reference_copied_by_name_is_the_policy(make_model, make_batch, case, precision: dict) -> None:
    """TRL makes the frozen reference of a trained adapter by adding "ref" and copying `.default.` parameters to it."""
    architecture, fields = case
    model, batch = make_model(architecture, **fields, **precision), make_batch()
    autocast = precision.get("autocast_adapter_dtype", True)
    model.add_adapter("ref", model.peft_config["default"], autocast_adapter_dtype=autocast)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(parameter.data)
    policy = model(**batch).logits
    model.set_adapter("ref")
    assert torch.equal(model(**batch).logits, policy)


# ---------------------------------------------------------------------- gates
def test_gates_sum_to_what_is_documented(make_model, make_batch, case, precision: dict, monkeypatch) -> None:
    """
    To 1, and for `softmax_topk` to the probability of the chosen; top-k of them are not zero. The arithmetic is
    float32's in every dtype, so within a few of its eps (1.2e-7 each).
    """
    architecture, fields = case
    model, batch = make_model(architecture, **fields, **precision), make_batch()
    logits, gates = [], []
    for module in model.modules():
        if isinstance(module, CuMARouter):
            module.register_forward_hook(lambda _, args, output: logits.append(output.float()))
    original = CuMALinear.gates

    def keep(layer: CuMALinear, name: str, x: torch.Tensor) -> torch.Tensor:
        before = len(logits)
        result = original(layer, name, x)
        if len(logits) > before:  # a layer with a router of its own, or the first of its group
            gates.append(result)
        return result

    monkeypatch.setattr(CuMALinear, "gates", keep)
    with torch.no_grad():
        model(**batch)
    assert len(gates) == len(logits) > 2
    gate = fields.get("gate", "topk_softmax")
    for z, g in zip(logits, gates, strict=True):
        assert g.dtype == torch.float32 and (g >= 0).all()
        probabilities = z.softmax(-1)
        expected = probabilities.topk(2, dim=-1).values.sum(-1) if gate == "softmax_topk" else torch.ones(())
        torch.testing.assert_close(g.sum(-1), expected.expand(g.shape[:-1]), rtol=0, atol=1e-6)
        assert (g.ne(0).sum(-1) == (4 if gate == "soft" else 2)).all()
        if gate == "double_softmax":  # e / (1 + e), for a router that is certain
            assert g.max() <= 0.7311


# ---------------------------------------------------------------------- copies
FRESH_PROCESS = """
import json
import sys
import torch
from peft import PeftModel
import trl_cuma
from trl_cuma.testing import tiny_model

folder = sys.argv[1]
batch = torch.load(f"{folder}/batch.pt")
for name, architecture in json.loads(sys.argv[2]).items():
    model = PeftModel.from_pretrained(tiny_model(architecture, vocab_size=50), f"{folder}/{name}").eval()
    torch.save(model(**batch).logits.detach(), f"{folder}/{name}.pt")
"""


def test_a_fresh_process_gives_the_same_logits(make_model, make_batch, every_case: dict, tmp_path) -> None:
    batch, expected = make_batch(lengths=[6, 3, 4]), {}
    torch.save(batch, tmp_path / "batch.pt")
    for name, (architecture, fields) in every_case.items():
        model = make_model(architecture, **fields)
        model.save_pretrained(tmp_path / name)
        expected[name] = model(**batch).logits
    architectures = json.dumps({name: architecture for name, (architecture, _) in every_case.items()})
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(tmp_path), architectures], check=True, timeout=120)
    for name, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), logits, rtol=0, atol=0)


def twins_of(model: nn.Module) -> list[nn.Module]:
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_model_is_copied_after_a_forward_and_before_its_backward(make_model, make_batch, case) -> None:
    """Neither does the copy hold the graph (autograd's tensors don't copy), nor does the original lose it."""
    architecture, fields = case
    model, batch = make_model(architecture, **fields).train(), make_batch(lengths=[6, 3, 4])
    other = batch | {"demographic_embeds": batch["demographic_embeds"].flip(0)}

    def loss(of: nn.Module) -> torch.Tensor:
        outputs = of(**batch, labels=batch["input_ids"], output_router_losses="local")
        return outputs.loss + outputs["aux_loss"]

    loss(model).backward()
    expected = gradients(model)
    model.zero_grad()

    alive = loss(model)
    twins = twins_of(model)
    for twin in twins:
        twin(**other, output_router_losses="local")  # with other people, before the original's backward
        loss(twin).backward()
        for name, gradient in gradients(twin).items():
            assert torch.equal(gradient, expected[name]), name
        assert gradients(twin).keys() == expected.keys()
    alive.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_copy_made_in_the_midst_of_a_call_holds_no_profile(make_model, make_batch, call: str) -> None:
    model, batch = make_model(demographic_projection=3), make_batch()
    expected = model(**batch).logits
    twins: list[nn.Module] = []

    def copy_now(*_) -> None:
        hook.remove()  # a local function would not pickle
        twins.extend(twins_of(model))

    hook = model.base_model.model.model.layers[1].register_forward_hook(copy_now)
    model(**batch) if call == "forward" else model.generate(**batch, max_new_tokens=2)
    without = {key: value for key, value in batch.items() if key != "demographic_embeds"}
    assert len(twins) == 2
    for twin in twins:
        with pytest.raises(ValueError, match="`demographic_embeds` is missing"):
            twin(**without)
        assert torch.equal(twin(**batch).logits, expected)
