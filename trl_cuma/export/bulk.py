# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Profiles in one pass: encoded, exported, checked, and written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..adapter.export import exported_adapter
from ..demographics import DemographicProfile
from ..demographics.profile import is_vector
from ..evaluation.report.output import check_output_dir, staged_folder
from ..generation.batches import Prompt, encode_prompt
from ..generation.profiles import check_profile
from ..generation.vectors import demographic_table
from .check import check_loads, vllm_rank
from .distill import Distillation
from .exporter import Exporter
from .folder import MAX_KL, Exports, Record, new_exports, write_index, write_lora
from .people import MIN_PEOPLE, check_people, count_people


def export_profiles(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    profiles: Mapping[str, Mapping[str, Any]],
    output_dir: str | os.PathLike[str],
    *,
    people: Sequence[Any] | None = None,
    prompts: Sequence[Prompt] = (),
    rank: int | None = None,
    how: Distillation | None = None,
    max_kl: float = MAX_KL,
    min_people: int = MIN_PEOPLE,
    force: bool = False,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    show_progress: bool = True,
) -> Exports:
    """
    Write one plain PEFT LoRA per profile, which every engine serves.

    Exact for `routing="demographic"` without FiLM: the experts under a profile's gates are one low-rank product. Of
    other adapters it is an approximation: the experts under their mean gates over `prompts`, refined by a distillation
    (KL to the routed model on answers that it draws), and measured on prompts held out from both.

    Profiles with equal vectors share a LoRA. `output_dir` appears when all is written, and has been loaded by PEFT in
    a process without trl_cuma and checked against what engines take.

    Args:
        model (`PeftModel`): With one active CuMA adapter, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        profiles (`Mapping[str, Mapping]`): Name of the export, which is its folder's → fields of the profile.
        output_dir (`str` or `PathLike`): A folder that is not there yet, or is empty.
        people (`Sequence`, *optional*): The profile of each training person, once, to count whom an export is of.
            Needed unless `min_people` is 0.
        prompts (`Sequence`): Texts or conversations as the LoRAs will get them; equal ones count once.
        rank (`int`, *optional*): Of all LoRAs; see [`~trl_cuma.export.exporter.Exporter`].
        how (`Distillation`, *optional*): How they are fitted and measured.
        max_kl (`float`): Nats. An export whose mean KL on held-out prompts is above is refused: not written, and
            listed as such.
        min_people (`int`): A profile of fewer training people is an error, unless nobody has it and each of its values
            is that of as many. 0: nobody is counted.
        force (`bool`): Write also what is above `max_kl`.
        dtype (`torch.dtype`): Of the written weights.
        trust_remote_code (`bool`): Run code that comes with the base model, when the LoRAs are loaded to check them.
        show_progress (`bool`): Show progress bars.

    Returns:
        [`~trl_cuma.export.folder.Exports`]: What was written and what was refused; `exports.json` says it, too.

    Raises:
        ValueError: A profile has a field or value that the adapter doesn't know, or speaks for too few people; the
            adapter can't be exported; or every export is above `max_kl`.
        FileExistsError: `output_dir` is there.
    """
    output = check_output_dir(output_dir)
    _check_names(profiles)
    _, config = exported_adapter(model)
    vectors = _encode(model, profiles)
    read = {name: DemographicProfile.from_value(profile) for name, profile in profiles.items()}
    counts: list[Any] = [None] * len(profiles)
    if min_people > 0:
        if people is None:
            raise ValueError(
                f"`min_people` is {min_people} and `people` was not given, so that nobody can be counted. Pass the "
                "training people's profiles, or `min_people=0`."
            )
        counts = count_people(list(read.values()), people)
        check_people(list(profiles), counts, min_people)
    encoded = list(dict.fromkeys(tuple(encode_prompt(tokenizer, prompt)) for prompt in prompts))
    exporter = Exporter(model, tokenizer, encoded, rank=rank, how=how)
    vllm_rank(exporter.rank)
    exports = new_exports(model, exporter.rank, max_kl, min_people)
    measured_on = "held-out prompts" if encoded else "random tokens"
    with staged_folder(output) as staging:
        made: dict[bytes, Record] = {}
        names = tqdm(read, desc="Exporting profiles", unit="profile", disable=not show_progress)
        for name, vector, counted in zip(names, vectors, counts, strict=True):
            key, profile = vector.numpy().tobytes(), dict(read[name].fields)
            if same := made.get(key):
                shared = replace(same, name=name, profile=profile, training_people=counted)
                (exports.refused if same in exports.refused else exports.records).append(shared)
                continue
            found = exporter.export(vector, "Distilling" if show_progress else None)
            record = made[key] = Record(
                name, name, profile, exporter.exact, found.distance, measured_on, found.averaged, counted
            )
            if found.distance.mean_kl > max_kl and not force:
                exports.refused.append(record)
                continue
            exports.records.append(record)
            write_lora(staging / name, model, found, exporter.rank, record, exports, dtype)
        if not exports.records:
            raise ValueError(
                f"Every export is farther from the routed model than `max_kl={max_kl:g}` nats:\n{exports.table()}\n"
                "Give more prompts, steps or rank; or force it, and say so where you publish it."
            )
        folders = [staging / name for name in dict.fromkeys(record.folder for record in exports.records)]
        check_loads(folders, config.base_model_name_or_path, trust_remote_code=trust_remote_code)
        write_index(staging, exports)
    return exports


def export_profile(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    profile: Mapping[str, Any],
    output_dir: str | os.PathLike[str],
    **options: Any,
) -> Record:
    """
    Write the plain LoRA of one profile into a folder.

    Args:
        model, tokenizer, output_dir: See [`export_profiles`].
        profile (`Mapping`): Fields of the profile.
        options: See [`export_profiles`].

    Returns:
        [`~trl_cuma.export.folder.Record`]: How far it is from the routed model, and of how many people.

    Raises:
        ValueError, FileExistsError: See [`export_profiles`].
    """
    output = check_output_dir(output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-incomplete-") as scratch:
        options = {"show_progress": False, **options}
        exports = export_profiles(model, tokenizer, {output.name: profile}, Path(scratch) / "all", **options)
        (Path(scratch) / "all" / output.name).rename(check_output_dir(output))
    return exports.records[0]


def _check_names(profiles: Mapping[str, Any]) -> None:
    if not profiles:
        raise ValueError("`profiles` is empty: there is nobody to export.")
    for name in profiles:
        if Path(name).name != name or name.startswith(".") or name != name.strip():
            raise ValueError(f"The name {name!r} can't be a folder's. Use letters, digits, '-' and '_'.")


def _encode(model: PeftModel, profiles: Mapping[str, Any]) -> torch.Tensor:
    """`(profiles, dim)`; what an adapter doesn't know would silently be exported as the average person's."""
    table = demographic_table(model)
    if table is None or table.encoder is None:
        raise ValueError(
            "The adapter has no demographic encoder: it was trained on vectors. Make exports of vectors with "
            "`trl_cuma.export.exporter.Exporter`."
        )
    for name, profile in profiles.items():
        if is_vector(profile) or not isinstance(profile, Mapping):
            raise ValueError(f"Profile {name!r} is a {type(profile).__name__}, expected a mapping of fields.")
        warnings = check_profile(table, profile, f"Profile {name!r}")
        if warnings:
            raise ValueError(f"{warnings[0]} What is exported under a name has to be of all that it says.")
        if not DemographicProfile.from_value(profile).fields:
            raise ValueError(f"Profile {name!r} says nothing: there is nobody to export.")
    return table(list(profiles.values()))
