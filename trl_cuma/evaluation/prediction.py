# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What is predicted of a survey's cells."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class SurveyPrediction:
    """
    Predicted answers of cells, and what is known of the true ones. Distributions are in the order of the scale, zero
    beyond a cell's own options.

    Args:
        question_id (`np.ndarray` of shape `(cells,)`): Texts.
        num_options (`np.ndarray` of shape `(cells,)`): Options of each cell's question.
        demographic (`list[dict[str, str | None]]`): Unique profiles. Empty for a vector; a plain text is the one field
            `"demographic"`.
        profile (`np.ndarray` of shape `(cells,)`): Index into `demographic`.
        predicted (`np.ndarray` of shape `(cells, max_options)`): Renormalised over the options; rows sum to 1.
        outside (`np.ndarray` of shape `(cells,)`): Probability of anything but the options; `nan` where an option is
            several tokens.
        truth (`np.ndarray` of shape `(cells, max_options)`, *optional*): The true distributions, where known.
        answer_cell (`np.ndarray` of shape `(answers,)`): The cell of each person's answer; none where the truth is
            all that there is.
        answer_choice (`np.ndarray` of shape `(answers,)`): The option chosen.
        answer_person (`np.ndarray` of shape `(answers,)`): Who chose it; `""` if not known.
        answer_weight (`np.ndarray` of shape `(answers,)`): Survey weight, 1 where there is none.
        position_bias (`np.ndarray` of shape `(cells,)`, *optional*): Mean total variation between the predictions with
            the options in different orders; `None` where they were asked in one order.
        num_rows (`int`): Rows that were read, the bad ones too; 0 for a [`Survey`].
        bad_rows (`dict[str, list[int]]`): Reason → numbers of the rows that could not be evaluated.
        unknown_values (`dict[str, int]`): Field → profiles whose value there the adapter's encoder doesn't know: they
            are answered as if the field were missing.
    """

    question_id: np.ndarray
    num_options: np.ndarray
    demographic: list[dict[str, str | None]]
    profile: np.ndarray
    predicted: np.ndarray
    outside: np.ndarray
    truth: np.ndarray | None
    answer_cell: np.ndarray
    answer_choice: np.ndarray
    answer_person: np.ndarray
    answer_weight: np.ndarray
    position_bias: np.ndarray | None = None
    num_rows: int = 0
    bad_rows: dict[str, list[int]] = field(default_factory=dict)
    unknown_values: dict[str, int] = field(default_factory=dict)

    def observed(self) -> np.ndarray:
        """
        What the predictions are held against, `(cells, max_options)`: the truth, or else the weighted shares of the
        answers in each cell, which are `nan` where nobody's answer has a weight.
        """
        if self.truth is not None:
            return self.truth
        shares = np.zeros_like(self.predicted)
        np.add.at(shares, (self.answer_cell, self.answer_choice), self.answer_weight)
        total = shares.sum(1, keepdims=True)
        return np.divide(shares, total, out=np.full_like(shares, np.nan), where=total > 0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays to an `.npz` file. Profiles are in it as numbers only, and rows that were bad as none."""
        arrays = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "demographic"}
        np.savez(path, **{name: value for name, value in arrays.items() if isinstance(value, np.ndarray)})
