# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The model card beside a saved adapter: how to load it, what it is, what it was trained on, what it can't do."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from .config import CuMAConfig

BEGIN, END = "<!-- trl_cuma: written anew whenever the adapter is saved -->", "<!-- trl_cuma: end -->"

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
    Write the card into `folder/README.md`: into a new one, in place of PEFT's empty template, or between its own marks
    in one that somebody has written, whose text stays.
    """
    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path) if os.path.exists(path) else ModelCard("")
    text, block = card.text, f"{BEGIN}\n{describe(config)}\n{END}"
    before, begin, rest = text.rpartition(BEGIN)  # the last: a lone mark of the owner's begins nothing
    _, end, after = rest.partition(END)
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
    card.save(path)


def _is_template(text: str) -> bool:
    """Whether nobody has written anything into the template that PEFT begins with, to which it adds some lines."""
    template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    added = re.compile(
        r"\s*$|### Framework versions|## Training procedure|The following `bitsandbytes`|- (PEFT |\w+: )"
    )
    return all(line in template or added.match(line) for line in text.splitlines())


def public_name(name: str | None) -> str | None:
    """A Hub id as it is; of a path its last part, since the rest tells of somebody's machine."""
    if not name or re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        return name or None
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def describe(config: CuMAConfig) -> str:
    """The card's text. Of the demographics it tells the fields, and of no person or group."""
    parts = [
        "# A CuMA adapter",
        "A Cultural Mixture of Adapters ([arXiv 2601.04885](https://arxiv.org/abs/2601.04885)): "
        f"{_method(config)}. Made with trl_cuma.",
        "## Use",
        USE.format(
            base=public_name(config.base_model_name_or_path) or "ITS_BASE_MODEL", profile=_profile_lines(config)
        ),
        "## Settings",
        _table(_settings(config)),
        "## Demographic profiles",
        _demographics(config),
        "## Training",
        *(_table({name.replace("_", " "): value for name, value in run.items()}) for run in config.training or []),
        *([] if config.training else ["Not recorded: the adapter was saved outside of a CuMA trainer."]),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(config)),
        "### Framework versions",
        f"- PEFT {config.peft_version}",
    ]
    return "\n\n".join(parts)


_ROUTERS = {
    "joint": "the token and the demographic profile of the person whom the answer is for",
    "demographic": "the demographic profile of the person whom the answer is for",
    "semantic": "the token (no profile)",
}


def _method(config: CuMAConfig) -> str:
    router = f"LoRA experts mixed by a router that reads {_ROUTERS[config.routing]}"
    if config.film_hidden is None:
        return router
    film = "whose low-rank activations the profile scales and shifts (FiLM)"
    return f"{router}, {film}" if config.has_routers else f"a LoRA {film}"


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
    names += ("film_hidden", "router_hidden", "router_layers", "router_groups", "demographic_dim")
    names += ("demographic_projection", "missing_demographics", "target_modules", "base_model_type", "format_version")
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
    names = ("type", "revision", "pooling", "template", "max_seq_length", "dim", "min_count")
    facts = {name: state[name] for name in names if state.get(name) is not None}
    if "model" in state:
        facts["model"] = public_name(state["model"])
    if "vocabulary" in state:
        facts["fields (known values)"] = {name: len(values) for name, values in state["vocabulary"].items()}
        facts["values that fewer than min_count people had"] = "left out"
    return _table(facts | {"fingerprint": str(state.get("fingerprint"))[:12]})


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
