# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Adapters on the Hub: what of a folder is uploaded, and the card that goes with `model.push_to_hub`."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils import PushToHubMixin

from .card import write_card
from .config import CuMAConfig

ADAPTER_FILES = (
    "README.md",
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    # The tokenizer's, which training may have given other tokens or another template.
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)
"""What makes up a saved adapter, also as patterns."""


def upload_adapter(folder: str | os.PathLike[str], repo_id: str, **kwargs: Any) -> CommitInfo:
    """
    Upload a saved adapter: [`ADAPTER_FILES`] and nothing else that is in its folder. Among the rest may be
    checkpoints, logs, what was sampled from people's prompts, and the training arguments, a pickle that holds this
    machine's paths and the Hub's token, if it was among them.

    Args:
        folder (`str` or `PathLike`): The adapter's.
        repo_id (`str`): A repository that is there.
        kwargs: `token`, `revision`, `commit_message`, `create_pr`, `run_as_future`, as in `HfApi.upload_folder`.

    Raises:
        `FileNotFoundError`: The folder holds no adapter.
        `HfHubHTTPError`: The Hub refuses. The folder is as it was.
    """
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not os.path.isfile(os.path.join(folder, name)):
            raise FileNotFoundError(f"{folder} has no {name}: there is no adapter to upload. Name the folder of one.")
    return HfApi().upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(ADAPTER_FILES), **kwargs)


def upload_with_card(self: PeftModel, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """
    What `PeftModel.push_to_hub` does last. It has put the Hub's card, or transformers' empty template, in the place
    of the one that was saved: of a CuMA adapter the card is written into that, too.
    """
    config = self.peft_config.get("default")  # others have folders of their own, with their cards
    if isinstance(config, CuMAConfig):
        self.create_or_update_model_card(os.fspath(working_dir))
        write_card(os.fspath(working_dir), config)
    return PushToHubMixin._upload_modified_files(self, working_dir, *args, **kwargs)


def carry_card_to_hub() -> None:
    """
    Make `push_to_hub` of models with a CuMA adapter upload their card. PEFT has no hook between the template and the
    upload, so a step of transformers' mixin is extended; for other adapters it is as it was.
    """
    PeftModel._upload_modified_files = upload_with_card
