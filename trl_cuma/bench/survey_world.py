# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A world that is one draw of a survey, with a tiny base model of its own."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..data.global_opinions import load_global_opinions
from ..data.simulated import simulate_survey
from ..data.survey import Answers, Cells, Survey, to_preference_dataset, to_sft_dataset
from ..demographics import encoder_from_state
from ..evaluation.baselines import AdditiveModel, FactorModel
from ..evaluation.metrics.cells import summarise_cells
from ..evaluation.options import split_options, survey_log_probs
from ..quickstart.language_model import build_tokenizer, pretrain, probe_profile_reading
from ..quickstart.settings import Settings
from .arms import Arm
from .suite import Suite
from .world import Model, World, rows_name, written_whole


class SurveyWorld(World):
    """
    One draw of a suite's survey, split for training, choosing and measuring; see [`World`].

    Args:
        seed (`int`): Of the survey, the base model and the order of the rows.
        folder (`Path`): Gets the base model and the tokenized training rows.
    """

    def __init__(self, suite: Suite, seed: int, folder: Path) -> None:
        super().__init__(suite, seed, folder)
        self._vectors: dict[str, torch.Tensor] = {}
        data = suite.data
        if data.source == "simulated":
            self.survey: Survey = simulate_survey(seed, **data.args)
        else:
            self.survey = load_global_opinions(data.path, seed=seed, **data.args)
        self.cells: dict[str, Cells] = {
            name: cells.sample(data.cells, seed) for name, cells in self.survey.cells.items() if name != "validation"
        }
        answers = self.survey.answers["validation"]
        keep = np.random.default_rng(seed).permutation(len(answers))[: data.validation_answers]
        self.validation = Answers(
            *(getattr(answers, name)[keep] for name in ("person", "question", "profile", "choice"))
        )

    def _base_path(self, folder: Path) -> Path:
        return folder / "model"

    def _prepare(self, folder: Path) -> dict[str, Any]:
        """Pretrain the base model, and tokenize the training rows."""
        base = self.suite.base
        settings = Settings(
            model=base.model,
            pretraining_steps=base.steps,
            pretraining_batch_size=base.batch_size,
            pretraining_learning_rate=base.learning_rate,
        )
        tokenizer = build_tokenizer(self.survey)
        model = pretrain(self.survey, tokenizer, settings, self.seed)
        probe = probe_profile_reading(model, self.survey, tokenizer, self.seed)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        for prompt_profile in {arm.prompt_profile for arm in self.suite.arms}:
            self._prepare_rows(prompt_profile, model, tokenizer).save_to_disk(folder / rows_name(prompt_profile))
        return {"probe": probe, "baselines": self._baselines()}

    def _complete(self) -> None:
        super()._complete()
        for prompt_profile in {arm.prompt_profile for arm in self.suite.arms}:
            path = self.folder / rows_name(prompt_profile)
            if not path.exists():
                with written_whole(path) as folder:
                    self._prepare_rows(prompt_profile, self.base_model(), self.tokenizer).save_to_disk(folder)

    def _baselines(self) -> dict[str, dict[str, dict[str, float]]]:
        """What can be had without a language model, by name and split; the fitted model sees the same answers."""
        simulated = self.suite.data.source == "simulated"
        fitted = AdditiveModel(self.survey) if simulated else FactorModel(self.survey)
        predictions = {
            "training marginal": lambda cells: self.survey.training_marginal[cells.question],
            "additive model" if simulated else "factor model": lambda cells: fitted.predict(
                cells.question, cells.profile
            ),
            "oracle (truth)": lambda cells: cells.truth,
        }
        return {
            name: {split: self.score(split, predict(cells)) for split, cells in self.cells.items()}
            for name, predict in predictions.items()
        }

    def score(self, split: str, probs: np.ndarray, outside: np.ndarray | None = None) -> dict[str, float]:
        """
        Means over a split's cells, see `summarise_cells`; `emd_marginal`, `kl_marginal`: the training marginal's.

        Args:
            split (`str`): Whose cells.
            probs (`np.ndarray` of shape `(cells, max_options)`): Predicted distributions.
            outside (`np.ndarray` of shape `(cells,)`, *optional*): Probability of what is no option.
        """
        cells = self.cells[split]
        num_options = self.survey.num_options[cells.question]
        marginal = summarise_cells(cells.truth, self.survey.training_marginal[cells.question], num_options)
        own = summarise_cells(cells.truth, probs, num_options, outside)
        return {**own, "emd_marginal": marginal["emd"], "kl_marginal": marginal["kl"]}

    @property
    def training_arguments(self) -> dict[str, Any]:
        return {"bf16": False, "gradient_checkpointing": False}

    def base_model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self._base_path(self.folder), dtype=torch.float32)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self._base_path(self.folder))

    def _training_profiles(self) -> list[Any]:
        train = self.survey.answers["train"]
        _, first = np.unique(train.person, return_index=True)
        return [self.survey.profiles[index] for index in train.profile[first]]

    def predict(self, arm: Arm, model: Model, question: np.ndarray, profile: np.ndarray) -> np.ndarray:
        """Log-probability of each option in cells, `(cells, max_options)`."""
        vectors = None
        if arm.of.reads_profiles:
            vectors = self._vectors_by(model.peft_config["default"].demographic_encoder)
            if arm.of.shuffled:
                vectors = vectors[torch.from_numpy(self.other_profile)]
        return survey_log_probs(
            model,
            self.tokenizer,
            self.survey,
            question,
            profile,
            prompt_profile=arm.prompt_profile,
            demographic_embeds=vectors,
        )

    def _vectors_by(self, state: dict[str, Any]) -> torch.Tensor:
        """All profiles' vectors, `(profiles, dim)`, by an encoder's state; once, for a sentence encoder is slow."""
        key = state["fingerprint"]
        if key not in self._vectors:
            self._vectors[key] = encoder_from_state(state).encode(self.survey.profiles, missing="zero")
        return self._vectors[key]

    def validation_loss(self, arm: Arm, model: Model) -> float:
        answers = self.validation
        probs = split_options(self.predict(arm, model, answers.question, answers.profile))[0]
        chosen = probs[np.arange(len(answers)), answers.choice]
        return float(-np.log(np.maximum(chosen, 1e-8)).mean())

    def measure(self, arm: Arm, model: Model) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
        """Scores, see [`SurveyWorld.score`]; and the log-probabilities of each cell's options, by split."""
        scores, arrays = {}, {}
        for split, cells in self.cells.items():
            log_probs = self.predict(arm, model, cells.question, cells.profile)
            arrays[split] = log_probs.astype(np.float32)
            scores[split] = self.score(split, *split_options(log_probs))
        return scores, arrays

    @cached_property
    def other_profile(self) -> np.ndarray:
        """Each profile's stand-in for an arm with shuffled profiles, `(profiles,)`: another training person's."""
        train = self.survey.answers["train"]
        _, first = np.unique(train.person, return_index=True)
        rng = np.random.default_rng([self.seed, 1])
        return rng.choice(train.profile[first], size=len(self.survey.profiles))

    def sft_rows(self, prompt_profile: bool, shuffled: bool, steps: int) -> Dataset:
        """Tokenized training rows, as many as the steps see."""
        rows = load_from_disk(str(self.folder / rows_name(prompt_profile)))
        return self._of_others(rows.select(range(steps * self.suite.training.batch_size)), shuffled)

    def _prepare_rows(
        self, prompt_profile: bool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Dataset:
        """TRL's own preparation, once for all runs."""
        training = self.suite.training
        rows = to_sft_dataset(self.survey, "train", prompt_profile=prompt_profile)
        rows = _first_rows(rows, training.steps * max(training.factors) * training.batch_size, self.seed)
        with tempfile.TemporaryDirectory() as scratch:
            args = SFTConfig(output_dir=scratch, report_to="none", bf16=False)
            trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        return trainer.train_dataset

    def dpo_rows(self, prompt_profile: bool, shuffled: bool) -> Dataset:
        """Preference pairs for a run of DPO."""
        rows = to_preference_dataset(self.survey, "train", seed=self.seed, prompt_profile=prompt_profile)
        rows = self._of_others(rows, shuffled)
        return _first_rows(rows, self.suite.dpo.steps * self.suite.dpo.batch_size, self.seed)

    def _of_others(self, rows: Dataset, shuffled: bool) -> Dataset:
        """
        The rows with another person's profile in the column that the router reads; drawn per person, so that no
        profile stands for another one: that would be a new name for the same information.
        """
        if not shuffled:
            return rows
        train = self.survey.answers["train"]
        people, first = np.unique(train.person, return_index=True)
        others = train.profile[first][np.random.default_rng([self.seed, 2]).permutation(len(people))]
        profiles = {
            f"person-{person}": {name: self.survey.profiles[other].get(name) for name in self.survey.fields}
            for person, other in zip(people.tolist(), others.tolist(), strict=True)
        }
        feature = rows.features["demographic"]
        column = [profiles[person] for person in rows["person_id"]]
        return rows.remove_columns("demographic").add_column("demographic", column, feature=feature)


def _first_rows(rows: Dataset, num_rows: int, seed: int) -> Dataset:
    """That many random rows, over and over where there are fewer: what is not trained on need not be prepared."""
    rows = rows.shuffle(seed=seed)
    order = np.arange(num_rows) % len(rows)
    return rows.select(order)
