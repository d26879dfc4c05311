# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig

from trl_cuma import CuMAConfig, DemographicProfile, FieldEncoder, TextEncoder
from trl_cuma.adapter.router import CuMARouter
from trl_cuma.testing import minilm_path


def config_of(trainer) -> CuMAConfig:
    return trainer.model.peft_config["default"]


# ---------------------------------------------------------------------- the column
def test_missing_column_names_it_and_those_present(make_sft, make_dpo, sft_data, dpo_data):
    message = r"The {} data set has no 'demographic' column; it has \['completion', 'prompt'\].*`demographic_column`"
    without = sft_data().remove_columns("demographic")
    with pytest.raises(ValueError, match=message.format("training")):
        make_sft(without)
    with pytest.raises(ValueError, match=message.format("training")):
        make_sft(without.to_iterable_dataset())
    with pytest.raises(ValueError, match=message.format("evaluation")):
        make_sft(eval_dataset=without)
    with pytest.raises(ValueError, match=message.format("b")):
        make_sft(eval_dataset={"a": sft_data(), "b": without})
    with pytest.raises(ValueError, match="no 'who' column; it has .*'demographic'"):
        make_dpo(demographic_column="who")


def test_what_is_no_training_data_set(make_sft, sft_data):
    with pytest.raises(TypeError, match=r"got DatasetDict. Of several splits, pass one"):
        make_sft(DatasetDict(train=sft_data()))


def test_split_dict_as_evaluation_sets(make_sft, sft_data):
    trainer = make_sft(eval_dataset=DatasetDict(a=sft_data(4), b=sft_data(4)))
    assert {"eval_a_loss", "eval_b_loss"} <= trainer.evaluate().keys()


@pytest.mark.parametrize("form", ["dict", "vector"])
@pytest.mark.parametrize("row", [0, 5])
def test_a_missing_profile_is_an_error_or_zero(form, row, make_sft, sft_data):
    data = sft_data(form=form)
    column = data["demographic"][:]
    column[row] = None
    data = data.remove_columns("demographic").add_column("demographic", column)
    fields = {"encoder": "field" if form == "dict" else None, "per_device_train_batch_size": 8}
    with pytest.raises(ValueError, match=rf"In the training data set: Nothing is known .* in row {row}:"):
        make_sft(data, **fields)
    with pytest.raises(ValueError, match=rf"In the evaluation data set: .* in row {row}:"):
        make_sft(sft_data(form=form), eval_dataset=data, **fields)
    trainer = make_sft(data, adapter={"missing_demographics": "zero"}, train_sampling_strategy="sequential", **fields)
    known = next(iter(trainer.get_train_dataloader()))["demographic_embeds"].any(1)
    assert (~known).nonzero().flatten().tolist() == [row]


# ---------------------------------------------------------------------- the encoder's life
def test_size_and_state_are_set_before_injection(make_sft, make_adapter):
    theirs = make_adapter()
    trainer = make_sft(peft_config=theirs)
    config = config_of(trainer)
    assert config.demographic_dim == 4  # two fields of two values
    assert config.demographic_encoder["vocabulary"] == {"age": ["old", "young"], "country": ["FR", "JP"]}
    routers = [module for module in trainer.model.modules() if isinstance(module, CuMARouter)]
    assert {router.demographic_weight.shape for router in routers} == {(8, 4)}
    assert config.task_type == "CAUSAL_LM"
    assert theirs.demographic_dim is None and theirs.demographic_encoder is None  # free for another run


def test_one_configuration_for_two_runs(make_sft, make_adapter, sft_data):
    shared = make_adapter()
    make_sft(peft_config=shared)
    second = make_sft(sft_data(form="vector"), peft_config=shared, encoder=None)
    assert config_of(second).demographic_dim == 3 and config_of(second).demographic_encoder is None


def test_conflicting_size(make_sft, make_base, make_adapter):
    with pytest.raises(ValueError, match=r"`demographic_dim=7` in CuMAConfig, but the profiles' vectors have 4"):
        make_sft(adapter={"demographic_dim": 7})
    from peft import get_peft_model

    with pytest.raises(ValueError, match=r"`demographic_dim=1024` in CuMAConfig, but .* have 4 entries"):
        make_sft(model=get_peft_model(make_base(), make_adapter(task_type="CAUSAL_LM")), peft_config=None)


def test_people_are_counted_once(make_sft, sft_data):
    # FR has four rows, all of one person; JP four rows of four people
    people = [0, 1, 0, 2, 0, 3, 0, 4]
    trainer = make_sft(sft_data(who=people), encoder=FieldEncoder(min_count=2), demographic_person_column="who")
    assert config_of(trainer).demographic_encoder["vocabulary"]["country"] == ["JP"]


def test_a_continued_adapter_never_refits(make_dpo, dpo_data, sft_adapter):
    saved = json.loads((Path(sft_adapter) / "adapter_config.json").read_text())["demographic_encoder"]
    other = dpo_data().map(lambda row: {"demographic": {"age": "old", "country": "BR"}})
    trainer = make_dpo(other, cuma_adapter_path=sft_adapter)
    trainer.train()
    assert config_of(trainer).demographic_encoder == saved
    same = FieldEncoder.from_state(saved)
    # age=old is known to it, country=BR isn't
    assert torch.equal(trainer.demographic_table.embeds, same.encode([{"age": "old"}]))
    assert config_of(make_dpo(cuma_adapter_path=sft_adapter, encoder=same)).demographic_encoder == saved


def test_another_encoder_than_the_adapters(make_dpo, sft_adapter):
    for encoder in (FieldEncoder(min_count=2), FieldEncoder(min_count=3).fit([{"age": "old"}] * 3)):
        with pytest.raises(ValueError, match="`demographic_encoder` is not the encoder that this adapter was trained"):
            make_dpo(cuma_adapter_path=sft_adapter, encoder=encoder)


def test_an_adapter_of_vectors_does_not_meet_a_fresh_encoder(make_sft, make_dpo, sft_data, tmp_path):
    trainer = make_sft(sft_data(form="vector"), encoder=None)
    trainer.save_model(str(tmp_path / "vectors"))
    for encoder in (None, FieldEncoder(min_count=2)):
        with pytest.raises(ValueError, match="was trained on vectors and keeps no encoder"):
            make_dpo(cuma_adapter_path=str(tmp_path / "vectors"), encoder=encoder)


def test_which_adapter(make_sft, make_base, make_adapter, sft_adapter):
    with pytest.raises(ValueError, match="`peft_config` and `cuma_adapter_path` were both passed"):
        make_sft(cuma_adapter_path=sft_adapter, peft_config=make_adapter())
    with pytest.raises(TypeError, match="needs a CuMA adapter, got LoraConfig"):
        make_sft(peft_config=LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="needs a CuMA adapter, got none"):
        make_sft(peft_config=None)
    continued = make_sft(cuma_adapter_path=sft_adapter).model
    with pytest.raises(ValueError, match="passed with a model that has an adapter"):
        make_sft(model=continued, cuma_adapter_path=sft_adapter)


def test_arguments_of_another_trainer(make_base, make_adapter, sft_data):
    from trl import SFTConfig

    from trl_cuma import CuMASFTTrainer

    with pytest.raises(TypeError, match="`args` must be a CuMASFTConfig, got SFTConfig"):
        CuMASFTTrainer(make_base(), args=SFTConfig(use_cpu=True), train_dataset=sft_data(), peft_config=make_adapter())


def test_vectors_need_no_encoder(make_sft, sft_data):
    with pytest.raises(ValueError, match="holds vectors, which need no encoder"):
        make_sft(sft_data(form="vector"), encoder=FieldEncoder(min_count=2))


def test_streaming_needs_a_fitted_encoder(make_sft, sft_data):
    stream = sft_data().to_iterable_dataset()
    with pytest.raises(ValueError, match=r"A streaming data set cannot fit the demographic encoder.*encoder.fit"):
        make_sft(stream, encoder=FieldEncoder(min_count=2))
    fitted = FieldEncoder(min_count=2).fit(sft_data()["demographic"])
    make_sft(stream, encoder=fitted).train()


@pytest.mark.parametrize("form", ["text", "dict"])
def test_the_default_encoder_is_the_text_encoder(form, make_sft, sft_data, text_encoder, monkeypatch):
    made: list[TextEncoder] = []

    def paper_encoder() -> TextEncoder:
        made.append(TextEncoder(str(minilm_path())))  # in place of Qwen3-Embedding-0.6B
        return made[-1]

    monkeypatch.setattr("trl_cuma.trainers.demographics.TextEncoder", paper_encoder)
    trainer = make_sft(sft_data(form=form), encoder=None)
    assert len(made) == 1 and config_of(trainer).demographic_encoder == made[0].state()
    assert config_of(trainer).demographic_dim == 384


def test_mixture_of_experts_base(make_sft, tokenizer):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 16}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), num_experts_per_tok=2, **sizes, **counts))
    with pytest.raises(ValueError, match="Set `router_aux_loss_coef=0`"):
        make_sft(model=base)
    trainer = make_sft(model=Qwen3MoeForCausalLM(base.config), router_aux_loss_coef=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 0


# ---------------------------------------------------------------------- privacy
SECRETS = ("ZZSENTINEL", "ZZRARE")


def leaks(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret.lower() in text.lower()]


@pytest.mark.parametrize("kind", ["field", "text"])
def test_no_profile_leaves_the_run(
    kind, make_sft, make_dpo, sft_data, dpo_data, text_encoder, tmp_path, caplog, capfd, monkeypatch
):
    def private(data: Dataset) -> Dataset:
        # one value is one person's, the other is shared by all others
        people = [{"city": "ZZSENTINEL" if row else "ZZRARE", "job": "any"} for row in range(len(data))]
        column = people if kind == "field" else [DemographicProfile.from_value(p).text for p in people]
        return data.remove_columns("demographic").add_column("demographic", column)

    for name in (None, "accelerate", "datasets", "huggingface_hub", "peft", "transformers", "trl", "trl_cuma"):
        caplog.set_level(logging.DEBUG, logger=name)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)  # some keep their records to themselves
    encoder = FieldEncoder(min_count=3) if kind == "field" else TextEncoder(str(minilm_path()))
    fields = {"save_strategy": "steps", "save_steps": 1, "disable_tqdm": False, "max_steps": 2}
    trainer = make_sft(private(sft_data()), eval_dataset=private(sft_data()), encoder=encoder, **fields)
    trainer.train()
    trainer.evaluate()
    adapter = str(tmp_path / "run" / "sft")
    trainer.save_model(adapter)
    dpo = make_dpo(private(dpo_data()), cuma_adapter_path=adapter, precompute_ref_log_probs=True, **fields)
    dpo.train()
    dpo.save_model()
    with pytest.raises(ValueError, match="data set: Nothing is known"):
        make_dpo(private(dpo_data()).add_item(dpo_data()[0] | {"demographic": None}), cuma_adapter_path=adapter)

    assert {"transformers", "datasets"} <= {record.name.split(".")[0] for record in caplog.records}
    assert not leaks(caplog.text)
    assert not leaks(json.dumps([trainer.state.log_history, dpo.state.log_history]))
    printed = capfd.readouterr()
    assert "profile" in printed.err and not leaks(printed.out + printed.err)  # a progress bar was shown
    kept = {}
    for path in tmp_path.rglob("*"):
        if path.is_file() and leaks(path.read_bytes().decode("latin-1")):
            kept[path.name] = leaks(path.read_bytes().decode("latin-1"))
    # The field encoder's vocabulary is what inference needs; a value of fewer than `min_count` people is not in it.
    assert kept == ({"adapter_config.json": ["ZZSENTINEL"]} if kind == "field" else {})
