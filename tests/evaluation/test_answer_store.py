# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import os
import signal

import pytest
import torch
from peft import get_peft_model

from trl_cuma import CuMAConfig
from trl_cuma.evaluation.answer_store import Answer, AnswerStore, model_fingerprint
from trl_cuma.testing import tiny_model


def key(number):
    return number.to_bytes(32, "big")


def test_what_was_written_is_read_by_another_object(tmp_path):
    path = tmp_path / "store.sqlite"
    batch = {key(1): Answer("one\nand more", 3, True), key(2): Answer("", 8, False)}
    AnswerStore(path).write(batch)
    AnswerStore(path).write({key(2): Answer("later", 1, True)})  # what is there stays
    assert AnswerStore(path).read([key(1), key(2), key(3)]) == batch


def test_a_batch_that_was_being_written_at_a_kill_leaves_nothing_behind(tmp_path):
    path = tmp_path / "store.sqlite"
    store = AnswerStore(path)
    store.write({key(0): Answer("kept", 1, True)})
    child = os.fork()
    if child == 0:

        class Killing(dict):
            def __getitem__(self, number):
                if number == key(900):
                    os.kill(os.getpid(), signal.SIGKILL)
                return Answer("x" * 10_000, 1, True)  # 9 MB: more than SQLite holds back from the file

        store.write(Killing.fromkeys(map(key, range(1, 1000))))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.stat().st_size > 1_000_000  # the half of it reached the file
    reopened = AnswerStore(path)
    assert list(reopened.read(map(key, range(1000)))) == [key(0)]
    reopened.write({key(5): Answer("new", 1, True)})
    assert reopened.read([key(0), key(5)]) == {key(0): Answer("kept", 1, True), key(5): Answer("new", 1, True)}


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, and long enough to be told from one " * 10)
    with pytest.raises(ValueError, match="notes.txt cannot be used to keep answers"):
        AnswerStore(path)
    assert path.read_text().startswith("not a database")


def make_model(**fields):
    torch.manual_seed(0)
    config = CuMAConfig(target_modules=["q_proj", "v_proj"], demographic_dim=4, num_experts=2, r=2, **fields)
    return get_peft_model(tiny_model("llama", vocab_size=20, hidden_size=16, num_hidden_layers=1), config)


def test_a_fingerprint_is_that_of_the_model_wherever_it_comes_from(tmp_path):
    model = make_model()
    fingerprint = model_fingerprint(model)
    assert model_fingerprint(make_model()) == fingerprint
    model.save_pretrained(tmp_path)
    base = tiny_model("llama", vocab_size=20, hidden_size=16, num_hidden_layers=1)
    assert model_fingerprint(type(model).from_pretrained(base, tmp_path)) == fingerprint


def test_a_fingerprint_changes_with_all_that_the_model_computes_with():
    model = make_model()
    found = {model_fingerprint(model)}
    changed = [make_model(lora_alpha=3), make_model(gate="soft"), model.get_base_model()]
    model_with_bias = make_model()
    with torch.no_grad():
        next(model_with_bias.parameters())[-1, -1] += 1e-3
    changed += [model_with_bias, make_model().half()]
    for other in changed:
        found.add(model_fingerprint(other))
    with model.disable_adapter():
        found.add(model_fingerprint(model))
    model.add_adapter("other", CuMAConfig(target_modules=["q_proj"], demographic_dim=4, num_experts=2, r=2))
    found.add(model_fingerprint(model))
    model.set_adapter("other")
    found.add(model_fingerprint(model))
    assert len(found) == 9


def test_a_weight_that_is_not_in_memory_has_no_fingerprint():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="`bias` is not in memory"):
        model_fingerprint(model)
