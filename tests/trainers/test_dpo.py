# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from trl_cuma import CuMADPOConfig, CuMADPOTrainer, FieldEncoder


def losses(trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def adapter_weights(trainer, name: str) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if f".{name}." in n}


@pytest.mark.parametrize("form", ["dict", "text", "vector"])
def test_trains_with_trl_defaults(form, arguments, make_base, make_adapter, tokenizer, dpo_data, text_encoder):
    encoder = {"dict": FieldEncoder(min_count=2), "text": text_encoder, "vector": None}[form]
    args = CuMADPOConfig(**arguments, max_steps=2, logging_steps=1)
    assert args.remove_unused_columns and args.gradient_checkpointing and args.bf16  # TRL's own
    trainer = CuMADPOTrainer(
        make_base(),
        args=args,
        train_dataset=dpo_data(form=form),
        processing_class=tokenizer,
        peft_config=make_adapter(),
        demographic_encoder=encoder,
    )
    trainer.train()
    assert any(p.abs().max() > 0 for n, p in trainer.model.named_parameters() if "weight_b" in n)
    record = trainer.state.log_history[0]
    assert all(math.isfinite(value) for value in record.values())
    assert {"aux_loss", "router/utilization", "rewards/margins"} <= record.keys()


def test_chosen_and_rejected_share_the_pairs_profile(make_dpo, tokenizer):
    rows = [
        {"prompt": f"{row} ", "chosen": "yes", "rejected": "no, not at all", "demographic": [float(row)]}
        for row in range(8)
    ]
    trainer = make_dpo(Dataset.from_list(rows), encoder=None, per_device_train_batch_size=4)
    seen = []
    for batch in trainer.get_train_dataloader():
        assert batch["demographic_embeds"].shape == (8, 1)  # [4 chosen; 4 rejected]
        for ids, (profile,) in zip(batch["input_ids"], batch["demographic_embeds"].tolist(), strict=True):
            assert tokenizer.decode(ids).startswith(f"{profile:.0f} ")
            seen.append(profile)
    assert sorted(seen) == sorted([*range(8), *range(8)])


def test_a_new_adapter_starts_at_ln_2(make_dpo):
    trainer = make_dpo(cuma_aux_loss_coef=0.0)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert "ref" not in trainer.model.peft_config  # the base model is the reference


def test_a_continued_adapter_starts_at_ln_2(make_dpo, sft_adapter):
    trainer = make_dpo(cuma_adapter_path=sft_adapter, cuma_aux_loss_coef=0.0, max_steps=3)
    frozen = adapter_weights(trainer, "ref")
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainer)[2] < math.log(2) - 1e-3  # and learns
    assert adapter_weights(trainer, "ref").keys() == frozen.keys() and frozen
    for name, weight in adapter_weights(trainer, "ref").items():
        assert torch.equal(weight, frozen[name])


def test_the_reference_sees_the_same_profiles(make_dpo, sft_adapter):
    trainer = make_dpo(cuma_adapter_path=sft_adapter, train_sampling_strategy="sequential")
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def policy(embeds):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        with torch.no_grad():
            return trainer.model(**inputs, demographic_embeds=embeds, fused_lm_head=True).log_probs.sum(1)

    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(reference, policy(batch["demographic_embeds"]), rtol=0, atol=1e-5)
    other = policy(batch["demographic_embeds"].roll(1, 0))
    assert (reference - other).abs().max() > 1e-3  # it would have shown


def test_explicit_reference_model(make_dpo, make_base):
    trainer = make_dpo(ref_model=make_base(), cuma_aux_loss_coef=0.0)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("continues", [False, True], ids=["new", "continued"])
def test_precomputed_reference_gives_the_same_run(continues, make_dpo, dpo_data, sft_adapter):
    fields = {"cuma_adapter_path": sft_adapter} if continues else {}
    data = dpo_data()
    runs = [
        make_dpo(data, precompute_ref_log_probs=precompute, eval_dataset=data, max_steps=3, **fields)
        for precompute in (False, True)
    ]
    for trainer in runs:
        trainer.train()
    assert "ref_chosen_logps" in runs[1].train_dataset.column_names
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-5)
    assert runs[1].evaluate()["eval_loss"] == pytest.approx(runs[0].evaluate()["eval_loss"], abs=1e-5)
    assert runs[1].evaluate(dpo_data(4))["eval_loss"] > 0  # precomputed on the way


def test_the_cache_of_reference_log_probs_knows_whose_profile_each_row_has(make_dpo, dpo_data, monkeypatch):
    """The same pairs and model; in the column `others` the people have changed places."""
    keys: list[str] = []
    original = Dataset._get_cache_file_path

    def spy(self, fingerprint):
        keys.append(fingerprint)
        return original(self, fingerprint)

    monkeypatch.setattr(Dataset, "_get_cache_file_path", spy)
    people = dpo_data()["demographic"]
    data = dpo_data(others=people[1:] + people[:1])
    for column in ("demographic", "demographic", "others"):
        keys.append("next")
        make_dpo(data, demographic_column=column, precompute_ref_log_probs=True, max_length=None)
    last = [keys[i - 1] for i, key in enumerate([*keys, "next"]) if key == "next" and i]
    assert last[0] == last[1] != last[2]


def test_accumulation_does_not_double_the_router_loss(make_dpo, dpo_data, aux_gradient):
    rows = dpo_data(2).to_list()
    fields = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2}
    single = aux_gradient(make_dpo, train=Dataset.from_list(rows + rows), **fields)
    double = aux_gradient(make_dpo, train=Dataset.from_list(rows + rows), gradient_accumulation_steps=2, **fields)
    assert single.abs().max() > 1e-4
    torch.testing.assert_close(double, single, rtol=1e-4, atol=1e-7)


def test_router_losses_are_added_in_training_only(make_dpo, dpo_data):
    runs = [
        make_dpo(eval_dataset=dpo_data(4), learning_rate=0.0, cuma_aux_loss_coef=aux, cuma_z_loss_coef=z)
        for aux, z in ((0.0, 0.0), (100.0, 10.0))
    ]
    for trainer in runs:
        trainer.train()
    record = runs[1].state.log_history[0]
    # a float32 of about 150 is exact to 1e-5
    expected = losses(runs[0])[0] + 100.0 * record["aux_loss"] + 10.0 * record["z_loss"]
    assert losses(runs[1])[0] == pytest.approx(expected, abs=1e-3)
    evals = [trainer.evaluate() for trainer in runs]
    assert evals[0]["eval_loss"] == pytest.approx(evals[1]["eval_loss"], abs=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(make_dpo, dpo_data, sft_adapter):
    def make():
        return make_dpo(
            dpo_data(16),
            cuma_adapter_path=sft_adapter,
            max_steps=4,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=2,
        )

    trainer = make()
    trainer.train()
    whole = adapter_weights(trainer, "default")
    resumed = make()
    start = adapter_weights(resumed, "default")
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-2"))
    assert len(losses(resumed)) == 4  # two of them are the checkpoint's
    for name, weight in adapter_weights(resumed, "default").items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-6, msg=name)
        reference = resumed.model.get_parameter(name.replace(".default.", ".ref."))
        assert torch.equal(reference, start[name]) and not reference.requires_grad  # SFT's, still
    assert losses(resumed) == pytest.approx(losses(trainer), abs=1e-6)


def test_best_model_is_loaded_beside_the_reference(make_dpo, dpo_data, sft_adapter):
    trainer = make_dpo(
        cuma_adapter_path=sft_adapter,
        eval_dataset=dpo_data(4),
        cuma_aux_loss_coef=10.0,
        max_steps=4,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    frozen = adapter_weights(trainer, "ref")
    trainer.train()
    evals = {record["step"]: record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record}
    best = min(evals, key=evals.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evals[best], abs=1e-5)
    for name, weight in adapter_weights(trainer, "ref").items():
        assert torch.equal(weight, frozen[name])


def test_streaming_and_named_evaluation_sets(make_dpo, dpo_data, text_encoder):
    trainer = make_dpo(
        dpo_data(form="text").to_iterable_dataset(),
        encoder=text_encoder,
        eval_dataset={"a": dpo_data(4, "text"), "b": dpo_data(4, "text").to_iterable_dataset()},
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    seen = {key for record in trainer.state.log_history for key in record}
    assert {"eval_a_loss", "eval_b_loss"} <= seen
    with pytest.raises(ValueError, match=r"no 'demographic' column; it has \['chosen', 'prompt', 'rejected'\]"):
        trainer.evaluate(dpo_data(4).remove_columns("demographic"))


def test_a_named_base_is_loaded_as_trl_would(make_dpo, make_base, tokenizer, sft_adapter, tmp_path, caplog):
    path = str(tmp_path / "base")
    make_base().save_pretrained(path)
    tokenizer.save_pretrained(path)
    trainer = make_dpo(
        model=path,
        processing_class=None,
        cuma_adapter_path=sft_adapter,
        model_init_kwargs={"dtype": "bfloat16"},
        cuma_aux_loss_coef=0.0,
    )
    assert "will be ignored" not in caplog.text
    assert trainer.model.get_base_model().lm_head.weight.dtype is torch.bfloat16
    assert trainer.processing_class.eos_token == tokenizer.eos_token
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_named_base_is_quantized_when_it_is_loaded(make_dpo, make_base, sft_adapter, monkeypatch):
    loaded: dict = {}

    def create(path, **kwargs):
        loaded.update(kwargs, path=path)
        return make_base()

    monkeypatch.setattr(CuMADPOTrainer, "load_base", staticmethod(create))
    wanted = object()
    make_dpo(model="base", cuma_adapter_path=sft_adapter, quantization_config=wanted)
    assert loaded["path"] == "base" and loaded["quantization_config"] is wanted
    with pytest.raises(ValueError, match="`quantization_config` was passed both"):
        make_dpo(
            model="base",
            cuma_adapter_path=sft_adapter,
            quantization_config=wanted,
            model_init_kwargs={"quantization_config": {}},
        )
