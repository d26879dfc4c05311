# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What the example scripts share: arguments, strict parsing, loading data."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk
from transformers.trainer_utils import get_last_checkpoint
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset

from .adapter import CuMAConfig
from .demographics import FieldEncoder, TextEncoder

# Keys of older recipes whose present names don't look alike.
RENAMED = {"torch_dtype": "dtype", "dataset_mixture": "datasets"}


@dataclass
class CuMAModelConfig(ModelConfig):
    """
    TRL's `ModelConfig`, for CuMA: `lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_modules`,
    `lora_modules_to_save` and `use_rslora` keep their names and describe each expert; `use_peft` is implied. The
    defaults of rank and alpha are the paper's. What LoRA lacks is `cuma_*`, see [`CuMAConfig`].

    Args:
        cuma_router_groups (`list[str]`, *optional*): sibling modules that share a router, joined by commas, e.g.
            `["q_proj,k_proj,v_proj", "gate_proj,up_proj"]`.
        cuma_encoder (`str`): what turns profiles into vectors: `"text"` (a sentence encoder), `"field"` (a multi-hot
            vector over field values) or `"none"` (the column holds vectors).
        cuma_encoder_model (`str`): the text encoder's id or path.
        cuma_encoder_revision (`str`, *optional*): its revision.
        cuma_encoder_min_count (`int`): the field encoder leaves out values that fewer people have.
    """

    use_peft: bool = field(default=True, metadata={"help": "Implied: the scripts always train a CuMA adapter."})
    lora_r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: int = field(default=16, metadata={"help": "The residual is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input."})
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, ignored in (("use_dora", self.use_dora), ("lora_target_parameters", self.lora_target_parameters)):
            if ignored:
                raise ValueError(f"`{name}` is not available for CuMA's experts. Leave it out.")
        if not self.use_peft:
            raise ValueError(
                "`use_peft=False`: these scripts train a CuMA adapter. Use TRL's own for full fine-tuning."
            )
        if self.cuma_encoder not in ("text", "field", "none"):
            raise ValueError(f"`cuma_encoder` must be 'text', 'field' or 'none', got {self.cuma_encoder!r}.")

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


def parse_strictly(trainer_config: type, args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """
    Parse a command line and its `--config` file as TRL does, but refuse what TRL's scripts drop silently.

    Args:
        trainer_config (`type`): the trainer's configuration class.
        args (`Sequence[str]`, *optional*): by default the command line.

    Returns:
        script, trainer, model and data-set-mixture arguments.

    Raises:
        ValueError: for keys that nothing reads; each with the nearest known one.
    """
    args = list(sys.argv[1:] if args is None else args)
    for index, value in enumerate(args):
        if value.startswith("--config="):  # TRL reads only `--config PATH`
            args[index : index + 1] = value.split("=", 1)
    dataclasses = (ScriptArguments, trainer_config, CuMAModelConfig, DatasetMixtureConfig)
    parser = TrlParser(dataclasses, allow_abbrev=False)  # an abbreviation is a typo as well
    *parsed, remaining = parser.parse_args_and_config(args, return_remaining_strings=True)
    if remaining:
        known = sorted(action.dest for action in parser._actions if action.dest != "help")
        problems = []
        for key in [value for value in remaining if value.startswith("--")] or remaining:
            name = key.removeprefix("--").split("=")[0]
            near = difflib.get_close_matches(RENAMED.get(name, name), known, n=1, cutoff=0.5)
            problems.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        raise ValueError(f"Unknown arguments: {', '.join(problems)}. Nothing reads them; correct or remove them.")
    return tuple(parsed)


def load_data(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> DatasetDict:
    """
    The data set of a recipe: a `datasets:` mixture, a folder written by `save_to_disk`, or anything that
    `load_dataset` takes.

    Raises:
        ValueError: if neither, or both, are named.
    """
    if bool(dataset_args.datasets) == bool(script_args.dataset_name):
        raise ValueError(
            f"Name the data with either `dataset_name` or `datasets`, got {script_args.dataset_name!r} and "
            f"{dataset_args.datasets!r}."
        )
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    if os.path.exists(os.path.join(script_args.dataset_name, "dataset_dict.json")):
        return load_from_disk(script_args.dataset_name)
    return load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )


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


def run(trainer_class: type, trainer_config: type, args: Sequence[str] | None = None) -> Any:
    """The whole of an example script: parse, load, train, save. Returns the trainer."""
    from trl import get_quantization_config

    script_args, training_args, model_args, dataset_args = parse_strictly(trainer_config, args)
    dataset = load_data(script_args, dataset_args)
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    new_adapter = training_args.cuma_adapter_path is None
    trainer = trainer_class(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=model_args.adapter_config() if new_adapter else None,
        # A trained adapter keeps the encoder that it was trained with, unless its routers start anew.
        demographic_encoder=model_args.encoder() if new_adapter or training_args.cuma_reset_router else None,
    )
    trainer.train(resume_from_checkpoint=resume_point(training_args))
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Adapter saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()
    return trainer
