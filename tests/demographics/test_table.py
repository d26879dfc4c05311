# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import copy
import os
import pickle
import stat
import threading
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trl_cuma.demographics import DemographicProfile, DemographicTable, FieldEncoder, TextEncoder

SECRET = "Xyzzyland"  # stands for a person's value: it must not show up anywhere
PEOPLE = [{"country": country, "age": age} for country in ("JP", "BR", SECRET) for age in (30, 60)]


@pytest.fixture
def fields():
    """One dimension per value: age 30, age 60, country BR, country JP, country Xyzzyland."""
    return FieldEncoder(min_count=1).fit(PEOPLE)


@pytest.fixture(scope="module")
def text_encoder(minilm_path):
    return TextEncoder(str(minilm_path)).fit(PEOPLE)


class Counter:
    """Counts the texts that a text encoder really embeds."""

    def __init__(self, monkeypatch):
        self.texts = 0
        embed = TextEncoder._embed

        def spy(encoder, texts, **kwargs):
            self.texts += len(texts)
            return embed(encoder, texts, **kwargs)

        monkeypatch.setattr(TextEncoder, "_embed", spy)


@pytest.fixture
def embedded(monkeypatch):
    return Counter(monkeypatch)


def test_one_row_per_unique_profile(fields):
    table = DemographicTable(fields)
    assert table.dim == 5 and table.embeds.shape[0] == 0
    table.add([PEOPLE[0], {"age": "30", "country": " JP "}, {"country": "JP", "age": 30.0, "sex": None}, PEOPLE[1]])
    assert table.embeds.shape == (2, 5) and table.embeds.dtype == torch.float32
    ids = table.lookup([PEOPLE[1], PEOPLE[0], PEOPLE[1], DemographicProfile.from_value(PEOPLE[0])])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [1, 0, 1, 0]
    multi_hot = torch.tensor([[0.0, 1, 0, 1, 0], [1, 0, 0, 1, 0]])
    assert torch.equal(table([PEOPLE[1], PEOPLE[0]]) > 0, multi_hot > 0)


def test_unseen_profiles_are_encoded_on_the_fly(fields):
    table = DemographicTable(fields)
    for person in PEOPLE:
        assert torch.equal(table([person]), fields.encode([person]))
    assert table.lookup(PEOPLE).tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(table.embeds, fields.encode(PEOPLE))
    assert table.lookup([]).shape == (0,) and table([]).shape == (0, 5)


def test_fields_that_read_the_same_as_text_are_kept_apart():
    people = [{"a": "1; b: 2"}, {"a": "1", "b": "2"}]  # both read "a: 1; b: 2"
    fields = FieldEncoder(min_count=1).fit(people)
    assert torch.equal(DemographicTable(fields)(people), fields.encode(people))


def test_missing_profiles(fields):
    people = [PEOPLE[0], None, {"country": "No answer"}]
    with pytest.raises(ValueError, match="Nothing is known about the person in rows 1, 2: "):
        DemographicTable(fields).add(people)
    table = DemographicTable(fields, missing="zero")
    assert table.lookup(people).tolist() == [0, 1, 1]
    assert not table([None]).any()
    with pytest.raises(ValueError, match="`missing` is 'skip'"):
        DemographicTable(fields, missing="skip")


def test_errors_name_the_rows_of_the_column_not_of_the_unique_profiles(fields):
    with pytest.raises(ValueError, match="in row 3 has none of the encoder's fields") as caught:
        DemographicTable(fields).add([PEOPLE[0]] * 3 + [{"land": SECRET}])
    assert SECRET not in str(caught.value)
    with pytest.raises(TypeError, match="Row 2: The field 'home'"):
        DemographicTable(fields).add([PEOPLE[0], PEOPLE[0], {"home": {}}])


def test_each_distinct_value_is_read_once_for_all_its_rows(fields, monkeypatch):
    read = []
    original = DemographicProfile.from_value

    def spy(value):
        read.extend([value] if isinstance(value, dict) else [])  # and not what was read and is encoded
        return original(value)

    monkeypatch.setattr(DemographicProfile, "from_value", spy)
    table = DemographicTable(fields)
    ids = table.lookup([dict(person) for person in PEOPLE * 50])
    assert len(read) == len(PEOPLE) == 6 and ids.tolist() == [0, 1, 2, 3, 4, 5] * 50
    table.lookup(PEOPLE)
    assert len(read) == 12  # the table keeps nothing that it has read
    with pytest.raises(ValueError, match="Nothing is known about the person in rows 1, 4: "):
        table.lookup([PEOPLE[0], None, PEOPLE[0], PEOPLE[1], None])


def test_equal_values_that_read_differently_are_kept_apart():
    people = [{"x": value} for value in (1, True, 1.0, "1", "true", 0, False, None, float("nan"))] + [None, "x: 1"]
    fields = FieldEncoder(min_count=1).fit([{"x": value} for value in ("1", "true", "0", "false")])
    table = DemographicTable(fields, missing="zero")
    ids = table.lookup(people[:-1])
    assert ids.tolist() == [table.lookup([person]).item() for person in people[:-1]]
    assert ids.tolist() == [0, 1, 0, 0, 1, 2, 3, 4, 4, 4]
    with pytest.raises(ValueError, match="row 10"):  # a plain text, unlike the fields that it spells
        table.lookup(people)


def test_profiles_need_an_encoder(fields):
    for value in (SECRET, {"country": SECRET}):
        with pytest.raises(ValueError, match="no encoder: pass a fitted `demographic_encoder`") as caught:
            DemographicTable(None).add([value])
        assert SECRET not in str(caught.value)
    with pytest.raises(RuntimeError, match="FieldEncoder is not fitted"):
        DemographicTable(FieldEncoder()).add(PEOPLE)
    with pytest.raises(TypeError, match="Expected a sequence of demographic profiles, got str"):
        DemographicTable(fields).lookup(SECRET)


def test_a_refitted_encoder_is_refused(fields):
    table = DemographicTable(fields)
    table.add(PEOPLE[:2])
    fields.fit([{"age": 30}, {"age": 60}])
    with pytest.raises(RuntimeError, match="fitted again after the table was begun"):
        table.add(PEOPLE)


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2.5], [3, 4]],
        [(1.0, 2.5), (3.0, 4.0)],
        [np.array([1.0, 2.5]), np.array([3, 4])],
        np.array([[1.0, 2.5], [3.0, 4.0]]),
        [torch.tensor([1.0, 2.5], dtype=torch.bfloat16), torch.tensor([3, 4], dtype=torch.float64)],
        torch.tensor([[1.0, 2.5], [3.0, 4.0]], requires_grad=True),
    ],
    ids=["lists", "tuples", "arrays", "array", "tensors", "tensor"],
)
def test_vectors_pass_through(values):
    table = DemographicTable(None)
    out = table(values)
    assert torch.equal(out, torch.tensor([[1.0, 2.5], [3.0, 4.0]])) and out.dtype == torch.float32
    assert not out.requires_grad
    assert table.dim == 2 and table.lookup([[3.0, 4.0], [1.0, 2.5], [3.0, 4.0]]).tolist() == [1, 0, 1]


def test_missing_vectors():
    with pytest.raises(ValueError, match="Nothing is known about the person in row 0"):
        DemographicTable(None)([None, [1.0, 2.0]])
    table = DemographicTable(None, missing="zero")
    assert torch.equal(table([None, [1.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    assert torch.equal(table([None]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="Nothing is known about the person in row 0"):
        DemographicTable(None).add([None])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([[1.0, 2.0], [1.0]], ValueError, "vector in row 1 has 1 dimensions, expected 2"),
        ([[1.0, 2.0], [1.0, float("nan")]], ValueError, "vector in row 1 has values that are not finite"),
        ([[1.0, 2.0], [1.0, 1e39]], ValueError, "vector in row 1 has values that are not finite in float32"),
        ([[1.0], {"country": SECRET}], ValueError, "Row 0 holds a vector and row 1 a profile"),
        ([[1.0], SECRET], ValueError, "Row 0 holds a vector and row 1 a profile"),
        ([[SECRET]], TypeError, "Row 0 holds a list that is not a vector of numbers: pass floats, or a profile"),
        ([[1.0], [None]], TypeError, "Row 1 holds a list that is not a vector of numbers"),
        ([[1.0, [2.0]]], TypeError, "Row 0 holds a list that is not a vector of numbers: its entries are nested"),
        ([[[1.0]]], TypeError, r"its shape is \(1, 1\), expected \(dim,\)"),
        ([[]], TypeError, r"its shape is \(0,\), expected \(dim,\)"),
        ([3.5], TypeError, "Row 0: A demographic profile is a mapping of fields, a text or None, got float"),
    ],
)
def test_bad_vectors(values, error, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message) as caught:
            DemographicTable(None).add(values)
    assert SECRET not in str(caught.value)


def test_later_values_must_fit_the_table(fields):
    vectors = DemographicTable(None)
    vectors.add([[1.0, 2.0]])
    with pytest.raises(ValueError, match="vector in row 0 has 3 dimensions, expected 2"):
        vectors.add([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="The table holds vectors and row 1 is of the other kind"):
        vectors.add([None, SECRET])
    profiles = DemographicTable(fields)
    with pytest.raises(ValueError, match="vector in row 0 has 2 dimensions, expected 5"):
        profiles.add([[1.0, 2.0]])
    profiles.add(PEOPLE)
    with pytest.raises(ValueError, match="The table holds profiles and row 0 is of the other kind"):
        profiles.add([[1.0] * 5])


def test_an_empty_vector_table_has_no_dim():
    with pytest.raises(RuntimeError, match="no encoder and no vectors yet"):
        _ = DemographicTable(None).dim


def test_copies_and_pickles(fields):
    table = DemographicTable(fields)
    table.add(PEOPLE[:3])
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(twin(PEOPLE), fields.encode(PEOPLE))
    assert len(table.embeds) == 3  # the copies grew, the original did not


def test_text_table_holds_no_text(text_encoder):
    table = DemographicTable(text_encoder)
    table.add(PEOPLE, show_progress=False)
    pickled = pickle.dumps(table)
    assert SECRET.encode() not in pickled and len(pickled) < 100_000
    torch.testing.assert_close(pickle.loads(pickled)(PEOPLE), text_encoder.encode(PEOPLE), rtol=0, atol=1e-5)


def test_progress_bar_counts_what_is_encoded(text_encoder, capsys):
    table = DemographicTable(text_encoder)
    table.add(PEOPLE * 3)
    shown = capsys.readouterr()
    assert "6/6" in shown.err and SECRET not in shown.err + shown.out
    table.add(PEOPLE)
    table.lookup([{"country": "FR"}])
    assert capsys.readouterr().err == ""


class TestCache:
    def test_second_run_encodes_nothing(self, text_encoder, tmp_path, embedded):
        first = DemographicTable(text_encoder, cache_dir=tmp_path / "cache")
        first.add(PEOPLE[:4], show_progress=False)
        assert embedded.texts == 4
        second = DemographicTable(TextEncoder.from_state(text_encoder.state()), cache_dir=str(tmp_path / "cache"))
        second.add(PEOPLE[:4], show_progress=False)
        assert embedded.texts == 4
        assert torch.equal(second.embeds, first.embeds)
        second.add(PEOPLE, show_progress=False)
        assert embedded.texts == 6  # the two new ones
        third = DemographicTable(text_encoder, cache_dir=tmp_path / "cache")
        third.add(PEOPLE[::-1], show_progress=False)
        assert embedded.texts == 6
        assert torch.equal(third.embeds, second.embeds.flip(0))

    def test_holds_hashes_and_vectors_only(self, text_encoder, tmp_path):
        DemographicTable(text_encoder, cache_dir=tmp_path).add(PEOPLE, show_progress=False)
        (path,) = tmp_path.iterdir()
        content = path.read_bytes()
        for word in (SECRET, "country", "age"):
            assert word.encode() not in content and word not in path.name
        with safe_open(path, framework="pt") as file:
            assert sorted(file.keys()) == ["keys", "vectors"]
            assert file.get_tensor("keys").shape == (6, 32) and file.get_tensor("vectors").shape == (6, 384)

    def test_only_the_owner_can_read_it(self, text_encoder, tmp_path):
        before = os.umask(0)
        try:
            DemographicTable(text_encoder, cache_dir=tmp_path / "cache").add(PEOPLE, show_progress=False)
        finally:
            os.umask(before)
        (path,) = (tmp_path / "cache").iterdir()
        assert [stat.S_IMODE(entry.stat().st_mode) for entry in (path.parent, path)] == [0o700, 0o600]

    def test_another_state_has_another_file(self, text_encoder, tmp_path, embedded):
        DemographicTable(text_encoder, cache_dir=tmp_path).add(PEOPLE, show_progress=False)
        other = TextEncoder(text_encoder.model).fit(PEOPLE[:3])
        done = embedded.texts
        table = DemographicTable(other, cache_dir=tmp_path)
        table.add(PEOPLE, show_progress=False)
        assert embedded.texts == done + 6
        assert len(list(tmp_path.iterdir())) == 2
        torch.testing.assert_close(table.embeds, other.encode(PEOPLE), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other encoder", "other shape", "nan"])
    def test_damaged_file_is_rebuilt(self, text_encoder, tmp_path, embedded, damage):
        DemographicTable(text_encoder, cache_dir=tmp_path).add(PEOPLE, show_progress=False)
        (path,) = tmp_path.iterdir()
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "text":
            path.write_text("not a safetensors file")
        elif damage == "other encoder":
            save_file(tensors, path, metadata={"fingerprint": "0" * 64})
        elif damage == "other shape":
            save_file(tensors | {"vectors": tensors["vectors"][:, :5].clone()}, path, metadata=metadata)
        elif damage == "nan":
            tensors["vectors"][2, 3] = float("nan")
            save_file(tensors, path, metadata=metadata)
        table = DemographicTable(text_encoder, cache_dir=tmp_path)
        with pytest.warns(UserWarning, match="is ignored and rebuilt") as caught:
            table.add(PEOPLE, show_progress=False)
        assert not any(SECRET in str(warning.message) for warning in caught)
        assert embedded.texts == 12
        torch.testing.assert_close(table.embeds, text_encoder.encode(PEOPLE), rtol=0, atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = DemographicTable(text_encoder, cache_dir=tmp_path)
            again.add(PEOPLE, show_progress=False)
        assert embedded.texts == 18  # 6 of them by encode() above

    def test_writers_at_once_leave_a_whole_file(self, text_encoder, tmp_path, embedded):
        """Readers and writers of one file never see half of it, and no temporary file stays."""
        from trl_cuma.demographics.table_cache import TableCache

        cache = TableCache(tmp_path, text_encoder.fingerprint, 384)
        failures = []

        def write(writer):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    for i in range(20):
                        cache.write({bytes([writer] * 31 + [i]): torch.full((384,), float(writer))})
                        for key, row in cache.read([bytes([w] * 31 + [i]) for w in range(4)]).items():
                            assert torch.equal(row, torch.full((384,), float(key[0])))
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]

    def test_folder_that_cannot_be_written_is_a_warning(self, text_encoder, tmp_path):
        (tmp_path / "file").write_text("")
        table = DemographicTable(text_encoder, cache_dir=tmp_path / "file")
        with pytest.warns(UserWarning, match="could not be written"):
            table.add(PEOPLE, show_progress=False)
        assert len(table.embeds) == 6

    def test_only_add_writes_and_only_for_text(self, text_encoder, fields, tmp_path):
        DemographicTable(text_encoder, cache_dir=tmp_path).lookup(PEOPLE)
        DemographicTable(fields, cache_dir=tmp_path).add(PEOPLE)
        DemographicTable(None, cache_dir=tmp_path).add([[1.0, 2.0]])
        assert not list(tmp_path.iterdir())
