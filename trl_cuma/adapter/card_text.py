# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
What the model card says: how to load the adapter, what it is for and what not, whom it was trained on, what was
measured, what it can't do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import CuMAConfig

NAMED_FROM = 30  # people: values that fewer may share are in the adapter's vocabulary, and not shown around
SHOWN_VALUES = 100

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

INTENDED = """\
To answer as people of a declared profile do on average in the training data: in research on whose values a model
reflects, and where people state their own profile and know that answers depend on it.

It is **not** for

- inferring anybody's demographics, or guessing a profile from a name, a language or a place;
- impersonating a person, or speaking for a group: its answers are averages, and nobody's own words;
- decisions about people, such as on work, credit, housing, insurance, benefits, asylum or policing, and persuasion
  aimed at a group;
- taking the place of a survey, or of the people concerned."""

NOT_MEASURED = """\
Not measured: this card holds no evaluation of these weights, neither of gains and gaps between groups nor of
stereotyping. `trl-cuma evaluate` measures them, `trl-cuma card` writes them here."""

NO_LICENSE = (
    "Not recorded. Read the terms of the training data before you use or share this adapter: several public surveys "
    "and preference data sets allow no commercial use, some no redistribution."
)

NON_COMMERCIAL = (
    "**These terms forbid commercial use.** An adapter is made from the data: don't use it for what the data may not "
    "be used for."
)


def public_name(name: str | None) -> str | None:
    """A Hub id as it is; of a path its last part, since the rest tells of somebody's machine."""
    if not name or re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        return name or None
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def describe(config: CuMAConfig, measured: str | None = None) -> str:
    """
    The card's text. It names values of profiles that are in the adapter's vocabulary and that many people share, and
    no person.

    Args:
        config ([`CuMAConfig`]): What the adapter is.
        measured (`str`, *optional*): Markdown on what was measured.
    """
    parts = [
        "# A CuMA adapter",
        "A Cultural Mixture of Adapters ([arXiv 2601.04885](https://arxiv.org/abs/2601.04885)): "
        f"{_method(config)}. Made with trl_cuma.",
        "## Use",
        USE.format(
            base=public_name(config.base_model_name_or_path) or "ITS_BASE_MODEL", profile=_profile_lines(config)
        ),
        *([] if config.routing == "semantic" else ["## Intended use", INTENDED]),
        "## Demographic profiles",
        _demographics(config),
        *_groups(config),
        "## Training",
        *(_table({name.replace("_", " "): value for name, value in run.items()}) for run in config.training or []),
        *([] if config.training else ["Not recorded: the adapter was saved outside of a CuMA trainer."]),
        "## Licence of the training data",
        _license(config),
        "## Measured gains and gaps",
        measured or NOT_MEASURED,
        "## Limits and risks",
        "\n".join(f"- {limit}" for limit in _limits(config)),
        "## Settings",
        _table(_settings(config)),
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


def _groups(config: CuMAConfig) -> list[str]:
    """The values that the encoder knows: what the adapter's configuration holds, where many people share each."""
    state = config.demographic_encoder
    if config.routing == "semantic":
        return []
    vocabulary, least = (state or {}).get("vocabulary"), (state or {}).get("min_count", 0)
    if vocabulary is None:
        seen = (
            "Not recorded: the encoder keeps no list of values. It also makes vectors of values that no training "
            "person had, for which nothing was learned."
        )
    elif least < NAMED_FROM:
        seen = (
            f"Not named here: as few as {least} people may share a value, and this card is for everybody. The values "
            "are in `adapter_config.json`. Publish that only if they may be known."
        )
    else:
        rows = [f"| {_escaped(name)} | {_listed(values)} |" for name, values in vocabulary.items()]
        seen = (
            f"At least {least} people share each value (rows, where the data doesn't tell people apart). How many is "
            "not kept. “Other” holds values of fewer people, where the data has it. What is not listed is taken for "
            "unknown.\n\n" + "\n".join(["| Field | Values |", "|---|---|", *rows])
        )
    return ["### Groups seen in training", seen]


def _listed(values: list[str]) -> str:
    text = ", ".join(_escaped(value) for value in values[:SHOWN_VALUES])
    more = len(values) - SHOWN_VALUES
    return f"{text} and {more} more, in `adapter_config.json`" if more > 0 else text


def _license(config: CuMAConfig) -> str:
    runs = config.training or []
    known = [(run.get("dataset", "data"), run["dataset_license"]) for run in runs if run.get("dataset_license")]
    if not known:
        return NO_LICENSE
    lines = [f"- {_escaped(name)}: {_escaped(terms)}" for name, terms in dict.fromkeys(known)]
    if len(known) < len(runs):
        lines.append("- of other training data: not recorded")
    text = "\n".join(lines)
    return f"{text}\n\n{NON_COMMERCIAL}" if any(forbids_commerce(terms) for _, terms in known) else text


def forbids_commerce(terms: str) -> bool:
    """Whether a licence's name or a data set's terms say that commercial use is excluded (cc-by-nc-sa-4.0, …)."""
    return re.search(r"\bnc\b|non-?(commercial|profit)", terms, re.IGNORECASE) is not None


def _limits(config: CuMAConfig) -> list[str]:
    limits = ["Its gates depend on the input, so it cannot be merged into the base model."]
    if config.routing != "semantic":
        missing = {
            "error": "A call without a profile is an error.",
            "zero": "A call without a profile means the zero vector, the average profile.",
        }
        limits += [
            f"It answers for the profile that it is told. {missing[config.missing_demographics]}",
            "A profile says something of a group, in the training data, and nothing certain of a person.",
            "**Stereotyping.** It learns how groups differ on average. It may exaggerate that, and make the people of "
            "a group more alike than they are.",
            "**Gaps.** It may serve some groups better than others. Profiles unlike those of the training data were "
            "not seen: measure before you rely on such answers.",
            "**Consent.** A profile is declared by the person, never inferred. Say that answers depend on it, and "
            "serve those who give none, too. In many places the law gives such data special protection.",
            "**Privacy.** `adapter_config.json` holds the encoder, of a field encoder with the values that it knows. "
            "Trained weights can hold pieces of what they were trained on.",
        ]
    return limits


def _table(facts: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts.items())])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{name} ({count})" for name, count in value.items())
    elif isinstance(value, set | list | tuple):
        value = ", ".join(sorted(map(str, value)))
    elif isinstance(value, float):
        value = f"{value:.4g}"
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|").replace("<", "&lt;")


def _escaped(text: Any) -> str:
    """Somebody else's words, shown as they are: neither Markdown nor HTML, nor one of the card's marks."""
    line = re.sub(r"\s+", " ", str(text))
    return re.sub(r"([\\`*_\[\]~|])", r"\\\1", line).replace("<", "&lt;")
