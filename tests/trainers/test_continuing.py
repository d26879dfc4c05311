# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""From one run to the next: other encoders, more experts, and what the adapter tells of its training."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from trl_cuma import FieldEncoder, grow_experts, load_demographic_encoder


def vectors(count: int = 8) -> list[list[float]]:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(0)).tolist()


def test_another_encoder_is_refused_without_a_reset(make_dpo, sft_adapter, text_encoder) -> None:
    for encoder in (text_encoder, FieldEncoder(min_count=2)):
        with pytest.raises(ValueError, match="not the encoder that this adapter was trained.*cuma_reset_router=True"):
            make_dpo(cuma_adapter_path=sft_adapter, encoder=encoder)


@pytest.mark.parametrize("kind", ["text", "field", "vectors"])
def test_a_reset_router_takes_another_encoder_and_keeps_the_experts(
    make_dpo, dpo_data, sft_adapter, text_encoder, kind, tmp_path
) -> None:
    encoder = {"text": text_encoder, "field": FieldEncoder(min_count=1), "vectors": None}[kind]
    data = dpo_data(8, demographic=vectors()) if kind == "vectors" else dpo_data(8)
    trainer = make_dpo(cuma_adapter_path=sft_adapter, cuma_reset_router=True, encoder=encoder, train=data)
    config = trainer.model.peft_config["default"]
    assert config.demographic_dim == trainer.demographic_table.dim
    assert config.demographic_encoder == (None if encoder is None else encoder.state())
    saved = {name: p for name, p in trainer.model.named_parameters() if ".cuma_experts.default." in name}
    original = PeftModel.from_pretrained(trainer.model.unload(), sft_adapter)
    kept = dict(original.named_parameters())
    assert saved and all(torch.equal(kept[name], value) for name, value in saved.items())


def test_a_reset_adapter_trains_saves_and_loads(make_sft, make_base, sft_adapter, text_encoder, tmp_path) -> None:
    trainer = make_sft(cuma_adapter_path=sft_adapter, cuma_reset_router=True, encoder=text_encoder)
    trainer.train()
    trainer.save_model(tmp_path / "reset")
    assert load_demographic_encoder(tmp_path / "reset").fingerprint == text_encoder.fingerprint
    model = PeftModel.from_pretrained(make_base(), tmp_path / "reset")
    ids, embeds = torch.tensor([[3, 4, 5]]), text_encoder.encode([{"age": "old", "country": "JP"}])
    again = model(input_ids=ids, demographic_embeds=embeds).logits
    trainer.model.eval()
    torch.testing.assert_close(again, trainer.model(input_ids=ids, demographic_embeds=embeds).logits)


def test_a_new_adapter_has_no_router_to_reset(make_sft) -> None:
    with pytest.raises(ValueError, match="`cuma_reset_router=True` with a new adapter"):
        make_sft(cuma_reset_router=True)


def test_a_grown_adapter_goes_on_training(make_dpo, make_base, sft_adapter, trainable) -> None:
    model = PeftModel.from_pretrained(make_base(), sft_adapter, is_trainable=True)
    for name, parameter in model.named_parameters():
        if name.endswith("weight_b"):
            parameter.data.normal_(std=0.1)
    experts = model.peft_config["default"].num_experts
    grow_experts(model, 2 * experts)
    trainer = make_dpo(model=model, peft_config=None, encoder=None)
    before = trainable(trainer)
    trainer.train()
    changed = [name for name, value in trainable(trainer).items() if not torch.equal(value, before[name])]
    assert changed
    first = next(entry for entry in trainer.state.log_history if "rewards/margins" in entry)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)  # the reference was grown with the policy


def test_the_adapter_tells_of_all_its_training(make_sft, make_dpo, tmp_path) -> None:
    sft = make_sft()
    sft.train()
    sft.save_model(tmp_path / "sft")
    dpo = make_dpo(cuma_adapter_path=str(tmp_path / "sft"))
    dpo.train()
    dpo.create_model_card(dataset_name="some/pairs")
    dpo.save_model(tmp_path / "dpo")
    runs = json.loads((tmp_path / "dpo" / "adapter_config.json").read_text())["training"]
    assert [run["trainer"] for run in runs] == ["CuMASFTTrainer", "CuMADPOTrainer"]
    assert runs[1]["dataset"] == "some/pairs" and runs[1]["steps"] == dpo.state.global_step > 0
    assert runs[1]["unique_profiles"] == len(dpo.demographic_table.embeds)
    logged = [entry for entry in dpo.state.log_history if "router/utilization" in entry][-1]
    assert runs[1]["last_router_utilization"] == logged["router/utilization"]
    for folder in (tmp_path / "dpo", Path(dpo.args.output_dir)):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "| trainer | CuMADPOTrainer |" in card and "| trainer | CuMASFTTrainer |" in card
        assert "| dataset | some/pairs |" in card
        assert "JP" not in card and "young" not in card


def test_every_checkpoint_has_its_card(make_sft, tmp_path) -> None:
    trainer = make_sft(save_strategy="steps", save_steps=1, max_steps=2, logging_steps=1)
    trainer.train()
    for step in (1, 2):
        card = (Path(trainer.args.output_dir) / f"checkpoint-{step}" / "README.md").read_text(encoding="utf-8")
        assert f"| steps | {step} |" in card and "| dataset |" not in card  # the data set has no name
        assert "| last router utilization |" in card
