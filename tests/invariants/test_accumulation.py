# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Two micro-batches of four are one batch of eight, for the task loss (router losses are means over micro-batches)."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel

from trl_cuma import CuMAConfig, CuMADPOConfig, CuMADPOTrainer, CuMASFTConfig, CuMASFTTrainer, FieldEncoder
from trl_cuma.testing import chat_tokenizer, tiny_model


def test_gradients_of_two_micro_batches_add_up(make_model, make_batch, case) -> None:
    """
    Sums over tokens, so that rows of other lengths keep their weight. In float64, where nothing but a real difference
    is above 1e-9 (its roundings are 1e-16; transformers' own float32 parts, rotary tables and norms, see a row alone).
    """
    architecture, fields = case
    model = make_model(architecture, **fields, base={"dtype": torch.float64}, autocast_adapter_dtype=False).train()
    batch = make_batch(lengths=[6, 2, 4, 5, 3, 6, 2, 5])
    batch["demographic_embeds"] = batch["demographic_embeds"].double()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def gradients(rows_per_forward: int) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for rows in torch.arange(8).split(rows_per_forward):
            logits = model(**{key: value[rows] for key, value in batch.items()}).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[rows, 1:].flatten(), reduction="sum").backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    whole, halves = gradients(8), gradients(4)
    for name, gradient in whole.items():
        torch.testing.assert_close(halves[name], gradient, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_training_in_micro_batches_is_the_same(method: str, tmp_path) -> None:
    """Through TRL: two steps of SGD, which unlike Adam doesn't blow up the roundings of a small gradient."""
    people = [{"age": age, "country": country} for age in ("old", "young") for country in ("FR", "JP")]
    answers = ["yes" if row % 3 else "no, not at all" for row in range(17)]
    rows: dict = {"prompt": [f"Question {row}? " for row in range(16)], "demographic": people * 4}
    if method == "sft":
        config_class, trainer_class = CuMASFTConfig, CuMASFTTrainer
        rows["completion"] = answers[:16]
    else:
        config_class, trainer_class = CuMADPOConfig, CuMADPOTrainer
        rows |= {"chosen": answers[:16], "rejected": [f"{text}!" for text in answers[1:]]}
    tokenizer = chat_tokenizer(rows["prompt"] + answers)

    def train(micro_batches: int) -> tuple[PeftModel, list[float]]:
        args = config_class(
            output_dir=str(tmp_path / str(micro_batches)),
            use_cpu=True,
            bf16=False,
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=0.5,
            per_device_train_batch_size=8 // micro_batches,
            gradient_accumulation_steps=micro_batches,
            train_sampling_strategy="sequential",
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            cuma_aux_loss_coef=0.0,
        )
        torch.manual_seed(0)
        trainer = trainer_class(
            tiny_model("qwen3", vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2),
            args=args,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            peft_config=CuMAConfig(
                target_modules=["q_proj", "v_proj"], num_experts=4, r=4, lora_alpha=32, router_hidden=8,
                demographic_projection=3, init_weights=False,
            ),
            demographic_encoder=FieldEncoder(min_count=2),
        )  # fmt: skip
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        changed = [(p - start[name]).abs().max() for name, p in trainer.model.named_parameters() if name in start]
        assert max(changed) > 1e-3
        return trainer.model, [record["loss"] for record in trainer.state.log_history if "loss" in record]

    (whole, losses), (halves, half_losses) = train(1), train(2)
    assert len(losses) == 2 and half_losses == pytest.approx(losses, abs=1e-5)
    for (name, weight), half in zip(whole.named_parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(half, weight, rtol=1e-4, atol=1e-6, msg=name)
