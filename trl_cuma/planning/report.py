# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A plan as text and as JSON."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, fields
from typing import Any

import yaml

from .setups import GIB, Plan, Setup

COLUMNS = ("weights", "adapter", "optimizer", "gradients", "buffers")
# A recipe's keys that the numbers or the adapter depend on, in the order in which they are printed.
KEYS = (
    *("model_name_or_path", "model_revision", "trust_remote_code", "dtype", "bf16"),
    *("load_in_4bit", "load_in_8bit", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
    *("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "lora_target_modules", "lora_modules_to_save"),
    *("cuma_num_experts", "cuma_top_k", "cuma_gate", "cuma_routing", "cuma_demographic_projection"),
    *("cuma_router_hidden", "cuma_router_layers", "cuma_share_a", "cuma_router_groups"),
    *("cuma_film_hidden", "cuma_missing_demographics"),
    *("cuma_adapter_path", "precompute_ref_log_probs", "max_length", "per_device_train_batch_size"),
    *("num_train_epochs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "optim"),
    "ddp_find_unused_parameters",
)
ALWAYS = {"model_name_or_path", "dtype", "bf16", "lora_r", "lora_alpha", "cuma_num_experts", "cuma_top_k"} | {
    *("cuma_router_hidden", "max_length", "per_device_train_batch_size", "gradient_checkpointing", "optim")
}


def render(plan: Plan) -> str:
    """What `trl-cuma plan` prints."""
    request, args = plan.request, plan.request.training_args
    config = request.adapter
    quantization = {"nf4": "nf4", "int8": "int8", None: str(request.base.dtype).removeprefix("torch.")}
    base = quantization[request.base.quantization] + (
        ", doubly quantized" if request.base.quantization == "nf4" and request.base.double_quantization else ""
    )
    targets = config.target_modules
    targets = "PEFT's for this architecture" if targets is None else targets
    targets = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    count = args.per_device_train_batch_size
    batch = f"{count} {'pair' if request.method == 'dpo' else 'row'}{'s' * (count > 1)}"
    share = 100 * plan.trainable / plan.parameters
    lines = [
        f"Model     {request.model_args.model_name_or_path} ({plan.model_type}, {plan.layers} layers): "
        f"{plan.parameters:,} parameters, held in {base}",
        f"Adapter   {plan.trainable:,} trainable parameters, {share:.2f} % of the model's: "
        f"r={config.r}, {config.num_experts} experts, top {config.top_k}, on {targets}",
        f"Training  {request.method}, {batch} of {args.max_length} tokens on each GPU, {_optim(plan)}, "
        f"{'bf16' if args.bf16 else 'fp32'}",
        "",
        "Memory of one GPU in GiB. Activations and totals: without / with gradient checkpointing. Other: assumed, 1.5 "
        "GiB for CUDA",
        f"and 5 % that the allocator can't use. A GPU has {request.gpu_memory:g}.",
        "",
        *_table(plan),
        *_hints(plan),
        "",
        *_chosen(plan),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _table(plan: Plan) -> list[str]:
    head = ["engine", "GPUs", *COLUMNS, "activations", "other", "total", "fits"]
    rows = [head]
    for setup in plan.setups:
        if setup.refusal is not None:
            continue
        parts = [f"{getattr(setup.memory, name) / GIB:.2f}" for name in COLUMNS]
        pairs = [
            f"{function(False) / GIB:.1f} / {function(True) / GIB:.1f}"
            for function in (lambda on, s=setup: s.activations[on], setup.other, setup.total)
        ]
        fits = [setup.fits(on, plan.request.gpu_memory) for on in (False, True)]
        verdict = "yes" if fits[0] else "checkpointed" if fits[1] else "no"
        if not setup.loads(plan.request.gpu_memory):
            verdict = "no: loading"
        rows.append([setup.engine, str(setup.gpus), *parts, *pairs, verdict])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)
        ]
        lines.append("  ".join([*cells, row[-1]]))
    return lines + [f"{setup.engine}: not possible. {setup.refusal}." for setup in plan.setups if setup.refusal]


def _hints(plan: Plan) -> list[str]:
    kwargs = plan.request.training_args.gradient_checkpointing_kwargs or {}
    if plan.request.base.quantization != "int8" or kwargs.get("use_reentrant"):
        return []
    # bitsandbytes keeps them itself, unseen by checkpointing that isn't reentrant
    return [
        "int8: checkpointing still keeps the inputs of all linear layers, unless you set "
        "`gradient_checkpointing_kwargs: {use_reentrant: true}`."
    ]


def _chosen(plan: Plan) -> list[str]:
    request = plan.request
    if plan.chosen is None:
        gpus = f"{request.num_gpus} GPU{'s' * (request.num_gpus > 1)} of {request.gpu_memory:g} GiB"
        advice = "more or larger GPUs, a lower `per_device_train_batch_size` or `max_length`"
        if request.base.quantization is None:
            advice += ", or a base in 4 bit (`--precision nf4`)"
        return [f"Nothing fits on {gpus}. What helps: {advice}."]
    setup, checkpointing = plan.chosen
    fits = f"{_on(setup)}, {_with(checkpointing)}, {setup.total(checkpointing) / GIB:.1f} GiB"
    lines = [f"The smallest setup that fits: {fits}."]
    if request.engine is not None:
        smallest, needs = plan.smallest
        lines = [f"It fits: {fits}. The fewest GPUs that do: {smallest.gpus}, {_with(needs)}."]
    if setup.engine == "zero3-offload":
        lines.append(f"It also keeps {plan.host_memory / GIB:.1f} GiB in host memory, over all machines.")
    if (hours := plan.hours()) is not None:
        epochs = request.training_args.num_train_epochs
        lines.append(
            f"As computed, not measured: {hours:.1f} hours for {epochs:g} epoch{'s' * (epochs != 1)} of "
            f"{request.num_rows:,} rows, if each has {request.training_args.max_length} tokens and the GPUs"
        )
        peak = f"{100 * request.utilization:g} % of {request.peak_tflops:g} TFLOP/s"
        lines.append(f"reach {peak} ({plan.flops_per_row / 1e12:,.0f} TFLOP a row).")
    lines += ["", "Recipe:", ""]
    lines += [f"    {line}" for line in yaml.safe_dump(recipe_lines(plan), sort_keys=False).splitlines()]
    lines += ["", "Launch:", "", *(f"    {line}" for line in launch_lines(plan))]
    return lines


def recipe_lines(plan: Plan) -> dict[str, Any]:
    """The keys of a recipe that this plan read, for the chosen setup: some always, others where they say something."""
    request, (setup, checkpointing) = plan.request, plan.chosen
    values = _settings(request.model_args, request.training_args) | {"gradient_checkpointing": checkpointing}
    defaults = {f.name: f.default for args in (request.model_args, request.training_args) for f in fields(args)}
    before = _settings(*request.recipe_args) if request.recipe_args else defaults
    left_out = set()
    if not values["load_in_4bit"]:
        left_out |= {"use_bnb_nested_quant", "bnb_4bit_quant_storage"}
    if not checkpointing:
        left_out.add("gradient_checkpointing_kwargs")
    if setup.engine == "ddp":
        values["ddp_find_unused_parameters"] = False
    else:
        left_out.add("ddp_find_unused_parameters")
    return {
        key: values[key]
        for key in KEYS
        if key in values.keys() - left_out and (key in ALWAYS or not values[key] == defaults[key] == before[key])
    }


def launch_lines(plan: Plan) -> list[str]:
    """
    The command that starts the chosen setup, one argument group per line. It sets the keys in which the plan differs
    from the recipe's file.
    """
    setup, request = plan.chosen[0], plan.request
    nodes = -(-setup.gpus // request.gpus_per_node)
    name = "two-nodes-zero3" if setup.engine == "zero3" and nodes > 1 else setup.engine
    lines = [f"accelerate launch --config_file recipes/accelerate_configs/{name}.yaml --num_processes {setup.gpus}"]
    if nodes > 1:
        lines.append(
            f"  --num_machines {nodes} --machine_rank RANK --main_process_ip ADDRESS --main_process_port 29500"
        )
    lines.append(f"  examples/{request.method}_cuma.py --config {request.recipe or 'RECIPE.yaml'}")
    if request.recipe_args is not None:
        before = _settings(*request.recipe_args)
        changed = {key: value for key, value in recipe_lines(plan).items() if value != before[key]}
        lines += [f"    --{key} {_words(value)}" for key, value in changed.items()]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _settings(model_args: Any, training_args: Any) -> dict[str, Any]:
    """A recipe's keys and values; of an enumeration's members, what a recipe writes."""
    return {key: getattr(value, "value", value) for key, value in (vars(training_args) | vars(model_args)).items()}


def _words(value: Any) -> str:
    """A recipe's value on a command line."""
    if isinstance(value, bool | dict):
        value = json.dumps(value)
    return shlex.join(map(str, value)) if isinstance(value, list) else shlex.quote(str(value))


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's numbers, in bytes, for another program."""

    def row(setup: Setup) -> dict[str, Any]:
        if setup.refusal is not None:
            return {"engine": setup.engine, "gpus": setup.gpus, "refusal": setup.refusal}
        by = {False: "without_checkpointing", True: "with_checkpointing"}
        return {
            "engine": setup.engine,
            "gpus": setup.gpus,
            **asdict(setup.memory),
            "activations": {key: setup.activations[on] for on, key in by.items()},
            "other": {key: round(setup.other(on)) for on, key in by.items()},
            "total": {key: round(setup.total(on)) for on, key in by.items()},
            "fits": {key: setup.fits(on, plan.request.gpu_memory) for on, key in by.items()},
        }

    chosen = None
    if plan.chosen is not None:  # what fits, and how to start it
        chosen = {
            **row(plan.chosen[0]),
            "gradient_checkpointing": plan.chosen[1],
            "hours": plan.hours(),
            "recipe": recipe_lines(plan),
            "launch": launch_lines(plan),
        }
    return {
        "model": plan.request.model_args.model_name_or_path,
        "parameters": plan.parameters,
        "trainable": plan.trainable,
        "setups": [row(setup) for setup in plan.setups],
        "chosen": chosen,
    }


def _on(setup: Setup) -> str:
    return f"{setup.engine} on {setup.gpus} GPU{'s' * (setup.gpus > 1)}"


def _with(checkpointing: bool) -> str:
    return f"{'with' if checkpointing else 'without'} gradient checkpointing"


def _optim(plan: Plan) -> str:
    optim = plan.request.training_args.optim
    return getattr(optim, "value", optim)
