# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
For mypy alone, `mypy --strict tests/release/typed_usage.py`: the public API as a typed program uses it. A wrong call
carries the error that it must give: mypy is strict about an `ignore` that ignores nothing, such as one of an API that
turned into `Any`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from trl_cuma import (
    CuMAConfig,
    CuMADPOConfig,
    CuMADPOTrainer,
    CuMASFTConfig,
    CuMASFTTrainer,
    DemographicProfile,
    DemographicTable,
    FieldEncoder,
    TextEncoder,
    compute_gates,
    grow_experts,
    load_demographic_encoder,
)
from trl_cuma.data import simulate_survey, to_sft_dataset
from trl_cuma.demographics import DemographicEncoder
from trl_cuma.evaluation import emd
from trl_cuma.evaluation.metrics import Estimate, t_interval
from trl_cuma.rewards import ProfileJudge
from trl_cuma.testing import tiny_model


def adapt(base: PreTrainedModel) -> PeftModel:
    """An adapter on a model."""
    model = get_peft_model(base, CuMAConfig(target_modules=["q_proj"], r=8, gate="soft", routing="joint"))
    assert isinstance(model, PeftModel)
    grow_experts(model, 2)
    return model


def train(rows: Dataset) -> None:
    """SFT, then DPO."""
    sft = CuMASFTTrainer(
        "base",
        args=CuMASFTConfig(output_dir="sft", demographic_dropout=0.1, cuma_group_by=["country"]),
        train_dataset=rows,
        peft_config=CuMAConfig(),
        demographic_encoder=FieldEncoder(min_count=2),
    )
    sft.train()
    sft.save_model("sft")
    dpo = CuMADPOTrainer("base", args=CuMADPOConfig(output_dir="dpo", cuma_adapter_path="sft"), train_dataset=rows)
    dpo.train(resume_from_checkpoint=True)


def vectors(people: Sequence[Mapping[str, str]]) -> torch.Tensor:
    """Profiles' vectors."""
    encoder: DemographicEncoder = load_demographic_encoder("sft")
    profiles = [DemographicProfile.from_value(person) for person in people]
    text: str = profiles[0].text
    table = DemographicTable(TextEncoder("encoder").fit([text]), missing="zero")
    return torch.cat([encoder.encode(profiles), table(people)])


def measure(truth: np.ndarray, predicted: np.ndarray) -> Estimate:
    """Metrics, data and the rest."""
    survey = simulate_survey(0)
    to_sft_dataset(survey, "train", prompt_profile=False)
    tiny_model("llama", vocab_size=10)
    ProfileJudge("judge", base_url="http://localhost:8000/v1", max_requests=10)
    return t_interval(emd(truth, predicted, np.full(len(truth), 4)))


def wrong() -> None:
    """What must not pass."""
    CuMAConfig(r="8")  # type: ignore[arg-type]
    CuMAConfig(gate="hard")  # type: ignore[arg-type]
    CuMAConfig(experts=8)  # type: ignore[call-arg]
    CuMASFTConfig(output_dir="sft", demographic_dropout="much")  # type: ignore[arg-type]
    FieldEncoder(min_count="2")  # type: ignore[arg-type]
    TextEncoder(pooling="mean")  # type: ignore[call-arg]
    compute_gates([0.1, 0.9])  # type: ignore[arg-type]
    load_demographic_encoder(3)  # type: ignore[arg-type]
    DemographicTable(None, missing="average")  # type: ignore[arg-type]
    t_interval("1, 2")  # type: ignore[arg-type]
    answer: int = FieldEncoder().encode([]).sum()  # type: ignore[assignment]
    print(answer)
