# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
What each extra is for, at its smallest. Each function gets the folder that `smoke.py` trained in, with a base model,
and raises `ImportError` where the extra is not installed.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch

from trl_cuma import CuMAConfig, TextEncoder

PEOPLE = [{"age": age, "country": country} for age in ("old", "young") for country in ("FR", "JP")]


def quantization(folder: Path) -> None:
    """An adapter on a base that bitsandbytes, torchao or HQQ quantized gets gradients; a plan counts 4-bit weights."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    from trl_cuma.planning import Planner, read_request

    plan = ["--model_name_or_path", "Qwen/Qwen3-8B", "--num_gpus", "1", "--precision", "nf4"]
    Planner(read_request(plan)[0]).plan()

    from torchao.quantization import Int8WeightOnlyConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    configs = {"bitsandbytes": four_bit, "torchao": TorchAoConfig(Int8WeightOnlyConfig()), "hqq": None}
    for name, config in configs.items():
        options = {"device_map": {"": "cpu"}, "dtype": torch.float32, "quantization_config": config}
        base = AutoModelForCausalLM.from_pretrained(folder / "base", **options)
        model = get_peft_model(_with_hqq(base) if name == "hqq" else base, _adapter())
        tokens = torch.tensor([[40, 41, 42]])
        model(input_ids=tokens, labels=tokens, demographic_embeds=torch.randn(1, 6)).loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert grads and all(grad is not None and grad.isfinite().all() for grad in grads), name


def _with_hqq(model: torch.nn.Module) -> torch.nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for layer in model.model.layers:
        layer.self_attn.q_proj = HQQLinear(
            layer.self_attn.q_proj,
            BaseQuantizeConfig(nbits=4, group_size=16),
            compute_dtype=torch.float32,
            device="cpu",
        )
    return model


def _adapter() -> CuMAConfig:
    return CuMAConfig(target_modules=["q_proj", "v_proj"], r=2, num_experts=4, router_hidden=8, demographic_dim=6)


def deepspeed(folder: Path) -> None:
    """`trl-cuma sft` under ZeRO-2, one process on the CPU."""
    rows = [{"prompt": "Question?", "completion": " yes", "demographic": person} for person in PEOPLE]
    (folder / "rows").mkdir(exist_ok=True)
    (folder / "rows" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # Without DeepSpeed's shared-memory operation, which would be compiled for a minute.
    (folder / "sft.py").write_text(
        "import deepspeed\n"
        'deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False\n'
        "from trl_cuma.scripts import main\n"
        "raise SystemExit(main())\n"
    )
    (folder / "zero2.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nmixed_precision: 'no'\n"
        "num_machines: 1\nnum_processes: 1\ndeepspeed_config: {zero_stage: 2}\n"
    )
    arguments = {"model_name_or_path": "base", "dataset_name": "rows", "output_dir": "zero2", "max_steps": 1}
    arguments |= {"cuma_encoder": "field", "cuma_encoder_min_count": 1, "lora_r": 2, "eval_strategy": "no"}
    arguments |= {"use_cpu": True, "bf16": False, "report_to": "none", "optim": "adamw_torch", "dtype": "float32"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "zero2.yaml", "sft.py", "sft"]
    command += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PET_STANDALONE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stdout + done.stderr
        missing = re.findall(r"^(?:\[rank0\]: )?(?:ImportError|ValueError): .*DeepSpeed.*$", said, re.MULTILINE)
        raise ImportError(missing[0]) if missing else AssertionError(said[-4000:])
    assert (folder / "zero2" / "adapter_model.safetensors").exists()


def text_encoder(folder: Path) -> None:
    """`TextEncoder` over a sentence encoder that is made here."""
    encoder = TextEncoder(str(folder / "sentences"))
    if not (folder / "sentences").exists():
        (folder / "sentences").mkdir()
        try:
            from sentence_transformers import SentenceTransformer, models
        except ImportError:
            encoder.fit(PEOPLE)  # its error says what to install
        else:
            words = models.Transformer(str(folder / "base"))
            pooling = models.Pooling(words.get_word_embedding_dimension())
            SentenceTransformer(modules=[words, pooling], device="cpu").save(str(folder / "sentences"))
    vectors = encoder.fit(PEOPLE).encode(PEOPLE)
    assert vectors.shape == (len(PEOPLE), 64) and vectors.isfinite().all()


class _Judge(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "[[A]]"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "j", "choices": choices})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: object) -> None:
        pass


def judge(folder: Path) -> None:
    """`ProfileJudge` asks a server on loopback."""
    from trl_cuma.rewards import ProfileJudge

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        asks = ProfileJudge("j", base_url=f"http://127.0.0.1:{server.server_address[1]}/v1", api_key="none")
        rewards = asks(["Tea?"], ["yes"], demographic=PEOPLE[:1], reference=["no"])
        assert rewards == [0.5], rewards  # it says A in both orders: a tie
    finally:
        server.shutdown()


def evaluation(folder: Path) -> None:
    """A figure (matplotlib), a macro F1 (scikit-learn) and an interval (scipy)."""
    from trl_cuma.evaluation.metrics import macro_f1, t_interval
    from trl_cuma.evaluation.report.svg import draw

    wide, narrow = draw(lambda figure, wide: figure.subplots().plot([1, 2]), lambda wide: 2.0, full=True)
    assert wide.startswith("<svg") and narrow.startswith("<svg")
    assert macro_f1(np.array([0, 1]), np.array([0, 1])) == 1.0
    assert t_interval(np.array([1.0, 2.0, 3.0])).value == 2.0


def serve(folder: Path) -> None:
    """The server answers over HTTP, for a profile."""
    from trl_cuma.serving.app import ServerSettings, create_app

    import uvicorn  # isort: skip

    from trl_cuma.generation.answering import Answerer
    from trl_cuma.generation.loading import load_model

    model, tokenizer, _ = load_model(None, str(folder / "adapter"))
    app = create_app(Answerer(model, tokenizer), ServerSettings(name="cuma"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended"
            time.sleep(0.05)
        body = {"prompt": "w1 w2", "max_tokens": 2, "metadata": PEOPLE[0]}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as response:
            assert json.load(response)["usage"]["completion_tokens"] >= 1
    finally:
        server.should_exit = True
        thread.join()


USES = {
    "quantization": quantization,
    "deepspeed": deepspeed,
    "text-encoder": text_encoder,
    "judge": judge,
    "evaluation": evaluation,
    "serve": serve,
}
