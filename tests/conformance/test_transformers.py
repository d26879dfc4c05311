# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""PEFT's tests on transformers models: decoders first of all, and the other task types that PEFT has a class for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trl_cuma import CuMAConfig

from .cases import DIM, ROUTINGS, SMALL, accept_profile, options
from .models import DECODERS, load_model, model_id
from .upstream import reparametrize, upstream_module

decoder = upstream_module("test_decoder_models")
encoder_decoder = upstream_module("test_encoder_decoder_models")
feature_extraction = upstream_module("test_feature_extraction_models")
seq_classifier = upstream_module("test_seq_classifier")
token_classification = upstream_module("test_token_classification_qa")

PROMPT_LEARNING = "only for prompt learning"
LEAVE_OUT = {
    "test_adding_multiple_adapters_with_bias_raises": "CuMA trains no biases",
    "test_weighted_combination_of_adapters": "CuMA has no weighted combinations of adapters",
    "test_mixed_adapter_batches": "only for LoRA: several adapters in a batch",
    "test_generate_with_mixed_adapter_batches": "only for LoRA: several adapters in a batch",
    "test_lora_conversion": "CuMA does not convert to LoRA",
    "test_training_prompt_learning_tasks": PROMPT_LEARNING,
    "test_prompt_tuning_text_prepare_for_training": PROMPT_LEARNING,
    "test_prompt_tuning_sample_vocab_prepare_for_training": PROMPT_LEARNING,
    "test_set_requires_grad_prompt_learning_raises": PROMPT_LEARNING,
    "test_prompt_learning_forward_with_inputs_embeds": PROMPT_LEARNING,
    "test_prompt_learning_with_gradient_checkpointing": PROMPT_LEARNING,
}


def models(*architectures: str) -> list[Any]:
    return [pytest.param(model_id(name), id=name) for name in architectures]


def adapters(task_type: str, more: Callable[[str], dict[str, Any]] = lambda routing: {}) -> list[Any]:
    """Config class, fields; for every routing."""
    return [
        pytest.param(CuMAConfig, SMALL | {"routing": routing, "task_type": task_type} | more(routing), id=routing)
        for routing in ROUTINGS
    ]


class ProfiledModels:
    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> nn.Module:
        return accept_profile(load_model(*args, **kwargs))


def with_profile(cls: type) -> dict[str, Any]:
    """What makes an upstream class use our models, and a profile in each input."""

    def prepare_inputs_for_testing(self: Any) -> dict[str, torch.Tensor]:
        profiles = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
        return {**cls.prepare_inputs_for_testing(self), "demographic_embeds": profiles}

    return {"transformers_class": ProfiledModels, "prepare_inputs_for_testing": prepare_inputs_for_testing}


TestDecoderModels = reparametrize(
    decoder.TestDecoderModels,
    {"model_id": models(*DECODERS), "config_cls,config_kwargs": adapters("CAUSAL_LM")},
    minimum=25,
    leave_out=LEAVE_OUT,
    **with_profile(decoder.TestDecoderModels),
)
TestDecoderModelsWithOptions = reparametrize(
    decoder.TestDecoderModels,
    {"model_id": models("qwen3"), "config_cls,config_kwargs": adapters("CAUSAL_LM", options)},
    minimum=25,
    leave_out=LEAVE_OUT,
    **with_profile(decoder.TestDecoderModels),
)
TestEncoderDecoderModels = reparametrize(
    encoder_decoder.TestEncoderDecoderModels,
    {"model_id": models("t5", "bart"), "config_cls,config_kwargs": adapters("SEQ_2_SEQ_LM")},
    minimum=21,
    leave_out=LEAVE_OUT,
    **with_profile(encoder_decoder.TestEncoderDecoderModels),
)
TestPeftFeatureExtractionModel = reparametrize(
    feature_extraction.TestPeftFeatureExtractionModel,
    {"model_id": models("bert"), "config_cls,config_kwargs": adapters("FEATURE_EXTRACTION")},
    minimum=14,
    leave_out=LEAVE_OUT | {"test_passing_input_embeds_works": PROMPT_LEARNING},
    **with_profile(feature_extraction.TestPeftFeatureExtractionModel),
)
TestSequenceClassificationModels = reparametrize(
    seq_classifier.TestSequenceClassificationModels,
    {"model_id": models("bert-sequence", "llama-sequence"), "config_cls,config_kwargs": adapters("SEQ_CLS")},
    minimum=10,
    leave_out=LEAVE_OUT,
    **with_profile(seq_classifier.TestSequenceClassificationModels),
)
TestTokenClassificationModels = reparametrize(
    token_classification.TestTokenClassificationModels,
    {"model_id": models("bert-token"), "config_cls,config_kwargs": adapters("TOKEN_CLS")},
    minimum=1,
    leave_out=LEAVE_OUT,
    **with_profile(token_classification.TestTokenClassificationModels),
)
TestQuestionAnsweringModels = reparametrize(
    token_classification.TestQuestionAnsweringModels,
    {"model_id": models("bert-question"), "config_cls,config_kwargs": adapters("QUESTION_ANS")},
    minimum=1,
    leave_out=LEAVE_OUT,
    **with_profile(token_classification.TestQuestionAnsweringModels),
)
