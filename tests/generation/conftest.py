# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_cuma.generation.answering import Answerer
from trl_cuma.generation.loading import load_model


@pytest.fixture(scope="session")
def answerer(saved_adapter) -> Answerer:
    """A chat model with an adapter, as a user loads it."""
    model, tokenizer, _ = load_model(None, str(saved_adapter()))
    return Answerer(model, tokenizer)
