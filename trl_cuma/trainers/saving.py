# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Outputs that are whole or not there, gathered from all processes, and what a checkpoint must have to be resumed."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..adapter import CuMAModel

INCOMPLETE = "_incomplete"  # beside the checkpoints: what is being written or deleted; no loader looks there


class SavingMixin:
    """
    A checkpoint is written beside the others and gets its name when it is complete; an adapter's files take the place
    of older ones when all are written. Under ZeRO-3 and FSDP2 the adapter is gathered, tensor by tensor: the base
    model, which may not fit into one process, is not.
    """

    _staging: str | None = None  # where a checkpoint is being written

    @property
    def _is_zero3(self) -> bool:
        return self.args.deepspeed_plugin is not None and self.args.deepspeed_plugin.zero_stage == 3

    # ------------------------------------------------------------------ the adapter
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if self._staging is not None:
            self._write_model(output_dir)
            return
        incomplete = os.path.join(output_dir, INCOMPLETE)
        if self.args.should_save:
            shutil.rmtree(incomplete, ignore_errors=True)  # of a process that was killed
        with _explained(f"The adapter could not be written to {output_dir}", incomplete):
            card = os.path.join(output_dir, "README.md")
            if self.args.should_save and os.path.isfile(card):  # it is written around its owner's words
                os.makedirs(incomplete)
                shutil.copy(card, incomplete)
            self._write_model(incomplete)
            if self.args.should_save:
                _move_files(incomplete, output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_model(self, folder: str) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if not self._is_zero3 and (plugin is None or plugin.fsdp_version != 2):
            super().save_model(folder, _internal_call=True)
            return
        tensors = gather_adapter(self.accelerator.unwrap_model(self.model), keep=self.args.should_save)
        if self.args.should_save:
            self._save(folder, state_dict=tensors)

    # ------------------------------------------------------------------ checkpoints
    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else self._staging

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = os.path.join(folder, INCOMPLETE)
        written, final = os.path.join(staging, name), os.path.join(folder, name)
        if self.is_local_process_zero():
            shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        self.accelerator.wait_for_everyone()  # machines may share the folder
        if self.is_local_process_zero():
            os.makedirs(staging, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            last = sort_checkpoints(folder)[-1:]
            intact = f"{os.path.basename(last[0])} is intact. " if last else ""
            with _explained(f"{name} could not be written to {folder}. {intact}".rstrip(" ."), staging):
                super()._save_checkpoint(model, trial)
                # `Trainer` looked for the best one where this one is written; it is among the others, or this one.
                best = os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
                if best == final or os.path.isdir(best):
                    self.state.best_model_checkpoint = best
                    if self.args.should_save:
                        self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self._publish(staging, name, folder)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and os.path.isdir(written):  # this machine has a file system of its own
            with suppress(FileNotFoundError):  # or shares one that still shows what the first has renamed
                self._publish(staging, name, folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def _publish(self, staging: str, name: str, folder: str) -> None:
        final = os.path.join(folder, name)
        if os.path.isdir(final):  # of an earlier run
            os.replace(final, os.path.join(staging, "replaced"))
        os.replace(os.path.join(staging, name), final)
        limit = self.args.save_total_limit
        if limit is not None and limit > 0:
            best = str(Path(self.state.best_model_checkpoint or ""))  # spelled as `sort_checkpoints` does
            # The oldest first, the best and the newest last.
            checkpoints = sort_checkpoints(folder, use_mtime=True, best_model_checkpoint=best)
            protected = len({best, checkpoints[-1]} & set(checkpoints))
            for checkpoint in checkpoints[: -max(limit, protected)]:
                os.replace(checkpoint, os.path.join(staging, f"old-{os.path.basename(checkpoint)}"))
        shutil.rmtree(staging, ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else it has another name in a moment
            super()._push_from_checkpoint(checkpoint_folder)


def gather_adapter(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """
    The whole tensors of an adapter whose parameters are spread over the processes (ZeRO-3, FSDP2), by name, on the
    CPU. All processes must call it; the base model's own tensors stay where they are.

    Args:
        model (`nn.Module`): a PEFT model.
        keep (`bool`): whether this process wants them; else it only takes part, and gets none.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or CuMAModel.prefix in name or "modules_to_save" in name):
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                if keep:
                    tensors[name] = parameter.detach().cpu().clone()
        else:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if keep:
                tensors[name] = whole.detach().cpu().clone()
    return tensors


def check_resumable(checkpoint: str, accelerator: Accelerator, each_node_saves: bool) -> None:
    """
    Raise `ValueError` for a checkpoint from which this run would not go on as the run that wrote it: without the
    optimizer's state, of another engine, or, under DeepSpeed ZeRO, of another number of processes.
    """
    if not os.path.isdir(checkpoint):
        raise ValueError(
            f"`resume_from_checkpoint` is {checkpoint!r}, and there is no such folder. Name a checkpoint's folder, or "
            "true for the last one in `output_dir`."
        )
    instead = (
        f"To begin a new run from its weights, with a new optimizer, set `cuma_adapter_path: {checkpoint}` instead of "
        "`resume_from_checkpoint`."
    )
    written_by = _engine_of(checkpoint)
    if written_by is None:
        raise ValueError(
            f"{checkpoint} has no optimizer state (`save_only_model: true` leaves it out), so the run would not go "
            f"on where it stopped. {instead}"
        )
    kind = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.FSDP: "FSDP"}
    engine = kind.get(accelerator.distributed_type, "DDP or a single process")
    if written_by != engine:
        raise ValueError(
            f"{checkpoint} was written under {written_by}, and this run uses {engine}, which can't read its optimizer "
            f"state. Launch with the same engine. {instead}"
        )
    if engine != "DeepSpeed" or each_node_saves:  # then no machine sees all shards
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    shards = len(glob.glob(os.path.join(checkpoint, "global_step*", "*zero_pp_rank_*_optim_states.pt")))
    universal = (config.get("checkpoint") or {}).get("load_universal", False)
    if shards and not universal and shards != accelerator.num_processes:
        raise ValueError(
            f"{checkpoint} holds the optimizer's shards of {shards} processes, and this run has "
            f"{accelerator.num_processes}. DeepSpeed ZeRO resumes with as many processes. For another number, convert "
            "the checkpoint with `python -m deepspeed.checkpoint.ds_to_universal` and set `checkpoint: "
            f"{{load_universal: true}}` in the DeepSpeed configuration (works for ZeRO-3). {instead}"
        )


def _engine_of(checkpoint: str) -> str | None:
    names = os.listdir(checkpoint)
    if any(name.startswith("global_step") for name in names):
        return "DeepSpeed"
    if "optimizer.bin" in names or any(name.startswith("optimizer_") for name in names):
        return "FSDP"
    return "DDP or a single process" if "optimizer.pt" in names else None


@contextmanager
def _explained(what: str, incomplete: str) -> Iterator[None]:
    """Errors of writing, of which each library has its own, say what is lost and what isn't; what was begun goes."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.distributed.DistError):  # nothing to do with the disk
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save's
        shutil.rmtree(incomplete, ignore_errors=True)
        raise OSError(
            f"{what}: {error}. What was begun is removed. If the disk is full, free space or name another "
            "`output_dir`, then go on with `resume_from_checkpoint`."
        ) from error


def _move_files(source: str, folder: str) -> None:
    """Each file of `source` takes the place of the one in `folder`, at once; `source` goes."""
    for parent, _, names in os.walk(source):
        into = os.path.normpath(os.path.join(folder, os.path.relpath(parent, source)))
        os.makedirs(into, exist_ok=True)
        for name in names:
            os.replace(os.path.join(parent, name), os.path.join(into, name))
    shutil.rmtree(source)
