# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""How the report writes numbers and names."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from ...data.people import OTHER


class Metric(NamedTuple):
    """How a metric is shown: its name, the better direction or the calibrated value, and what it is."""

    title: str
    better: str
    meaning: str
    digits: int = 3


METRICS = {
    "accuracy": Metric("Accuracy", "higher", "how often the most probable option is the answer given"),
    "macro_f1_question": Metric("Macro-F1, per question", "higher", "F1 averaged over a question's options"),
    "macro_f1_pooled": Metric("Macro-F1, pooled", "higher", "F1 averaged over option letters, questions pooled"),
    "country_macro_accuracy": Metric("Country macro-accuracy", "higher", "accuracy averaged over countries"),
    "emd": Metric("EMD", "lower", "distance to the group's own distribution of answers; each cell counts the same"),
    "emd_population": Metric("EMD, population", "lower", "the same; each cell counts by its answers"),
    "wvb_emd": Metric("EMD, WorldValuesBench", "lower", "pooled over people: blind to who answered what"),
    "kl": Metric("KL", "lower", "divergence of the prediction from the truth, nats"),
    "kl_explained": Metric("KL explained", "higher", "1 - KL(truth, prediction) / KL(truth, training marginal)"),
    "nll": Metric("Log-loss", "lower", "of the answers given, nats"),
    "entropy": Metric("Entropy", "", "of the predictions, nats"),
    "collapse_index": Metric("Collapse index", "0", "0 calibrated, 1 the training marginal, below 0 over-confident"),
    "spread_ratio": Metric("Spread ratio", "1", "differences between profiles, predicted over true"),
    "position_bias": Metric("Position bias", "lower", "how far the order of the options changes the answer, 0 to 1"),
    "outside": Metric("Outside", "lower", "probability given to anything but an option", 4),
    "pair_accuracy": Metric(
        "Pair accuracy", "higher", "how often what a person chose is likelier than another answer"
    ),
    "pair_accuracy_per_token": Metric("Pair accuracy, per token", "higher", "the same by the likelihood of a token"),
    "choice_accuracy": Metric("Choice accuracy", "higher", "how often what a person chose is the likeliest of all"),
    "choice_accuracy_per_token": Metric("Choice accuracy, per token", "higher", "the same by that of a token"),
}
"""The metrics of a split, in the order of the report; of people's choices between texts the last ones."""

HEADLINE = ("emd", "kl_explained", "nll", "accuracy")
"""What the summary shows: group-conditional and blind to nothing first."""

MISSING = "n/a"

KEPT = "\u00a0\u200c\u200d"
"""No-break space, and the joiners that some scripts need: not printable by themselves."""


def metric_of(name: str) -> Metric:
    """How a metric is shown; one that is not in `METRICS` goes by its own name."""
    return METRICS.get(name, Metric(clean(name).replace("_", " ").capitalize(), "", ""))


def number(value: Any, digits: int = 3) -> str:
    """`0.103`; whole numbers with thousands separated; `n/a` for `None` and what is not finite."""
    if value is None or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # no "-0.000"


def percent(share: float) -> str:
    """`83 %`."""
    return f"{100 * share:.0f}\u00a0%"


def estimate(entry: Mapping[str, Any] | None, digits: int = 3) -> str:
    """`0.103 [0.091, 0.115]`; without an interval the value alone."""
    if not entry or number(entry.get("value")) == MISSING:
        return MISSING
    value = number(float(entry["value"]), digits)
    low, high = (number(entry.get(end), digits) for end in ("low", "high"))
    return value if MISSING in (low, high) else f"{value} [{low}, {high}]"


def people_known(counts: Mapping[str, Any]) -> bool:
    """Whether it is known of any answer whose it is; published shares, and answers drawn from them, are nobody's."""
    return "answers" not in counts or counts["answers"] > counts.get("answers without a person", 0)


def other_note(groups: Container[str], min_people: int | None) -> str:
    """
    What the group "Other" is, where it is among those shown. `min_people`: as in the document, if it says so; 0 where
    nobody is asked, so that "Other" is a value like any.
    """
    if OTHER not in groups or min_people == 0:
        return ""
    if min_people == 1:
        return f" “{OTHER}”: those whose value is unknown."
    few = "too few" if min_people is None else f"fewer than {min_people:,}"
    return f" Values with {few} people are together as “{OTHER}”, with the unknown."


def clean(text: Any) -> str:
    """One line without control characters, which neither HTML nor SVG can hold."""
    line = re.sub(r"[^\S\u00a0]+", " ", str(text)).strip()
    return "".join(char for char in line if char.isprintable() or char in KEPT)


def shorten(text: Any, length: int) -> str:
    """The text's beginning, at a word's end where there is one, with an ellipsis."""
    text = clean(text)
    if len(text) <= length:
        return text
    head = text[: length - 1]
    return (head.rsplit(" ", 1)[0] if " " in head[length // 2 :] else head).rstrip(" ,;:.") + "…"
