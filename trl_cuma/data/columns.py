# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Arrow columns of many rows at once, from what is known per person and per prompt."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc


def message_lists(*messages: tuple[str, pa.Array]) -> pa.ListArray:
    """
    One list of messages per row.

    Args:
        messages (`tuple[str, pa.Array]`): A role and its contents, one text per row; a null leaves the message out of
            that row. Texts that recur had better be dictionary-encoded: they are then not copied.

    Returns:
        `pa.ListArray`: `list<struct<role, content>>`, one entry per row, with texts that are dictionary-encoded.
    """
    width, rows = len(messages), len(messages[0][1])
    contents = pa.chunked_array([encoded(contents) for _, contents in messages])
    contents = contents.unify_dictionaries().combine_chunks()  # message by message
    there = np.stack([contents.is_valid().to_numpy(zero_copy_only=False) for _, contents in messages], axis=1)
    row_by_row = (np.arange(width)[None] * rows + np.arange(rows)[:, None])[there]
    roles = encoded(pa.array([role for role, _ in messages])).take(pa.array(np.nonzero(there)[1]))
    structs = pa.StructArray.from_arrays([roles, contents.take(pa.array(row_by_row))], names=["role", "content"])
    offsets = np.concatenate([[0], there.sum(1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), structs)


def encoded(texts: pa.Array) -> pa.Array:
    """The texts as a dictionary and indices into it, from which rows are taken and written without copying a text."""
    return texts if pa.types.is_dictionary(texts.type) else texts.dictionary_encode()


def joined(first: pa.Array, second: pa.Array) -> pa.Array:
    """Two texts per row as one."""
    return pc.binary_join_element_wise(first.cast(pa.string()), second.cast(pa.string()), "")


def profile_structs(profiles: pd.DataFrame) -> pa.StructArray:
    """The column `demographic`: one struct of texts per row of `profiles`, null where a field is not known."""
    fields = [encoded(pa.array(profiles[field].to_numpy(dtype=object), pa.string())) for field in profiles.columns]
    return pa.StructArray.from_arrays(fields, names=list(profiles.columns))
