# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from peft import LoraConfig

from trl_cuma import CuMAConfig, FieldEncoder, load_demographic_encoder

PEOPLE = [{"country": "Kenya", "age": "25-34"}, {"country": "Japan"}, {"age": "65+"}]


@pytest.fixture
def encoder() -> FieldEncoder:
    return FieldEncoder(min_count=1).fit(PEOPLE)


def test_the_adapter_s_own_encoder_comes_back(encoder, tmp_path) -> None:
    CuMAConfig(demographic_encoder=encoder.state()).save_pretrained(tmp_path / "adapter")
    for path in (tmp_path / "adapter", str(tmp_path / "adapter")):
        assert torch.equal(load_demographic_encoder(path).encode(PEOPLE), encoder.encode(PEOPLE))
    again = load_demographic_encoder(tmp_path, subfolder="adapter")
    assert again.fingerprint == encoder.fingerprint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CuMAConfig(demographic_dim=7), "trained on ready-made vectors: pass your own, of 7 entries"),
        (CuMAConfig(routing="semantic"), "reads no profile"),
        (LoraConfig(), "holds no CuMA adapter"),
    ],
)
def test_an_adapter_without_an_encoder_says_why(config, message, tmp_path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_demographic_encoder(tmp_path)


def test_a_changed_or_missing_state_is_refused(encoder, tmp_path) -> None:
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        load_demographic_encoder(tmp_path / "nowhere")
    CuMAConfig(demographic_encoder=encoder.state()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["demographic_encoder"]["vocabulary"]["country"][0] = "Peru"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not match its fingerprint"):
        load_demographic_encoder(tmp_path)
