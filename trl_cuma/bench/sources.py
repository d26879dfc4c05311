# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a benchmark is run on: surveys with a tiny base model per draw, or the user's own data and base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from typing import Any, ClassVar

from ..data.global_opinions import load_global_opinions
from ..data.simulated import simulate_survey
from .fields import check_arguments, check_least, check_lists, check_positive, check_types

DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Data:
    """
    The survey that a world is drawn from.

    Args:
        source (`str`): `"simulated"` or `"global_opinions"`.
        path (`str`, *optional*): GlobalOpinionQA's file.
        args (`dict`): Arguments of `simulate_survey`, or of `load_global_opinions`.
        cells (`int`): Evaluated cells per split, a uniform sample.
        validation_answers (`int`): Answers of the validation split that settings and steps are chosen on.
    """

    headline: ClassVar[str] = "emd"  # the metric that comparisons and `--check` are about

    source: str
    path: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    cells: int = 400
    validation_answers: int = 1000

    def __post_init__(self) -> None:
        check_types(self, "data")
        if self.source not in ("simulated", "global_opinions"):
            sources = "'simulated', 'global_opinions' or 'prepared'"
            raise ValueError(f"`data.source` is {self.source!r}, expected {sources}.")
        if (self.path is None) != (self.source == "simulated"):
            raise ValueError("`data.path` names GlobalOpinionQA's file, and a simulated survey has none.")
        check_least(self, "data", cells=1, validation_answers=1)
        function = simulate_survey if self.source == "simulated" else load_global_opinions
        known = [name for name in signature(function).parameters if name not in ("seed", "path")]
        args = check_arguments(self.args, function, "data.args", known=known)
        object.__setattr__(self, "args", args)


@dataclass(frozen=True)
class PreparedData:
    """
    People's answers that `trl-cuma prepare --task sft` wrote, or rows like them. A world is a seed of training: of the
    adapter, of which rows are trained on, and of their order. What is evaluated is the same in all worlds.

    Args:
        source (`str`): `"prepared"`.
        path (`str`): The folder whose prompts don't state the profile.
        splits (`tuple[str, ...]`): Splits to evaluate: `test`, `test_combinations`, `test_countries`.
        prompt_path (`str`, *optional*): The same rows with the profile in the prompt, for arms with `prompt_profile`.
        validation_split (`str`): Settings and steps are chosen on its answers.
        split_by (`tuple[str, ...]`): What training and the other splits must not share: `person`, `prompt` or both, as
            in [`~trl_cuma.data.SplitOptions`].
        answers (`int`): Evaluated rows per split, a uniform sample.
        validation_answers (`int`): Rows of the validation split that are looked at, a uniform sample.
    """

    headline: ClassVar[str] = "nll"

    source: str
    path: str
    splits: tuple[str, ...]
    prompt_path: str | None = None
    validation_split: str = "validation"
    split_by: tuple[str, ...] = ("person", "prompt")
    answers: int = 10_000
    validation_answers: int = 1000

    def __post_init__(self) -> None:
        check_types(self, "data")
        check_lists(self, "data", "splits")
        check_least(self, "data", answers=1, validation_answers=1)
        for name in ("train", self.validation_split):
            if name in self.splits:
                raise ValueError(f"`data.splits` names {name!r}, which arms are trained or chosen on. Leave it out.")


@dataclass(frozen=True)
class Base:
    """
    The base model that is pretrained in every world, see `trl_cuma.quickstart.language_model`.

    Args:
        model (`dict`): Arguments of `trl_cuma.testing.tiny_model`.
        steps, batch_size (`int`), learning_rate (`float`): Of its pretraining.
    """

    model: dict[str, Any]
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        check_types(self, "base")
        check_least(self, "base", steps=1, batch_size=1)
        check_positive(self, "base", "learning_rate")


@dataclass(frozen=True)
class GivenBase:
    """
    A base model that is there.

    Args:
        path (`str`): Id or folder of a causal language model with a chat template.
        dtype (`str`): `"bfloat16"` or `"float32"`; what is trained is float32 in any case.
        load_in_4bit (`bool`): Quantize it to NF4 (bitsandbytes).
        gradient_checkpointing (`bool`): Less memory, a third more time.
        micro_batch_size (`int`, *optional*): Rows per forward, a divisor of `training.batch_size`; by default all.
    """

    path: str
    dtype: str = "bfloat16"
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "base")
        if self.dtype not in DTYPES:
            raise ValueError(f"`base.dtype` is {self.dtype!r}, expected one of {DTYPES}.")


def data_of(content: Any) -> type[Data | PreparedData]:
    """The class of a suite's `data`."""
    prepared = isinstance(content, dict) and content.get("source") == "prepared"
    return PreparedData if prepared else Data


def base_of(content: Any) -> type[Base | GivenBase]:
    """The class of a suite's `base`."""
    return GivenBase if isinstance(content, dict) and "path" in content else Base
