# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from trl_cuma import DemographicProfile, TextEncoder
from trl_cuma.testing import minilm_path
from trl_cuma.trainers.hub import HubMixin
from trl_cuma.trainers.saving import INCOMPLETE

# A new process knows nothing but the saved files and the people's profiles.
FRESH_PROCESS = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl_cuma import load_demographic_encoder

folder = sys.argv[1]
inputs = torch.load(f"{folder}/inputs.pt")
for name, people in inputs["people"].items():
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, f"{folder}/{name}").eval()
    encoder = load_demographic_encoder(f"{folder}/{name}")
    embeds = encoder.encode(people)
    with torch.no_grad():
        logits = model(inputs["ids"], demographic_embeds=embeds).logits
    tokens = model.generate(inputs["ids"], demographic_embeds=embeds, max_new_tokens=4, do_sample=False)
    torch.save({"logits": logits, "tokens": tokens}, f"{folder}/{name}.pt")
"""


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_logits(make_sft, make_base, sft_data, text_encoder, tmp_path):
    make_base(initializer_range=0.2).save_pretrained(tmp_path / "base")
    people = {
        "field": [{"age": "old", "country": "JP"}, {"age": "young", "country": "BR"}],  # BR is unknown to it
        "text": ["age: old; country: JP", "age: young; country: BR"],
    }
    ids = torch.randint(10, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = {}
    for name, encoder in (("field", "field"), ("text", TextEncoder(str(minilm_path())))):
        trainer = make_sft(
            sft_data(form="text" if name == "text" else "dict"),
            model=AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
            encoder=encoder,
            adapter={"demographic_projection": 4},
            max_steps=4,
            learning_rate=0.05,
        )
        trainer.train()
        trainer.save_model(str(tmp_path / name))
        model = trainer.model.eval()
        with torch.no_grad():
            embeds = trainer.demographic_table([DemographicProfile.from_value(person) for person in people[name]])
            logits = model(ids, demographic_embeds=embeds).logits
            tokens = model.generate(ids, demographic_embeds=embeds, max_new_tokens=4, do_sample=False)
            base = model.get_base_model()
            with model.disable_adapter():
                assert (base(ids).logits - logits).abs().max() > 1e-2  # the adapter does something
            swapped = model(ids, demographic_embeds=embeds.flip(0)).logits
            assert (swapped - logits).abs().max() > 1e-4  # and the profile
        expected[name] = {"logits": logits, "tokens": tokens}
    torch.save({"ids": ids, "people": people}, tmp_path / "inputs.pt")

    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, wanted in expected.items():
        got = torch.load(tmp_path / f"{name}.pt")
        torch.testing.assert_close(got["logits"], wanted["logits"], rtol=0, atol=1e-5)
        assert torch.equal(got["tokens"], wanted["tokens"])


def test_every_checkpoint_holds_the_encoder(make_sft, tmp_path):
    import json

    trainer = make_sft(save_strategy="steps", save_steps=1)
    trainer.train()
    saved = json.loads((Path(trainer.args.output_dir) / "checkpoint-1" / "adapter_config.json").read_text())
    assert saved["demographic_encoder"] == trainer.demographic_table.encoder.state()
    assert saved["demographic_dim"] == 4


@pytest.fixture
def limited_files() -> Callable:
    """Within it, no file of this process can grow beyond so many bytes: what a full disk does to a writer."""

    @contextmanager
    def limit(nbytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_the_previous_checkpoint(file, make_sft, trainable, limited_files, tmp_path):
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 3, "lr_scheduler_type": "constant"}
    whole = make_sft(**fields, output_dir=str(tmp_path / "whole"))
    whole.train()

    class FullDisk(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                stack.enter_context(limited_files((run / "checkpoint-2" / file).stat().st_size - 1))

    run = tmp_path / "run"
    trainer = make_sft(**fields, output_dir=str(run), callbacks=[FullDisk()])
    with (
        ExitStack() as stack,
        pytest.raises(OSError, match="checkpoint-4 could not be written to .*checkpoint-2 is i"),
    ):
        trainer.train()
    assert [path.name for path in run.iterdir() if path.is_dir()] == ["checkpoint-2"]
    resumed = make_sft(**fields, output_dir=str(run))
    resumed.train(resume_from_checkpoint=True)
    for name, weight in trainable(whole).items():
        torch.testing.assert_close(trainable(resumed)[name], weight, rtol=0, atol=0)
    assert (run / "checkpoint-4").is_dir() and not (run / INCOMPLETE).exists()


def test_a_full_disk_leaves_the_adapter_that_was_there(make_sft, limited_files, tmp_path):
    trainer = make_sft(max_steps=1)
    trainer.train()
    folder = tmp_path / "adapter"
    trainer.save_model(str(folder))
    before = files_of(folder)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1.0)
    with limited_files(5_000), pytest.raises(OSError, match=f"The adapter could not be written to {folder}"):
        trainer.save_model(str(folder))
    assert files_of(folder) == before
    trainer.save_model(str(folder))
    after = files_of(folder)
    assert after.keys() == before.keys() and after["adapter_model.safetensors"] != before["adapter_model.safetensors"]


# A run that is killed while it writes its second checkpoint: when half of its second file is on the disk.
KILLED = """
import os
import sys
import torch
from datasets import Dataset
from trl_cuma import CuMAConfig, CuMASFTConfig, CuMASFTTrainer, FieldEncoder
from trl_cuma.testing import chat_tokenizer, tiny_model

folder, resume = sys.argv[1:]
tokenizer = chat_tokenizer(["Question 0? yes no"])
rows = {"prompt": [f"Question {row}? " for row in range(8)], "completion": ["yes", "no"] * 4}
rows["demographic"] = [{"age": "old"}, {"age": "young"}] * 4
trainer = CuMASFTTrainer(
    tiny_model("qwen3", vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2),
    args=CuMASFTConfig(
        output_dir=folder, use_cpu=True, bf16=False, max_steps=4, save_steps=2, report_to="none", learning_rate=0.05
    ),
    train_dataset=Dataset.from_dict(rows),
    processing_class=tokenizer,
    peft_config=CuMAConfig(target_modules=["q_proj", "v_proj"], num_experts=4, r=2, router_hidden=8),
    demographic_encoder=FieldEncoder(min_count=2),
)
save = torch.save

def save_half(value, path, *args, **kwargs):
    save(value, path, *args, **kwargs)
    if trainer.state.global_step == 4 and str(path).endswith("optimizer.pt"):
        os.truncate(path, os.path.getsize(path) // 2)
        os._exit(9)

if resume == "no":
    torch.save = save_half
trainer.train(resume_from_checkpoint=resume == "yes")
save({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}, f"{folder}/weights.pt")
"""


@pytest.mark.slow
def test_a_run_killed_while_saving_leaves_no_checkpoint_that_loads(tmp_path):
    def run(folder: str, resume: str) -> int:
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", KILLED, str(tmp_path / folder), resume]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True).returncode

    assert run("run", "no") == 9
    left = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert left == {"checkpoint-2", INCOMPLETE}
    assert (tmp_path / "run" / INCOMPLETE / "checkpoint-4" / "optimizer.pt").exists()
    assert get_last_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / "checkpoint-2")
    assert run("run", "yes") == 0 and run("whole", "uninterrupted") == 0
    assert not (tmp_path / "run" / INCOMPLETE).exists() and (tmp_path / "run" / "checkpoint-4").is_dir()
    resumed, whole = (torch.load(tmp_path / name / "weights.pt") for name in ("run", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("folder", "limit", "left"), [("run", 2, ("checkpoint-2", "checkpoint-5")), ("./run", 1, ("checkpoint-2",))]
)
def test_old_checkpoints_go_and_the_best_stays(folder, limit, left, make_sft, sft_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_sft(
        max_steps=5,
        output_dir=folder,
        eval_dataset=sft_data(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=limit,
        load_best_model_at_end=True,
        learning_rate=0.05,
    )
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0])  # the second step is the best
    evaluate = trainer.evaluation_loop

    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        output = evaluate(*args, **kwargs)
        output.metrics["eval_loss"] = next(losses)
        return output

    trainer.evaluation_loop = evaluation_loop
    trainer.train()
    run = Path(trainer.args.output_dir)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [*left]
    for name in left:
        state = TrainerState.load_from_json(str(run / name / "trainer_state.json"))
        assert os.path.samefile(state.best_model_checkpoint, run / "checkpoint-2")


def test_the_best_checkpoint_is_found_again_where_the_run_was_moved(make_sft, sft_data, tmp_path):
    fields = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    fields |= {"load_best_model_at_end": True, "save_total_limit": 1, "learning_rate": 0.0}  # the first stays the best
    make_sft(**fields, eval_dataset=sft_data(4), max_steps=1, output_dir=str(tmp_path / "old")).train()
    (tmp_path / "old").rename(tmp_path / "new")
    resumed = make_sft(**fields, eval_dataset=sft_data(4), max_steps=3, output_dir=str(tmp_path / "new"))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-1")
    assert (tmp_path / "new" / "checkpoint-1").is_dir()


def test_a_checkpoint_of_an_earlier_run_is_replaced(make_sft, tmp_path):
    stale = tmp_path / "run" / "checkpoint-1"
    stale.mkdir(parents=True)
    (stale / "of_an_earlier_run").touch()
    make_sft(max_steps=1, save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "run")).train()
    assert (stale / "optimizer.pt").exists() and not (stale / "of_an_earlier_run").exists()


def test_a_checkpoint_is_pushed_under_its_name(make_sft, monkeypatch):
    trainer = make_sft(max_steps=1, save_strategy="steps", save_steps=1)
    pushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        HubMixin, "_push_from_checkpoint", lambda self, path: pushed.append((path, os.path.isdir(path))), raising=True
    )
    trainer.args.push_to_hub = True  # after `__init__`, which would ask the Hub for a repository
    trainer.train()
    assert pushed == [(os.path.join(trainer.args.output_dir, "checkpoint-1"), True)]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "has no optimizer state .*cuma_adapter_path"),
        ("global_step1/mp_rank_00_model_states.pt", "was written under DeepSpeed, and this run uses DDP or a single"),
        ("optimizer.bin", "was written under FSDP, and this run uses DDP or a single process"),
    ],
)
def test_a_checkpoint_that_this_run_cannot_go_on_from_is_refused(file, message, make_sft, tmp_path):
    fields = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "run")}
    make_sft(**fields).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "optimizer.pt").unlink()
    if file:
        (checkpoint / file).parent.mkdir(exist_ok=True)
        (checkpoint / file).touch()
    with pytest.raises(ValueError, match=message):
        make_sft(**fields).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_that_is_not_there_is_named(make_sft, tmp_path):
    with pytest.raises(
        ValueError, match=f"`resume_from_checkpoint` is '{tmp_path / 'nowhere'}', and there is no such"
    ):
        make_sft().train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_memory_that_runs_out_while_saving_is_no_full_disk(make_sft, monkeypatch):
    trainer = make_sft(max_steps=1, save_strategy="steps", save_steps=1)

    def run_out(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", run_out)
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
        trainer.train()
    assert get_last_checkpoint(trainer.args.output_dir) is None
