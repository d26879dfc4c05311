# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
The training scripts: parse, load, train, save. `examples/` calls [`run`]; `trl-cuma sft|dpo|kto|reward|grpo` launches
this module, `python -m trl_cuma.scripts METHOD ...`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from datasets import DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from transformers.trainer_utils import get_last_checkpoint
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_dataset, get_quantization_config
from trl.data_utils import get_dataset_column_names
from trl.rewards import (
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)
from trl.scripts.grpo import GRPOScriptArguments

from .arguments import METHODS, CuMAModelConfig, parse_strictly
from .data.licenses import prepared_license
from .demographics import FieldEncoder, TextEncoder
from .trainers.grpo import refuse_vllm

# The names that TRL's GRPO script knows; its own table is local to a function.
REWARD_FUNCS: dict[str, Callable] = {
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256),
}


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """
    The data set of a recipe: a `datasets:` mixture, a folder written by `save_to_disk`, or anything that
    `load_dataset` takes.

    Raises:
        ValueError: if a saved folder is asked for a configuration, which it can't have.
    """
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    if not os.path.exists(os.path.join(script_args.dataset_name, "dataset_dict.json")):
        return load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    if script_args.dataset_config:
        raise ValueError(
            f"`dataset_config` is {script_args.dataset_config!r}, but {script_args.dataset_name} is a folder written "
            "by `save_to_disk`, which holds one configuration. Leave it out."
        )
    saved = load_from_disk(script_args.dataset_name)
    if script_args.dataset_streaming:
        return IterableDatasetDict({name: split.to_iterable_dataset() for name, split in saved.items()})
    return saved


def split_of(dataset: DatasetDict | IterableDatasetDict, argument: str, name: str) -> Any:
    """
    The split `name`, which `argument` asks for.

    Raises:
        ValueError: if there is none.
    """
    if name not in dataset:
        raise ValueError(
            f"`{argument}` is {name!r}, but the data has the splits {list(dataset)}. Name one of them; without "
            "evaluation, set `eval_strategy` to 'no' and `load_best_model_at_end` to false."
        )
    return dataset[name]


def fit_on_stream(
    encoder: TextEncoder | FieldEncoder, dataset: IterableDataset, training_args: Any, rows: int
) -> None:
    """Fit an encoder on the first `rows` rows of a streaming data set, which a trainer reads only once."""
    column, people = training_args.demographic_column, training_args.demographic_person_column
    columns = [name for name in (column, people) if name in get_dataset_column_names(dataset)]
    if column not in columns:
        return  # the trainer says what it has instead
    head = list(dataset.select_columns(columns).take(rows))
    person_ids = [row[people] for row in head] if people in columns else None
    encoder.fit([row[column] for row in head], person_ids=person_ids, show_progress=True)


def load_reward_funcs(script_args: GRPOScriptArguments) -> list[str | Callable]:
    """
    The rewards that a recipe names, as in TRL's script: a reward model, TRL's own functions, and dotted import paths,
    for which the working directory is searched too.

    Raises:
        ValueError: for a name that is neither TRL's nor can be imported.
    """
    rewards: list[str | Callable] = []
    if script_args.reward_model_name_or_path:
        rewards.append(script_args.reward_model_name_or_path)
    names = script_args.reward_funcs or []
    for name in [names] if isinstance(names, str) else names:
        if name in REWARD_FUNCS:
            rewards.append(REWARD_FUNCS[name])
            continue
        module, _, function = name.rpartition(".")
        sys.path.insert(0, os.getcwd())
        try:
            found = getattr(import_module(module), function)
            if isinstance(found, type) or not callable(found):
                raise ValueError("it is no function; of a class, name an instance: `judge = ProfileJudge(...)`")
            rewards.append(found)
        except (ImportError, AttributeError, ValueError) as error:  # ValueError: no dot in the name
            raise ValueError(
                f"`reward_funcs` names {name!r}, which can't be loaded ({error}). Name one of {list(REWARD_FUNCS)}, "
                "or the import path of a function, such as 'my_rewards.agreement'."
            ) from error
        finally:
            sys.path.remove(os.getcwd())
    return rewards


def model_init_kwargs(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` of the base model gets; `training_args.model_init_kwargs` wins, as in TRL's scripts."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def resume_point(training_args: Any) -> str | bool | None:
    """
    What `train(resume_from_checkpoint=...)` gets. `resume_from_checkpoint: true` (or `latest`) in a recipe means the
    last checkpoint in `output_dir`, and a fresh start where there is none.
    """
    value = training_args.resume_from_checkpoint
    if str(value).lower() in ("true", "latest"):
        return get_last_checkpoint(training_args.output_dir) if os.path.isdir(training_args.output_dir) else None
    return None if value is None or str(value).lower() == "false" else value


def make_trainer(
    trainer_class: type,
    script_args: ScriptArguments,
    training_args: Any,
    model_args: CuMAModelConfig,
    dataset_args: DatasetMixtureConfig,
    reward_funcs: Sequence[str | Callable] = (),
) -> Any:
    """
    Load what the arguments describe, up to a trainer that is ready.

    Args:
        trainer_class (`type`): e.g. [`CuMASFTTrainer`].
        script_args, training_args, model_args, dataset_args: of [`parse_strictly`].
        reward_funcs (`Sequence`): for GRPO, rewards beside those that `script_args` names.

    Returns:
        the trainer.

    Raises:
        ValueError: if GRPO has no reward, or a named split, reward or model is missing.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("Name the base model with `model_name_or_path`.")
    only_grpo: dict[str, Any] = {}
    if isinstance(script_args, GRPOScriptArguments):
        only_grpo["reward_funcs"] = [*load_reward_funcs(script_args), *reward_funcs]
        if not only_grpo["reward_funcs"]:
            raise ValueError("GRPO needs a reward. Name it with `reward_funcs` or `reward_model_name_or_path`.")
        refuse_vllm(training_args)  # before the data is loaded, too
    dataset = load_data(script_args, dataset_args)
    train_dataset = split_of(dataset, "dataset_train_split", script_args.dataset_train_split)
    folders = [part.path for part in dataset_args.datasets] or [script_args.dataset_name]
    terms = filter(None, map(prepared_license, folders))  # `load_dataset` doesn't read them
    train_dataset.info.license = train_dataset.info.license or "; ".join(dict.fromkeys(terms))
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = split_of(dataset, "dataset_test_split", script_args.dataset_test_split)
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    new_adapter = training_args.cuma_adapter_path is None
    # A trained adapter keeps the encoder that it was trained with, unless its routers start anew.
    encoder = model_args.encoder() if new_adapter or training_args.cuma_reset_router else None
    if encoder is not None and isinstance(train_dataset, IterableDataset):
        fit_on_stream(encoder, train_dataset, training_args, model_args.cuma_encoder_rows)
    trainer = trainer_class(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=model_args.adapter_config() if new_adapter else None,
        demographic_encoder=encoder,
        **only_grpo,
    )
    if script_args.ignore_bias_buffers:  # read by DistributedDataParallel
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    return trainer


def train(trainer: Any, script_args: ScriptArguments) -> Any:
    """Train and save. Returns the trainer."""
    training_args = trainer.args
    trainer.train(resume_from_checkpoint=resume_point(training_args))
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Adapter saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Adapter pushed to {trainer.hub_model_id} on the Hub.")
    trainer.end()
    return trainer


def run(
    trainer_class: type,
    trainer_config: type,
    args: Sequence[str] | None = None,
    reward_funcs: Sequence[str | Callable] = (),
) -> Any:
    """
    The whole of an example script: parse the command line, train, save. Returns the trainer.

    Args:
        trainer_class, trainer_config (`type`): e.g. [`CuMASFTTrainer`] and [`CuMASFTConfig`].
        args (`Sequence[str]`, *optional*): by default the command line.
        reward_funcs (`Sequence`): for GRPO, rewards beside those that the recipe names.
    """
    parsed = parse_strictly(trainer_config, args)
    return train(make_trainer(trainer_class, *parsed, reward_funcs=reward_funcs), parsed[0])


def main(args: Sequence[str] | None = None) -> int:
    """What `trl-cuma METHOD ...` launches in each process; the first argument is the method."""
    import trl_cuma

    method, *args = sys.argv[1:] if args is None else args
    name = METHODS[method]
    try:
        parsed = parse_strictly(getattr(trl_cuma, f"CuMA{name}Config"), args, launched=True)
        trainer = make_trainer(getattr(trl_cuma, f"CuMA{name}Trainer"), *parsed)
    except (NotImplementedError, OSError, ValueError) as error:
        print(f"trl-cuma {method}: error: {error}", file=sys.stderr)
        return 2
    train(trainer, parsed[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
