# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The arguments of the training scripts: TRL's and CuMA's, parsed so that nothing a user wrote is dropped."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from trl.scripts.grpo import GRPOScriptArguments
from trl.scripts.utils import DatasetConfig

from .adapter import CuMAConfig
from .demographics import FieldEncoder, TextEncoder
from .retired import advice

# The scripts' names → the middle of the names of their trainers and configurations.
METHODS = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "grpo": "GRPO"}


@dataclass
class CuMAModelConfig(ModelConfig):
    """
    TRL's `ModelConfig`, for CuMA: `lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_modules`,
    `lora_modules_to_save` and `use_rslora` keep their names and describe each expert; `use_peft` is implied, and
    `lora_task_type` follows from the trainer. The defaults of rank and alpha are the paper's. What LoRA lacks is
    `cuma_*`, see [`CuMAConfig`].

    Args:
        cuma_router_groups (`list[str]`, *optional*): sibling modules that share a router, joined by commas, e.g.
            `["q_proj,k_proj,v_proj", "gate_proj,up_proj"]`.
        cuma_encoder (`str`): what turns profiles into vectors: `"text"` (a sentence encoder), `"field"` (a multi-hot
            vector over field values) or `"none"` (the column holds vectors).
        cuma_encoder_model (`str`): the text encoder's id or path.
        cuma_encoder_revision (`str`, *optional*): its revision.
        cuma_encoder_min_count (`int`): the field encoder leaves out values that fewer people have.
        cuma_encoder_rows (`int`): rows of a streaming data set, from its beginning, that the encoder is fitted on;
            other data sets are read whole.
    """

    use_peft: bool = field(default=True, metadata={"help": "Implied: the scripts always train a CuMA adapter."})
    lora_r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: int = field(default=16, metadata={"help": "The residual is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input."})
    lora_task_type: str | None = field(
        default=None, metadata={"help": "Follows from the trainer: SEQ_CLS for reward models, else CAUSAL_LM."}
    )
    cuma_num_experts: int = field(default=8, metadata={"help": "Number of experts of each layer."})
    cuma_top_k: int = field(default=2, metadata={"help": "Experts mixed for a token."})
    cuma_gate: str = field(default="topk_softmax", metadata={"help": "How router logits become gates."})
    cuma_routing: str = field(default="joint", metadata={"help": "joint, demographic or semantic."})
    cuma_demographic_projection: int | None = field(
        default=None, metadata={"help": "Size of a trainable linear projection of the profile's vector."}
    )
    cuma_router_hidden: int = field(default=256, metadata={"help": "Width of the router's hidden layers."})
    cuma_router_layers: int = field(default=2, metadata={"help": "Linear layers in the router."})
    cuma_share_a: bool = field(default=False, metadata={"help": "One A for all experts of a layer."})
    cuma_film_hidden: int | None = field(
        default=None, metadata={"help": "Width of an MLP on the profile that modulates the experts; None: no FiLM."}
    )
    cuma_router_groups: list[str] | None = field(
        default=None, metadata={"help": "Sibling modules that share a router, joined by commas."}
    )
    cuma_missing_demographics: str = field(
        default="error", metadata={"help": "What a row without a profile is: error, or zero (the average profile)."}
    )
    cuma_encoder: str = field(default="text", metadata={"help": "text, field or none (a column of vectors)."})
    cuma_encoder_model: str = field(
        default="Qwen/Qwen3-Embedding-0.6B", metadata={"help": "The text encoder's id or path."}
    )
    cuma_encoder_revision: str | None = field(default=None, metadata={"help": "The text encoder's revision."})
    cuma_encoder_min_count: int = field(
        default=30, metadata={"help": "The field encoder leaves out values that fewer people have."}
    )
    cuma_encoder_rows: int = field(
        default=100_000, metadata={"help": "Rows of a streaming data set that the encoder is fitted on."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # TRL makes a string, a regular expression, of a list of one. A bare word can only be a module's name.
        if isinstance(self.lora_target_modules, str) and re.fullmatch(r"\w+", self.lora_target_modules):
            self.lora_target_modules = [self.lora_target_modules]
        for name, ignored in (("use_dora", self.use_dora), ("lora_target_parameters", self.lora_target_parameters)):
            if ignored:
                raise ValueError(f"`{name}` is not available for CuMA's experts. Leave it out.")
        if not self.use_peft:
            raise ValueError(
                "`use_peft=False`: these scripts train a CuMA adapter. Use TRL's own for full fine-tuning."
            )
        if self.cuma_encoder not in ("text", "field", "none"):
            raise ValueError(f"`cuma_encoder` must be 'text', 'field' or 'none', got {self.cuma_encoder!r}.")
        for name in ("lora_modules_to_save", "cuma_router_groups"):
            if isinstance(getattr(self, name), str):  # a recipe's `lora_modules_to_save: lm_head`
                setattr(self, name, [getattr(self, name)])

    def adapter_config(self) -> CuMAConfig:
        """The adapter that these arguments describe."""
        return CuMAConfig(
            task_type=self.lora_task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            target_modules=self.lora_target_modules,
            modules_to_save=self.lora_modules_to_save,
            num_experts=self.cuma_num_experts,
            top_k=self.cuma_top_k,
            gate=self.cuma_gate,
            routing=self.cuma_routing,
            demographic_projection=self.cuma_demographic_projection,
            router_hidden=self.cuma_router_hidden,
            router_layers=self.cuma_router_layers,
            share_a=self.cuma_share_a,
            film_hidden=self.cuma_film_hidden,
            router_groups=[group.split(",") for group in self.cuma_router_groups or []] or None,
            missing_demographics=self.cuma_missing_demographics,
        )

    def encoder(self) -> TextEncoder | FieldEncoder | None:
        """The demographic encoder that these arguments describe, not yet fitted."""
        if self.cuma_routing == "semantic" or self.cuma_encoder == "none":
            return None
        if self.cuma_encoder == "field":
            return FieldEncoder(min_count=self.cuma_encoder_min_count)
        return TextEncoder(self.cuma_encoder_model, revision=self.cuma_encoder_revision)


@dataclass
class CuMADatasetMixtureConfig(DatasetMixtureConfig):
    """TRL's `DatasetMixtureConfig`, which says which key of an entry of `datasets` it doesn't know."""

    def __post_init__(self) -> None:
        known = [entry.name for entry in fields(DatasetConfig)]
        for index, entry in enumerate(self.datasets):
            if isinstance(entry, dict) and not entry.keys() <= set(known):
                problems = [_problem(key, DatasetConfig, known) for key in entry if key not in known]
                raise ValueError(f"Unknown keys in `datasets[{index}]`: {'; '.join(problems)}. Known: {known}.")
        super().__post_init__()


class TrainingParser(TrlParser):
    """
    TRL's parser for one method's arguments.

    Args:
        trainer_config (`type`): the trainer's configuration class, such as [`CuMASFTConfig`].
        prog, epilog (`str`, *optional*): for `--help`.
    """

    def __init__(self, trainer_config: type, prog: str | None = None, epilog: str | None = None) -> None:
        bases = [base.__name__ for base in trainer_config.__mro__]
        self.trainer_config = trainer_config
        self.task_type = "SEQ_CLS" if "RewardConfig" in bases else "CAUSAL_LM"
        script_arguments = GRPOScriptArguments if "GRPOConfig" in bases else ScriptArguments
        dataclasses = (script_arguments, trainer_config, CuMAModelConfig, CuMADatasetMixtureConfig)
        super().__init__(dataclasses, prog=prog, epilog=epilog, allow_abbrev=False)  # an abbreviation is a typo too

    @property
    def known(self) -> set[str]:
        """The keys that this parser reads, as a recipe writes them."""
        return {action.dest for action in self._actions if action.dest != "help"}

    def error(self, message: str) -> None:
        """Raise what argparse found; it would print the usage of 300 arguments and exit."""
        raise ValueError(message)

    def read(self, recipe: dict[str, Any], args: Sequence[str], elsewhere: Container[str] = ()) -> None:
        """
        Take a recipe's values as defaults, and check that every key of it and of a command line is known.

        Args:
            recipe, args: of [`read_recipe`].
            elsewhere (`Container[str]`): keys that the recipe may hold for another reader.

        Raises:
            ValueError: says of each unknown key what it is called today, or what looks like it.
        """
        for action in self._actions:  # argparse converts text only
            value = recipe.get(action.dest)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if action.dest in recipe and action.type in (int, float) and not isinstance(value, str) and not is_number:
                if not (value is None and action.default is None) and action.nargs is None:
                    raise ValueError(f"`{action.dest}` must be a number, got {value!r}.")
        self.set_defaults_with_config(**recipe)
        _, rest = self.parse_known_args(list(args))
        keys = [value.removeprefix("--").split("=")[0] for value in rest if value.startswith("--")]
        unknown = [key for key in recipe if key not in self.known and key not in elsewhere] + (keys or rest)
        if unknown:
            problems = [_problem(key, self.trainer_config, sorted(self.known)) for key in unknown]
            raise ValueError(f"Unknown arguments: {'; '.join(problems)}. Nothing reads them; correct or remove them.")


def launch_options() -> dict[str, argparse.Action]:
    """What `accelerate launch` reads, and `accelerate_config`, by the names that a recipe writes."""
    from accelerate.commands.launch import launch_command_parser

    actions = launch_command_parser()._actions
    options = {action.dest: action for action in actions if action.option_strings and action.dest != "help"}
    return options | {"accelerate_config": options["config_file"]}


def _problem(key: str, config_class: type, known: list[str]) -> str:
    name = key.replace("-", "_")
    if today := advice(config_class, name):
        return f"{key!r} is now {today}" if today.startswith("`") else f"{key!r} is {today}"
    if name in known:
        return f"{key!r}: write `{name}`"
    if name.startswith("no_") and name.removeprefix("no_") in known:
        return f"{key!r}: write `{name.removeprefix('no_')}: false`"
    if name in launch_options():
        return f"{key!r} is for `accelerate launch`, or for a recipe that `trl-cuma` starts"
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
        return f"{key!r} (did you mean {near[0]!r}?)"
    return repr(key)


def read_recipe(args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """
    The mapping in a command line's `--config` file, whose `env:` is set, and the command line without it.

    Raises:
        ValueError: if it is not YAML with a mapping of keys.
    """
    args = list(args)
    for index, value in enumerate(args):
        if value.startswith("--config="):  # TRL reads only `--config PATH`
            args[index : index + 1] = value.split("=", 1)
    if "--config" not in args:
        return {}, args
    index = args.index("--config")
    if index + 1 == len(args) or "--config" in args[index + 1 :]:
        raise ValueError("`--config` takes one path, once.")
    path = args[index + 1]
    with open(path) as file:
        try:
            recipe = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(recipe).__name__}.")
    environment = recipe.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"`env` in {path} must hold `NAME: value` lines, got {type(environment).__name__}.")
    os.environ.update({name: str(value) for name, value in environment.items()})
    return recipe, args[:index] + args[index + 2 :]


def parse_strictly(
    trainer_config: type, args: Sequence[str] | None = None, *, launched: bool = False
) -> tuple[Any, Any, CuMAModelConfig, DatasetMixtureConfig]:
    """
    Parse a command line and its `--config` file as TRL does, but refuse what TRL's scripts drop silently.

    Args:
        trainer_config (`type`): the trainer's configuration class.
        args (`Sequence[str]`, *optional*): by default the command line.
        launched (`bool`): `trl-cuma` started this and has read what the recipe holds for `accelerate launch`.

    Returns:
        script, trainer, model and data-set-mixture arguments.

    Raises:
        ValueError: for keys that nothing reads, each with today's name or the nearest known one, and for values that
            don't fit.
    """
    recipe, args = read_recipe(sys.argv[1:] if args is None else args)
    parser = TrainingParser(trainer_config)
    parser.read(recipe, args, elsewhere=launch_options() if launched else ())
    parsed = parser.parse_args_into_dataclasses(args)
    script_args, training_args, model_args, dataset_args = parsed
    if model_args.lora_task_type not in (None, parser.task_type):
        raise ValueError(
            f"`lora_task_type` must be {parser.task_type!r} for {trainer_config.__name__}, got "
            f"{model_args.lora_task_type!r}. Leave it out: it follows from the trainer."
        )
    model_args.lora_task_type = parser.task_type
    needed = None if model_args.cuma_routing == "semantic" else training_args.demographic_column
    _check_data_arguments(script_args, dataset_args, needed)
    return parsed


def _check_data_arguments(
    script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, demographic_column: str | None
) -> None:
    if bool(dataset_args.datasets) == bool(script_args.dataset_name):
        raise ValueError(
            f"Name the data with either `dataset_name` or `datasets`, got {script_args.dataset_name!r} and "
            f"{dataset_args.datasets!r}."
        )
    if dataset_args.datasets:
        for name in ("dataset_config", "dataset_streaming"):
            if getattr(script_args, name):
                instead = "'name' in each entry" if name == "dataset_config" else "`streaming`"
                raise ValueError(f"`{name}` is not read with `datasets`. Use {instead}.")
        for index, entry in enumerate(dataset_args.datasets):
            if demographic_column and entry.columns is not None and demographic_column not in entry.columns:
                raise ValueError(
                    f"`datasets[{index}]` keeps only the columns {entry.columns}. Add the demographic column, "
                    f"{demographic_column!r}."
                )
    else:
        if dataset_args.streaming:
            raise ValueError("`streaming` belongs to `datasets`. With `dataset_name` use `dataset_streaming`.")
        if dataset_args.test_split_size is not None:
            raise ValueError(
                "`test_split_size` belongs to `datasets`. With `dataset_name` name a split with `dataset_test_split`."
            )
