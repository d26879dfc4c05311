# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A reward model for people who disagree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl import RewardConfig, RewardTrainer

from trl_cuma import CuMAConfig, CuMARewardConfig, CuMARewardTrainer, FieldEncoder, load_demographic_encoder
from trl_cuma.testing import tiny_model, word_tokenizer

PEOPLE = [{"country": "FR"}, {"country": "JP"}]


@pytest.fixture(scope="module")
def words():
    return word_tokenizer(["question yes no"])


@pytest.fixture
def make_classifier(words) -> Callable[..., PreTrainedModel]:
    def make(architecture: str = "qwen3") -> PreTrainedModel:
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "initializer_range": 0.2}
        config = tiny_model(architecture, vocab_size=len(words), **sizes).config
        config.num_labels = 1
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config)

    return make


def pairs(count: int = 8) -> Dataset:
    """The same question; one half of the people prefers yes, the other no."""
    rows = []
    for row in range(count):
        chosen, rejected = (" yes", " no") if row % 2 else (" no", " yes")
        rows.append({"prompt": "question", "chosen": chosen, "rejected": rejected, "demographic": PEOPLE[row % 2]})
    return Dataset.from_list(rows)


@pytest.fixture
def make_reward(quick, words, make_classifier, make_adapter) -> Callable[..., CuMARewardTrainer]:
    def make(model: Any = None, train: Any = None, peft_config: Any = "new", **fields: Any) -> CuMARewardTrainer:
        new = peft_config == "new"
        kwargs = {name: fields.pop(name) for name in ("eval_dataset", "compute_metrics") if name in fields}
        return CuMARewardTrainer(
            make_classifier() if model is None else model,
            args=CuMARewardConfig(**(quick | fields)),
            train_dataset=pairs() if train is None else train,
            processing_class=words,
            peft_config=(None if "cuma_adapter_path" in fields else make_adapter()) if new else peft_config,
            demographic_encoder=None if "cuma_adapter_path" in fields else FieldEncoder(min_count=2),
            **kwargs,
        )

    return make


def reward(model: Any, words: Any, text: str, profile: torch.Tensor) -> float:
    inputs = words([text + words.eos_token], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs, demographic_embeds=profile).logits.item()


def test_each_group_gets_its_own_reward_and_the_head_is_saved(make_reward, make_classifier, words, tmp_path) -> None:
    """No single reward can satisfy both halves: with one, the accuracy would be 1/2 and the loss ln 2 at best."""
    trainer = make_reward(max_steps=60, learning_rate=0.02, cuma_aux_loss_coef=0.0)
    head = trainer.model.get_base_model().score.modules_to_save["default"].weight
    before = head.detach().clone()
    trainer.train()
    assert not torch.equal(head, before)
    assert trainer.state.log_history[-2]["accuracy"] == 1.0
    trainer.save_model(tmp_path / "reward")
    encoder = load_demographic_encoder(tmp_path / "reward")
    base = make_classifier()
    base.score.weight.data.zero_()  # the saved head takes its place
    model = PeftModel.from_pretrained(base, tmp_path / "reward").eval()
    trainer.model.eval()
    margins = []
    for person in PEOPLE:
        profile = encoder.encode([person])
        answers = [reward(model, words, f"question {answer}", profile) for answer in ("yes", "no")]
        again = [reward(trainer.model, words, f"question {answer}", profile) for answer in ("yes", "no")]
        assert answers == pytest.approx(again, abs=1e-5)
        margins.append(answers[0] - answers[1])
    assert margins[0] < -0.5 and margins[1] > 0.5


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "bloom"])
def test_the_first_loss_is_trls_and_the_router_term(make_reward, make_classifier, words, quick, architecture) -> None:
    targets = {"gpt2": ["c_attn"], "bloom": ["query_key_value"]}.get(architecture, ["q_proj", "v_proj"])
    peft_config = CuMAConfig(target_modules=targets, num_experts=4, r=2, router_hidden=8)
    trainer = make_reward(make_classifier(architecture), peft_config=peft_config, cuma_aux_loss_coef=0.5)
    trainer.train()
    record = trainer.state.log_history[0]
    arguments = {name: value for name, value in quick.items() if name != "demographic_cache_dir"}
    plain = RewardTrainer(
        make_classifier(architecture),
        args=RewardConfig(**arguments),
        train_dataset=pairs().remove_columns("demographic"),
        processing_class=words,
    )
    plain.train()
    expected = plain.state.log_history[0]["loss"] + 0.5 * record["aux_loss"]
    assert record["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_saved_reward_model_goes_on(make_reward, make_classifier, words, tmp_path) -> None:
    """Also where the base is a name, which is loaded as a classifier with one output."""
    first = make_reward(max_steps=3, learning_rate=0.02)
    first.train()
    first.save_model(tmp_path / "first")
    make_classifier().save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    expected = first.evaluate(pairs())["eval_loss"]
    for model in (make_classifier(), str(tmp_path / "base")):
        again = make_reward(model, cuma_adapter_path=str(tmp_path / "first"))
        assert again.model.get_base_model().score.modules_to_save["default"].weight.requires_grad
        assert again.evaluate(pairs())["eval_loss"] == pytest.approx(expected, abs=1e-5)
        again.train()


def test_streaming_margins_and_named_evaluation_sets(make_reward) -> None:
    data = pairs().add_column("margin", [0.1] * 8)
    trainer = make_reward(train=data, eval_dataset={"a": pairs(4), "b": pairs(4).to_iterable_dataset()})
    trainer.train()
    assert {"eval_a_loss", "eval_b_loss"} <= trainer.evaluate().keys()


def test_metrics_of_the_user_see_the_rewards_alone(make_reward) -> None:
    seen = []

    def compute_metrics(prediction) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"mean": float(prediction.predictions.mean())}

    data = pairs(8)
    trainer = make_reward(
        eval_dataset=data, compute_metrics=compute_metrics, cuma_group_by=["country"], cuma_min_group_size=1
    )
    metrics = trainer.evaluate()
    assert seen[0].shape == (16, 1) and {"eval_mean", "eval_router/country=FR/entropy"} <= metrics.keys()


def test_an_adapter_that_leaves_the_head_at_random_is_refused(make_reward, make_adapter, sft_adapter) -> None:
    with pytest.raises(ValueError, match="task_type='CAUSAL_LM'.*neither trains nor saves the reward head.*SEQ_CLS"):
        make_reward(model="no/such-model", peft_config=make_adapter(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="task_type='CAUSAL_LM'"):
        make_reward(model="no/such-model", cuma_adapter_path=sft_adapter)
