# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
from trl_cuma.data.report import Report


def test_what_is_read_is_kept_or_dropped_with_a_reason():
    report = Report("Some survey, sft")
    report.read("people", 5)
    report.read("people", 3)
    report.drop("people", "no answer", 2)
    report.drop("people", "never happened", 0)
    report.note("values grouped", 4)
    report.wrote("train", 6)
    assert report.kept("people") == 6
    assert report.to_dict() == {
        "title": "Some survey, sft",
        "units": {"people": {"read": 8, "kept": 6, "dropped": {"no answer": 2}}},
        "notes": {"values grouped": 4},
        "rows": {"train": 6},
    }
    assert [line.split() for line in str(report).splitlines()[1:]] == [
        ["people", "read", "8"],
        ["dropped:", "no", "answer", "-2"],
        ["people", "kept", "6"],
        ["note:", "values", "grouped", "4"],
        ["rows", "of", "split", "train", "6"],
    ]
