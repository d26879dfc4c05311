# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A world: one draw of a survey, with a base model of its own, on which every arm is trained and measured."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..data.global_opinions import load_global_opinions
from ..data.simulated import simulate_survey
from ..data.survey import Answers, Cells, Survey, to_preference_dataset, to_sft_dataset
from ..demographics import FieldEncoder, TextEncoder, encoder_from_state
from ..evaluation.baselines import AdditiveModel, FactorModel
from ..evaluation.metrics.cells import summarise_cells
from ..quickstart.language_model import build_tokenizer, pretrain, probe_profile_reading
from ..quickstart.settings import Settings
from ..testing import minilm_path
from .suite import Suite


class World:
    """
    One draw of a suite's survey, split for training, choosing and measuring.

    Args:
        suite (`Suite`): Says what to draw.
        seed (`int`): Of the survey, the base model and the order of the rows.
        folder (`Path`): Gets the base model.
    """

    def __init__(self, suite: Suite, seed: int, folder: Path) -> None:
        self.suite, self.seed, self.folder = suite, seed, folder
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

    @property
    def model_dir(self) -> Path:
        return self.folder / "model"

    def prepare(self) -> None:
        """Pretrain the base model, unless it is there."""
        if (self.folder / "world.json").exists():
            return
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
        temporary = self.folder.with_name(f".{self.folder.name}-{os.getpid()}")
        model.save_pretrained(temporary / "model")
        tokenizer.save_pretrained(temporary / "model")
        for prompt_profile in {arm.prompt_profile for arm in self.suite.arms}:
            self._prepare_rows(prompt_profile, model, tokenizer).save_to_disk(temporary / _rows_name(prompt_profile))
        record = {"seed": self.seed, "probe": probe, "baselines": self._baselines()}
        for kind in {"field", *(arm.encoder for arm in self.suite.arms)}:
            (temporary / f"encoder-{kind}.json").write_text(json.dumps(self._fit_encoder(kind).state()))
        (temporary / "world.json").write_text(json.dumps(record))
        shutil.rmtree(self.folder, ignore_errors=True)
        temporary.rename(self.folder)

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

    @cached_property
    def validation_cells(self) -> Cells:
        """The validation answers as cells: each answered question and profile once."""
        answers = self.validation
        pairs, cell = np.unique(np.stack([answers.question, answers.profile], 1), axis=0, return_inverse=True)
        counts = np.zeros((len(pairs), self.survey.max_options))
        np.add.at(counts, (cell.reshape(-1), answers.choice), 1.0)
        return Cells(pairs[:, 0], pairs[:, 1], counts / counts.sum(1, keepdims=True))

    def base_model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.model_dir)

    def encoder(self, kind: str) -> FieldEncoder | TextEncoder:
        """A fitted encoder of profiles: one of `ENCODERS`."""
        return encoder_from_state(json.loads((self.folder / f"encoder-{kind}.json").read_text()))

    def _fit_encoder(self, kind: str) -> FieldEncoder | TextEncoder:
        if kind == "field":
            encoder = FieldEncoder()
        else:
            path = minilm_path() if self.suite.text_encoder == "minilm" else self.suite.text_encoder
            encoder = TextEncoder(path, centre=kind == "text")
        train = self.survey.answers["train"]
        people, first = np.unique(train.person, return_index=True)
        profiles = [self.survey.profiles[index] for index in train.profile[first]]
        return encoder.fit(profiles, person_ids=people.tolist())

    @cached_property
    def other_profile(self) -> np.ndarray:
        """Each profile's stand-in for an arm with shuffled profiles, `(profiles,)`: another training person's."""
        train = self.survey.answers["train"]
        _, first = np.unique(train.person, return_index=True)
        rng = np.random.default_rng([self.seed, 1])
        return rng.choice(train.profile[first], size=len(self.survey.profiles))

    def sft_rows(self, prompt_profile: bool, shuffled: bool, steps: int) -> Dataset:
        """Tokenized training rows, as many as the steps see."""
        rows = load_from_disk(str(self.folder / _rows_name(prompt_profile)))
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


def _rows_name(prompt_profile: bool) -> str:
    return "rows-prompt" if prompt_profile else "rows"


def _first_rows(rows: Dataset, num_rows: int, seed: int) -> Dataset:
    """That many random rows, over and over where there are fewer: what is not trained on need not be prepared."""
    rows = rows.shuffle(seed=seed)
    order = np.arange(num_rows) % len(rows)
    return rows.select(order)
