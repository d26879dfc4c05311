# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a run needs of a world: a base model, rows to train on, and how an arm is chosen and measured there."""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..demographics import FieldEncoder, TextEncoder, encoder_from_state
from ..testing import minilm_path
from .arms import Arm
from .sources import PreparedData
from .suite import Suite

Model = PeftModel | PreTrainedModel


class World(ABC):
    """
    Where every arm is trained and measured.

    Args:
        suite (`Suite`): Says what of.
        seed (`int`): Of whatever is drawn, and of the training.
        folder (`Path`): What is prepared once and read by all runs.
    """

    def __init__(self, suite: Suite, seed: int, folder: Path) -> None:
        self.suite, self.seed, self.folder = suite, seed, folder

    def prepare(self) -> None:
        """
        Write the folder, or add to it what arms that are new to the suite need.

        Raises:
            `ValueError`: An arm can't have the reference's parameters, which is said before anything trains.
        """
        if (self.folder / "world.json").exists():
            self._complete()
            return
        with written_whole(self.folder) as folder:
            record = {"seed": self.seed, **self._prepare(folder)}
            profiles, dims = self._training_profiles(), {}
            for kind in _encoders(self.suite):
                encoder = self._new_encoder(kind).fit(profiles)
                (folder / _encoder_name(kind)).write_text(json.dumps(encoder.state()))
                dims[kind] = encoder.dim
            with torch.device("meta"):
                shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self._base_path(folder)))
            for arm in self.suite.arms:
                self.suite.reference.adapter(arm, shapes, dims, 1.0)
            (folder / "world.json").write_text(json.dumps(record))

    def _complete(self) -> None:
        for kind in _encoders(self.suite):
            path = self.folder / _encoder_name(kind)
            if not path.exists():
                state = self._new_encoder(kind).fit(self._training_profiles()).state()
                write_whole(path, json.dumps(state))

    def encoder(self, kind: str) -> FieldEncoder | TextEncoder:
        """The encoder of profiles that was fitted on training people: one of `ENCODERS`."""
        return encoder_from_state(json.loads((self.folder / _encoder_name(kind)).read_text()))

    def _new_encoder(self, kind: str) -> FieldEncoder | TextEncoder:
        if kind == "field":
            return FieldEncoder()
        path = minilm_path() if self.suite.text_encoder == "minilm" else self.suite.text_encoder
        return TextEncoder(path, centre=kind == "text")

    @abstractmethod
    def _prepare(self, folder: Path) -> dict[str, Any]:
        """Write what is this world's own; `baselines` (name → split → scores) and whatever else is to be recorded."""

    @abstractmethod
    def _base_path(self, folder: Path) -> str | Path:
        """Where the base model is."""

    @abstractmethod
    def _training_profiles(self) -> list[Any]:
        """The profile of each training person."""

    @property
    def rows_per_forward(self) -> int:
        """Of a step's rows in SFT; gradients are summed over the others."""
        return self.suite.training.batch_size

    @property
    @abstractmethod
    def training_arguments(self) -> dict[str, Any]:
        """Arguments of every trainer, on top of those that all worlds share."""

    @abstractmethod
    def base_model(self) -> PreTrainedModel:
        """The base model, anew."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""

    @abstractmethod
    def sft_rows(self, prompt_profile: bool, shuffled: bool, steps: int) -> Dataset:
        """
        Training rows, as many as the steps see. Those of fewer steps are the first of these, but the trainer shuffles
        what it gets: the first half of a run is on other rows than a run of half the steps.

        Args:
            prompt_profile (`bool`): Whether the prompt states the profile.
            shuffled (`bool`): Each person's profile in the column that the router reads is another one's.
            steps (`int`): Optimizer steps.
        """

    @abstractmethod
    def validation_loss(self, arm: Arm, model: Model) -> float:
        """The mean log-loss of the validation answers, in nats."""

    @abstractmethod
    def measure(self, arm: Arm, model: Model) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
        """
        What the model predicts of what was held out.

        Returns:
            Split → scores; and arrays to store, whose names begin with the split's. They hold no profile.
        """


def is_prepared(suite: Suite, folder: Path) -> bool:
    """Whether a world's folder holds what the suite's arms read there."""
    names = {"world.json", *map(_encoder_name, _encoders(suite))}
    if not isinstance(suite.data, PreparedData):
        names |= {rows_name(arm.prompt_profile) for arm in suite.arms}
    return all((folder / name).exists() for name in names)


def rows_name(prompt_profile: bool) -> str:
    """The name of a survey's tokenized training rows."""
    return "rows-prompt" if prompt_profile else "rows"


def _encoders(suite: Suite) -> set[str]:
    return {"field", *(arm.encoder for arm in suite.arms)}


def _encoder_name(kind: str) -> str:
    return f"encoder-{kind}.json"


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there when it is complete, and not before."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text)
    temporary.rename(path)


class written_whole:
    """A folder that is there when the block has ended well, and not before."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder, folder.with_name(f".{folder.name}-{os.getpid()}")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.temporary.rename(self.folder)
        else:
            shutil.rmtree(self.temporary, ignore_errors=True)
