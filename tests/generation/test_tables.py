# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_cuma.generation.tables import read_table


def test_both_kinds_of_table_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"name": "a", "country": "Kenya", "age": null}\n\n{"age": 30}\n')
    assert read_table(tmp_path / "a.jsonl", "--x") == [{"name": "a", "country": "Kenya", "age": None}, {"age": 30}]
    (tmp_path / "a.csv").write_text('\ufeffcountry,age\n"Korea, South",30\nKenya,\n', encoding="utf-8")  # as Excel
    assert read_table(tmp_path / "a.csv", "--x") == [
        {"country": "Korea, South", "age": "30"},
        {"country": "Kenya", "age": ""},
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("b.jsonl", '{"country": "Kenya"}\nKenya\n', "line 2 is no JSON object"),
        ("c.jsonl", '["Kenya"]\n', "line 1 is no JSON object"),
        ("d.csv", "country,age\nKenya\n", "row 1 has more or fewer values than the header"),
        ("e.csv", "country\nKenya,30\n", "row 1 has more or fewer values than the header"),
        ("f.txt", "country", "is neither a .csv nor a .jsonl"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_and_not_repeated(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"`--x` .*{name}.*{message}|`--x` .*{message}") as error:
        read_table(tmp_path / name, "--x")
    assert "Kenya" not in str(error.value)
