# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
The profile's life through forward, generate and the recomputation of checkpointed layers.

One [`Conditioning`] belongs to one forward (or one `generate`). It is on the model's [`ConditioningStack`] while that
call runs, and it travels with each checkpointed call as explicit arguments, so that a recomputation sees the profiles
of *its* forward: never a global, never "the last one seen".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .losses import RouterLosses
from .router import CuMARouter


class Conditioning:
    """
    Args:
        profiles (`dict[str, torch.Tensor]`): adapter name → projected demographic embeddings `(rows, dim)`, or
            `(profiles, dim)` with `ids`; one row stands for all rows where `broadcast` is set.
        ids (`torch.Tensor`, *optional*): `(rows, seq)`: the profile of each token of packed rows, negative for
            padding.
        batch_shape (`tuple[int, int]`, *optional*): `(rows, seq)` of the model's input, where known.
        expand (`bool`): inside `generate`, where beams and returned sequences repeat each row.
        broadcast (`bool`): one zero profile for every row (`missing_demographics="zero"`).
        losses (`RouterLosses`, *optional*): gathers the router losses of this forward.
    """

    def __init__(
        self,
        profiles: dict[str, torch.Tensor],
        *,
        ids: torch.Tensor | None = None,
        batch_shape: tuple[int, int] | None = None,
        expand: bool = False,
        broadcast: bool = False,
        losses: RouterLosses | None = None,
    ) -> None:
        self.profiles = profiles
        self.ids = ids
        self.batch_shape = batch_shape
        self.expand = expand
        self.broadcast = broadcast
        self.losses = losses
        # Of a `generate`: what the profiles alone decide, by router and by experts; see `CuMALinear.prepare`.
        self.prepared: dict[nn.Module, Any] = {}
        # The layers of a router group get the very same input tensor: the last router's gates are theirs.
        self.last_gates: tuple[CuMARouter, torch.Tensor, torch.Tensor] | None = None

    @property
    def prepared_now(self) -> dict[nn.Module, Any]:
        """What was prepared, without a graph; nothing where a gradient is wanted."""
        return {} if torch.is_grad_enabled() else self.prepared

    def with_profiles(self, profiles: dict[str, torch.Tensor]) -> Conditioning:
        """The same conditioning around other tensors, as a checkpoint's recomputation gets them."""
        return Conditioning(
            profiles,
            ids=self.ids,
            batch_shape=self.batch_shape,
            expand=self.expand,
            broadcast=self.broadcast,
            losses=self.losses,
        )

    def gather(self, part: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Lay out a per-profile tensor `(profiles, n)` to broadcast with `hidden` `(batch, seq, ·)`."""
        batch, seq = hidden.shape[:2]
        if self.ids is not None:
            if self.ids.shape != (batch, seq):
                raise ValueError(
                    f"`demographic_ids` has shape {tuple(self.ids.shape)} but a CuMA layer's input has (rows, seq) = "
                    f"{(batch, seq)}. Pass one id per token."
                )
            return F.embedding(self.ids.to(part.device).clamp(min=0), part)  # of padding nothing is read
        repeats = self.repeats(part.shape[0], batch)
        if repeats > 1 and not self.broadcast:
            part = part.repeat_interleave(repeats, dim=0)
        return part.unsqueeze(1)

    def repeats(self, profiles: int, batch: int) -> int:
        """How many rows of the batch each profile has, one after the other."""
        if batch == profiles:  # also of none
            return 1
        if not self.broadcast and not (self.expand and batch % profiles == 0):
            raise ValueError(
                f"`demographic_embeds` has {profiles} rows but the batch has {batch}. Pass one row per sample, in the "
                "batch's order."
            )
        return batch // profiles


class ConditioningStack:
    """
    What the layers of one model share: the conditioning of the call that is running.

    A copy or a pickle starts empty: it must not carry tensors of a graph along.
    """

    def __init__(self) -> None:
        self._stack: list[Conditioning | None] = []

    @property
    def current(self) -> Conditioning | None:
        return self._stack[-1] if self._stack else None

    def push(self, conditioning: Conditioning | None) -> None:
        self._stack.append(conditioning)

    def pop(self) -> Conditioning | None:
        return self._stack.pop() if self._stack else None

    def clear(self) -> None:
        self._stack.clear()

    @contextmanager
    def use(self, conditioning: Conditioning | None) -> Iterator[None]:
        depth = len(self._stack)
        self.push(conditioning)
        try:
            yield
        finally:
            del self._stack[depth:]  # not one pop: a forward inside may have been interrupted before its own

    def __deepcopy__(self, memo: dict[int, Any]) -> ConditioningStack:
        memo[id(self)] = new = ConditioningStack()
        return new

    def __reduce__(self) -> tuple[type, tuple]:
        return ConditioningStack, ()


class CheckpointWithConditioning:
    """
    Stands in for a module's `_gradient_checkpointing_func`: the same checkpoint function, for a call that reinstalls
    its conditioning when it is recomputed. The profiles are positional arguments of the checkpointed call, so that
    reentrant checkpointing also returns their gradients (for a trainable projection).
    """

    def __init__(self, checkpoint: Callable, stack: ConditioningStack) -> None:
        self.checkpoint = checkpoint
        self.stack = stack

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        conditioning = self.stack.current
        if conditioning is None:
            return self.checkpoint(function, *args, **kwargs)
        if conditioning.losses is not None:
            conditioning.losses.checkpointed = True
        names = list(conditioning.profiles)

        def run(*values: Any) -> Any:
            profiles = dict(zip(names, values[: len(names)], strict=True))
            with self.stack.use(conditioning.with_profiles(profiles)):
                return function(*values[len(names) :])

        return self.checkpoint(run, *conditioning.profiles.values(), *args, **kwargs)


def carry_conditioning_through_checkpoints(model: nn.Module, stack: ConditioningStack) -> None:
    """
    Wrap the checkpoint function of every module of a transformers model. Cheap, and repeated at each training forward:
    `gradient_checkpointing_enable` and TRL's `disable_gradient_checkpointing` replace the functions.

    Raises:
        RuntimeError: for torch's `CheckpointWrapper` (FSDP's own `activation_checkpointing`), which recomputes outside
            the wrapped function and would lose the profile.
    """
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, CheckpointWithConditioning) and function.stack is not stack:
            function = function.checkpoint  # of an adapter that has been unloaded
        if function is not None and not isinstance(function, CheckpointWithConditioning):
            module._gradient_checkpointing_func = CheckpointWithConditioning(function, stack)
        elif type(module).__name__ == "CheckpointWrapper":
            raise RuntimeError(
                "CuMA loses the demographic profile under FSDP's own activation checkpointing. Set "
                "`activation_checkpointing: false` in the FSDP configuration and `gradient_checkpointing: true` in "
                "the trainer's."
            )
