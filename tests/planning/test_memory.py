# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What is held beside activations: against a real trainer's tensors, and shares of engines against sums by hand."""

import pytest
import torch

from trl_cuma.planning.architecture import Base, build_model
from trl_cuma.planning.memory import ENGINES, Memory, Model, Parameter, host_memory, inventory, memory

BF16 = Base(torch.bfloat16)
NF4 = Base(torch.bfloat16, "nf4", storage=torch.bfloat16)


@pytest.mark.parametrize("architecture", ["qwen3", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_gpu_holds_what_a_real_trainer_does(make_base, adapter, make_trainer, architecture: str, dtype) -> None:
    bf16 = dtype == torch.bfloat16
    model = make_base(architecture, dtype)
    config = model.config
    trainer, step, _ = make_trainer(model, adapter(), bf16=bf16, optim="adamw_torch")
    step()
    trainer.create_optimizer()
    trainer.optimizer.step()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    state = [t for entry in trainer.optimizer.state.values() for t in entry.values() if t.dim()]  # not the counters

    planned = inventory(build_model(config, Base(dtype), adapter()))
    assert memory(planned, "single", 1, Base(dtype), bf16=bf16, optim="adamw_torch") == Memory(
        weights=sum(t.nbytes for t in [*frozen, *trainer.model.buffers()]),
        adapter=sum(p.nbytes for p in trained),
        optimizer=sum(t.nbytes for t in state),
        gradients=sum(p.grad.nbytes for p in trained),
        buffers=0,
    )


def parameter(numel: int, itemsize: int = 2, **fields) -> Parameter:
    defaults = {"name": f"{numel}{fields}", "trained": False, "reference": False, "shardable": True}
    return Parameter(numel=numel, itemsize=itemsize, **(defaults | {"layer": None, "head": False} | fields))


M = 1_000_000
# An embedding, two layers and a head of 60 million numbers; an adapter of 6 million; 1000 bytes of tables.
MODEL = Model(
    (
        parameter(12 * M),
        *(parameter(16 * M, layer=f"layers.{i}") for i in range(2)),
        *(parameter(3 * M, 4, layer=f"layers.{i}", trained=True) for i in range(2)),
        parameter(8 * M, head=True),
        parameter(8 * M, layer="layers.1"),
    ),
    state=1000,
)


def of(engine: str, gpus: int = 4, model: Model = MODEL, base: Base = BF16, **fields) -> Memory:
    return memory(model, engine, gpus, base, **({"bf16": True, "optim": "adamw_torch"} | fields))


def test_shares_by_hand() -> None:
    whole = 120 * M + 1000  # 60 million numbers in bf16
    # The adapter in fp32: 24 MB; Adam's two moments; gradients; DDP's copy of them.
    assert of("single") == Memory(whole, 24 * M, 48 * M, 24 * M, 0)
    assert of("ddp") == Memory(whole, 24 * M, 48 * M, 24 * M, 24 * M)
    # DeepSpeed: 6 million in bf16, 12 bytes for each of copy and moments; the flat copy that is reduced.
    assert of("zero0") == Memory(whole, 12 * M, 72 * M, 12 * M, 12 * M)
    bucket = 1000 * M  # 5e8 numbers in bf16
    assert of("zero1") == Memory(whole, 12 * M, 18 * M, 12 * M + 3 * M, bucket)
    assert of("zero2") == Memory(whole, 12 * M, 18 * M, 3 * M, bucket)
    # All 66 million numbers are less than ZeRO-3's limit of live ones: at most all are gathered.
    assert of("zero3") == Memory(30 * M + 1000, 3 * M, 18 * M, 3 * M, bucket + 132 * M)
    assert of("zero3-offload") == Memory(1000, 0, 0, 0, bucket + 132 * M)
    # FSDP2: the adapter in fp32, a quarter; gathered in bf16 twice the larger layer, 16 + 8 + 3 million, and the head.
    assert of("fsdp2") == Memory(30 * M + 1000, 6 * M, 12 * M, 6 * M, 2 * 54 * M + 16 * M)
    assert host_memory(MODEL, bf16=True) == 132 * M + 6 * M * (12 + 2)


def test_without_bf16_everything_is_fp32() -> None:
    base = Base(torch.float32)
    model = Model(
        tuple(parameter(p.numel, 4, trained=p.trained, layer=p.layer, head=p.head) for p in MODEL.parameters), 0
    )
    assert of("zero2", model=model, base=base, bf16=False) == Memory(240 * M, 24 * M, 18 * M, 6 * M, 2000 * M)
    assert of("fsdp2", model=model, base=base, bf16=False) == Memory(
        60 * M, 6 * M, 12 * M, 6 * M, 2 * 4 * 27 * M + 32 * M
    )


def test_what_zero3_does_not_shard() -> None:
    small = parameter(100_000)  # DeepSpeed keeps parameters up to this size on each GPU
    int8 = parameter(16 * M, 1, shardable=False)
    model = Model((small, int8, *MODEL.parameters), 0)
    assert of("zero3", model=model).weights == 200_000 + 16 * M + 30 * M


def test_the_limit_of_what_zero3_gathers() -> None:
    """1e9 live numbers, 5e7 on their way, and one parameter that is larger than what is left."""
    model = Model(tuple(parameter(1000 * M, name=str(i)) for i in range(8)) + (parameter(M, trained=True),), 0)
    assert of("zero3", model=model).buffers == 1000 * M + 2 * (1050 * M + 1000 * M)


def test_a_4_bit_base_is_loaded_whole_before_it_is_sharded() -> None:
    assert of("zero3", base=NF4).loading == of("fsdp2", base=NF4).loading == 120 * M + 1000
    assert of("ddp", base=NF4).loading == of("zero3").loading == of("fsdp2").loading == 0


@pytest.mark.parametrize(
    "optim, fp32, bf16",
    [
        ("adamw_torch_fused", 8, 4),  # torch's moments have the parameter's dtype
        ("adamw_8bit", 2 + 8 / 256, 2 + 8 / 256),
        ("sgd", 0, 0),
    ],
)
def test_optimizers(optim: str, fp32: float, bf16: float) -> None:
    for itemsize, each in ((4, fp32), (2, bf16)):
        model = Model((parameter(M), parameter(256 * 1000, itemsize, trained=True)), 0)
        assert of("single", model=model, optim=optim).optimizer == 256 * 1000 * each


def test_the_reference_adapter_counts_as_adapter_alone(make_base, adapter) -> None:
    model = build_model(make_base().config, BF16, adapter())
    alone = of("single", model=inventory(model))
    with torch.device("meta"):
        model.add_adapter("ref", model.peft_config["default"])
    both = of("single", model=inventory(model))
    assert both.adapter == 2 * alone.adapter
    assert (both.weights, both.optimizer, both.gradients) == (alone.weights, alone.optimizer, alone.gradients)


def test_more_gpus_never_need_more(make_base, adapter) -> None:
    model = inventory(build_model(make_base().config, BF16, adapter()))
    for engine in ENGINES:
        needs = [of(engine, gpus, model).fixed for gpus in (1, 2, 4, 8)]
        assert needs == sorted(needs, reverse=True)
