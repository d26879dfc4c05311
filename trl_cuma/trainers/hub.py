# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a run uploads: the adapter, its card and the tokenizer, and nothing else that lies in the output folder."""

import os
import shutil
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from ..adapter.hub import upload_adapter


class HubMixin:
    """
    `Trainer` uploads its whole output folder. In it are the training arguments, a pickle with this machine's paths
    and `hub_token`, and, with `log_completions`, people's prompts. Here the adapter's own files are uploaded.
    """

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """
        As `Trainer.push_to_hub`, of the adapter alone; `kwargs` go to `create_model_card`.

        Returns:
            `CommitInfo`, or with `blocking=False` a `Future` of it; `None` in other processes than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return upload_adapter(
            self.args.output_dir,
            self.hub_model_id,
            commit_message=commit_message,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            run_as_future=not blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args, running = self.args, self.push_in_progress is not None and not self.push_in_progress.is_done()
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if running and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):  # the checkpoint may be deleted while it is uploaded
            shutil.copy(os.path.join(checkpoint_folder, name), os.path.join(args.output_dir, name))
        self.processing_class.save_pretrained(args.output_dir)
        self.create_model_card()
        steps = args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch)}"
        options = {"token": args.hub_token, "revision": args.hub_revision, "run_as_future": True}
        message = f"Training in progress, {when}"
        jobs = [upload_adapter(args.output_dir, self.hub_model_id, commit_message=message, **options)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                HfApi().upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=checkpoint_folder,
                    path_in_repo="last-checkpoint" if last else os.path.basename(checkpoint_folder),
                    commit_message=f"{message}, checkpoint",
                    ignore_patterns=[TRAINING_ARGS_NAME],
                    **options,
                )
            )
        if running:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)
