# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The quick start: simulate or load a survey, pretrain a small model, train every arm, measure, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.global_opinions import load_global_opinions
from ..data.simulated import simulate_survey
from ..data.survey import Cells, to_preference_dataset, to_sft_dataset
from ..demographics import FieldEncoder, TextEncoder
from ..evaluation.baselines import AdditiveModel, FactorModel
from ..evaluation.metrics import gap_closed, summarise_cells
from ..evaluation.options import split_options, survey_log_probs
from ..evaluation.preferences import implicit_margin, oracle_margin, pair_metrics, pair_weights
from .language_model import build_tokenizer, pretrain, probe_profile_reading
from .settings import REAL, SIMULATED, Settings
from .training import ARMS, Arm, adapter_configs, load_model, profile_vectors, rows_to_train_on, train_dpo, train_sft


class Quickstart:
    """
    One run of the quick start.

    Args:
        output_dir (`str` or `Path`): gets the model, the data, the adapters, the tables and the figures.
        seed (`int`): of the simulated world (or of the answers drawn from real distributions), the model and the
            training.
        data (`str` or `Path`, *optional*): a GlobalOpinionQA file; without it a survey is simulated.
        encoder (`str`, *optional*): id or path of a sentence encoder for the profiles; by default a field encoder.
        rejected (`str`): where DPO's rejected options come from: `"uniform"`, any other option, or `"reference"`, the
            reference's own distribution.
        log (`Callable`): told of each stage.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        seed: int = 0,
        data: str | Path | None = None,
        encoder: str | None = None,
        rejected: str = "uniform",
        settings: Settings | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        if rejected not in ("uniform", "reference"):
            raise ValueError(f"`rejected` must be 'uniform' or 'reference', got {rejected!r}.")
        self.output_dir = Path(output_dir)
        self.seed = seed
        self.data = data
        self.encoder_id = encoder
        self.rejected = rejected
        self.settings = settings or (SIMULATED if data is None else REAL)
        if encoder is not None:
            cuma = {**self.settings.cuma, "demographic_projection": self.settings.text_projection}
            self.settings = replace(self.settings, cuma=cuma)
        self.log = log
        if data is None:
            self.survey = simulate_survey(seed, **self.settings.survey)
        else:
            self.survey = load_global_opinions(data, seed=seed, **self.settings.survey)
        cells = {name: cells.sample(self.settings.cells, seed) for name, cells in self.survey.cells.items()}
        self.validation = cells.pop("validation")
        self.cells = cells
        self.model_dir = self.output_dir / "model"
        self.probe: dict[str, float] = {}

    # ------------------------------------------------------------------ stages
    def prepare(self) -> None:
        """Leave the base model in `model/` and the data that the recipes name in `data/sft` and `data/dpo`."""
        survey = self.survey
        counts = ", ".join(f"{name.replace('_', ' ')} {len(answers):,}" for name, answers in survey.answers.items())
        self.log(f"Survey: {len(survey.questions)} questions; answers: {counts}.")
        tokenizer = build_tokenizer(survey)
        model = pretrain(survey, tokenizer, self.settings, self.seed)
        self.probe = probe_profile_reading(model, survey, tokenizer, self.seed)
        probed = ", ".join(f"{field} {accuracy:.1%}" for field, accuracy in self.probe.items())
        self.log(f"Base model: {model.num_parameters():,} parameters; a linear probe reads {probed}.")
        model.save_pretrained(self.model_dir)
        tokenizer.save_pretrained(self.model_dir)
        splits = {"train": "train", "test": "validation"}
        for name, build in (("sft", self.sft_data), ("dpo", self.dpo_data)):
            data = DatasetDict({split: build(source, False) for split, source in splits.items()})
            data.save_to_disk(str(self.output_dir / "data" / name))

    def run(self) -> dict[str, Any]:
        """Prepare, train and measure every arm; returns (and saves) the results."""
        started = time.monotonic()
        encoder = self.encoder()  # first: a wrong path should not cost a pretraining
        self.prepare()
        tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        configs = adapter_configs(load_model(self.model_dir), self.settings, encoder.dim)
        results: dict[str, Any] = {"seed": self.seed, "settings": asdict(self.settings), "probe": self.probe}
        results["sft"] = {"baselines": self._baselines(), "arms": {}}
        results["dpo"] = {"oracle": self._dpo_oracle(), "arms": {}}
        predictions: dict[str, dict[str, np.ndarray]] = {}
        prepared: dict[bool, Dataset] = {}  # tokenized once for all arms with the same prompts
        for arm in ARMS:
            rate = self.settings.sft_learning_rates[arm.name]
            self.log(f"SFT: {arm.label} (learning rate {rate:g}).")
            trainer = train_sft(
                arm,
                self.model_dir,
                prepared.get(arm.prompt_profile) or self.sft_training_rows(arm.prompt_profile),
                configs[arm.matched],
                encoder,
                self.settings,
                rate,
                self.seed,
                self.output_dir / "sft" / arm.name,
            )
            model, prepared[arm.prompt_profile] = trainer.model, trainer.train_dataset
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            sft = self.predict(arm, model, tokenizer)
            results["sft"]["arms"][arm.name] = {
                "label": arm.label,
                "parameters": parameters,
                **{split: self.score(cells, sft[split]) for split, cells in self.cells.items()},
            }
            rate = self.settings.dpo_learning_rates[arm.name]
            self.log(f"DPO: {arm.label} (learning rate {rate:g}).")
            dataset = self.dpo_training_rows(arm, model, tokenizer)
            model = train_dpo(
                arm,
                self.model_dir,
                self.output_dir / "sft" / arm.name,
                dataset,
                self.settings,
                rate,
                self.seed,
                self.output_dir / "dpo" / arm.name,
            ).model
            dpo = self.predict(arm, model, tokenizer)
            results["dpo"]["arms"][arm.name] = {
                "label": arm.label,
                **{split: self.score_dpo(cells, dpo[split], sft[split]) for split, cells in self.cells.items()},
            }
            predictions[arm.name] = {f"sft/{k}": v for k, v in sft.items()} | {f"dpo/{k}": v for k, v in dpo.items()}
        results["seconds"] = time.monotonic() - started
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        self.predictions = predictions
        return results

    # ------------------------------------------------------------------ measuring
    def predict(
        self, arm: Arm, model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, np.ndarray]:
        """Log-probabilities of the options in every evaluated cell, by split."""
        return {
            split: self._log_probs(arm, model, tokenizer, cells.question, cells.profile)
            for split, cells in self.cells.items()
        }

    def _log_probs(
        self,
        arm: Arm,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        question: np.ndarray,
        profile: np.ndarray,
    ) -> np.ndarray:
        return survey_log_probs(
            model,
            tokenizer,
            self.survey,
            question,
            profile,
            prompt_profile=arm.prompt_profile,
            demographic_embeds=profile_vectors(model, self.survey.profiles) if arm.is_cuma else None,
        )

    def score(self, cells: Cells, log_probs: np.ndarray) -> dict[str, float]:
        probs, outside = split_options(log_probs)
        return self._summarise(cells, probs, outside)

    def _summarise(self, cells: Cells, probs: np.ndarray, outside: np.ndarray | None = None) -> dict[str, float]:
        num_options = self.survey.num_options[cells.question]
        scores = summarise_cells(cells.truth, probs, num_options, outside)
        marginal = summarise_cells(cells.truth, self.survey.training_marginal[cells.question], num_options)
        scores["gap_closed"] = gap_closed(scores["emd"], marginal["emd"], 0.0)
        return scores

    def _baselines(self) -> dict[str, dict[str, dict[str, float]]]:
        model = FactorModel(self.survey) if self.data is not None else AdditiveModel(self.survey)
        scores = {"marginal": {}, "fitted": {}, "oracle": {}}
        for split, cells in self.cells.items():
            scores["marginal"][split] = self._summarise(cells, self.survey.training_marginal[cells.question])
            scores["fitted"][split] = self._summarise(cells, model.predict(cells.question, cells.profile))
            scores["oracle"][split] = self._summarise(cells, cells.truth)
        return scores

    def _pair_weights(self, cells: Cells, reference: np.ndarray) -> np.ndarray:
        mask = self.survey.option_mask[cells.question]
        drawn = split_options(reference)[0] if self.rejected == "reference" else None
        return pair_weights(cells.truth, mask, drawn)

    def score_dpo(self, cells: Cells, policy: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        weights = self._pair_weights(cells, reference)
        margin = implicit_margin(policy, reference, self.settings.dpo_beta)
        return {**self.score(cells, policy), **pair_metrics(margin, weights)}

    def _dpo_oracle(self) -> dict[str, dict[str, float]]:
        """The least pair log-loss that any policy can have, for uniformly drawn rejected options."""
        scores = {}
        for split, cells in self.cells.items():
            weights = pair_weights(cells.truth, self.survey.option_mask[cells.question])
            scores[split] = {
                **pair_metrics(oracle_margin(weights), weights),
                "accuracy": self._summarise(cells, cells.truth)["accuracy"],
            }
        return scores

    # ------------------------------------------------------------------ data
    def encoder(self) -> FieldEncoder | TextEncoder:
        encoder = FieldEncoder() if self.encoder_id is None else TextEncoder(self.encoder_id)
        train = self.survey.answers["train"]
        profiles = [self.survey.profiles[index] for index in train.profile]
        return encoder.fit(profiles, person_ids=train.person.tolist())

    def sft_training_rows(self, prompt_profile: bool) -> Dataset:
        """The rows that every SFT run of a prompt style trains on."""
        settings = self.settings
        return rows_to_train_on(
            self.sft_data("train", prompt_profile), settings.sft_steps, settings.sft_batch_size, self.seed
        )

    def dpo_training_rows(self, arm: Arm, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """The pairs that an arm's DPO run trains on; `model` is its reference."""
        settings, reference_probs = self.settings, None
        if self.rejected == "reference":
            answers = self.survey.answers["train"]
            log_probs = self._log_probs(arm, model, tokenizer, answers.question, answers.profile)
            reference_probs = split_options(log_probs)[0]
        return rows_to_train_on(
            self.dpo_data("train", arm.prompt_profile, reference_probs),
            settings.dpo_steps,
            settings.dpo_batch_size,
            self.seed,
        )

    def sft_data(self, split: str, prompt_profile: bool) -> Dataset:
        return to_sft_dataset(self.survey, split, prompt_profile=prompt_profile)

    def dpo_data(self, split: str, prompt_profile: bool, reference_probs: np.ndarray | None = None) -> Dataset:
        return to_preference_dataset(
            self.survey, split, seed=self.seed, prompt_profile=prompt_profile, reference_probs=reference_probs
        )
