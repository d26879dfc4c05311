# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import pandas as pd
import pyarrow as pa

from trl_cuma.data.columns import joined, message_lists, profile_structs


def test_messages_by_row():
    lists = message_lists(
        ("system", pa.array(["be kind", None, "be brief"])),
        ("user", pa.array(["a", "b", "c"])),
        ("assistant", pa.array(["A", "B", "C"])),
    )
    assert lists.to_pylist() == [
        [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "A"},
        ],
        [{"role": "user", "content": "b"}, {"role": "assistant", "content": "B"}],
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "C"},
        ],
    ]


def test_no_rows():
    assert message_lists(("user", pa.array([], pa.string()))).to_pylist() == []


def test_joined():
    assert joined(pa.array(["a\n\n", ""]), pa.array(["x", "y"])).to_pylist() == ["a\n\nx", "y"]


def test_profiles_keep_the_order_of_their_fields():
    profiles = pd.DataFrame({"country": ["Ruritania", None], "age": [None, None]}, dtype=object)
    structs = profile_structs(profiles)
    assert [field.name for field in structs.type.fields] == ["country", "age"]
    assert structs.to_pylist() == [{"country": "Ruritania", "age": None}, {"country": None, "age": None}]
