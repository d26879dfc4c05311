# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""That GRPO's losses are TRL's, plus the router's; and that they teach people's answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import concatenate_datasets
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_cuma.adapter.layer import CuMALinear
from trl_cuma.rewards import GroupLikelihoodReward, ProfileJudge

# Each loss type of TRL 1.16, and each option that changes a loss, in some case.
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.1, "scale_rewards": "batch", "delta": 1.1},
    "dapo": {"epsilon_high": 0.28, "mask_truncated_completions": True},
    "dr_grpo": {
        "scale_rewards": "none",
        "off_policy_mask_threshold": 0.1,
        "beta": 0.1,
        "use_bias_correction_kl": True,
    },
    "bnpo": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
    "cispo": {"epsilon_high": 5.0, "multi_objective_aggregation": "normalize_then_sum"},
    "sapo": {"use_bias_correction_kl": False, "beta": 0.1, "use_adaptive_entropy": True},
    "luspo": {"importance_sampling_level": "sequence"},
    "vespo": {},
}
# Their task loss is a mean over rows or over the tokens of the whole generation batch. bnpo's is a mean over the
# tokens of a micro-batch, by definition, as TRL's is.
EXACT = [name for name in LOSSES if name != "bnpo"]


class Gradients(TrainerCallback):
    """Keeps the gradients of the last optimizer step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.last = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def losses(trainer: Any) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_one_expert_trains_as_trls_lora(loss_type, make_grpo):
    """One expert has a gate of 1, so CuMA is a LoRA: the run is TRL's own, for each loss and over several steps."""
    fields = {
        "loss_type": loss_type,
        "num_iterations": 2,  # so that ratios leave 1
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.5,
    } | LOSSES[loss_type]
    lora = LoraConfig(
        target_modules=["q_proj", "v_proj"], r=2, lora_alpha=32, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = make_grpo(trainer_class=GRPOTrainer, config_class=GRPOConfig, peft_config=lora, **fields)
    start = {name: p.detach().clone() for name, p in theirs.model.named_parameters() if p.requires_grad}
    theirs.train()
    ours = make_grpo(adapter={"num_experts": 1, "top_k": 1}, cuma_aux_loss_coef=0.0, **fields)
    for name, module in ours.model.named_modules():
        if isinstance(module, CuMALinear):
            module.cuma_experts["default"].weight_a.data.copy_(start[f"{name}.lora_A.default.weight"])
            module.cuma_experts["default"].weight_b.data.copy_(start[f"{name}.lora_B.default.weight"])
    ours.train()
    assert torch.equal(ours._buffered_inputs[0]["completion_ids"], theirs._buffered_inputs[0]["completion_ids"])
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    assert max(map(abs, losses(ours))) > 1e-3
    moved = 0.0
    for name, parameter in theirs.model.named_parameters():
        if parameter.requires_grad:
            layer, matrix = name.split(".lora_")
            own = ours.model.get_submodule(layer).cuma_experts["default"]
            own = own.weight_a if matrix.startswith("A") else own.weight_b
            torch.testing.assert_close(own.reshape(parameter.shape), parameter, rtol=0, atol=1e-4)
            moved = max(moved, (parameter - start[name]).abs().max().item())
    assert moved > 1e-2


def test_the_first_loss_is_the_plain_loras_plus_the_router_term(make_grpo):
    fields = {"loss_type": "cispo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    plain = make_grpo(trainer_class=GRPOTrainer, config_class=GRPOConfig, peft_config=lora, **fields)
    plain.train()
    ours = make_grpo(adapter={"init_weights": True}, cuma_aux_loss_coef=2.0, cuma_z_loss_coef=0.5, **fields)
    ours.train()  # right after it was made, as the other, with TRL's random state; both adapters start at zero
    record = ours.state.log_history[0]  # router losses are means over the two micro-batches
    expected = losses(plain)[0] + 2.0 * record["aux_loss"] + 0.5 * record["z_loss"]
    assert record["loss"] == pytest.approx(expected, abs=1e-5)
    assert record["aux_loss"] > 0.9 and record["z_loss"] > 0.1 and abs(losses(plain)[0]) > 1e-3


@pytest.mark.parametrize("loss_type", EXACT)
def test_accumulation_gives_the_gradient_of_the_whole_batch(loss_type, make_grpo):
    """Both runs generate for the same 8 rows at once, with the same random state: the same completions."""
    fields = {name: value for name, value in LOSSES[loss_type].items() if "entropy" not in name}
    runs = {}
    for steps in (1, 2):
        recorder = Gradients()
        trainer = make_grpo(
            loss_type=loss_type,
            cuma_aux_loss_coef=0.0,
            callbacks=[recorder],
            gradient_accumulation_steps=steps,
            per_device_train_batch_size=8 // steps,
            **fields,
        )
        trainer.train()
        batches = trainer._buffered_inputs
        assert len(batches) == steps
        runs[steps] = recorder.last, torch.cat([batch["completion_ids"] for batch in batches])
    assert torch.equal(runs[1][1], runs[2][1])
    assert max(gradient.abs().max() for gradient in runs[1][0].values()) > 1e-3
    for name, gradient in runs[1][0].items():
        torch.testing.assert_close(runs[2][0][name], gradient, rtol=0, atol=1e-6, msg=name)


def test_the_router_loss_is_the_mean_over_micro_batches(make_grpo):
    gradients = []
    for coefficient in (3.0, 0.0):
        recorder = Gradients()
        trainer = make_grpo(
            cuma_aux_loss_coef=coefficient,
            callbacks=[recorder],
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4,
            learning_rate=0.0,
        )
        trainer.train()
        gradients.append(recorder.last)
    total = 0.0
    for batch in trainer._buffered_inputs:
        ids, mask = (torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], dim=1) for k in ("ids", "mask"))
        outputs = trainer.model(
            ids,
            attention_mask=mask,
            demographic_embeds=batch["demographic_embeds"],
            output_router_losses="local",
        )
        # The router losses' gradient travels with the backward of a task loss: here one of weight 0.
        total = total + 3.0 * outputs["aux_loss"] / 2 + 0.0 * outputs.logits.sum()
    trainer.model.zero_grad()
    total.backward()
    routers = {name: p.grad for name, p in trainer.model.named_parameters() if "cuma_router" in name}
    assert max(gradient.abs().max() for gradient in routers.values()) > 1e-2
    for name, gradient in routers.items():
        torch.testing.assert_close(gradients[0][name] - gradients[1][name], gradient, rtol=0, atol=1e-5, msg=name)


def test_evaluation_reads_the_task_loss(make_grpo, grpo_data):
    evals = []
    for coefficient in (0.0, 100.0):
        trainer = make_grpo(
            eval_dataset=grpo_data(4), cuma_aux_loss_coef=coefficient, loss_type="cispo", learning_rate=0.0
        )
        trainer.train()
        evals.append(trainer.evaluate()["eval_loss"])
        assert not {"eval_aux_loss", "eval_router/entropy"} & trainer.state.log_history[-1].keys()
    assert evals[0] == pytest.approx(evals[1], abs=1e-6) and abs(evals[0]) > 1e-3


def test_a_resumed_run_is_the_uninterrupted_one(make_grpo, grpo_data, trainable):
    """Within the first epoch: in later ones, TRL's sampler begins again with the first one's order."""
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "steps_per_generation": 2, "beta": 0.1}
    data = concatenate_datasets([grpo_data()] * 2)
    whole = make_grpo(data, **fields)
    whole.train()
    resumed = make_grpo(data, **fields)
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    for name, weight in trainable(resumed).items():
        torch.testing.assert_close(weight, trainable(whole)[name], rtol=0, atol=1e-6, msg=name)


def test_people_are_taught_their_own_answers(make_grpo, grpo_data):
    """
    The prompt is the same; one group's reward is for "yes", the other's for "no". The base's head cannot give a word
    much more than 0.67: hidden states have a fixed norm, and its rows are short.
    """
    groups = [[3.0, 0.0], [0.0, 3.0]]

    def agrees(completions, demographic, **kwargs):
        wanted = ["yes" if person[0] else "no" for person in demographic]
        return [float(text == word) for text, word in zip(completions, wanted, strict=True)]

    data = grpo_data(prompt=["x x"] * 8, demographic=groups * 4)
    trainer = make_grpo(
        data,
        reward_funcs=agrees,
        adapter={"init_weights": True, "target_modules": ["o_proj", "down_proj"]},
        max_completion_length=1,
        max_steps=40,
        num_generations=8,
        per_device_train_batch_size=16,
        learning_rate=0.02,
    )

    def probabilities() -> torch.Tensor:  # of (yes, no), for each group
        prompts = trainer.processing_class(["x x"] * 2, return_tensors="pt")
        with torch.no_grad():
            logits = trainer.model(**prompts, demographic_embeds=torch.tensor(groups)).logits[:, -1]
        return logits.softmax(-1)[:, trainer.processing_class.convert_tokens_to_ids(["yes", "no"])]

    assert probabilities().max() < 0.2
    trainer.train()
    (old_yes, old_no), (young_yes, young_no) = probabilities().tolist()
    assert min(old_yes, young_no) > 0.5 and max(old_no, young_yes) < 0.1


def test_a_row_that_a_strict_reward_left_out_has_no_advantage(make_grpo) -> None:
    """
    As those of this package are. TRL sums what is left of a row: beside rewards below 0, a failure would be the best
    that can happen.
    """

    def strict(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if row % 4 == 1 else -3.0 - row for row in range(len(completions))]

    def constant(completions: list[str], **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)

    assert ProfileJudge.none_drops_row and GroupLikelihoodReward.none_drops_row
    for none_drops_row in (True, False):
        strict.none_drops_row = none_drops_row
        trainer = make_grpo(reward_funcs=[strict, constant], num_generations=4, scale_rewards="none")
        trainer.model.train()
        batch = trainer._generate_and_score_completions(list(trainer.train_dataset.select([0] * 4 + [1] * 4)))
        dropped, others = batch["advantages"][[1, 5]], batch["advantages"][[0, 2, 3, 4, 6, 7]]
        assert (dropped == 0).all() if none_drops_row else (dropped > 1).all()
        assert others.abs().max() > 0.5
