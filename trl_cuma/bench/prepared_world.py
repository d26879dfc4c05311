# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A world that is a seed of training on the user's own data and base model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import DatasetMixtureConfig, ScriptArguments

from ..data import assert_disjoint
from ..evaluation.cell_scores import Scores
from ..evaluation.evaluation_data import MARGINAL_ROWS, Wording, people_of, sample_rows, training_marginal
from ..evaluation.prediction import SurveyPrediction
from ..evaluation.resampling import number_labels
from ..evaluation.rows import read_rows
from ..evaluation.scoring import score_prediction
from ..evaluation.survey import predict_rows
from ..scripts import load_data
from .arms import Arm
from .world import Model, World

COLUMNS = {"answer_by": "letter", "demographic_column": "demographic", "person_column": "person_id"}
TRAINING_COLUMNS = ("prompt", "completion", "demographic", "person_id")
SAMPLE = 0  # the seed of what all worlds share
TRAIN_DRAW, HELD_OUT_DRAW = 2, 1  # of stand-ins


class PreparedWorld(World):
    """
    A seed of training; see [`World`]. Evaluated rows and validation answers are the same in all worlds.

    Args:
        seed (`int`): Of the adapter, of which rows are trained on, and of their order.
        folder (`Path`): Gets the training marginal and the encoders; the data stays where it is.
    """

    # ------------------------------------------------------------------ data
    def _prepare(self, folder: Path) -> dict[str, Any]:
        """
        Check the data, and take the marginal of the training answers.

        Raises:
            `ValueError`: A split or a column is missing, people or prompts are shared with training, prompts state
                the profile where they shouldn't (or don't), or the two folders hold other rows.
        """
        data = self.suite.data
        splits = self._splits(False)
        missing = [
            name for name in ("prompt", "completion", "demographic") if name not in splits["train"].column_names
        ]
        if missing:
            raise ValueError(
                f"`data.path` {data.path} has no columns {missing}; it has {sorted(splits['train'].column_names)}. "
                "Prepare it with `--task sft`, without `--messages`."
            )
        names = {data.validation_split: "validation"}
        try:
            assert_disjoint({names.get(name, name): rows for name, rows in splits.items()}, split_by=data.split_by)
        except AssertionError as error:
            raise ValueError(
                f"`data.path` {data.path}: {error} What is measured would have been trained on: split the data anew, "
                "or say in `data.split_by` what it was split by."
            ) from None
        self._check_wording(False, splits)
        if any(arm.prompt_profile for arm in self.suite.arms):
            self._splits(True)
        marginal = training_marginal(read_rows(sample_rows(splits["train"], MARGINAL_ROWS, SAMPLE), **COLUMNS))
        (folder / "marginal.json").write_text(json.dumps({name: probs.tolist() for name, probs in marginal.items()}))
        return {"baselines": {}}  # the marginal's scores come with each arm's, of the same answers

    def _path(self, prompt_profile: bool) -> tuple[str, str]:
        """The key of a folder, and the folder."""
        data = self.suite.data
        return ("data.prompt_path", data.prompt_path) if prompt_profile else ("data.path", data.path)

    def _splits(self, prompt_profile: bool) -> DatasetDict:
        """Those that are used; with the profile in the prompt, checked against those without it on first use."""
        if prompt_profile not in self._loaded:
            key, path = self._path(prompt_profile)
            found = load_data(ScriptArguments(dataset_name=path), DatasetMixtureConfig())
            names = ("train", self.suite.data.validation_split, *self.suite.data.splits)
            absent = [name for name in names if name not in found]
            if absent:
                raise ValueError(f"`{key}` {path} has no split {absent[0]!r}; it has {list(found)}.")
            splits = DatasetDict({name: found[name] for name in names})
            if prompt_profile:
                self._check_same_rows(self._splits(False), splits)
                self._check_wording(True, splits)
            self._loaded[prompt_profile] = splits
        return self._loaded[prompt_profile]

    @cached_property
    def _loaded(self) -> dict[bool, DatasetDict]:
        return {}

    def _check_wording(self, prompt_profile: bool, splits: DatasetDict) -> None:
        key, path = self._path(prompt_profile)
        states = Wording(splits[self.suite.data.splits[0]], **COLUMNS).prompt_profile
        if states is (not prompt_profile):
            kind = "state" if states else "don't state"
            option = "system" if prompt_profile else "none"
            raise ValueError(
                f"The prompts of `{key}` {path} {kind} the profile: prepare it with `--demographics {option}`."
            )

    def _check_same_rows(self, splits: DatasetDict, with_profile: DatasetDict) -> None:
        """That the two folders differ in their prompts alone, so that arms are compared on the same answers."""
        for split, rows in splits.items():
            others = with_profile[split]
            names = [name for name in rows.column_names if name != "prompt"]
            wrong = set(names) ^ {name for name in others.column_names if name != "prompt"}
            if len(rows) == len(others):
                wrong |= {name for name in names if name in others.column_names and not _equal(rows, others, name)}
            if wrong or len(rows) != len(others):
                what = f"the columns {sorted(wrong)}" if wrong else f"{len(rows):,} and {len(others):,} rows"
                raise ValueError(
                    f"`data.path` and `data.prompt_path` differ in more than their prompts: {what} of the split "
                    f"{split!r}. Prepare both by the same command, but for `--demographics`."
                )

    def _training_profiles(self) -> list[Any]:
        return self._people

    @cached_property
    def _people(self) -> list[Any]:
        """The profile of each training person; of data without people, of each of a sample of rows."""
        train = self._splits(False)["train"]
        profiles, are_people = people_of(train, "demographic", "person_id")
        return profiles if are_people else list(sample_rows(train, MARGINAL_ROWS, SAMPLE)["demographic"])

    def sft_rows(self, prompt_profile: bool, shuffled: bool, steps: int) -> Dataset:
        train = self._splits(prompt_profile)["train"]
        order = np.random.default_rng(self.seed).permutation(len(train))
        rows = train.select(np.resize(order, steps * self.suite.training.batch_size))  # over and over, if they are few
        rows = rows.select_columns([name for name in TRAINING_COLUMNS if name in rows.column_names])
        return self._of_others(rows, TRAIN_DRAW) if shuffled else rows

    def _held_out(self, split: str, arm: Arm) -> Dataset:
        """The evaluated rows of a split, as an arm sees them."""
        data = self.suite.data
        limit = data.validation_answers if split == data.validation_split else data.answers
        rows = sample_rows(self._splits(arm.prompt_profile)[split], limit, SAMPLE)
        return self._of_others(rows, HELD_OUT_DRAW) if arm.of.shuffled else rows

    def _of_others(self, rows: Dataset, draw: int) -> Dataset:
        """
        The rows with a training person's profile in the column that the router reads, drawn per person: were it per
        profile, it would be a new name for the same information. Rows without a person draw each for itself. Rows
        with distributions, of which a question has one per profile, exchange theirs within each question.
        """
        if "distribution" in rows.column_names:
            return self._exchanged(rows, draw)
        ids = rows["person_id"] if "person_id" in rows.column_names else [None] * len(rows)
        person = number_labels(row if name is None else name for row, name in enumerate(ids))
        drawn = np.random.default_rng([self.seed, draw]).integers(len(self._people), size=person.max() + 1)
        return _with_profiles(rows, [self._people[drawn[who]] for who in person])

    def _exchanged(self, rows: Dataset, draw: int) -> Dataset:
        """The profiles of each question in another order; rows of one profile and question go on sharing one."""
        asked = ("question_id",) if "question_id" in rows.column_names else ("conversation_id", "turn")
        questions = zip(*(rows[name][:] for name in asked), strict=True)
        profiles = list(rows["demographic"])
        places: dict[Any, dict[str, list[int]]] = {}
        for row, (question, profile) in enumerate(zip(questions, profiles, strict=True)):
            places.setdefault(question, {}).setdefault(str(profile), []).append(row)
        rng, column = np.random.default_rng([self.seed, draw]), list(profiles)
        for by_profile in places.values():
            groups = list(by_profile.values())
            for own, other in zip(groups, rng.permutation(len(groups)), strict=True):
                for row in own:
                    column[row] = profiles[groups[other][0]]
        return _with_profiles(rows, column)

    # ------------------------------------------------------------------ model
    def _base_path(self, folder: Path) -> str:
        return self.suite.base.path

    @property
    def rows_per_forward(self) -> int:
        return self.suite.base.micro_batch_size or self.suite.training.batch_size

    @property
    def training_arguments(self) -> dict[str, Any]:
        base = self.suite.base
        return {
            "bf16": base.dtype == "bfloat16",
            "use_cpu": not torch.cuda.is_available(),  # where bfloat16 has to be asked for
            "gradient_checkpointing": base.gradient_checkpointing,
            "max_length": None,  # a row that is cut has no answer
        }

    def base_model(self) -> PreTrainedModel:
        base = self.suite.base
        dtype = getattr(torch, base.dtype)
        quantization = None
        if base.load_in_4bit:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        return AutoModelForCausalLM.from_pretrained(
            base.path,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": 0} if torch.cuda.is_available() else None,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return AutoTokenizer.from_pretrained(self.suite.base.path)

    # ------------------------------------------------------------------ scores
    @cached_property
    def _marginal(self) -> dict[str, np.ndarray]:
        found = json.loads((self.folder / "marginal.json").read_text())
        return {name: np.array(probs) for name, probs in found.items()}

    def _score(self, arm: Arm, model: Model, split: str) -> tuple[SurveyPrediction, dict[str, Any], Scores]:
        rows = self._held_out(split, arm)
        prediction = predict_rows(model, self.tokenizer, rows, show_progress=False)
        # Groups and intervals are the business of `trl-cuma evaluate`, and of the comparisons.
        document, tables = score_prediction(prediction, self._marginal, group_by=(), num_samples=2)
        return prediction, document["metrics"], tables["cells" if prediction.truth is not None else "answers"]

    def validation_loss(self, arm: Arm, model: Model) -> float:
        return self._score(arm, model, self.suite.data.validation_split)[1]["nll"]["value"]

    def measure(self, arm: Arm, model: Model) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
        """
        `nll`, `accuracy` and, of rows with distributions, `emd` and `kl`, each with `…_marginal` (`None` where the
        questions have no training answers), and `bad_rows`; and [`Scores`] of each answer, with its row's number.
        """
        found, arrays = {}, {}
        for split in self.suite.data.splits:
            prediction, metrics, scores = self._score(arm, model, split)
            found[split] = {"bad_rows": {reason: len(rows) for reason, rows in prediction.bad_rows.items()}}
            for name in ("nll", "accuracy", *(("emd", "kl") if prediction.truth is not None else ())):
                found[split] |= {name: metrics[name]["value"], f"{name}_marginal": metrics[name].get("marginal")}
            bad = [row for rows in prediction.bad_rows.values() for row in rows]
            row = np.setdiff1d(np.arange(prediction.num_rows), bad)
            if prediction.truth is None:
                row = row[prediction.answer_weight > 0]  # the others stand for nobody, and have no scores
            arrays |= replace(scores, columns=scores.columns | {"row": row}).arrays(split)
        return found, arrays


def _with_profiles(rows: Dataset, profiles: list[Any]) -> Dataset:
    feature = rows.features["demographic"]
    return rows.remove_columns("demographic").add_column("demographic", profiles, feature=feature)


def _equal(rows: Dataset, others: Dataset, column: str) -> bool:
    values, other = (each.with_format("arrow").select_columns(column)[:][column] for each in (rows, others))
    return values.equals(other)
