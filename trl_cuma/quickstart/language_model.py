# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
The quick start's base model: a small language model that can read profiles and knows the questions, but no group.

Its texts are survey prompts with answers drawn from the *training marginal*, independently of the profile, some with a
profile in the prompt and some without. Nothing in such an answer asks for the profile, so a language-modelling loss
alone would teach the model to ignore it. A large pretrained model does encode who is speaking; to stand in for that,
linear heads must name each field's value from the hidden state of the prompt's last token while the model is
pretrained. The heads are thrown away. [`probe_profile_reading`] measures the outcome with fresh probes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import trange
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.survey import Survey, draw_options, format_completion, format_prompt
from ..testing import tiny_model, word_tokenizer
from .settings import Settings


def field_values(survey: Survey) -> dict[str, list[str]]:
    """Every field's values, sorted."""
    return {
        field: sorted({profile[field] for profile in survey.profiles if field in profile}) for field in survey.fields
    }


def build_tokenizer(survey: Survey) -> PreTrainedTokenizerBase:
    """A word-level tokenizer for the survey's prompts, with and without profiles, and its completions."""
    texts = [format_prompt(question) + format_completion(len(question.options) - 1) for question in survey.questions]
    texts += [f"{field} {value} ." for field, values in field_values(survey).items() for value in values]
    texts += [format_completion(choice) for choice in range(survey.max_options)]
    return word_tokenizer(texts)


def pretrain(survey: Survey, tokenizer: PreTrainedTokenizerBase, settings: Settings, seed: int) -> PreTrainedModel:
    """Pretrain a small language model on the survey's questions, see the module's docstring."""
    model = tiny_model(vocab_size=len(tokenizer), seed=seed, max_position_embeddings=256, **settings.model)
    texts = _Texts(survey, tokenizer, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = torch.nn.ModuleList(torch.nn.Linear(model.config.hidden_size, n) for n in texts.num_values)
    parameters = [*model.parameters(), *heads.parameters()]
    rate, steps = settings.pretraining_learning_rate, settings.pretraining_steps
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    for _ in (bar := trange(steps, desc="Pretraining the base model", unit="step")):
        batch = texts.sample(settings.pretraining_batch_size)
        output = model(input_ids=batch["input_ids"], output_hidden_states=True)
        rows, last = torch.arange(len(batch["last"])), batch["last"]
        answer = batch["labels"][rows, last + 1]
        # The answers, one token in thirty, count as much as all other text.
        text = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss = text + F.cross_entropy(output.logits[rows, last], answer)
        state = output.hidden_states[-1][rows, last]
        reading = sum(
            F.cross_entropy(head(state), values, ignore_index=-100)
            for head, values in zip(heads, batch["values"].unbind(1), strict=True)
        )
        (loss + 0.2 * reading).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", reading=f"{reading.item():.3f}", refresh=False)
    return model.eval()


def probe_profile_reading(
    model: PreTrainedModel, survey: Survey, tokenizer: PreTrainedTokenizerBase, seed: int, num_prompts: int = 3000
) -> dict[str, float]:
    """
    How well a linear probe reads each field off the hidden state (last layer, last prompt token) of survey prompts.

    Args:
        num_prompts (`int`): prompts with random profiles and questions; a multinomial logistic regression is fitted on
            two thirds of them.

    Returns:
        `dict[str, float]`: field → accuracy on the other third.
    """
    texts = _Texts(survey, tokenizer, seed + 1, profile_share=1.0)
    batch = texts.sample(num_prompts)
    hidden = []
    with torch.no_grad():
        for start in range(0, num_prompts, 256):
            rows = slice(start, start + 256)
            states = model(input_ids=batch["input_ids"][rows], output_hidden_states=True).hidden_states[-1]
            hidden.append(states[torch.arange(len(states)), batch["last"][rows]])
    features = torch.cat(hidden).double()
    fit = slice(0, 2 * num_prompts // 3)
    test = slice(2 * num_prompts // 3, None)
    features = (features - features[fit].mean(0)) / (features[fit].std(0) + 1e-6)
    accuracy = {}
    for column, (field, values) in enumerate(field_values(survey).items()):
        target = batch["values"][:, column]
        weight = torch.zeros(features.shape[1] + 1, len(values), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure(weight=weight, optimizer=optimizer, target=target) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(features[fit] @ weight[1:] + weight[0], target[fit]) + 1e-4 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        predicted = (features[test] @ weight[1:] + weight[0]).argmax(1)
        accuracy[field] = (predicted == target[test]).double().mean().item()
    return accuracy


class _Texts:
    """Random pretraining texts; profiles are drawn uniformly, each field for itself."""

    def __init__(
        self, survey: Survey, tokenizer: PreTrainedTokenizerBase, seed: int, profile_share: float = 0.7
    ) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        self._rng = np.random.default_rng(seed)
        self._profile_share = profile_share
        self._marginal = survey.training_marginal
        self._questions = [encode(format_prompt(question)) for question in survey.questions]
        self._letters = [encode(format_completion(choice))[0] for choice in range(survey.max_options)]
        values = field_values(survey)
        self._fields = [[encode(f"{field} {value}") for value in names] for field, names in values.items()]
        self._stop = encode(".")
        self._eos, self._pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.num_values = [len(names) for names in values.values()]

    def sample(self, size: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` `(size, seq)`, `last` prompt token `(size,)`, field `values` `(size, fields)`."""
        question = self._rng.integers(len(self._questions), size=size)
        choice = draw_options(self._rng, self._marginal[question])
        values = np.stack([self._rng.integers(n, size=size) for n in self.num_values], 1)
        stated = self._rng.random(size) < self._profile_share
        rows, last = [], []
        for q, k, profile, with_profile in zip(question, choice, values, stated, strict=True):
            row = []
            if with_profile:
                row = [
                    token for field, v in zip(self._fields, profile, strict=True) for token in field[v]
                ] + self._stop
            row = row + self._questions[q]
            last.append(len(row) - 1)
            rows.append(torch.tensor([*row, self._letters[k], self._eos]))
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        return {
            "input_ids": padded.masked_fill(padded == -100, self._pad),
            "labels": padded,
            "last": torch.tensor(last),
            "values": torch.from_numpy(np.where(stated[:, None], values, -100)),
        }
