# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What GRPO cannot do with profiles, and what `CuMAGRPOTrainer` relies on."""

import inspect
import logging

import pytest
from peft import LoraConfig, get_peft_model
from trl import GRPOTrainer

from trl_cuma import FieldEncoder
from trl_cuma.testing import chat_tokenizer, tiny_model


@pytest.mark.parametrize(
    "fields, adapter, message",
    [
        ({"use_vllm": True}, {}, "`use_vllm=True`: .* Set `use_vllm=False`"),
        ({"use_vllm": True}, {"routing": "semantic"}, "`use_vllm=True`: .* Set `use_vllm=False`"),
        ({"use_transformers_continuous_batching": True}, {}, "`use_transformers_continuous_batching=True`"),
        ({"use_transformers_paged": True}, {}, r"formerly `use_transformers_paged`\) .* Set it to False"),
        ({"rollout_func": print}, {}, "`rollout_func=print`: .* Leave it out"),
    ],
)
def test_refuses_what_cannot_carry_a_profile_before_loading(fields, adapter, message, make_grpo):
    with pytest.raises(NotImplementedError, match=message):
        make_grpo(model="no-such/model", adapter=adapter, **fields)


def test_refuses_before_loading_also_when_it_continues(make_grpo, tmp_path):
    make_grpo().save_model(str(tmp_path))
    with pytest.raises(NotImplementedError, match="`use_transformers_continuous_batching=True`"):
        make_grpo(model="no-such/model", cuma_adapter_path=str(tmp_path), use_transformers_continuous_batching=True)


def test_refuses_a_reward_model_that_needs_profiles(make_grpo, make_model):
    with pytest.raises(NotImplementedError, match="`reward_funcs` has a PeftModelForCausalLM with CuMA layers"):
        make_grpo(model="no-such/model", reward_funcs=[print, make_model()])


def test_refuses_images_in_prompts(make_grpo, grpo_data):
    content = [{"type": "image", "image": "x"}, {"type": "text", "text": "x"}]
    tokenizer = chat_tokenizer(["x"])
    tokenizer.chat_template = "{% for message in messages %}x{% endfor %}"
    prompts = [[{"role": "user", "content": content}]] * 8
    trainer = make_grpo(grpo_data(prompt=prompts), processing_class=tokenizer)
    with pytest.raises(NotImplementedError, match="Images, in prompts"):
        trainer.train()

    trainer = make_grpo(processing_class=tokenizer)
    trainer._is_vlm, trainer.tools = True, [print]  # whose images TRL would put in the profiles' place
    with pytest.raises(NotImplementedError, match="from tools with a vision-language processor"):
        trainer.train()


def test_refuses_an_adapter_that_generate_goes_past(make_grpo, make_adapter):
    base = tiny_model("qwen3", vocab_size=14)
    with pytest.raises(ValueError, match="`task_type=None`.* Make it with `task_type='CAUSAL_LM'`"):
        make_grpo(model=get_peft_model(base, make_adapter(demographic_dim=2)), peft_config=None)


@pytest.mark.parametrize("peft_config", [None, LoraConfig()])
def test_needs_a_cuma_adapter(peft_config, make_grpo):
    with pytest.raises(TypeError, match="needs a CuMA adapter"):
        make_grpo(model="no-such/model", peft_config=peft_config)


def test_profiles_stay_out_of_the_log(make_grpo, grpo_data, caplog):
    people = [{"country": "Atlantis"}] * 8
    data = grpo_data().remove_columns("demographic").add_column("demographic", people)

    def silent(completions, **kwargs):
        return [None] * len(completions)

    trainer = make_grpo(data, reward_funcs=silent, demographic_encoder=FieldEncoder(min_count=1))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "All reward functions returned None for at least one row" in caplog.text
    assert "Atlantis" not in caplog.text


def test_what_is_relied_on_of_trl():
    """Fails when TRL changes a method that `CuMAGRPOTrainer` overrides or counts on: read them again, then edit."""
    expected = {
        "_generate_and_score_completions": ["self", "inputs"],  # a row per completion; returns a dict of tensors
        "_tokenize_prompts": ["self", "prompts"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions"],  # (rows, functions), NaN for None
        "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields"],
        "_get_per_token_logps_and_entropies": ["self", "model", "input_ids"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "get_eval_dataloader": ["self", "eval_dataset"],
    }
    for name, names in expected.items():
        parameters = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
        assert parameters[: len(names)] == names, name
    assert {"reward_funcs", "rollout_func", "tools"} <= inspect.signature(GRPOTrainer).parameters.keys()
    assert GRPOTrainer.loss_is_scaled_for_ga  # else `Trainer` would divide by the accumulation steps once more
