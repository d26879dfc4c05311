# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Held-out people's own choices: does the model find likelier what a person chose than what the same person rejected?

No judge stands between: whom the model knows better is measured on what people did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..demographics import DemographicTable
from ..generation.batches import context_length
from ..generation.vectors import NOT_KNOWN, can_encode, demographic_table
from .option_tokens import EncodedOptions, Prompt, prompt_key
from .options import score_options
from .resampling import metric, number_labels, resampled_mean

TIE = 1e-6  # of the log-likelihoods' size: equal up to rounding
UNIT = "person × prompt"


@dataclass(frozen=True, eq=False)
class OwnChoices:
    """
    People's choices and what the model makes of them. A choice is one answer over one or more others.

    Two models are compared on the same rows by the differences of their `scores`, with `clusters`.

    Attributes:
        person, prompt (`np.ndarray` of shape `(choices,)`): Numbers in the order of the data, no names or texts.
        log_likelihood (`list[np.ndarray]`): Of each choice, of all tokens of each candidate `(candidates,)`; the first
            is the one that the person chose.
        num_tokens (`list[np.ndarray]`): Tokens of each candidate, with those that end it.
        rows (`int`): Rows of the data.
        bad_rows (`dict[str, int]`): Rows that are left out, by reason.
    """

    person: np.ndarray
    prompt: np.ndarray
    log_likelihood: list[np.ndarray]
    num_tokens: list[np.ndarray]
    rows: int
    bad_rows: dict[str, int]

    @property
    def clusters(self) -> list[np.ndarray]:
        """The columns of labels to resample: people and prompts."""
        return [self.person, self.prompt]

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """
        Of each choice, `(choices,)`:
        - `pair_accuracy`: the share of the other candidates that are less likely than the chosen one; a tie is a half.
        - `choice_accuracy`: 1 if it is the likeliest of all; with k candidates equally likely, 1/k.
        - `pair_accuracy_per_token`, `choice_accuracy_per_token`: the same by the mean log-likelihood of a token.
        - `pair_accuracy_longer`: of the rule that people choose the answer with more tokens. A sum over tokens is
          drawn to the short answer, a mean to the fluent one: read both beside it.
        - `choice_chance`: 1 over the number of candidates. (For pairs chance is 0.5.)
        """
        per_token = [sums / sizes for sums, sizes in zip(self.log_likelihood, self.num_tokens, strict=True)]
        scores = {
            "pair_accuracy": [_pairs(values) for values in self.log_likelihood],
            "pair_accuracy_per_token": [_pairs(values) for values in per_token],
            "choice_accuracy": [_choice(values) for values in self.log_likelihood],
            "choice_accuracy_per_token": [_choice(values) for values in per_token],
            "pair_accuracy_longer": [_pairs(sizes.astype(float)) for sizes in self.num_tokens],
            "choice_chance": [1 / len(sizes) for sizes in self.num_tokens],
        }
        return {name: np.array(values, dtype=float) for name, values in scores.items()}

    def document(self, *, num_samples: int = 2000, seed: int = 0) -> dict[str, Any]:
        """
        For the evaluation's document: counts, and the mean of each of `scores` over choices, with an interval that
        resamples people and prompts.

        Args:
            num_samples, seed (`int`): Of the bootstrap.
        """
        metrics = {
            name: metric(resampled_mean(values, self.clusters, num_samples=num_samples, seed=seed), UNIT)
            for name, values in self.scores.items()
        }
        counts = {
            "rows": self.rows,
            "choices": len(self.person),
            "pairs": sum(len(sizes) - 1 for sizes in self.num_tokens),
            "people": len(np.unique(self.person)),
            "prompts": len(np.unique(self.prompt)),
            "ties": sum(int((_signs(values) == 0).sum()) for values in self.log_likelihood),
            "bad_rows": self.bad_rows,
        }
        return {"counts": counts, "metrics": metrics}


def own_choice_accuracy(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    demographic_column: str = "demographic",
    person_column: str = "person_id",
    table: DemographicTable | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_batch_tokens: int = 16_384,
    description: str | None = "Own choices",
) -> OwnChoices:
    """
    Log-likelihoods of what people chose and rejected, given the prompt and, where the model reads it, the profile.

    Rows of one person with the same prompt and the same chosen answer (as `trl-cuma prepare` writes one row per
    rejected answer) are one choice among several candidates; `conversation_id` and `turn`, where they are columns,
    tell two choices apart. Choices count alike, however many candidates they have. Prompts of one `prompt_group`,
    where that is a column, are resampled together.

    Args:
        model (`torch.nn.Module`): A causal language model, see [`demographic_table`] for what it gets of a profile.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer. Candidates are tokenized as by TRL's `DPOTrainer`, with
            the token that ends them.
        rows (`Dataset`, or mappings): With `prompt`, `chosen` and `rejected` (text or messages) of the *held-out*
            people, their profiles and ids.
        demographic_column, person_column (`str`): Names of columns.
        table (`DemographicTable`, *optional*): Makes the vectors of profiles, for any model.
        chat_template_kwargs (`Mapping`, *optional*): Arguments for the chat template.
        max_batch_tokens (`int`): Tokens of a batch, with its padding.
        description (`str`, *optional*): Name of the progress bar; `None` for none.

    Returns:
        [`OwnChoices`]. Left out, and counted, are rows without a person, a text, or a profile that the adapter needs,
        and those that are longer than the model's context.

    Raises:
        ValueError: A column is absent, or no row is left.
    """
    bad: Counter[str] = Counter()
    groups: dict[tuple, list[int]] = {}
    rows = list(rows)
    table = table or demographic_table(model)
    known = np.ones(len(rows), dtype=bool)
    if table is not None:
        known = can_encode(table, [row.get(demographic_column) for row in rows])
    for number, row in enumerate(rows):
        absent = [name for name in ("prompt", "chosen", "rejected", person_column) if name not in row]
        if absent:
            raise ValueError(f"Row {number} has no {absent}; it has {sorted(row)}. Own choices need these columns.")
        if row[person_column] is None:
            bad["no person"] += 1
        elif not (row["prompt"] and row["chosen"] and row["rejected"]):
            bad["no text"] += 1
        elif not known[number]:
            bad[NOT_KNOWN] += 1
        else:
            texts = (prompt_key(row[name]) for name in ("prompt", "chosen"))
            key = (row[person_column], row.get("conversation_id"), row.get("turn"), *texts)
            groups.setdefault(key, []).append(number)
    limit = context_length(model) or float("inf")
    kept: list[int] = []  # the first row of each choice
    encoded: list[EncodedOptions] = []
    for choice in groups.values():
        first = rows[choice[0]]
        candidates = [first["chosen"], *(rows[number]["rejected"] for number in choice)]
        entry = encode_candidates(tokenizer, first["prompt"], candidates, chat_template_kwargs)
        if entry.length > limit:
            bad["longer than the model's context"] += len(choice)
        else:
            kept.append(choice[0])
            encoded.append(entry)
    if not kept:
        raise ValueError(f"None of {len(rows)} rows holds a choice that can be scored; left out were {dict(bad)}.")
    choices = [rows[number] for number in kept]
    vectors = None if table is None else table([row.get(demographic_column) for row in choices])
    scored = score_options(
        model,
        encoded,
        np.arange(len(encoded)),
        demographic_embeds=vectors,
        max_batch_tokens=max_batch_tokens,
        description=description,
    ).log_probs
    return OwnChoices(
        person=number_labels(row[person_column] for row in choices),
        prompt=number_labels(row.get("prompt_group") or prompt_key(row["prompt"]) for row in choices),
        log_likelihood=[scores[: len(entry.options)] for scores, entry in zip(scored, encoded, strict=True)],
        num_tokens=[np.array([len(tokens) for tokens in entry.options]) for entry in encoded],
        rows=len(rows),
        bad_rows=dict(bad),
    )


def encode_candidates(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    candidates: Sequence[Prompt],
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> EncodedOptions:
    """
    The tokens of a prompt and of whole answers to it, as `DPOTrainer` makes them: the end-of-sequence token closes a
    text, the chat template a message; the answers begin where the first of them differs from the prompt alone.

    Raises:
        ValueError: An answer has no token of its own.
    """
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        head = tokenizer(prompt)["input_ids"]
        whole = [tokenizer(prompt + text.removesuffix(end) + end)["input_ids"] for text in candidates]
    else:
        kwargs = dict(chat_template_kwargs or {}) | {"return_dict": True}
        head = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, **kwargs)["input_ids"]
        whole = [tokenizer.apply_chat_template([*prompt, *said], **kwargs)["input_ids"] for said in candidates]
    start = min(_shared(head, ids) for ids in whole)
    if start == 0 or any(len(ids) == start for ids in whole):
        raise ValueError("A prompt has no token before its answers, or an answer has none. Leave such rows out.")
    return EncodedOptions(np.array(head[:start], dtype=np.int32), tuple(tuple(ids[start:]) for ids in whole))


def _shared(head: Sequence[int], ids: Sequence[int]) -> int:
    """Tokens with which both begin."""
    differs = (place for place, pair in enumerate(zip(head, ids, strict=False)) if pair[0] != pair[1])
    return next(differs, min(len(head), len(ids)))


def _signs(values: np.ndarray) -> np.ndarray:
    """Of the first over each of the others: 1, 0 or -1."""
    gap = values[0] - values[1:]
    return np.where(np.abs(gap) <= TIE * np.abs(values[0]), 0, np.sign(gap))


def _pairs(values: np.ndarray) -> float:
    return float(np.mean((_signs(values) + 1) / 2))


def _choice(values: np.ndarray) -> float:
    signs = _signs(values)
    return 0.0 if (signs < 0).any() else 1 / (1 + int((signs == 0).sum()))
