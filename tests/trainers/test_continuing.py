# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""From one run to the next: other encoders, more experts, and the checkpoints in between."""

import json
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from peft import PeftModel

from trl_cuma import CuMASFTConfig, CuMASFTTrainer, FieldEncoder, grow_experts, load_demographic_encoder
from trl_cuma.scripts import run


def vectors(count: int = 8) -> list[list[float]]:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(0)).tolist()


def test_another_encoder_is_refused_without_a_reset(make_dpo, sft_adapter, text_encoder) -> None:
    for encoder in (text_encoder, FieldEncoder(min_count=2)):
        with pytest.raises(ValueError, match="not the encoder that this adapter was trained.*cuma_reset_router=True"):
            make_dpo(cuma_adapter_path=sft_adapter, encoder=encoder)


@pytest.mark.parametrize("kind", ["text", "field", "vectors"])
def test_a_reset_router_takes_another_encoder_and_keeps_the_experts(
    make_sft, sft_data, sft_adapter, text_encoder, kind, tmp_path
) -> None:
    encoder = {"text": text_encoder, "field": FieldEncoder(min_count=1), "vectors": None}[kind]
    data = sft_data(8, demographic=vectors()) if kind == "vectors" else sft_data(8)
    trainer = make_sft(cuma_adapter_path=sft_adapter, cuma_reset_router=True, encoder=encoder, train=data)
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


def test_vectors_are_no_way_round_an_adapters_encoder(make_sft, sft_data, sft_adapter) -> None:
    """They have the right length, and nothing tells what made them."""
    with pytest.raises(ValueError, match="column holds vectors, but the adapter was trained with an encoder"):
        make_sft(sft_data(8, demographic=torch.randn(8, 4).tolist()), cuma_adapter_path=sft_adapter)


def test_a_reference_that_would_be_reset_is_refused(make_dpo, make_kto, make_grpo, make_base, sft_adapter) -> None:
    """It is a copy of the adapter, made after the routers start anew."""
    fields = {"cuma_adapter_path": sft_adapter, "cuma_reset_router": True}
    for make in (make_dpo, make_kto):
        with pytest.raises(ValueError, match="whose reference is a copy of the adapter.*Reset the routers in SFT"):
            make(model="no/such-model", **fields)
        make(ref_model=make_base(), **fields).train()  # a reference of its own
    with pytest.raises(ValueError, match="whose reference is a copy of the adapter"):
        make_grpo(model="no/such-model", beta=0.1, **fields)


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


@pytest.mark.parametrize("routing", ["joint", "semantic"])
@pytest.mark.parametrize("given_as", ["path", "model"])
def test_a_reset_without_an_encoder_keeps_the_adapters_own(
    make_sft, make_base, trainable, tmp_path, routing, given_as
) -> None:
    projection = {"demographic_projection": 3} if routing == "joint" else {}
    first = make_sft(adapter={"routing": routing, **projection})
    first.train()
    first.save_model(tmp_path / "first")
    if given_as == "path":
        reset = make_sft(cuma_adapter_path=str(tmp_path / "first"), cuma_reset_router=True)
    else:
        model = PeftModel.from_pretrained(make_base(), tmp_path / "first", is_trainable=True)
        reset = make_sft(model=model, peft_config=None, encoder=None, cuma_reset_router=True)
    before, after = trainable(first), trainable(reset)
    assert before.keys() == after.keys()
    kept = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert kept == {name for name in after if ".cuma_experts." in name}
    own, kept_config = (trainer.model.peft_config["default"] for trainer in (first, reset))
    assert kept_config.demographic_encoder == own.demographic_encoder
    assert (own.demographic_encoder is None) == (routing == "semantic")
    reset.train()


def resumable(**fields) -> dict:
    """Arguments of a run of two steps with a checkpoint after the first."""
    return {"max_steps": 2, "save_strategy": "steps", "save_steps": 1} | fields


@pytest.mark.parametrize("last", [False, True])
def test_a_run_that_reset_its_routers_is_not_resumed_without_doing_so(make_sft, sft_adapter, last) -> None:
    """The two encoders give vectors of one size, so that every tensor would fit."""
    other = FieldEncoder(min_count=1)
    reset = make_sft(**resumable(cuma_adapter_path=sft_adapter, cuma_reset_router=True, encoder=other))
    reset.train()
    own = load_demographic_encoder(sft_adapter).fingerprint
    assert reset.demographic_table.dim == load_demographic_encoder(sft_adapter).dim and own != other.fingerprint
    without = make_sft(**resumable(cuma_adapter_path=sft_adapter))
    checkpoint = str(Path(reset.args.output_dir) / f"checkpoint-{2 if last else 1}")
    with pytest.raises(ValueError) as error:
        without.train(resume_from_checkpoint=last or checkpoint)
    for part in (checkpoint, other.fingerprint[:12], own[:12], "Resume with those of the checkpoint"):
        assert part in str(error.value)


@pytest.mark.parametrize("kind", ["field", "vectors"])
def test_a_run_that_reset_its_routers_is_resumed_by_doing_so_again(
    make_sft, sft_data, sft_adapter, trainable, kind
) -> None:
    data = sft_data(8, demographic=vectors()) if kind == "vectors" else sft_data(8)

    def make():
        encoder = None if kind == "vectors" else FieldEncoder(min_count=1)
        return make_sft(data, **resumable(cuma_adapter_path=sft_adapter, cuma_reset_router=True, encoder=encoder))

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-1"))
    assert resumed.state.global_step == 2
    for name, weight in trainable(resumed).items():
        torch.testing.assert_close(weight, trainable(whole)[name], rtol=0, atol=1e-6, msg=name)
    resumed.save_model()
    runs = json.loads((Path(resumed.args.output_dir) / "adapter_config.json").read_text())["training"]
    assert [entry["steps"] for entry in runs] == [4, 2]  # the adapter's own four steps once, and all of this run


def test_vectors_are_not_resumed_with_an_encoder(make_sft, sft_data) -> None:
    make_sft(sft_data(8, demographic=vectors()), encoder=None, **resumable()).train()
    encoded = make_sft(**resumable())
    own = encoded.demographic_table.encoder.fingerprint[:12]
    with pytest.raises(ValueError, match=rf"encoder \(fingerprint none: vector.* than this run's \({own}\)"):
        encoded.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("reset", [False, True])
def test_a_recipes_encoder_is_used_where_the_routers_start_anew(
    make_base, tokenizer, sft_data, sft_adapter, tmp_path, reset
) -> None:
    tokenizer.save_pretrained(tmp_path / "base")
    make_base().save_pretrained(tmp_path / "base")
    DatasetDict(train=sft_data()).save_to_disk(tmp_path / "data")
    settings = {
        "model_name_or_path": tmp_path / "base",
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "cuma_adapter_path": sft_adapter,
        "cuma_reset_router": reset,
        "cuma_encoder": "field",
        "cuma_encoder_min_count": 1,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    run(
        CuMASFTTrainer, CuMASFTConfig, [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    )
    assert load_demographic_encoder(sft_adapter).min_count == 2
    assert load_demographic_encoder(tmp_path / "out").min_count == (1 if reset else 2)
