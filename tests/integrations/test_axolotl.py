# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Against axolotl's own plugin manager, where axolotl is installed (it is no dependency: its pins contradict ours). Its
command line trains in `test_a_training_from_axolotl_s_command_line`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM

from trl_cuma import FieldEncoder, load_demographic_encoder
from trl_cuma.testing import chat_tokenizer, tiny_model

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
base = pytest.importorskip("axolotl.integrations.base", reason="needs axolotl: pip install --no-deps axolotl")

from axolotl.utils.dict import DictDefault  # noqa: E402

from trl_cuma.integrations.axolotl import CuMAArgs, CuMAPlugin, KeepsProfile  # noqa: E402

PLUGIN = "trl_cuma.integrations.axolotl.CuMAPlugin"
PEOPLE = [{"age": age, "country": country} for age in ("old", "young") for country in ("FR", "JP")]


@pytest.fixture
def manager():
    manager = base.PluginManager.get_instance()
    manager.register(PLUGIN)
    yield manager
    manager.plugins.clear()


@pytest.fixture
def cfg():
    return DictDefault(
        adapter="cuma", lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules=["q_proj"], cuma_num_experts=3
    )


def test_axolotl_finds_the_adapter_and_its_arguments(manager):
    assert manager.supports_adapter("cuma") and not manager.adapter_supports_relora("cuma")
    module, name = manager.get_input_args()[0].rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) is CuMAArgs
    module, name = manager.get_training_args_mixin()[0].rsplit(".", 1)
    assert "cuma_aux_loss_coef" in getattr(importlib.import_module(module), name).__dataclass_fields__


def test_without_the_adapter_the_plugin_does_nothing(manager, cfg):
    other = DictDefault({**cfg, "adapter": "lora"})
    assert manager.load_adapter(None, other) is None
    assert manager.get_trainer_cls(other) is None
    assert manager.load_datasets(other) is None
    assert CuMAArgs(adapter="lora", sample_packing=True)


def test_the_yaml_s_numbers_make_the_adapter(manager, cfg):
    model, config = manager.load_adapter(tiny_model("qwen3", vocab_size=20), cfg)
    adapter = model.active_peft_config
    assert (adapter.peft_type, adapter.r, adapter.num_experts, adapter.lora_alpha) == ("CUMA", 2, 3, 4)
    assert adapter.target_modules == {"q_proj"} and config.num_experts == 3
    nothing, config = manager.load_adapter(model, cfg, config_only=True)  # for DPO
    assert nothing is None and config.num_experts == 3


def test_what_axolotl_sends_to_its_telemetry_holds_no_profiles(manager, cfg, tmp_path):
    model, _ = manager.load_adapter(tiny_model("qwen3", vocab_size=20), cfg)
    model.active_peft_config.demographic_encoder = FieldEncoder(min_count=1).fit(PEOPLE).state()
    model.save_pretrained(tmp_path)
    again = DictDefault({**cfg, "lora_model_dir": str(tmp_path)})
    loaded, config = manager.load_adapter(tiny_model("qwen3", vocab_size=20), again)
    assert loaded.active_peft_config.demographic_encoder is not None
    assert "JP" not in json.dumps(config.to_dict(), default=str)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cuma_num_expert": 8}, "`cuma_num_expert` is no key of the CuMA plugin: did you mean `cuma_num_experts`"),
        ({"demographic_colum": "x"}, "did you mean `demographic_column`"),
        ({"cuma_adapter_path": "x"}, "name the trained adapter with `lora_model_dir`"),
        ({"cuma_zzz": 1}, "known are"),
        ({"cuma_top_k": "many"}, "cuma_top_k"),
        ({"adapter": "cuma", "sample_packing": True}, "several people's documents"),
        ({"adapter": "cuma", "rl": "grpo"}, "only SFT .* and dpo are supported"),
    ],
)
def test_what_would_be_dropped_in_silence_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        CuMAArgs(**given)


def test_the_training_arguments_that_were_given_reach_the_trainer(manager, cfg):
    given = DictDefault({**cfg, "cuma_aux_loss_coef": 0.5, "demographic_column": "who"})
    assert manager.get_training_args(given) == {"cuma_aux_loss_coef": 0.5, "demographic_column": "who"}


def test_the_encoder_is_fitted_on_the_data_and_sizes_the_adapter(cfg):
    plugin = CuMAPlugin()
    plugin._fit(DictDefault({**cfg, "cuma_encoder": "field", "cuma_encoder_min_count": 2}), rows_with(PEOPLE))
    model, _ = plugin.load_adapter(tiny_model("qwen3", vocab_size=20), DictDefault({**cfg, "cuma_encoder": "field"}))
    assert plugin.encoder.is_fitted and model.active_peft_config.demographic_dim == 4  # two values of two fields
    with pytest.raises(ValueError, match="has no 'demographic' column"):
        plugin._fit(cfg, Dataset.from_dict({"input_ids": [[1]]}))


def rows_with(profiles):
    return Dataset.from_dict({"input_ids": [[1, 2]] * len(profiles), "demographic": profiles})


def test_a_prompt_strategy_keeps_the_profile():
    tokens = SimpleNamespace(
        supports_batched=True, tokenize_prompt=lambda batch: {"input_ids": [[len(text)] for text in batch["text"]]}
    )
    rows = Dataset.from_dict({"text": ["a", "bb"], "demographic": PEOPLE[:2], "person_id": [7, 8]})
    wrapped = KeepsProfile(tokens, "demographic", "person_id")
    kept = rows.map(wrapped.tokenize_prompt, batched=True, remove_columns=rows.column_names)
    assert kept.to_list() == [
        {"input_ids": [1], "demographic": PEOPLE[0], "person_id": 7},
        {"input_ids": [2], "demographic": PEOPLE[1], "person_id": 8},
    ]
    tokens.tokenize_prompt = lambda batch: {"input_ids": [[1]]}
    with pytest.raises(ValueError, match="makes other rows than it gets"):
        wrapped.tokenize_prompt(rows[:])
    with pytest.raises(ValueError, match="no 'demographic' column"):
        wrapped.tokenize_prompt({"text": ["a"]})


# axolotl 0.19.0 imports names of TRL's trainer of process rewards, which TRL 1.16 no longer has and we don't use.
RUN = """
import importlib.util, sys, types
if importlib.util.find_spec("trl.experimental.prm") is None:
    import trl
    stand_in = types.ModuleType("trl.experimental.prm")
    stand_in.PRMConfig, stand_in.PRMTrainer = trl.RewardConfig, trl.RewardTrainer
    sys.modules["trl.experimental.prm"] = stand_in
from axolotl.cli.train import do_cli
do_cli(sys.argv[1])
"""
NEEDED = ("httpcore", "PIL", "triton", "addict", "fire", "posthog", "dotenv", "art", "evaluate")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_training_from_axolotl_s_command_line(method, tmp_path):
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"axolotl's command line needs {missing}")
    tokenizer = chat_tokenizer(["Question 0? yes no, not at all"])
    tiny_model("qwen3", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    answers, prompts = ["yes", "no"] * 16, [f"Question {row % 10}? " for row in range(32)]
    if method == "sft":
        chats = [[("user", prompt), ("assistant", text)] for prompt, text in zip(prompts, answers, strict=True)]
        rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    else:
        rows = [{"prompt": p, "chosen": a, "rejected": a + "!"} for p, a in zip(prompts, answers, strict=True)]
    rows = [row | {"demographic": PEOPLE[number % 4]} for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"path": "rows.jsonl", "ds_type": "json", "split": "train"}
    settings = {
        "base_model": str(tmp_path / "base"),
        "plugins": [PLUGIN],
        "adapter": "cuma",
        "lora_r": 2,
        "lora_alpha": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "cuma_num_experts": 3,
        "cuma_router_hidden": 8,
        "cuma_encoder": "field",
        "cuma_encoder_min_count": 2,
        "datasets": [data | ({"type": "trl_cuma.integrations.axolotl"} if method == "sft" else {})],
        "chat_template": "tokenizer_default",
        "sequence_len": 64,
        "val_set_size": 0.25 if method == "sft" else 0,
        "output_dir": "./out",
        "dataset_prepared_path": "./prepared",
        "dataset_num_proc": 1,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_epochs": 1,
        "max_steps": 2,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "logging_steps": 1,
    } | ({"rl": "dpo"} if method == "dpo" else {"eval_steps": 2})
    (tmp_path / "config.yml").write_text(json.dumps(settings))  # JSON is YAML
    environment = os.environ | {"DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "config.yml"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "aux_loss" in done.stdout + done.stderr
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = [p for name, p in model.named_parameters() if "weight_b" in name]
    assert weights and all(weight.abs().max() > 0 for weight in weights)  # it starts at zero
    vectors = load_demographic_encoder(tmp_path / "out").encode(PEOPLE)
    logits = model.eval()(input_ids=torch.tensor([[40, 41]] * 4), demographic_embeds=vectors).logits
    assert len({row.detach().numpy().tobytes() for row in logits}) == 4
