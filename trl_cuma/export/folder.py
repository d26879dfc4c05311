# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What an export leaves on disk: a folder per LoRA, with its card and its record, and one index of all."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..adapter.card_text import forbids_commerce, public_name
from ..adapter.export import exported_adapter, lora_config, save_lora
from .check import check_files, vllm_rank
from .distill import Distance
from .exporter import Exported
from .people import TrainingPeople

RECORD, INDEX = "export.json", "exports.json"
MAX_KL = 0.05
"""Nats: an export whose mean KL is above is refused unless it is forced."""


@dataclass
class Record:
    """
    What is known of one export.

    Args:
        name (`str`): Its name.
        folder (`str`): Of the LoRA, beside the index; names with equal vectors share one.
        profile (`dict`): Whom it is for.
        exact (`bool`): Whether it is the adapter itself, rather than near it.
        distance (`Distance`): From the routed model, on `measured_on`.
        measured_on (`str`): `"held-out prompts"` or `"random tokens"`.
        averaged (`Distance`, *optional*): The same before the distillation.
        training_people (`TrainingPeople`, *optional*): How many had the profile; `None` where that wasn't counted.
    """

    name: str
    folder: str
    profile: dict[str, str]
    exact: bool
    distance: Distance
    measured_on: str
    averaged: Distance | None = None
    training_people: TrainingPeople | None = None

    def document(self) -> dict[str, Any]:
        counted = self.training_people
        return {
            "name": self.name,
            "folder": self.folder,
            "profile": self.profile,
            "exact": self.exact,
            "measured_on": self.measured_on,
            **self.distance.document(),
            "mean_kl_before_distillation": None if self.averaged is None else self.averaged.mean_kl,
            "training_people": None if counted is None else counted.people,
            "combination_seen": None if counted is None else counted.people > 0,
        }


@dataclass
class Exports:
    """
    All exports of one adapter.

    Args:
        base_model (`str`, *optional*): Id of the base, or the last part of its path.
        rank (`int`): Of all of them.
        max_kl (`float`): The limit, in nats.
        min_people (`int`): The least training people; 0: not counted.
        data (`list[dict]`): What the adapter was trained on: names and licences of the data sets, as far as recorded.
        records (`list[Record]`): What was exported.
        refused (`list[Record]`): What was too far from the routed model, and isn't there.
    """

    base_model: str | None
    rank: int
    max_kl: float
    min_people: int
    data: list[dict[str, Any]]
    records: list[Record] = field(default_factory=list)
    refused: list[Record] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        worst = max(self.records, key=lambda record: record.distance.mean_kl, default=None)
        return {
            "base_model": self.base_model,
            "rank": self.rank,
            "vllm_max_lora_rank": vllm_rank(self.rank),
            "max_kl": self.max_kl,
            "min_people": self.min_people,
            "data": self.data,
            "worst_group": worst and {"name": worst.name, "mean_kl": worst.distance.mean_kl},
            "exports": [record.document() for record in self.records],
            "refused": [{"name": record.name, **record.distance.document()} for record in self.refused],
        }

    def table(self) -> str:
        """In Markdown."""
        lines = ["| name | | people | mean KL | worst KL | same top token |", "|---|---|---:|---:|---:|---:|"]
        for record in [*self.records, *self.refused]:
            what = "exact" if record.exact else "refused" if record in self.refused else "distilled"
            if record.training_people is not None and not record.training_people.people:
                what += ", combination not seen"
            if record.folder != record.name:
                what += f", as {record.folder}"
            counted = "–" if record.training_people is None else f"{record.training_people.people:,}"
            found = record.distance
            lines.append(
                f"| {record.name} | {what} | {counted} | {found.mean_kl:.2g} | {found.worst_kl:.2g} | "
                f"{found.top1_agreement:.1%} |"
            )
        return "\n".join(lines)


def data_of(model: PeftModel) -> list[dict[str, Any]]:
    """Names and licences of the data sets in the adapter's record of its training, as far as it has them."""
    _, config = exported_adapter(model)
    found = [
        {name: run[name] for name in ("dataset", "dataset_license") if run.get(name)} for run in config.training or []
    ]
    unique = [dict(pairs) for pairs in dict.fromkeys(tuple(each.items()) for each in found if each)]
    return [
        {**each, "non_commercial": forbids_commerce(each["dataset_license"])} if "dataset_license" in each else each
        for each in unique
    ]


def write_lora(
    folder: Path, model: PeftModel, exported: Exported, rank: int, record: Record, exports: Exports, dtype: torch.dtype
) -> None:
    """
    Write one LoRA with its record and card, and check it against what engines take.

    Raises:
        ValueError: see [`~trl_cuma.export.check.check_files`].
    """
    folder.mkdir(parents=True)
    save_lora(folder, exported.factors, lora_config(model, rank), dtype)
    document = {**record.document(), "data": exports.data}
    (folder / RECORD).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(record, exports), encoding="utf-8")
    check_files(folder)


def card(record: Record, exports: Exports) -> str:
    """The card of one LoRA: what it is, how near it is to the adapter, and what it isn't for."""
    counted, found = record.training_people, record.distance
    group = "; ".join(f"{name}: {value}" for name, value in sorted(record.profile.items()))
    seen = (
        "How many training people had this profile was not counted."
        if counted is None
        else f"{counted.people:,} training people had this profile."
        if counted.people
        else "Nobody in training had this combination; each of its values is that of many."
    )
    lines = [
        "---",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        "- lora",
        "- cuma",
        "---",
        "",
        f"# LoRA of a CuMA adapter for one profile ({record.name})",
        "",
        f"A plain LoRA, rank {exports.rank}, scale 1, on {exports.base_model or 'its base model'}: how a Cultural "
        f"Mixture of Adapters answers for the profile *{group}*. PEFT loads it, and so do engines that serve LoRAs; "
        "trl_cuma isn't needed.",
        "",
        f"- {seen}",
        f"- {_nearness(record)}: KL(adapter ‖ LoRA) per token {found.mean_kl:.2g} nats in the mean and "
        f"{found.worst_kl:.2g} for the farthest of {found.prompts} prompts; the most likely token is the same in "
        f"{found.top1_agreement:.1%} of {found.tokens} places ({record.measured_on}).",
        f"- Licence of the training data: {_licences(exports) or 'not recorded'}.",
        "",
        "It answers as training answers of a group did, and says nothing certain of a person. Use it for people who "
        "say that the profile is theirs; don't infer anyone's. Don't use it to decide about people, or to speak in "
        "a group's name.",
        "",
    ]
    return "\n".join(lines)


def _licences(exports: Exports) -> str:
    names = {each["dataset_license"] for each in exports.data if "dataset_license" in each}
    return ", ".join(f"{name} (non-commercial)" if forbids_commerce(name) else name for name in sorted(names))


def _nearness(record: Record) -> str:
    return "The adapter itself, up to rounding" if record.exact else "An approximation of the adapter"


def write_index(folder: Path, exports: Exports) -> None:
    """Write the index of all exports."""
    text = json.dumps(exports.document(), indent=2, ensure_ascii=False) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def new_exports(model: PeftModel, rank: int, max_kl: float, min_people: int) -> Exports:
    """An empty set of exports of a model's active adapter."""
    _, config = exported_adapter(model)
    return Exports(public_name(config.base_model_name_or_path), rank, max_kl, min_people, data_of(model))
