# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""How `speed.py` measures: paired times in alternating rounds, and what is counted in one step."""

from __future__ import annotations

import gc
import re
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

Run = Callable[[Callable[[], None]], None]  # does the work, and calls its argument at the end of each part

# Operations whose result's shape or value the host must know before it can go on. On a CPU they cost nothing special;
# on an accelerator each one waits for all work that was queued.
WAITS = re.compile(r"_local_scalar_dense|nonzero(_numpy)?|masked_select|_?unique\w*|bincount|equal|is_nonzero|item")
MATRIX_PRODUCTS = re.compile(r"mm|mv|dot|conv(?!ert)|attention|linear$")


# ---------------------------------------------------------------------------------------------------- time
class Clock:
    """Marks on a device's own time line: CUDA events, or the host's clock where the host does the work."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.marks: list[Any] = []
        if self.on_cuda:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From the first mark to each of the others."""
        if self.on_cuda:
            torch.cuda.synchronize()
            return [self.marks[0].elapsed_time(mark) / 1000 for mark in self.marks[1:]]
        return [mark - self.marks[0] for mark in self.marks[1:]]


def alternate(
    runs: dict[str, Run], rounds: int, device: torch.device, before: Callable[[], None] = lambda: None
) -> dict[str, list[list[float]]]:
    """
    Time every arm once per round, so that what slows the machine for a while slows all arms. Each round starts with
    another arm, and every other round goes backwards, so that no arm always follows the same one.

    Args:
        runs (`dict[str, Run]`): arm → its work.
        rounds (`int`): timed rounds; one more before them is not timed.
        before (`Callable`): called before each arm's work, outside the time.

    Returns:
        `dict[str, list[list[float]]]`: arm → for each round, the seconds from the start to each of its marks.
    """
    names = list(runs)
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(-1, rounds):
        first = number % len(names)
        order = names[first:] + names[:first]
        for name in order if number % 2 else reversed(order):
            before()
            gc.collect()
            gc.disable()  # a collection in the middle of a step would be charged to the arm that it happens to hit
            clock = Clock(device)
            runs[name](clock.mark)
            seconds = clock.seconds()
            gc.enable()
            if number >= 0:
                times[name].append(seconds)
    return times


# ---------------------------------------------------------------------------------------------------- counts
@dataclass
class Counts:
    """
    What one step does.

    Args:
        ops (`int`): aten operations, without views.
        waits (`int`): times that the host waits for the device. On CUDA those that torch itself reports
            (`set_sync_debug_mode`); on a CPU, operations that would wait on an accelerator.
        flops (`int`): of matrix products and attention; elementwise work is not counted.
        saved (`int`): bytes kept for the backward besides parameters and inputs; 0 where there is none.
        peak (`int`): the most bytes that were allocated at once, above what there was before (parameters, inputs).
        kernels (`int`, *optional*): kernels launched, on CUDA.
        uncounted (`set[str]`): operations that look like matrix products and have no formula for their FLOPs.
    """

    ops: float
    waits: float
    flops: float
    saved: int
    peak: int
    kernels: float | None
    uncounted: set[str]

    def beyond(self, shorter: Counts, units: int) -> Counts:
        """What each of the `units` costs that this work has more than a shorter one; the peak stays this one's."""
        names = ["ops", "waits", "flops", *([] if self.kernels is None else ["kernels"])]
        return replace(self, **{name: (getattr(self, name) - getattr(shorter, name)) / units for name in names})


class _Operations(TorchDispatchMode):
    """Counts aten operations that do work, and those that an accelerator's host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.waits = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "profiler":  # marks of the profiler, which optimizers set
            return func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        name = packet.__name__
        if not func.is_view and name != "_unsafe_view":
            self.ops += 1
        self.waits += bool(WAITS.fullmatch(name)) or _indexes_with_mask(name, args) or _repeats_unknown(func, kwargs)
        if packet not in flop_registry and packet not in FORMULAS:
            if func.namespace != "aten" or MATRIX_PRODUCTS.search(name):
                self.uncounted.add(str(packet))
        return func(*args, **(kwargs or {}))


class _HostReads(TorchFunctionMode):
    """Counts reads that on a CPU are no operation at all, and a wait on an accelerator."""

    READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += func in self.READS
        return func(*args, **(kwargs or {}))


def _indexes_with_mask(name: str, args: tuple) -> bool:
    """Indexing with a boolean mask looks for its non-zeros first (also in the backward, `index_put`)."""
    if not name.lstrip("_").startswith(("index", "unsafe_index")) or len(args) < 2:
        return False
    indices = args[1] if isinstance(args[1], list | tuple) else ()
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _repeats_unknown(func: Any, kwargs: dict[str, Any] | None) -> bool:
    """`repeat_interleave` by a tensor of counts: their sum is the result's length."""
    return func is torch.ops.aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size")


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    # The scores again, and the gradients of value, weights, query and key: five products to the forward's two.
    return sdpa_flop_count(query, key, value) * 5 // 2


def _grouped_product(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    # Where one operand is two-dimensional, the groups share out a dimension of it, whose length is the sum over them.
    groups = a[0] if len(a) == len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]


def _added_product(total: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == 3 else 1)


# Those that torch has no formula for.
FORMULAS = {
    torch.ops.aten.addmm_: _added_product,
    torch.ops.aten.baddbmm_: _added_product,
    torch.ops.aten._grouped_mm: _grouped_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def count(
    run: Run,
    device: torch.device,
    before: Callable[[], None] = lambda: None,
    ignore: Iterable[torch.Tensor] = (),
) -> Counts:
    """
    Watch one step (on CUDA several). Not timed: watching is slow, and adds a little of its own. It holds gradients,
    which autograd then copies, and its hooks make a CuMA layer leave the base layer's result alone.

    Args:
        run (`Run`): the step; if it marks the end of its forward, the bytes saved until there are counted.
        before (`Callable`): called before each run, outside of what is watched.
        ignore (`Iterable[torch.Tensor]`): tensors whose storages don't count as saved: parameters, buffers, inputs.
    """
    on_cuda = device.type == "cuda"
    operations, reads, saved = _Operations(), _HostReads(), _Saved(ignore)
    with ExitStack() as watching:
        allocations = None if on_cuda else profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        before()
        for watch in (saved.hooks(), allocations, flops, operations, reads):
            if watch is not None:
                watching.enter_context(watch)
        run(saved.end)
    waits, kernels = operations.waits + reads.waits, None
    if on_cuda:
        peak, waits, kernels = _watch_cuda(lambda: run(lambda: None), before)
    else:
        peak = _peak_of(allocations)
    return Counts(operations.ops, waits, flops.get_total_flops(), saved.total, peak, kernels, operations.uncounted)


class _Saved:
    """The storages that autograd keeps for the backward, each once."""

    def __init__(self, ignore: Iterable[torch.Tensor]) -> None:
        self.ignored = {tensor.untyped_storage().data_ptr() for tensor in ignore}
        self.storages: dict[int, torch.UntypedStorage] = {}  # holding them, so that no address comes twice
        self.total = 0
        self.ended = False

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not self.ended and storage.data_ptr() not in self.ignored:
            self.storages[storage.data_ptr()] = storage
        return tensor

    def end(self) -> None:
        self.total += sum(storage.nbytes() for storage in self.storages.values())
        self.storages.clear()  # else the backward couldn't free them, and the peak would rise
        self.ended = True


def _peak_of(allocations: profile) -> int:
    """From the profiler's record of torch's allocations and releases; what libraries take by themselves is unseen."""
    events = [event for event in allocations.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _watch_cuda(work: Callable[[], None], before: Callable[[], None]) -> tuple[int, int, int]:
    """Peak bytes, waits and kernels launched."""
    before()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - start
    before()
    waits = _waits_on_cuda(work)
    before()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        work()
        torch.cuda.synchronize()
    kernels = sum(event.count for event in watched.key_averages() if "LaunchKernel" in event.key)
    return peak, waits, kernels


def _waits_on_cuda(work: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
