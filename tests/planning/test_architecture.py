# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_cuma import CuMAConfig
from trl_cuma.planning.architecture import Base, build_model, decoder_layers, load_config, shipped_models
from trl_cuma.planning.memory import inventory

BF16 = Base(torch.bfloat16)


@pytest.mark.parametrize(
    "name, parameters, layers",
    [  # the numbers of their checkpoints
        ("Qwen/Qwen3-8B", 8_190_735_360, 36),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248, 32),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 32),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496, 80),
        ("bigscience/bloomz-7b1", 7_069_016_064, 30),
        ("bigscience/bloom", 176_247_271_424, 70),
    ],
)
def test_shipped_architectures(name: str, parameters: int, layers: int) -> None:
    model = build_model(load_config(name), BF16, None)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(decoder_layers(model)) == layers
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_every_shipped_id_is_read() -> None:
    assert len(shipped_models()) > 5
    assert {load_config(name).model_type for name in shipped_models()} == {"qwen3", "llama", "bloom"}


@pytest.mark.parametrize("r, published", [(8, 125_209_152), (64, 339_905_088)])  # 1.53 % and 4.15 %
def test_published_adapters_of_qwen3_8b(r: int, published: int) -> None:
    config = CuMAConfig(target_modules=["q_proj", "v_proj"], r=r, demographic_dim=1024, task_type="CAUSAL_LM")
    model = inventory(build_model(load_config("Qwen/Qwen3-8B"), BF16, config))
    assert sum(p.numel for p in model.trained) == published


def test_a_file_a_folder_and_what_is_neither(config_file, make_base, tmp_path) -> None:
    path = config_file("bloom")
    make_base("llama").config.save_pretrained(tmp_path / "folder")
    assert load_config(path).model_type == "bloom"
    assert load_config(str(tmp_path / "folder")).model_type == "llama"
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.json").write_text(json.dumps({"hidden_size": 8}))
    for name, message in [
        (str(tmp_path / "none.json"), "there is no such file"),
        (str(tmp_path / "no.json"), "no configuration of a transformers model: 'model_type'"),
        (str(tmp_path / "empty"), "holds no config.json that transformers reads"),
        (
            "somebody/else",
            "pass a local folder or the path of a config.json, or one of Qwen/Qwen3-8B, bigscience/bloom",
        ),
    ]:
        with pytest.raises(ValueError, match="`model_name_or_path` is ") as error:
            load_config(name)
        assert message in str(error.value)


@pytest.mark.parametrize("architecture", ["qwen3", "bloom"])
@pytest.mark.parametrize("quantization, double", [("nf4", False), ("nf4", True), ("int8", False)])
def test_a_quantized_base_has_the_bytes_that_bitsandbytes_makes(
    make_base, tmp_path, architecture: str, quantization: str, double: bool
) -> None:
    """Of the quantized layers alone and of what it leaves: embeddings, norms and the head, tied or not."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs the extra trl_cuma[quantization]")
    base = make_base(architecture)
    base.save_pretrained(tmp_path / "base")
    real = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=quantization == "nf4",
            load_in_8bit=quantization == "int8",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        ),
    )
    layers = [m for m in real.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]
    assert layers
    state = sum(buffer.nbytes for buffer in real.buffers())
    for layer in layers:
        if quantization == "int8":
            state += layer.weight.SCB.nbytes
            continue
        found = layer.weight.quant_state
        state += found.absmax.nbytes + found.code.nbytes
        if double:
            state += found.offset.nbytes + found.state2.absmax.nbytes + found.state2.code.nbytes

    adapter = CuMAConfig(demographic_dim=6, task_type="CAUSAL_LM")
    planned = inventory(build_model(base.config, Base(torch.bfloat16, quantization, double, torch.bfloat16), adapter))
    assert sum(p.nbytes for p in planned.base) == sum(p.nbytes for p in real.parameters())
    assert planned.state == state


def test_the_adapter_is_float32_beside_every_base(make_base, adapter) -> None:
    config = make_base().config

    def dtypes(base: Base) -> set[torch.dtype]:
        model = build_model(config, base, adapter())
        assert isinstance(model, PeftModel)
        return {p.dtype for p in model.parameters() if p.requires_grad}

    assert dtypes(BF16) == dtypes(Base(torch.float32)) == {torch.float32}
    assert dtypes(Base(torch.bfloat16, "nf4", storage=torch.bfloat16)) == {torch.float32}
