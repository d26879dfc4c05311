# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a language model writes for people: the same prompts answered for each profile, kept on disk as they come."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather_object
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from ..demographics import DemographicTable
from ..demographics.profile import is_vector, read_profiles
from ..generation.batches import (
    Prompt,
    answer_end,
    check_length,
    encode_prompt,
    end_tokens,
    generate_batch,
    greedy_config,
)
from ..generation.row_sampling import row_sampling
from ..generation.vectors import profile_vectors
from .answer_store import Answer, AnswerStore, model_fingerprint
from .metrics.diversity import distinct_ratio
from .option_tokens import prompt_key
from .resampling import metric, number_labels


@dataclass(frozen=True, eq=False, repr=False)
class GeneratedAnswers:
    """
    Attributes:
        texts (`list[list[str]]`): Of each row, its answers, as many as `num_samples`.
        num_tokens (`np.ndarray` of shape `(rows, samples)`): Their lengths in tokens.
        finished (`np.ndarray` of shape `(rows, samples)`): Whether the model ended the answer, rather than
            `max_new_tokens`.
        generated (`int`): Different answers that were generated now, over all processes.
        cached (`int`): Different answers that were kept from before.
    """

    texts: list[list[str]]
    num_tokens: np.ndarray
    finished: np.ndarray
    generated: int
    cached: int

    @property
    def first(self) -> list[str]:
        """The first answer of each row."""
        return [samples[0] for samples in self.texts]

    def document(self) -> dict[str, Any]:
        """Counts for the evaluation's document."""
        return {
            "rows": len(self.texts),
            "answers": self.finished.size,
            "mean_tokens": float(self.num_tokens.mean()) if self.num_tokens.size else None,
            "cut_off": int((~self.finished).sum()),
            "empty": sum(not text.strip() for samples in self.texts for text in samples),
        }


def generate_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    demographics: Sequence[Any] | None = None,
    *,
    num_samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    batch_size: int = 16,
    cache_path: str | os.PathLike | None = None,
    fingerprint: str | None = None,
    table: DemographicTable | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    description: str | None = "Answers",
) -> GeneratedAnswers:
    """
    Answer each row's prompt for its person. For the same prompts across profiles give every pair as a row.

    An answer depends on its row alone: not on the rows beside it in its batch, which mixes profiles, nor on what was
    kept from an earlier run, nor on the number of processes. Greedy answers are so up to the rounding of matrix
    products, which in half precision may tip a near-tie. Sampling is exact as well: each token is the argmax of its
    log-probability plus Gumbel noise, which is a draw from the distribution, and each row has a noise generator of its
    own, seeded by `seed`, the prompt, the profile and the number of the sample. The model is no part of it, so that
    two models are compared on common random numbers. (Another kind of device draws other noise.)

    Equal rows are generated once; so are, greedily, those that differ in a profile that the model does not read.

    Under `accelerate launch` the answers are divided over the processes, each of which must hold the whole model and
    gets all answers back.

    Args:
        model (`torch.nn.Module`): A causal language model. One with an active CuMA adapter that reads profiles gets
            each row's vector, by the adapter's own encoder; any other gets the prompt alone. Its own generation
            settings hold but for what samples or searches.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer. Batches are padded on the left, whatever it says.
        prompts (sequence of `str` or of chat messages): One per row.
        demographics (`Sequence`, *optional*): One per row: a profile (mapping, text, `None`) or a vector.
        num_samples (`int`): Answers per row; several need a temperature.
        temperature (`float`): 0 is greedy.
        top_p (`float`): Mass of the most likely tokens that are drawn from.
        max_new_tokens (`int`): An answer that does not end before is cut off, and marked.
        seed (`int`): Of the samples.
        batch_size (`int`): Answers at a time.
        cache_path (`str` or `os.PathLike`, *optional*): An [`AnswerStore`]: each batch is kept as it is done, and what
            is there is not generated again.
        fingerprint (`str`, *optional*): What tells this model from others in the store, by default
            [`model_fingerprint`].
        table (`DemographicTable`, *optional*): Makes the vectors in place of the adapter's own encoder.
        chat_template_kwargs (`Mapping`, *optional*): Arguments for the chat template, e.g. `enable_thinking=False`.
        description (`str`, *optional*): Name of the progress bar; `None` for none.

    Returns:
        [`GeneratedAnswers`].

    Raises:
        ValueError: A setting is out of range, a prompt with its answer may be longer than the model can read, or a
            profile is missing that the adapter needs; the message names the row.
    """
    _check_settings(num_samples, temperature, top_p, max_new_tokens, batch_size)
    demographics = [None] * len(prompts) if demographics is None else demographics
    if len(demographics) != len(prompts):
        raise ValueError(f"`demographics` has {len(demographics)} rows and `prompts` {len(prompts)}. Pass one each.")
    model = extract_model_from_parallel(model)
    encoded = [encode_prompt(tokenizer, prompt, chat_template_kwargs) for prompt in prompts]
    for row, tokens in enumerate(encoded):
        check_length(model, tokens, max_new_tokens, f"The prompt in row {row}")
    vectors = profile_vectors(model, demographics, table)
    config = greedy_config(model, tokenizer, max_new_tokens)
    store = None if cache_path is None else AnswerStore(cache_path)
    settings = _digest(
        {name: value for name, value in config.to_dict().items() if name != "transformers_version"},
        None if store is None else fingerprint or model_fingerprint(model),
        [temperature, top_p] if temperature > 0 else "greedy",
    )
    people = _profile_keys(demographics) if temperature > 0 else [b""] * len(prompts)

    # The different answers to make: key → row and seed; and the keys of each row.
    wanted: dict[bytes, tuple[int, int]] = {}
    keys: list[list[bytes]] = []
    for row, (tokens, person) in enumerate(zip(encoded, people, strict=True)):
        vector = b"" if vectors is None else vectors[row].numpy().tobytes()
        draws = [_digest(seed, tokens, person, sample) for sample in range(num_samples)]
        keys.append([_digest(settings, tokens, vector, *([draw] if temperature > 0 else [])) for draw in draws])
        for key, draw in zip(keys[-1], draws, strict=True):
            wanted.setdefault(key, (row, int.from_bytes(draw[:8], "big")))

    # Long prompts first, so that a lack of memory shows at once; each process gets as many of each length.
    state = PartialState()
    order = sorted(wanted, key=lambda key: -len(encoded[wanted[key][0]]))
    mine = order[state.process_index :: state.num_processes]
    known = {} if store is None else store.read(mine)
    missing = [key for key in mine if key not in known]
    answers = dict(known)
    hidden = description is None or not state.is_main_process
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with tqdm(total=len(mine), initial=len(known), desc=description, unit="answer", disable=hidden) as bar:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                rows, seeds = zip(*(wanted[key] for key in batch), strict=True)
                processors = row_sampling(temperature, top_p, seeds)
                embeds = None if vectors is None else vectors[list(rows)]
                made = _generate(model, tokenizer, [encoded[row] for row in rows], embeds, config, processors)
                done = dict(zip(batch, made, strict=True))
                if store is not None:
                    store.write(done)
                answers |= done
                bar.update(len(batch))
    finally:
        for module in training:
            module.training = True
    generated = len(missing)
    if state.num_processes > 1:
        answers = dict(gather_object(list(answers.items())))
        generated = sum(gather_object([generated]))
    shape = (len(keys), num_samples)
    return GeneratedAnswers(
        texts=[[answers[key].text for key in row] for row in keys],
        num_tokens=np.array([[answers[key].num_tokens for key in row] for row in keys], dtype=int).reshape(shape),
        finished=np.array([[answers[key].finished for key in row] for row in keys], dtype=bool).reshape(shape),
        generated=generated,
        cached=len(order) - generated,
    )


def answer_diversity(
    answers: GeneratedAnswers,
    prompts: Sequence[Prompt],
    demographics: Sequence[Any],
    *,
    prompt_groups: Sequence[Any] | None = None,
    n: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Do the answers to a prompt differ more between profiles than within one? See [`distinct_ratio`].

    Args:
        answers ([`GeneratedAnswers`]): Of at least two samples per row.
        prompts, demographics (`Sequence`): What they were generated for.
        prompt_groups (`Sequence`, *optional*): A label for each row; by default equal prompts have the same. Give one
            where the prompt states the profile.
        n (`int`): Words per n-gram.
        seed (`int`): Of the draws and the bootstrap over prompts.

    Raises:
        ValueError: As [`distinct_ratio`].
    """
    groups = [prompt_key(prompt) for prompt in prompts] if prompt_groups is None else prompt_groups
    people = _profile_keys(demographics)
    # Of equal rows the answers are the same texts: one of them stands for all.
    rows = {(group, person): row for row, (group, person) in enumerate(zip(groups, people, strict=True))}
    labels = [(label, text) for label, row in rows.items() for text in answers.texts[row]]
    estimate = distinct_ratio(
        [text for _, text in labels],
        number_labels(group for (group, _), _ in labels),
        number_labels(person for (_, person), _ in labels),
        n,
        seed=seed,
    )
    return metric(estimate, "prompt") | {"words": n}


def _generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    embeds: torch.Tensor | None,
    config: GenerationConfig,
    processors: LogitsProcessorList,
) -> list[Answer]:
    ends = end_tokens(config)
    answers = []
    for tokens in generate_batch(model, encoded, embeds, config, processors):
        end = answer_end(tokens, ends)
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        answers.append(Answer(text, end or len(tokens), end is not None))
    return answers


def _check_settings(num_samples: int, temperature: float, top_p: float, max_new_tokens: int, batch_size: int) -> None:
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}, expected an integer of at least 1.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"`temperature` is {temperature!r}, expected 0 (greedy) or a number above.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` is {top_p!r}, expected a mass above 0 and up to 1.")
    if temperature == 0 and (num_samples > 1 or top_p < 1):
        raise ValueError("`num_samples` above 1, or `top_p` below, needs a `temperature` above 0: 0 is greedy.")


def _profile_keys(demographics: Sequence[Any]) -> list[bytes]:
    """What tells people apart where the model does not read their vectors: samples of two people are two draws."""
    profiles = read_profiles(None if is_vector(value) else value for value in demographics)
    return [
        np.asarray(value, dtype=np.float32).tobytes() if is_vector(value) else profile.text.encode()
        for value, profile in zip(demographics, profiles, strict=True)
    ]


def _digest(*parts: Any) -> bytes:
    """A hash of JSON values and bytes, in order."""
    content = [part.hex() if isinstance(part, bytes) else part for part in parts]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
