# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_cuma.data.global_opinions_cells import says_nothing


@pytest.mark.parametrize(
    "option",
    [
        "DK/Refused",
        "(DK/Refused)",
        "DK/Refused (DO NOT READ)",
        "Don't know [DO NOT READ]",
        "Don’t know",
        "Don't know/No answer",
        "Don't know or refused",
        "DK (VOL)",
        "Refused",
        "No answer",
        "Missing; Unknown",
        "Missing; Not available",
        "Other missing; Multiple answers Mail (EVS)",
        "Not asked",
        "Not applicable",
        "Not sure",
        "",
    ],
)
def test_options_that_are_no_answer(option):
    assert says_nothing(option)


@pytest.mark.parametrize(
    "option",
    [
        "None",
        "Neither",
        "Both (VOL)",
        "Other (DO NOT READ)",
        "Never heard of (DO NOT READ)",
        "Not a threat",
        "Not applicable; no children",
        "Depends/Both good and bad",
        "Refused entry at the border",
        "Missing the old days",
        "2.0",
    ],
)
def test_options_that_are_answers(option):
    assert not says_nothing(option)
