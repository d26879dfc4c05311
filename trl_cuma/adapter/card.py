# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The model card beside a saved adapter: written anew at each save, around what its owner has written."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .card_text import describe, public_name

if TYPE_CHECKING:
    from .config import CuMAConfig

BEGIN, END = "<!-- trl_cuma: written anew whenever the adapter is saved -->", "<!-- trl_cuma: end -->"
MEASURED_BEGIN, MEASURED_END = "<!-- trl_cuma: measured on weights {} -->", "<!-- trl_cuma: end of measured -->"
WEIGHTS = "trl_cuma_weights"  # in an evaluation result's `metric_args`: of which weights it is


def write_card(
    folder: str,
    config: CuMAConfig,
    *,
    measured: str | None = None,
    results: Sequence[EvalResult] = (),
) -> None:
    """
    Write the card into `folder/README.md`: into a new one, in place of an empty template, or between its own marks in
    one that somebody has written, whose text stays.

    What was measured stays as long as the folder's weights are those that it was measured on.

    Args:
        folder (`str`): The adapter's.
        config ([`CuMAConfig`]): What the adapter is.
        measured (`str`, *optional*): Markdown on what was measured on the folder's weights, in place of what the card
            says of it.
        results (`Sequence[EvalResult]`): With `measured`: the same for the Hub's metadata.

    Raises:
        `ValueError`: `measured` without weights in the folder.
    """
    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path) if os.path.exists(path) else ModelCard("---\n{}\n---\n")  # else it warns
    text, weights = card.text, None
    before, begin, rest = text.rpartition(BEGIN)  # the last: a lone mark of the owner's begins nothing
    own, end, after = rest.partition(END)
    if measured is not None:
        weights = weights_fingerprint(folder)
        if weights is None:
            raise ValueError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME} that something could be measured on.")
        measured = f"{MEASURED_BEGIN.format(weights)}\n{measured.strip()}\n{MEASURED_END}"
    elif begin and end and (found := _measured_part(own)):
        weights = weights_fingerprint(folder) or found["weights"]
        measured = found[0] if weights == found["weights"] else None
    block = f"{BEGIN}\n{describe(config, measured)}\n{END}"
    if begin and end:
        text = before + block + after
    elif _is_template(text):
        text = block
    else:
        text = f"{text.rstrip()}\n\n{block}"
    card.text = text.strip() + "\n"
    tags = {*map(str, card.data.get("tags") or []), "cuma", "trl", "mixture-of-experts"}
    name = card.data.base_model
    if isinstance(name, str) and name != public_name(name):  # PEFT names the folder of this machine
        card.data.base_model = None
        tags = {tag for tag in tags if not tag.startswith("base_model:adapter:")}
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted(tags)
    _set_results(card.data, folder, weights, results)
    card.save(f"{path}.incomplete")
    os.replace(f"{path}.incomplete", path)


def weights_fingerprint(folder: str | os.PathLike[str]) -> str | None:
    """`sha256:…` of the folder's saved weights; `None` where there are none."""
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _measured_part(text: str) -> re.Match[str] | None:
    begin = re.escape(MEASURED_BEGIN).replace(r"\{\}", r"(?P<weights>sha256:[0-9a-f]{64})")
    return re.search(f"{begin}.*?{re.escape(MEASURED_END)}", text, re.DOTALL)


def _set_results(data: ModelCardData, folder: str, weights: str | None, results: Sequence[EvalResult]) -> None:
    """Put in `results`, or keep those of the same weights; the owner's own stay."""
    kept = []
    for result in data.eval_results or []:
        measured_on = (result.metric_args or {}).get(WEIGHTS) if isinstance(result.metric_args, dict) else None
        if measured_on is None or (not results and measured_on == weights):
            kept.append(result)
    if data.eval_results or results:
        new = [replace(result, metric_args={WEIGHTS: weights}) for result in results]
        data.eval_results = [*kept, *new] or None
    if data.eval_results and not data.model_name:
        data.model_name = os.path.basename(os.path.abspath(folder))


def _is_template(text: str) -> bool:
    """
    Whether nobody has written anything into the template that PEFT begins with, to which it adds some lines, or into
    that of transformers' `push_to_hub`.
    """
    template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    added = re.compile(
        r"\s*$|### Framework versions|## Training procedure|The following `bitsandbytes`|- (PEFT |\w+: )"
        r"|This is the model card of a 🤗 transformers model that has been pushed on the Hub"
    )
    return all(line in template or added.match(line) for line in text.splitlines())
