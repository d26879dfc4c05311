# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import KTOConfig, KTOTrainer

from trl_cuma.testing import tiny_model


def losses(trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_policy_kl_and_reference_see_each_rows_profile(make_kto, monkeypatch) -> None:
    """The KL term's completions are other rows', answered to this row's person."""
    rows = [
        {"prompt": f"{row} ", "completion": f"{row + 4}", "label": bool(row % 2), "demographic": [float(row)]}
        for row in range(8)
    ]
    trainer = make_kto(Dataset.from_list(rows), encoder=None)
    calls = []
    forward = trainer.model.forward

    def spy(**inputs):
        calls.append(inputs)
        return forward(**inputs)

    monkeypatch.setattr(trainer.model, "forward", spy)
    trainer.train()
    assert len(calls) == 4  # the policy's KL and answers, and the reference's
    for inputs in calls:
        texts = trainer.processing_class.batch_decode(inputs["input_ids"])
        people = inputs["demographic_embeds"][:, 0].tolist()
        assert sorted(people) == list(range(8))
        assert all(text.startswith(f"{person:.0f} ") for text, person in zip(texts, people, strict=True))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("continues", [False, True], ids=["new", "continued"])
def test_the_first_loss_is_one_half(make_kto, sft_adapter, loss_type, continues) -> None:
    """Policy and reference agree at first: 1 - sigmoid(0), with equal weights."""
    fields = {"cuma_adapter_path": sft_adapter} if continues else {}
    trainer = make_kto(loss_type=loss_type, cuma_aux_loss_coef=0.0, max_steps=3, **fields)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.5, abs=1e-6)
    assert losses(trainer)[2] < 0.5 - 1e-3


def test_the_first_loss_is_trls_and_the_router_term(make_kto, make_base, kto_data, quick, tokenizer) -> None:
    data = kto_data()
    trainer = make_kto(data, cuma_aux_loss_coef=0.5, ref_model=make_base(seed=2))
    trainer.train()
    plain = KTOTrainer(
        make_base(),
        ref_model=make_base(seed=2),
        args=KTOConfig(**{k: v for k, v in quick.items() if k != "demographic_cache_dir"}),
        train_dataset=data.remove_columns("demographic"),
        processing_class=tokenizer,
    )
    plain.train()
    record = trainer.state.log_history[0]
    assert abs(losses(plain)[0] - 0.5) > 5e-4  # another model is the reference
    assert record["loss"] == pytest.approx(losses(plain)[0] + 0.5 * record["aux_loss"], abs=1e-5)


@pytest.mark.parametrize("continues", [False, True], ids=["new", "continued"])
def test_precomputed_reference_gives_the_same_run(continues, make_kto, kto_data, sft_adapter) -> None:
    """TRL's forwards for it pass ids, mask and labels only: the profile must come along."""
    fields = {"cuma_adapter_path": sft_adapter} if continues else {}
    data = kto_data()
    runs = [
        make_kto(data, precompute_ref_log_probs=precompute, eval_dataset=data, max_steps=3, **fields)
        for precompute in (False, True)
    ]
    for trainer in runs:
        trainer.train()
    assert {"ref_logps", "ref_KL_logps"} <= set(runs[1].train_dataset.column_names)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-5)
    assert runs[1].evaluate()["eval_loss"] == pytest.approx(runs[0].evaluate()["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("trainer_name", ["make_dpo", "make_kto"])
@pytest.mark.parametrize("precompute", [False, True])
def test_an_explicit_reference_that_takes_no_profile(request, tokenizer, trainer_name, precompute) -> None:
    """GPT-2's forward, unlike Qwen's, has no room for arguments that it doesn't know."""

    def gpt2():
        return tiny_model("gpt2", vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2)

    trainer = request.getfixturevalue(trainer_name)(
        model=gpt2(),
        ref_model=gpt2(),
        adapter={"target_modules": ["c_attn"]},
        cuma_aux_loss_coef=0.0,
        precompute_ref_log_probs=precompute,
    )
    trainer.train()
    first = math.log(2) if trainer_name == "make_dpo" else 0.5
    assert losses(trainer)[0] == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("trainer_name", ["make_dpo", "make_kto"])
def test_an_adapter_as_explicit_reference_is_refused(request, make_base, sft_adapter, trainer_name) -> None:
    reference = PeftModel.from_pretrained(make_base(), sft_adapter)
    with pytest.raises(ValueError, match="`ref_model` has an adapter.*`cuma_adapter_path`"):
        request.getfixturevalue(trainer_name)(ref_model=reference)
    with pytest.raises(TypeError, match="`ref_model` must be a model, got str. Load it first"):
        request.getfixturevalue(trainer_name)(ref_model="some/model")


def test_streaming_named_and_passed_evaluation_sets(make_kto, kto_data, text_encoder) -> None:
    trainer = make_kto(
        kto_data(form="text").to_iterable_dataset(),
        encoder=text_encoder,
        eval_dataset={"a": kto_data(4, "text"), "b": kto_data(4, "text").to_iterable_dataset()},
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert {"eval_a_loss", "eval_b_loss"} <= {key for record in trainer.state.log_history for key in record}
    assert trainer.evaluate(kto_data(4, "text"))["eval_loss"] > 0
    with pytest.raises(ValueError, match="no 'demographic' column"):
        trainer.evaluate(kto_data(4).remove_columns("demographic"))


def test_accumulation_does_not_double_the_router_loss(make_kto, kto_data, aux_gradient) -> None:
    rows = kto_data(2).to_list()
    data = Dataset.from_list(rows + rows)
    fields = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2}
    single = aux_gradient(make_kto, train=data, **fields)
    double = aux_gradient(make_kto, train=data, gradient_accumulation_steps=2, **fields)
    assert single.abs().max() > 1e-4
    torch.testing.assert_close(double, single, rtol=1e-4, atol=1e-7)
