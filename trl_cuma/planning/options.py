# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `trl-cuma plan`: its own, and the recipe's, which keep their names and their parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

import trl_cuma

from ..adapter import CuMAConfig
from ..adapter.config import DEFAULT_DEMOGRAPHIC_DIM
from ..arguments import METHODS, CuMAModelConfig, TrainingParser, launch_options, read_recipe
from .architecture import DTYPES, Base, shipped_models
from .memory import ENGINES, OPTIMIZERS

PLANNED = ("sft", "dpo")
PRECISION_KEYS = ("dtype", "bf16", "load_in_4bit", "load_in_8bit")
PRECISIONS = {
    "bf16": ("bfloat16", "true", "false", "false"),
    "fp32": ("float32", "false", "false", "false"),
    "nf4": ("bfloat16", "true", "true", "false"),
    "int8": ("bfloat16", "true", "false", "true"),
}


@dataclass(frozen=True)
class Request:
    """What is to be planned; `model_args` and `training_args` are the recipe's."""

    method: str
    model_args: CuMAModelConfig
    training_args: Any
    base: Base
    adapter: CuMAConfig
    engine: str | None
    num_gpus: int
    gpus_per_node: int
    gpu_memory: float  # GiB
    demographic_dim: int
    num_rows: int | None
    peak_tflops: float
    utilization: float
    recipe: str | None
    recipe_args: tuple[CuMAModelConfig, Any] | None  # `model_args` and `training_args` of the recipe's file alone

    @property
    def rows(self) -> int:
        """Rows of a forward: DPO's are the chosen and the rejected answers."""
        return self.training_args.per_device_train_batch_size * (2 if self.method == "dpo" else 1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def make_parser() -> argparse.ArgumentParser:
    """The plan's own arguments."""
    parser = _Parser(
        prog="trl-cuma plan",
        usage="trl-cuma plan [--config RECIPE] [--model_name_or_path MODEL] [options, and any key of a recipe]",
        description="How much GPU memory a training run needs under each engine, and the smallest setup that fits. "
        "Computed from the real model and adapter without weights; nothing is downloaded but a config.json.",
        epilog="Of a recipe's keys these count: model_name_or_path (an id, a folder or a config.json; without a "
        f"network: {', '.join(shipped_models())}), dtype, bf16, load_in_4bit, load_in_8bit, use_bnb_nested_quant, "
        "bnb_4bit_quant_storage, use_rslora, lora_*, cuma_*, max_length, per_device_train_batch_size, "
        "gradient_checkpointing, gradient_checkpointing_kwargs, precompute_ref_log_probs, optim, num_train_epochs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--method", choices=PLANNED, default=None, help="default: the recipe's name up to `_`, else sft")
    add("--engine", choices=ENGINES, default=None, help="default: all of them, and the smallest setup that fits")
    add("--precision", choices=tuple(PRECISIONS), default=None, help="of the base; default: the recipe's, else bf16")
    add("--num_gpus", type=int, default=8, help="GPUs there are, over all machines; default: 8")
    add("--gpus_per_node", type=int, default=8, help="GPUs of a machine; default: 8")
    add("--gpu_memory", type=float, default=79.0, help="GiB of one GPU; a card of 80 GB has about 79; default: 79")
    add("--demographic_dim", type=int, default=None, help="length of a profile's vector; default: 1024, the paper's")
    add("--num_rows", type=int, default=None, help="rows of the data set: with it, hours are estimated")
    add("--peak_tflops", type=float, default=989.0, help="of one GPU in 16 bit; default: 989, an H100 SXM, dense")
    add("--utilization", type=float, default=0.4, help="share of the peak that training reaches; default: 0.4")
    add("--json", action="store_true", help="print the plan as JSON")
    return parser


def read_request(args: Sequence[str]) -> tuple[Request, bool]:
    """
    Read a command line.

    Returns:
        what is to be planned, and whether as JSON.

    Raises:
        ValueError: for a key that neither the plan nor the recipes have, and for values that don't fit.
    """
    own, rest = make_parser().parse_known_args(list(args))
    path = next((rest[i + 1] for i, arg in enumerate(rest[:-1]) if arg == "--config"), None)
    path = next((arg.removeprefix("--config=") for arg in rest if arg.startswith("--config=")), path)
    recipe, rest = read_recipe(rest)
    method = own.method or _method_of(path)
    parser = TrainingParser(getattr(trl_cuma, f"CuMA{METHODS[method]}Config"), prog="trl-cuma plan")
    typed = {arg.removeprefix("--").split("=")[0].replace("-", "_") for arg in rest if arg.startswith("--")}
    given = typed | set(recipe)
    if own.precision is not None and (both := [key for key in PRECISION_KEYS if key in typed]):
        raise ValueError(
            f"`--precision {own.precision}` and `--{both[0]}` were both given, and the first sets the second. Leave "
            "one out."
        )
    precision = own.precision or (None if given.intersection(PRECISION_KEYS) else "bf16")
    if precision is not None:
        for key, value in zip(PRECISION_KEYS, PRECISIONS[precision], strict=True):
            rest += [f"--{key}", value]
        if precision == "nf4" and "bnb_4bit_quant_storage" not in given:
            rest += ["--bnb_4bit_quant_storage", "bfloat16"]
    # `use_cpu`: the machine that plans needs no GPU that does bfloat16
    rest += ["--use_cpu", "true"]
    parser.read(recipe, rest, elsewhere=launch_options())
    _, training_args, model_args, _ = parser.parse_args_into_dataclasses(rest)
    recipe_args = None
    if path is not None:  # to compare with: what is left of it is to be said on the launched command line
        _, recipe_training_args, recipe_model_args, _ = parser.parse_args_into_dataclasses(["--use_cpu", "true"])
        recipe_args = recipe_model_args, recipe_training_args
    model_args.lora_task_type = "CAUSAL_LM"
    adapter = model_args.adapter_config()
    adapter.demographic_dim = own.demographic_dim or DEFAULT_DEMOGRAPHIC_DIM
    request = Request(
        method=method,
        model_args=model_args,
        training_args=training_args,
        base=_base(model_args),
        adapter=adapter,
        engine=own.engine,
        num_gpus=own.num_gpus,
        gpus_per_node=own.gpus_per_node,
        gpu_memory=own.gpu_memory,
        demographic_dim=adapter.demographic_dim,
        num_rows=own.num_rows,
        peak_tflops=own.peak_tflops,
        utilization=own.utilization,
        recipe=path,
        recipe_args=recipe_args,
    )
    _check(request)
    return request, own.json


def _method_of(path: str | None) -> str:
    method = Path(path).stem.split("_")[0] if path else "sft"
    if method in METHODS and method not in PLANNED:
        raise ValueError(
            f"`--config` is a recipe of {method.upper()}, whose memory is not computed: only that of SFT and DPO is. "
            "Plan a recipe of these."
        )
    return method if method in PLANNED else "sft"


def _base(model_args: CuMAModelConfig) -> Base:
    if model_args.dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(repr, DTYPES))} to plan, got {model_args.dtype!r}.")
    storage = model_args.bnb_4bit_quant_storage or "uint8"
    if storage not in ("uint8", *DTYPES):
        raise ValueError(f"`bnb_4bit_quant_storage` must be 'uint8', 'bfloat16' or 'float32', got {storage!r}.")
    return Base(
        dtype=DTYPES[model_args.dtype],
        quantization="nf4" if model_args.load_in_4bit else "int8" if model_args.load_in_8bit else None,
        double_quantization=model_args.use_bnb_nested_quant,
        storage=getattr(torch, storage),
    )


def _check(request: Request) -> None:
    args = request.training_args
    if request.model_args.model_name_or_path is None:
        raise ValueError(
            "Name the base model with `--model_name_or_path`: an id, a folder or a config.json; or a recipe with "
            "`--config`."
        )
    for name, value in (
        ("num_gpus", request.num_gpus),
        ("gpus_per_node", request.gpus_per_node),
        ("demographic_dim", request.demographic_dim),
        ("per_device_train_batch_size", args.per_device_train_batch_size),
        ("num_rows", request.num_rows),
    ):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {value}.")
    if not request.gpu_memory > 0 or not request.peak_tflops > 0:
        name = "gpu_memory" if not request.gpu_memory > 0 else "peak_tflops"
        raise ValueError(f"`{name}` must be more than 0, got {getattr(request, name)}.")
    if not 0 < request.utilization <= 1:
        raise ValueError(f"`utilization` must be in (0, 1], got {request.utilization}.")
    if args.max_length is None or args.max_length < 2:
        raise ValueError(f"`max_length` must be a number of tokens, 2 or more, to plan; got {args.max_length}.")
    if args.fp16:
        raise ValueError("`fp16: true` is not planned: its loss scaling and copies differ. Use `bf16: true`.")
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        raise ValueError(
            "`packing` and `padding_free` lay a batch out as one long row, whose memory is not computed. Set both to "
            "false to plan: the same tokens in rows of `max_length` need about as much."
        )
    optim = getattr(args.optim, "value", args.optim)
    if optim not in OPTIMIZERS:
        raise ValueError(f"`optim` must be one of {', '.join(map(repr, OPTIMIZERS))} to plan, got {optim!r}.")
