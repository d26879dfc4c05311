# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Engines and numbers of GPUs: what each needs, what doesn't work, and the smallest setup that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PretrainedConfig

from .activations import Step, measure
from .architecture import Base, build_model, load_config, with_layers
from .memory import ENGINES, Memory, Model, host_memory, inventory, memory
from .options import Request

GIB = 2**30
# Assumed, not computed: CUDA's context with its libraries, and what the allocator holds but can't use.
CONTEXT = 1.5 * GIB
SLACK = 0.05
DEPTHS = (2, 3)  # decoder layers of the steps that are run; further layers add what the third adds to the second


@dataclass(frozen=True)
class Setup:
    """
    One engine on some GPUs. `activations` are bytes without and with checkpointing; `refusal` says why the engine
    doesn't work, and then there are no numbers.
    """

    engine: str
    gpus: int
    memory: Memory | None = None
    activations: tuple[int, int] | None = None
    refusal: str | None = None

    def other(self, checkpointing: bool) -> float:
        return CONTEXT + SLACK * (self.memory.fixed + self.activations[checkpointing])

    def total(self, checkpointing: bool) -> float:
        return self.memory.fixed + self.activations[checkpointing] + self.other(checkpointing)

    def loads(self, gib: float) -> bool:
        return CONTEXT + (1 + SLACK) * self.memory.loading <= gib * GIB

    def fits(self, checkpointing: bool, gib: float) -> bool:
        return self.refusal is None and self.loads(gib) and self.total(checkpointing) <= gib * GIB


@dataclass(frozen=True)
class Plan:
    """
    What `trl-cuma plan` found. `smallest` is the smallest setup that fits and whether it checkpoints; `chosen` what is
    to be launched: the same, or the requested engine on the requested GPUs.
    """

    request: Request
    model_type: str
    layers: int
    parameters: int
    trainable: int
    setups: list[Setup]
    smallest: tuple[Setup, bool] | None
    chosen: tuple[Setup, bool] | None
    flops_per_row: int
    host_memory: int

    def hours(self) -> float | None:
        """Of the chosen setup, if every row is as long as the longest; `None` without a number of rows."""
        if self.request.num_rows is None or self.chosen is None:
            return None
        flops = self.flops_per_row * self.request.num_rows * self.request.training_args.num_train_epochs
        per_second = self.chosen[0].gpus * self.request.peak_tflops * 1e12 * self.request.utilization
        return flops / per_second / 3600


def refusal(engine: str, base: Base, *, bf16: bool) -> str | None:
    """Why an engine can't train this base, with what to do instead; what is known of it was found by running it."""
    is_deepspeed = engine.startswith("zero")
    if base.quantization == "int8" and engine == "fsdp2":
        return "`precision` int8 crashes under fsdp2, which can't shard its weights: use ddp, or nf4"
    if base.quantization == "int8" and engine in ("zero3", "zero3-offload"):
        return f"`precision` int8 saves nothing under {engine}: every GPU keeps the full weights. Use ddp, or nf4"
    if base.quantization == "nf4" and engine == "zero3-offload":
        return "`precision` nf4 with weights in host memory was never run: use zero3"
    if base.quantization == "nf4" and engine == "fsdp2" and base.storage != base.dtype:
        return (
            f"`bnb_4bit_quant_storage` is {_name(base.storage)}, and fsdp2 shards packed weights only in the dtype it "
            f"computes in: set it to {_name(base.dtype)}"
        )
    if base.quantization == "nf4" and is_deepspeed and base.storage not in (base.dtype, torch.uint8):
        return (
            f"`bnb_4bit_quant_storage` is {_name(base.storage)}, which DeepSpeed casts to the dtype it computes in "
            f"and so destroys: set it to {_name(base.dtype)}"
        )
    if is_deepspeed and not bf16 and base.dtype != torch.float32:
        return f"`bf16` is false with `dtype` {_name(base.dtype)}, which DeepSpeed refuses: set `bf16: true`"
    return None


class Planner:
    """
    Computes setups for one request; the training steps that engines share are run once.

    Args:
        request ([`Request`]): what is to be planned.

    Raises:
        ValueError: if there is no such model, or it is no causal language model.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        args = request.model_args
        self.config: PretrainedConfig = load_config(
            args.model_name_or_path,
            revision=args.model_revision,
            trust_remote_code=request.training_args.trust_remote_code,
        )
        self.bf16 = bool(request.training_args.bf16)
        try:
            bare = build_model(self.config, Base(torch.bfloat16), None)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError(  # transformers' lists all classes
                f"`model_name_or_path` is {args.model_name_or_path!r}, a {type(self.config).__name__}, which is no "
                "causal language model. Name one that is, such as Qwen/Qwen3-8B."
            ) from error
        self.parameters = sum(p.numel() for p in bare.parameters())
        self.model: Model = inventory(self._build(self.config))
        self._steps: dict[tuple, tuple[int, int]] = {}

    def _build(self, config: PretrainedConfig, dtype: torch.dtype | None = None) -> PeftModel:
        """The model; `dtype` of all that is in floating point, where the engine casts it."""
        model = build_model(config, self.request.base, self.request.adapter)
        if self.request.method == "dpo" and self.request.training_args.cuma_adapter_path is not None:
            with torch.device("meta"):
                model.add_adapter("ref", model.peft_config["default"])  # as TRL does: its reference is a copy
        if dtype is not None:
            for parameter in model.parameters():
                if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
                    parameter.data = parameter.data.to(dtype)
        return model

    def _is_even(self) -> bool:
        """Whether all decoder layers have the same tensors, so that two depths tell of all."""
        if len(set(getattr(self.config, "layer_types", None) or ())) > 1:
            return False
        layers: dict[str, list] = {}
        for p in self.model.parameters:
            if p.layer:
                layers.setdefault(p.layer, []).append((p.name.removeprefix(p.layer), p.numel, p.trained))
        return all(layer == next(iter(layers.values())) for layer in layers.values())

    def step(self, engine: str, checkpointing: bool) -> tuple[int, int]:
        """The activations' peak in bytes and the floating-point operations of one training step."""
        args = self.request.training_args
        reentrant = bool((args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))
        if engine in ("zero3", "zero3-offload"):  # as TRL sets it for adapters
            reentrant = True
        is_deepspeed = engine.startswith("zero")
        # Engines that cast the adapter compute in bfloat16; DeepSpeed without autocast, the others under it.
        cast = self.bf16 and (is_deepspeed or engine == "fsdp2")
        step = Step(
            method=self.request.method,
            rows=self.request.rows,
            length=args.max_length,
            demographic_dim=self.request.demographic_dim,
            autocast=self.bf16 and not is_deepspeed,
            checkpointing=("reentrant" if reentrant else "non-reentrant") if checkpointing else None,
            has_reference=not getattr(args, "precompute_ref_log_probs", False),
        )
        key = (step, cast)
        if key not in self._steps:
            self._steps[key] = self._run(step, torch.bfloat16 if cast else None)
        return self._steps[key]

    def _run(self, step: Step, dtype: torch.dtype | None) -> tuple[int, int]:
        layers = self.config.num_hidden_layers
        if layers <= DEPTHS[1] or not self._is_even():
            return measure(self._build(self.config, dtype), step)
        at_two, at_three = (measure(self._build(with_layers(self.config, n), dtype), step) for n in DEPTHS)
        more = layers - DEPTHS[0]
        return tuple(two + more * (three - two) for two, three in zip(at_two, at_three, strict=True))

    def setup(self, engine: str, gpus: int) -> Setup:
        """What `engine` needs on `gpus` GPUs."""
        reason = refusal(engine, self.request.base, bf16=self.bf16)
        if reason is not None:
            return Setup(engine, gpus, refusal=reason)
        optim = getattr(self.request.training_args.optim, "value", self.request.training_args.optim)
        if engine == "zero3-offload" and "8bit" in optim:
            reason = f"`optim` {optim} with its state in host memory was never run: use adamw_torch_fused, or zero3"
            return Setup(engine, gpus, refusal=reason)
        needed = memory(self.model, engine, gpus, self.request.base, bf16=self.bf16, optim=optim)
        return Setup(engine, gpus, needed, (self.step(engine, False)[0], self.step(engine, True)[0]))

    def smallest(self, engines: tuple[str, ...], most: int) -> tuple[Setup, bool] | None:
        """The fewest GPUs, then the simplest engine, without checkpointing where that fits."""
        for gpus in counts(most):
            for engine in engines:
                if len(engines) > 1 and (engine == "single") != (gpus == 1):
                    continue
                if (fitting := self._fitting(self.setup(engine, gpus))) is not None:
                    return fitting
        return None

    def _fitting(self, setup: Setup) -> tuple[Setup, bool] | None:
        for checkpointing in (False, True):
            if setup.fits(checkpointing, self.request.gpu_memory):
                return setup, checkpointing
        return None

    def plan(self) -> Plan:
        """
        All engines, or the requested one, on all GPUs, and the smallest setup that fits.

        Raises:
            ValueError: if the requested engine doesn't work here.
        """
        request = self.request
        engines = ENGINES if request.engine is None else (request.engine,)
        setups = [self.setup(engine, 1 if engine == "single" else request.num_gpus) for engine in engines]
        if request.engine is not None:
            if setups[0].refusal is not None:
                raise ValueError(f"{setups[0].refusal}.")
            smallest, chosen = self.smallest(engines, setups[0].gpus), self._fitting(setups[0])
        else:  # weights in host memory only where nothing else is left
            smallest = self.smallest(
                tuple(e for e in ENGINES if e not in ("zero0", "zero3-offload")), request.num_gpus
            )
            smallest = chosen = smallest or self.smallest(("zero3-offload",), request.num_gpus)
        flops = 0
        if chosen is not None:
            flops = self.step(chosen[0].engine, chosen[1])[1] // request.training_args.per_device_train_batch_size
        return Plan(
            request=request,
            model_type=self.config.model_type,
            layers=self.config.num_hidden_layers,
            parameters=self.parameters,
            trainable=sum(p.numel for p in self.model.trained),
            setups=setups,
            smallest=smallest,
            chosen=chosen,
            flops_per_row=flops,
            host_memory=host_memory(self.model, bf16=self.bf16),
        )


def counts(most: int) -> Iterator[int]:
    """1, 2, 4, … and `most`."""
    gpus = 1
    while gpus < most:
        yield gpus
        gpus *= 2
    yield most


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
