# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The model card beside a saved adapter: how to load it, what it is, what it was trained on, what it can't do."""

from __future__ import annotations

import os
import re
import tempfile
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from .config import CuMAConfig

BEGIN, END = "<!-- trl_cuma: written anew whenever the adapter is saved -->", "<!-- trl_cuma: end -->"
PLACEHOLDER = "[More Information Needed]"  # of the empty template that PEFT begins with

USE = """\
```python
import trl_cuma  # registers the PEFT method; without it PEFT fails with KeyError: 'CUMA'
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "PATH_OR_ID_OF_THIS_ADAPTER"){profile}
```"""

PROFILE = """
encoder = trl_cuma.load_demographic_encoder("PATH_OR_ID_OF_THIS_ADAPTER")
embeds = encoder.encode([{profile}])  # one profile per prompt
model.generate(**inputs, demographic_embeds=embeds)"""


def write_card(folder: str, config: CuMAConfig) -> None:
    """
    Write the card into `folder/README.md`: into a new one, in place of an empty template, or between its own marks in
    one that somebody has written; their text and metadata stay.
    """
    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path) if os.path.exists(path) else ModelCard.from_template(ModelCardData())
    text, block = card.text, f"{BEGIN}\n{describe(config)}\n{END}"
    if BEGIN in text and END in text:
        before, rest = text.split(BEGIN, 1)
        text = before + block + rest.split(END, 1)[1]
    elif PLACEHOLDER in text:
        text = block
    else:
        text = f"{text.rstrip()}\n\n{block}"
    card.text = text.strip() + "\n"
    tags = {*(card.data.get("tags") or []), "cuma", "trl", "mixture-of-experts"}
    if _base_name(config) is None:  # PEFT names the folder of this machine
        card.data.base_model = None
        tags = {tag for tag in tags if not tag.startswith("base_model:adapter:")}
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted(tags)
    # whole or not at all: a card may hold its owner's words
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(str(card))
    os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
    os.replace(file.name, path)


def describe(config: CuMAConfig) -> str:
    """The card's text. Of the demographics it tells the fields, and of no person or group."""
    parts = [
        "# A CuMA adapter",
        "A Cultural Mixture of Adapters ([arXiv 2601.04885](https://arxiv.org/abs/2601.04885)): LoRA experts mixed by "
        f"a router that reads {_ROUTERS[config.routing]}. Made with trl_cuma.",
        "## Use",
        USE.format(base=_base_name(config) or "PATH_OF_ITS_BASE_MODEL", profile=_profile_lines(config)),
        "## Settings",
        _table(_settings(config)),
        "## Demographic profiles",
        _demographics(config),
        "## Training",
        *(_table(run) for run in config.training or []),
        *([] if config.training else ["Not recorded: the adapter was saved outside of a CuMA trainer."]),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(config)),
        "### Framework versions",
        f"- PEFT {config.peft_version}",
    ]
    return "\n\n".join(parts)


def _base_name(config: CuMAConfig) -> str | None:
    name = config.base_model_name_or_path
    return None if not name or os.path.isabs(name) else name


_ROUTERS = {
    "joint": "the token and the demographic profile of the person whom the answer is for",
    "demographic": "the demographic profile of the person whom the answer is for",
    "semantic": "the token (no profile)",
}


def _profile_lines(config: CuMAConfig) -> str:
    state = config.demographic_encoder
    if config.routing == "semantic":
        return ""
    if state is None:
        return "\nmodel.generate(**inputs, demographic_embeds=embeds)  # (prompts, dim), made as in training"
    fields = list(state.get("vocabulary", {})) or ["country", "age"]
    return PROFILE.format(profile="{" + ", ".join(f'"{name}": …' for name in fields) + "}")


def _settings(config: CuMAConfig) -> dict[str, Any]:
    names = ("r", "lora_alpha", "use_rslora", "lora_dropout", "num_experts", "top_k", "gate", "routing", "share_a")
    names += ("router_hidden", "router_layers", "router_groups", "demographic_dim", "demographic_projection")
    names += ("missing_demographics", "target_modules", "base_model_type", "format_version")
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def _demographics(config: CuMAConfig) -> str:
    state = config.demographic_encoder
    if config.routing == "semantic":
        return "None: the router reads the token alone."
    if state is None:
        return (
            f"Vectors of {config.demographic_dim} entries that the data set brought along. How they were made is not "
            "recorded here, and nothing else fits the router."
        )
    facts: dict[str, Any] = {"encoder": state["type"]}
    if state["type"] == "text":
        model = state["model"]
        facts["model"] = os.path.basename(model) if os.path.isabs(model) else model
        facts |= {name: state[name] for name in ("revision", "pooling", "template", "max_seq_length", "dim")}
        facts["standardisation"] = "mean and RMS of the training profiles' vectors"
    else:
        facts["fields (known values)"] = {name: len(values) for name, values in state["vocabulary"].items()}
        facts["left out"] = f"values that fewer than {state['min_count']} people had"
    return _table(facts | {"fingerprint": state["fingerprint"][:12]})


def _limits(config: CuMAConfig) -> list[str]:
    limits = ["Its gates depend on the input, so it cannot be merged into the base model."]
    if config.routing != "semantic":
        missing = {
            "error": "A call without a profile is an error.",
            "zero": "A call without a profile means the zero vector, the average profile.",
        }
        limits += [
            f"It answers for the profile that it is told. {missing[config.missing_demographics]}",
            "A profile says something of a group, in the training data, and nothing certain of a person. Don't infer "
            "anyone's profile to use it.",
            "Profiles unlike those of the training data were not seen: measure before you rely on such answers.",
        ]
    return limits


def _table(facts: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts.items())])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{name} ({count})" for name, count in value.items())
    elif isinstance(value, set | list | tuple):
        value = ", ".join(sorted(map(str, value)))
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")
