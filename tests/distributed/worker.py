# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
`python worker.py LAUNCH FOLDER CELL…`, in each process of a launch: trains the cells one after the other, and writes
what each came to, or the error that it ended with, into `FOLDER/CELL.RANK.pt`.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from cells import AUX_COEF, CELLS, SAVED_STEP, STEPS, Z_COEF, Cell
from datasets import Dataset
from engines import LAUNCHES, ZERO3
from peft import get_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, BitsAndBytesConfig, set_seed
from trl.models import unwrap_model_for_generation

from trl_cuma import CuMAConfig, CuMADPOConfig, CuMADPOTrainer, CuMASFTConfig, CuMASFTTrainer, FieldEncoder
from trl_cuma.testing import chat_tokenizer, tiny_model

PEOPLE = [{"age": age, "country": country} for age in ("old", "young") for country in ("FR", "JP")]


def prepare(folder: Path) -> None:
    """The base model with its tokenizer, and an adapter for it that isn't at its start: B is not zero."""
    tokenizer = chat_tokenizer(["Question 0? yes no, not at all"])
    # Ten times the usual spread of weights: of so small a model the logits would all be nearly 0.
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "initializer_range": 0.2}
    model = tiny_model("qwen3", vocab_size=len(tokenizer), **sizes)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    set_seed(1)
    config = adapter_config(target_modules=["q_proj", "v_proj"], init_weights=False, demographic_dim=2)
    get_peft_model(model, config).save_pretrained(folder / "trained")


def adapter_config(**fields: Any) -> CuMAConfig:
    return CuMAConfig(**({"num_experts": 4, "r": 2, "router_hidden": 8, "task_type": "CAUSAL_LM"} | fields))


def rows(cell: Cell, count: int) -> Dataset:
    texts = ["yes" if row % 3 else "no, not at all" for row in range(count + 1)]
    columns: dict[str, list[Any]] = {"prompt": [f"Question {row % 10}? " for row in range(count)]}
    if cell.profiles == "fields":
        columns["demographic"] = [PEOPLE[row % 4] for row in range(count)]
    else:
        columns["demographic"] = [[1.0, 0.0] if row % 4 < 2 else [0.0, 1.0] for row in range(count)]
    if cell.method == "sft":
        columns["completion"] = texts[:count]
    else:
        columns |= {"chosen": texts[:count], "rejected": [text + "!" for text in texts[1:]]}
    return Dataset.from_dict(columns)


def make_trainer(name: str, cell: Cell, launch: str, folder: Path) -> Any:
    engine, world = LAUNCHES[launch]
    methods = {"sft": (CuMASFTConfig, CuMASFTTrainer), "dpo": (CuMADPOConfig, CuMADPOTrainer)}
    config_class, trainer_class = methods[cell.method]
    arguments: dict[str, Any] = {
        "output_dir": str(folder / name),
        "use_cpu": True,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
        "per_device_train_batch_size": 4 // world if cell.scope == "ranks" else 2,
        "gradient_accumulation_steps": cell.accumulation if cell.scope == "ranks" else cell.accumulation * 2 // world,
        "per_device_eval_batch_size": 2,
        "gradient_checkpointing": cell.checkpointing != "none",
        "train_sampling_strategy": "sequential",
        "max_steps": STEPS,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "optim": "adamw_torch",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "cuma_aux_loss_coef": AUX_COEF,
        "cuma_z_loss_coef": Z_COEF,
        "cuma_aux_loss_scope": cell.scope,
    }
    if cell.checkpointing != "none":
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": cell.checkpointing == "reentrant"}
        arguments["ddp_find_unused_parameters"] = False  # with it DDP refuses reentrant checkpointing
    if "save" in cell.do:
        arguments |= {"save_strategy": "steps", "save_steps": SAVED_STEP}
    fields = cell.profiles == "fields"
    if fields:
        arguments |= {"cuma_group_by": ["country"], "cuma_min_group_size": 1}
    arguments |= cell.arguments
    continues = "cuma_adapter_path" in arguments
    if continues:
        arguments["cuma_adapter_path"] = str(folder / arguments["cuma_adapter_path"])
    args = config_class(**arguments)
    if engine == "fsdp2":  # accelerate makes FSDP of what it takes for several GPUs only
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    assert args.distributed_state.num_processes == world, args.distributed_state
    set_seed(0)  # of the adapter's start
    return trainer_class(
        str(folder / "base"),
        args=args,
        train_dataset=rows(cell, cell.rows or 4 * cell.accumulation * STEPS),
        # In two processes the second one has no row of its own in the last batch, or the first one only one.
        eval_dataset={"even": rows(cell, 6), "odd": rows(cell, 5)},
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=None if continues else adapter_config(**cell.adapter),
        demographic_encoder=FieldEncoder(min_count=2) if fields else None,
        **({} if cell.quantization is None else {"quantization_config": quantization(cell.quantization)}),
    )


def quantization(scheme: str) -> BitsAndBytesConfig:
    if scheme == "int8":  # without outlier columns, which are those of a whole batch
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if scheme == "nf4-bfloat16" else torch.float32,
        bnb_4bit_quant_storage=scheme.partition("-")[2] or "uint8",
    )


def whole(parameter: torch.nn.Parameter, write: bool = False) -> Any:
    """A context in which a parameter that ZeRO-3 has partitioned is whole."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None)


def gathered(trainer: Any) -> dict[str, torch.Tensor]:
    """The trained parameters. All processes must call it."""
    found = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if parameter.requires_grad:
            with whole(parameter):
                full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                found[name] = full.detach().clone()
    return found


def describe_engine(trainer: Any) -> dict[str, Any]:
    """What the engine is, and does: accelerate falls back to other ones without a word."""
    wrapped, optimizer = trainer.model_wrapped, trainer.optimizer.optimizer
    parameters = list(trainer.model.parameters())
    stage = wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else None
    # The tensors that this process's optimizer steps; ZeRO 1 and 2 keep flat ones of their own.
    flat = "single_partition_of_fp32_groups" if stage in (1, 2) else "fp32_partitioned_groups_flat"
    stepped = getattr(optimizer, flat, None) or [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "world": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "type": trainer.accelerator.distributed_type.value,
        "wrapper": "FSDPModule" if isinstance(wrapped, FSDPModule) else type(wrapped).__name__,
        "stage": stage,
        "partitions gradients": bool(stage) and wrapped.zero_optimization_partition_gradients(),
        # a parameter that ZeRO-3 has partitioned is empty outside of its layer's forward
        "sharded": all(isinstance(p, DTensor) or (hasattr(p, "ds_tensor") and not p.numel()) for p in parameters),
        "steps": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in stepped),
        "trains": sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad),
    }


def send_each_person_to_one_expert(trainer: Any) -> None:
    """The routers of the first person's vector (1, 0) choose expert 0, of the second's (0, 1) expert 1."""
    for name, parameter in trainer.model.named_parameters():
        if "cuma_router" in name:
            with torch.no_grad(), whole(parameter, write=True):
                if parameter.numel():
                    start = 4 * torch.eye(4, 2) if name.endswith("demographic_weight") else torch.zeros(4)
                    parameter.copy_(start)


def logits(trainer: Any) -> torch.Tensor:
    """Of the wrapped model, for the same rows in each process."""
    batch = trainer.processing_class(["Question 1? yes", "Question 2? yes"], return_tensors="pt")
    embeds = trainer.demographic_table.encoder.encode(PEOPLE[1:3])
    trainer.model_wrapped.eval()
    with torch.no_grad():
        return trainer.model_wrapped(**batch, demographic_embeds=embeds).logits.float()


def generate(trainer: Any, world: int, **how: Any) -> list[list[int]]:
    """Two people's answers in each of two processes, or all four. The first process is done two tokens earlier."""
    rank = trainer.accelerator.process_index
    mine = slice(2 * rank, 2 * rank + 4 // world)
    prompts = trainer.processing_class([f"Question {row}? " for row in (1, 2, 3, 4)][mine], return_tensors="pt")
    embeds = trainer.demographic_table.encoder.encode(PEOPLE[mine])
    gather = how.pop("gather", True)
    unwrapped = unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, gather)
    trainer.model.eval()
    with torch.no_grad(), unwrapped as model:
        limit = {"max_new_tokens": 4 + 2 * rank, "eos_token_id": None, "do_sample": False}
        tokens = model.generate(**prompts, demographic_embeds=embeds, **limit, **how)
    return tokens[:, prompts["input_ids"].shape[1] :][:, :4].tolist()


def convert(checkpoint: Path, folder: Path) -> Path:
    """As our error message says, so that another number of processes can go on from a checkpoint of ZeRO-3."""
    copy = shutil.copytree(checkpoint, folder / checkpoint.name)
    [shards] = copy.glob("global_step*")
    options = ["--input_folder", shards, "--output_folder", f"{shards}_universal"]
    subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *options], check=True)
    (folder / "universal.json").write_text(json.dumps(ZERO3 | {"checkpoint": {"load_universal": True}}))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(folder / "universal.json")
    return copy


def run(name: str, cell: Cell, launch: str, folder: Path) -> dict[str, Any]:
    engine, world = LAUNCHES[launch]
    checkpoint = None if cell.resume is None else folder / cell.resume
    if "convert" in cell.do:
        checkpoint = convert(checkpoint, folder)
    trainer = make_trainer(name, cell, launch, folder)
    if "one expert each" in cell.do:
        send_each_person_to_one_expert(trainer)
    result: dict[str, Any] = {"start": gathered(trainer)}
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    result |= {
        "engine": describe_engine(trainer),
        "reentrant": (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"),
        "weights": gathered(trainer),
        "logs": [record for record in trainer.state.log_history if "loss" in record],
    }
    if "evaluate" in cell.do:
        result["evaluation"] = trainer.evaluate()
    if "save" in cell.do:
        trainer.save_model(str(folder / name / "saved"))
        result["logits"] = logits(trainer)
    if "generate" in cell.do:
        # transformers knows by itself that processes have to wait for each other under ZeRO-3, but not under FSDP2
        result["generated"] = generate(trainer, world, **({"synced_gpus": True} if engine == "fsdp2" else {}))
        if engine == "zero3":
            result["generated in parts"] = generate(trainer, world, gather=False, synced_gpus=True)
    return result


def start(launch: str, folder: Path) -> int:
    """What each process does first; returns its number."""
    if launch == "alone" or launch.startswith("zero"):
        with suppress(ImportError):
            import deepspeed

            # A collective for CPUs that DeepSpeed would compile first, in 90 seconds; gloo has it, too.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        prepare(folder)
        (folder / "prepared").touch()
    while not (folder / "prepared").exists():
        time.sleep(0.1)
    return rank


def main(launch: str, folder: Path, names: list[str]) -> None:
    rank = start(launch, folder)
    environment = dict(os.environ)
    for name in names:
        os.environ.update(CELLS[name].environment)
        try:
            result = run(name, CELLS[name], launch, folder)
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{name}.{rank}.tmp")
        os.replace(folder / f"{name}.{rank}.tmp", folder / f"{name}.{rank}.pt")
        os.environ.clear()
        os.environ.update(environment)
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
