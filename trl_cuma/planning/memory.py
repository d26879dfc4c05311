# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
What one GPU holds under each engine, in bytes, from the tensors of the real model and adapter. Where the rules come
from: the code of accelerate 1.15, DeepSpeed 0.19, torch 2.13, transformers 5.23, TRL 1.16 and PEFT 0.21, with their
defaults, which `recipes/accelerate_configs` leaves as they are. For a run with `bf16: true` on n GPUs:

| engine | base | adapter | gradients | optimizer |
|---|---|---|---|---|
| single, ddp | whole | fp32 | fp32 | fp32 |
| zero0 | whole | cast to bf16 by DeepSpeed | bf16 | fp32, and an fp32 copy of the adapter |
| zero1 | whole | bf16 | bf16, and 1/n of their mean | as zero0, 1/n |
| zero2 | whole | bf16 | bf16, 1/n | as zero0, 1/n |
| zero3 | 1/n | bf16, 1/n | bf16, 1/n | as zero0, 1/n |
| zero3-offload | host | host | host | host |
| fsdp2 | 1/n | fp32, 1/n | fp32, 1/n | fp32, 1/n |

With `bf16: false` all of it is fp32. The factors of 4-bit blocks and int8 rows are no parameters: no engine shards
them. A quantized base is loaded whole by each process (transformers' `get_init_context` and `update_device_map`), and
sharded after that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from peft import PeftModel

from .architecture import Base, decoder_layers, state_of

# From the simplest to the least simple; `zero0` is for finding faults, `zero3-offload` the last resort.
ENGINES = ("single", "ddp", "zero0", "zero1", "zero2", "fsdp2", "zero3", "zero3-offload")

# DeepSpeed's defaults, in elements.
REDUCE_BUCKET = 500_000_000  # `reduce_bucket_size`: allocated whole by ZeRO-1 to 3, however small the gradients
LIVE_PARAMETERS = 1_000_000_000  # `stage3_max_live_parameters`, and `stage3_max_reuse_distance`
PREFETCH_BUCKET = 50_000_000  # `stage3_prefetch_bucket_size`
PERSISTENCE_THRESHOLD = 100_000  # `stage3_param_persistence_threshold`: smaller parameters are on each GPU

# Bytes of state for each trained parameter, by the name in the recipe: a function of its dtype's size.
OPTIMIZERS = {
    "adamw_torch": lambda itemsize: 2 * itemsize,
    "adamw_torch_fused": lambda itemsize: 2 * itemsize,
    "adamw_8bit": lambda itemsize: 2 * (1 + 4 / 256),  # bitsandbytes: a float32 factor for 256 values
    "adamw_bnb_8bit": lambda itemsize: 2 * (1 + 4 / 256),
    "paged_adamw_8bit": lambda itemsize: 2 * (1 + 4 / 256),
    "sgd": lambda itemsize: 0,
}


@dataclass(frozen=True)
class Parameter:
    """One parameter: its elements and bytes as they are stored, and what it belongs to."""

    name: str
    numel: int
    itemsize: int
    trained: bool
    reference: bool  # of the frozen copy of the adapter
    shardable: bool  # not int8
    layer: str | None  # its decoder layer
    head: bool  # in the output embedding or the final norm, which FSDP2 gathers as one

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Model:
    """What of a model counts: its parameters, and the bytes of what no engine shards."""

    parameters: tuple[Parameter, ...]
    state: int

    @property
    def base(self) -> list[Parameter]:
        return [p for p in self.parameters if not (p.trained or p.reference)]

    @property
    def adapter(self) -> list[Parameter]:
        return [p for p in self.parameters if p.trained or p.reference]

    @property
    def trained(self) -> list[Parameter]:
        return [p for p in self.parameters if p.trained]


def inventory(model: PeftModel) -> Model:
    """The tensors of a model on the meta device."""
    layers = decoder_layers(model)
    head = model.get_base_model().get_output_embeddings()
    parameters = []
    for name, parameter in model.named_parameters():  # a tied one comes once
        layer = next((key for key in layers if name.startswith(f"{key}.")), None)
        is_adapter = "cuma_" in name
        found = Parameter(
            name=name,
            numel=parameter.numel(),
            itemsize=parameter.itemsize,
            trained=parameter.requires_grad,
            reference=is_adapter and not parameter.requires_grad,
            shardable=not hasattr(parameter, "SCB"),
            layer=layer,
            head=layer is None and (parameter is head.weight or parameter.dim() == 1) and not is_adapter,
        )
        parameters.append(found)
    state = [tensor for module in model.modules() for tensor in state_of(module)]
    return Model(tuple(parameters), sum(t.nbytes for t in [*state, *model.buffers()]))


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. `buffers` are the engine's own; `loading` is what is there before it shards the base."""

    weights: int
    adapter: int
    optimizer: int
    gradients: int
    buffers: int
    loading: int = 0

    @property
    def fixed(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.gradients + self.buffers


def memory(model: Model, engine: str, gpus: int, base: Base, *, bf16: bool, optim: str) -> Memory:
    """
    Args:
        model (`Model`): of [`inventory`].
        engine (`str`): a name of the table above.
        gpus (`int`): n, over which the engine shards.
        base (`Base`): how the base is held.
        bf16 (`bool`), optim (`str`): the recipe's.
    """
    if engine in ("single", "ddp"):
        return _replicated(model, optim, buckets=engine == "ddp")
    if engine == "fsdp2":
        needed = _fsdp2(model, gpus, 2 if bf16 else 4, optim)
    else:
        needed = _deepspeed(model, engine, gpus, 2 if bf16 else 4, optim)
    if base.quantization is None or engine not in ("fsdp2", "zero3"):  # others are read in shards, or by the host
        return needed
    return replace(needed, loading=sum(p.nbytes for p in model.base) + model.state)


def _replicated(model: Model, optim: str, buckets: bool) -> Memory:
    gradients = sum(p.nbytes for p in model.trained)
    return Memory(
        weights=sum(p.nbytes for p in model.base) + model.state,
        adapter=sum(p.nbytes for p in model.adapter),
        optimizer=round(sum(p.numel * OPTIMIZERS[optim](p.itemsize) for p in model.trained)),
        gradients=gradients,
        buffers=gradients if buckets else 0,  # DDP's buckets are a copy
    )


def _fsdp2(model: Model, gpus: int, compute: int, optim: str) -> Memory:
    def itemsize(p: Parameter) -> int:
        return 4 if p.trained else p.itemsize

    def share(p: Parameter) -> int:
        return -(-p.numel // gpus)

    # Gathered: in the forward and the backward pass the layer that computes and the one that comes next; the output
    # embedding and the final norm, which are a unit, from the forward's end to the backward's start.
    gathered = {p: p.numel * min(itemsize(p), compute) for p in model.parameters}
    layers = {p.layer for p in model.parameters if p.layer}
    largest = max((sum(size for p, size in gathered.items() if p.layer == name) for name in layers), default=0)
    head = sum(size for p, size in gathered.items() if p.head)
    return Memory(
        weights=sum(share(p) * itemsize(p) for p in model.base) + model.state,
        adapter=sum(share(p) * itemsize(p) for p in model.adapter),
        optimizer=round(sum(share(p) * OPTIMIZERS[optim](itemsize(p)) for p in model.trained)),
        gradients=sum(share(p) * itemsize(p) for p in model.trained),
        buffers=2 * largest + head,
    )


def _deepspeed(model: Model, engine: str, gpus: int, compute: int, optim: str) -> Memory:
    def itemsize(p: Parameter) -> int:
        return 1 if p.itemsize == 1 else compute  # it casts all parameters but packed bytes

    def share(p: Parameter) -> int:  # of ZeRO-3's parameters
        if p.numel <= PERSISTENCE_THRESHOLD or not p.shardable:
            return p.numel
        return 0 if engine == "zero3-offload" else -(-p.numel // gpus)

    trained = sum(p.numel for p in model.trained)
    master = 4 + OPTIMIZERS[optim](4)  # bytes for each trained number: a float32 copy, and the state
    if engine == "zero0":
        return Memory(
            weights=sum(p.numel * itemsize(p) for p in model.base) + model.state,
            adapter=sum(p.numel * itemsize(p) for p in model.adapter),
            optimizer=trained * (master if compute == 2 else OPTIMIZERS[optim](4)),
            gradients=trained * compute,
            buffers=min(trained, REDUCE_BUCKET) * compute,  # a flat copy, to be reduced
        )
    shard = -(-trained // gpus)
    if engine in ("zero1", "zero2"):
        return Memory(
            weights=sum(p.numel * itemsize(p) for p in model.base) + model.state,
            adapter=sum(p.numel * itemsize(p) for p in model.adapter),
            optimizer=shard * master,
            gradients=(shard + trained if engine == "zero1" else shard) * compute,
            buffers=REDUCE_BUCKET * compute,
        )
    sizes = [(p.numel, p.numel * itemsize(p)) for p in model.parameters if p.shardable]
    numel, nbytes = (sum(column) for column in zip(*sizes, strict=True))
    # Gathered: what will be used again soon and what comes next, up to a limit that a single parameter may exceed; and
    # a flat copy of what is on its way.
    limit = (LIVE_PARAMETERS + PREFETCH_BUCKET) * nbytes // numel + max(size for _, size in sizes)
    is_offload = engine == "zero3-offload"
    return Memory(
        weights=sum(share(p) * itemsize(p) for p in model.base) + model.state,
        adapter=sum(share(p) * itemsize(p) for p in model.adapter),
        optimizer=0 if is_offload else shard * master,
        gradients=0 if is_offload else shard * compute,
        buffers=REDUCE_BUCKET * compute + min(nbytes, limit),
    )


def host_memory(model: Model, *, bf16: bool) -> int:
    """Bytes that `zero3-offload` keeps in host memory, over all machines: the model, the optimizer and gradients."""
    compute = 2 if bf16 else 4
    return sum(p.numel for p in model.parameters) * compute + sum(p.numel for p in model.trained) * (12 + compute)
