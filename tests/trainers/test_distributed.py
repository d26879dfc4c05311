# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Trains in however many processes it is launched in, on batches of four rows in all, and saves what it came to.
SCRIPT = """
import sys
import torch
from accelerate import PartialState
from datasets import Dataset
from trl_cuma import CuMAConfig, CuMADPOConfig, CuMADPOTrainer, CuMASFTConfig, CuMASFTTrainer, FieldEncoder
from trl_cuma.testing import chat_tokenizer, tiny_model

method, scope, folder = sys.argv[1:]
tokenizer = chat_tokenizer(["Question 0? yes no, not at all"])
people = [{"age": age, "country": country} for age in ("old", "young") for country in ("FR", "JP")]
rows = {"prompt": [f"Question {row}? " for row in range(8)], "demographic": people + people}
texts = ["yes" if row % 3 else "no, not at all" for row in range(9)]
if method == "sft":
    config_class, trainer_class = CuMASFTConfig, CuMASFTTrainer
    rows["completion"] = texts[:8]
else:
    config_class, trainer_class = CuMADPOConfig, CuMADPOTrainer
    rows |= {"chosen": texts[:8], "rejected": [text + "!" for text in texts[1:]]}
state = PartialState(cpu=True)
args = config_class(
    output_dir=f"{folder}/run",
    use_cpu=True,
    bf16=False,
    per_device_train_batch_size=4 // state.num_processes,
    train_sampling_strategy="sequential",
    max_steps=4,
    learning_rate=0.05,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    cuma_aux_loss_coef=1.0,
    cuma_aux_loss_scope=scope,
    per_device_eval_batch_size=4 // state.num_processes,
    cuma_group_by=["country"],
    cuma_min_group_size=1,
)
trainer = trainer_class(
    tiny_model("qwen3", vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2, initializer_range=0.2),
    args=args,
    train_dataset=Dataset.from_dict(rows),
    eval_dataset=Dataset.from_dict(rows).select(range(5)),  # two processes repeat rows in their last batch
    processing_class=tokenizer,
    peft_config=CuMAConfig(target_modules=["q_proj", "v_proj"], num_experts=4, r=2, router_hidden=8),
    demographic_encoder=FieldEncoder(min_count=2),
)
trainer.train()
wrapper = type(trainer.model_wrapped).__name__
assert (wrapper == "DistributedDataParallel") == (state.num_processes > 1), wrapper
groups = {k: v for k, v in trainer.evaluate().items() if "router/" in k}
if state.is_main_process:
    weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    logs = [record for record in trainer.state.log_history if "loss" in record]
    result = {"world": state.num_processes, "weights": weights, "logs": logs, "groups": groups}
    torch.save(result, f"{folder}/result.pt")
trainer.end()
"""


def train(folder: Path, processes: int, method: str, scope: str) -> dict:
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", "0"]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*launch, str(folder / "train.py"), method, scope, str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = torch.load(folder / "result.pt")
    assert result["world"] == processes
    return result


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_processes_are_one_where_the_load_spans_the_ranks(method, tmp_path):
    one = train(tmp_path / "one", 1, method, "ranks")
    two = train(tmp_path / "two", 2, method, "ranks")
    for name, weight in two["weights"].items():
        torch.testing.assert_close(weight, one["weights"][name], rtol=1e-4, atol=1e-5, msg=name)
    for mine, theirs in zip(two["logs"], one["logs"], strict=True):
        for key in ("loss", "aux_loss", "router/utilization", "router/entropy", "router/dead_experts"):
            assert mine[key] == pytest.approx(theirs[key], abs=1e-4), key
    # Its evaluation set of five rows: what the second process repeats must not count.
    assert (
        two["groups"] == pytest.approx(one["groups"], abs=1e-3) and "eval_router/country=JP/entropy" in one["groups"]
    )
