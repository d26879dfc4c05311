# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
What the quick start runs. The learning rates were chosen once, on another simulated world than any that is reported,
from the grids here: see recipes/quickstart/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SFT_GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
DPO_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Settings:
    """
    Args:
        survey (`dict`): arguments of `simulate_survey`, or of `load_global_opinions`.
        model (`dict`): arguments of `trl_cuma.testing.tiny_model`.
        pretraining_steps, pretraining_batch_size (`int`), pretraining_learning_rate (`float`): the base model's.
        target_modules (`tuple[str, ...]`): layers that every arm adapts.
        cuma (`dict`): arguments of `CuMAConfig`.
        text_projection (`int`): `demographic_projection` with a text encoder, whose vectors are long: a smaller one,
            so that the LoRA with as many parameters stays low-rank.
        sft_steps, sft_batch_size, dpo_steps, dpo_batch_size, warmup_steps (`int`): the same for every arm.
        dpo_beta (`float`): DPO's beta.
        cells (`int`): evaluated (question, profile) cells per split.
        sft_learning_rates, dpo_learning_rates (`dict[str, float]`): arm → chosen rate.
    """

    survey: dict[str, Any] = field(default_factory=lambda: {"num_questions": 16, "answers_per_person": 16})
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "architecture": "llama",
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
    )
    pretraining_steps: int = 400
    pretraining_batch_size: int = 64
    pretraining_learning_rate: float = 3e-3
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    cuma: dict[str, Any] = field(
        default_factory=lambda: {
            "r": 8,
            "lora_alpha": 16,
            "num_experts": 4,
            "top_k": 2,
            "router_hidden": 16,
            "demographic_projection": 16,
        }
    )
    text_projection: int = 8
    sft_steps: int = 400
    sft_batch_size: int = 64
    dpo_steps: int = 100
    dpo_batch_size: int = 32
    warmup_steps: int = 20
    dpo_beta: float = 0.1
    cells: int = 800
    sft_learning_rates: dict[str, float] = field(default_factory=dict)
    dpo_learning_rates: dict[str, float] = field(default_factory=dict)


SIMULATED = Settings(
    sft_learning_rates={"lora-rank": 2e-3, "lora": 1e-3, "lora-prompt-rank": 8e-3, "lora-prompt": 4e-3, "cuma": 8e-3},
    dpo_learning_rates={"lora-rank": 1e-3, "lora": 1e-3, "lora-prompt-rank": 3e-3, "lora-prompt": 1e-3, "cuma": 3e-3},
)
REAL = Settings(
    survey={"max_questions": 40, "answers_per_cell": 100},
    sft_batch_size=32,
    sft_learning_rates=SIMULATED.sft_learning_rates,
    dpo_learning_rates=SIMULATED.dpo_learning_rates,
)
