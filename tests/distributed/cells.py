# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What is trained: the cells of the matrix, for every engine. Read by the worker and the tests."""

from dataclasses import dataclass, field, replace
from typing import Any

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
CHECKPOINTING = ("none", "non-reentrant", "reentrant")
STEPS, SAVED_STEP = 3, 2
AUX_COEF, Z_COEF = 1.0, 0.1
PLAIN = {"target_modules": ["q_proj", "v_proj"]}
SHARED_A = PLAIN | {"share_a": True}
# A router that a group of layers shares, and a projection of the profile that all routers share.
GROUPED = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "router_groups": [["q_proj", "k_proj", "v_proj"]],
    "demographic_projection": 3,
}


@dataclass(frozen=True)
class Cell:
    """
    One run. A step of the optimizer takes `4 · accumulation` rows, however many processes there are. Where the load
    spans the ranks, one process takes as many rows in a forward as all processes do together; where it is local, it
    takes those of one process (2) in a forward, and the other's in the next.
    """

    method: str = "sft"
    adapter: dict[str, Any] = field(default_factory=lambda: PLAIN)
    checkpointing: str = "none"
    scope: str = "ranks"
    accumulation: int = 1
    rows: int | None = None  # by default what the steps need
    profiles: str = "fields"  # or "vectors": the rows of the first process are one person's, the second's another's
    quantization: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # of the trainer
    do: tuple[str, ...] = ()  # beside training: see the worker
    resume: str | None = None  # the checkpoint's folder, from that of the launch
    environment: dict[str, str] = field(default_factory=dict)


CELLS = {
    f"{method}-{checkpointing}": Cell(method, adapter, checkpointing, accumulation=accumulation)
    for method, adapter, accumulation in (("sft", GROUPED, 2), ("dpo", SHARED_A, 1))
    for checkpointing in CHECKPOINTING
}
CELLS["sft-none"] = replace(CELLS["sft-none"], do=("evaluate", "generate", "save"))
CELLS["dpo-none"] = replace(CELLS["dpo-none"], do=("evaluate",))
CELLS |= {
    "sft-local": Cell(scope="local"),
    "dpo-local": Cell("dpo", GROUPED, scope="local"),
    "sft-spanning": Cell(),  # what sft-local must differ from
    # Each person to one expert: with one person in each process, neither uses the other's.
    "sft-experts": Cell(
        adapter=PLAIN | {"routing": "demographic", "gate": "softmax_topk", "top_k": 1, "router_layers": 1},
        profiles="vectors",
        do=("one expert each",),
    ),
    "sft-uneven": Cell(rows=9, arguments={"max_steps": -1, "num_train_epochs": 1}),
    "dpo-continue": Cell("dpo", profiles="vectors", arguments={"cuma_adapter_path": "trained"}),
    # ZeRO-3 of a model that each process loads whole
    "sft-whole": replace(CELLS["sft-none"], do=(), environment={"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}),
}
for scheme in ("nf4", "nf4-float32", "int8"):  # nf4-float32: stored as float32, which ZeRO-3 and FSDP2 can shard
    CELLS[f"sft-{scheme}"] = Cell(quantization=scheme, do=("save",))
# What recipes for GPUs do. For nf4-bfloat16, see nf4-float32.
BF16 = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
CELLS |= {
    "sft-bf16": Cell(adapter=GROUPED, checkpointing="reentrant", arguments=BF16, do=("save",)),
    "dpo-bf16": replace(CELLS["dpo-continue"], arguments=BF16 | {"cuma_adapter_path": "trained"}),
    "sft-bf16-nf4": Cell(quantization="nf4-bfloat16", arguments=BF16, do=("save",)),
}
CHECKPOINT = f"sft-none/checkpoint-{SAVED_STEP}"
CELLS["sft-resumed"] = replace(CELLS["sft-none"], do=(), resume=CHECKPOINT)
# Other numbers of processes than the two that wrote the checkpoint
CELLS |= {f"from-{engine}": replace(CELLS["sft-resumed"], resume=f"../{engine}/{CHECKPOINT}") for engine in ENGINES}
# and, as `accelerate launch --num_processes 1` would, of the same engine
ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
for stage in (0, 1, 2, 3):
    environment = ONE | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    CELLS[f"from-zero{stage}-by-zero"] = replace(CELLS[f"from-zero{stage}"], environment=environment)
CELLS["from-zero3-converted"] = replace(CELLS["from-zero3-by-zero"], do=("convert",))


def reference(name: str) -> str:
    """The cell that one process computes to compare with: checkpointing, say, changes nothing."""
    method, _, rest = name.partition("-")
    if method == "from" or rest in ("whole", "resumed"):
        return "sft-none"
    name = name.replace("nf4-float32", "nf4")
    return f"{method}-none" if rest in CHECKPOINTING else name
