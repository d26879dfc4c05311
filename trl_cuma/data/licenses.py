# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The terms of the public data sets, which go from a prepared folder into an adapter's card."""

from __future__ import annotations

import json
import os

WORLD_VALUES_SURVEY = "terms of the World Values Survey: non-profit use, with citation; the data is not redistributed"
COMMUNITY_ALIGNMENT = "cc-by-4.0, by the account of others: read the data set's own page"
PRISM = "people's texts cc-by-4.0, models' answers cc-by-nc-4.0"
GLOBAL_OPINIONS = "cc-by-nc-sa-4.0"


def prepared_license(folder: str | os.PathLike[str] | None) -> str | None:
    """The terms that `trl-cuma prepare` noted in a folder; `None` where it noted none, or for something else."""
    try:
        with open(os.path.join(folder or "", "report.json"), encoding="utf-8") as file:
            return json.load(file).get("license")
    except (OSError, ValueError, AttributeError):
        return None
