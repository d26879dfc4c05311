# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from peft import get_peft_model

from trl_cuma import CuMAConfig
from trl_cuma.data import simulate_survey
from trl_cuma.data.survey import format_completion, format_prompt
from trl_cuma.evaluation.options import option_log_probs, option_tokens, split_options
from trl_cuma.quickstart.language_model import build_tokenizer
from trl_cuma.testing import tiny_model, word_tokenizer


@pytest.fixture(scope="module")
def survey():
    return simulate_survey(0, num_questions=8, num_topics=8, answers_per_person=2, max_cells=50)


@pytest.fixture(scope="module")
def tokenizer(survey):
    return build_tokenizer(survey)


@pytest.fixture(scope="module")
def model(tokenizer):
    base = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32)
    config = CuMAConfig(target_modules=["v_proj"], demographic_dim=4, num_experts=4, init_weights=False)
    config.task_type = "CAUSAL_LM"
    return get_peft_model(base, config)


@pytest.mark.parametrize("prompt_profile", [False, True])
def test_batches_equal_one_prompt_at_a_time(survey, tokenizer, model, prompt_profile):
    """Prompts of different lengths, repeated cells, another profile for each: nothing depends on the batch."""
    cells = survey.cells["held_out_people"]
    question, profile = np.tile(cells.question[:12], 2), np.tile(cells.profile[:12], 2)
    vectors = torch.randn(len(survey.profiles), 4, generator=torch.Generator().manual_seed(0))
    log_probs = option_log_probs(
        model,
        tokenizer,
        survey,
        question,
        profile,
        prompt_profile=prompt_profile,
        demographic_embeds=vectors,
        batch_size=5,
    )
    for row, (q, p) in enumerate(zip(question, profile, strict=True)):
        text = format_prompt(survey.questions[q], survey.profiles[p] if prompt_profile else None)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, demographic_embeds=vectors[p : p + 1]).logits[0, -1].log_softmax(-1)
        size = survey.num_options[q]
        letters = [tokenizer(format_completion(k))["input_ids"][0] for k in range(size)]
        np.testing.assert_allclose(log_probs[row, :size], logits[letters].numpy(), atol=1e-5)
        assert np.isneginf(log_probs[row, size:]).all()


def test_what_the_options_leave_is_outside(survey, tokenizer, model):
    cells = survey.cells["held_out_people"].sample(10)
    vectors = torch.zeros(len(survey.profiles), 4)
    log_probs = option_log_probs(model, tokenizer, survey, cells.question, cells.profile, demographic_embeds=vectors)
    probs, outside = split_options(log_probs)
    np.testing.assert_allclose(probs.sum(1), 1)
    np.testing.assert_allclose(outside, 1 - np.exp(log_probs).sum(1))
    assert (outside > 0.5).all()  # an untrained model knows nothing of letters


def test_a_letter_that_is_no_single_token_is_refused():
    with pytest.raises(ValueError, match="'B' must be one token"):
        option_tokens(word_tokenizer(["A only"]), 2)
