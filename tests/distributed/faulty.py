# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
`python faulty.py LAUNCH FOLDER FAULT…` in each process of a launch: trains, one after the other, runs in which
something goes wrong, and writes what each process knew of it into `FOLDER/FAULT.RANK.pt`.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import Cell
from transformers import TrainerCallback
from worker import gathered, make_trainer, start

LAYER = "model.layers.1.mlp.down_proj"
SAVED, LAST = 2, 4  # steps
SAVING = {"max_steps": LAST, "save_strategy": "steps", "save_steps": SAVED}


class At(TrainerCallback):
    """Calls something before a step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.action()


def spoil(module: torch.nn.Module, gradient: bool) -> None:
    """The layer's output, or its gradient, becomes NaN in this process's second row."""

    def write(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        mask = torch.tensor([[[False]], [[True]]])
        if not gradient:
            return output.masked_fill(mask, torch.nan)
        if output.requires_grad:
            output.register_hook(lambda grad: grad.masked_fill(mask, torch.nan))
        return None

    module.register_forward_hook(write)


def run(fault: str, launch: str, folder: Path) -> dict[str, Any]:
    trainer = make_trainer(fault, Cell(arguments={} if fault in ("output", "gradient") else SAVING), launch, folder)
    layer = next(module for name, module in trainer.model.named_modules() if name.endswith(LAYER))
    is_second = trainer.args.process_index == 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def die(*args: Any) -> None:
        (folder / "dead").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def fill_the_disk() -> None:
        adapter = folder / fault / f"checkpoint-{SAVED}" / "adapter_model.safetensors"
        resource.setrlimit(resource.RLIMIT_FSIZE, (adapter.stat().st_size - 1, limits[1]))

    if fault in ("output", "gradient") and is_second:
        trainer.add_callback(At(2, lambda: spoil(layer, fault == "gradient")))
    if fault == "killed" and is_second:  # in mid-step: the other process waits for it
        trainer.add_callback(At(SAVED + 1, lambda: layer.register_forward_hook(die)))
    if fault == "full" and not is_second:  # no file of this process can grow beyond the limit
        trainer.add_callback(At(LAST, fill_the_disk))
    killed = folder.parent / f"{launch}-killed" / "killed" / f"checkpoint-{SAVED}"
    result: dict[str, Any] = {}
    try:
        trainer.train(resume_from_checkpoint=str(killed) if fault == "resumed" else None)
    except FloatingPointError as error:
        result["error"] = str(error)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        (folder / "error").write_text(str(error))
        raise
    return result | {"steps": trainer.state.global_step, "weights": gathered(trainer)}


def main(launch: str, folder: Path, faults: list[str]) -> None:
    rank = start(launch, folder)
    for fault in faults:
        torch.save(run(fault, launch, folder), folder / f"{fault}.{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
