# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
What batching people together brings a server: concurrent clients over HTTP on loopback, each request for another
profile, against `examples/serve.py` in a process of its own. Prints a Markdown table.

    pip install 'trl_cuma[serve,judge]'
    python benchmarks/serving.py

The model is tiny, so that ratios are about batching, HTTP and this code, not about a model of use. Numbers of clients
take turns within a round, and each ratio is the median of the rounds' ratios. Every answer is compared with that of
the same request alone.
"""

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import torch
from machine import processor
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from trl_cuma import CuMAConfig, FieldEncoder
from trl_cuma.testing import chat_tokenizer, tiny_model

ROOT = Path(__file__).parents[1]
COUNTRIES = ("Brazil", "India", "Japan", "Kenya", "Norway", "Peru")
PROFILES = [{"country": country, "age": age} for country, age in product(COUNTRIES, ("18-24", "25-34", "65+"))]
TEXTS = [
    "What makes a good life?",
    "Tea or coffee?",
    "Is work more important than friends?",
    "How should a city grow?",
]


class Call(NamedTuple):
    """One request: seconds, tokens, and the answer; none if it failed."""

    seconds: float
    tokens: int
    text: str | None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=24, help="of each number of clients in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=16)
    args = parser.parse_args()
    requests = [(text, profile) for text in TEXTS for profile in PROFILES]
    random.Random(0).shuffle(requests)
    requests = [requests[i % len(requests)] for i in range(args.requests)]
    with tempfile.TemporaryDirectory() as folder, serve(make_adapter(Path(folder))) as url:
        alone = {number: call(url, request, args.max_tokens) for number, request in enumerate(requests)}
        load(url, requests, max(args.clients), args.max_tokens)  # what is slow the first time
        runs: dict[int, list[tuple[float, list[Call]]]] = {clients: [] for clients in args.clients}
        for _ in range(args.rounds):
            for clients in args.clients:
                runs[clients].append(load(url, requests, clients, args.max_tokens))
    print(f"{processor()}; torch {torch.__version__}, {args.rounds} rounds, answers of {args.max_tokens} tokens.\n")
    print(table(runs, [alone[number].text for number in range(len(requests))]))


def make_adapter(folder: Path) -> Path:
    """A tiny base with an adapter whose answers differ between profiles."""
    tokenizer = chat_tokenizer(TEXTS)
    base = tiny_model("qwen3", vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, initializer_range=0.1)
    base.generation_config.suppress_tokens = [tokenizer.eos_token_id]  # so that all answers are as long
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    encoder = FieldEncoder(min_count=1).fit(PROFILES)
    config = CuMAConfig(
        target_modules=["q_proj", "v_proj"],
        demographic_dim=encoder.dim,
        demographic_encoder=encoder.state(),
        r=8,
        lora_alpha=128,
        router_hidden=32,
        init_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


class serve:
    """The example server, until the block ends."""

    def __init__(self, adapter: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--adapter", str(adapter)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> str:
        url = f"http://127.0.0.1:{self.port}"
        for _ in range(1200):
            try:
                httpx2.get(f"{url}/health").raise_for_status()
                return url
            except httpx2.ConnectError:
                if self.process.poll() is not None:
                    raise RuntimeError("The server ended before it answered: run examples/serve.py by hand.") from None
                time.sleep(0.1)
        raise RuntimeError("The server doesn't answer.")

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait()


def call(url: str, request: tuple[str, dict[str, str]], max_tokens: int, client: Any = httpx2) -> Call:
    """One request, answered greedily."""
    text, profile = request
    body = {"messages": [{"role": "user", "content": text}], "metadata": profile, "max_tokens": max_tokens}
    began = time.perf_counter()
    try:
        response = client.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        response.raise_for_status()
        answer = response.json()
        tokens, text = answer["usage"]["completion_tokens"], answer["choices"][0]["message"]["content"]
    except httpx2.HTTPError:
        tokens, text = 0, None
    return Call(time.perf_counter() - began, tokens, text)


def load(url: str, requests: Sequence[Any], clients: int, max_tokens: int) -> tuple[float, list[Call]]:
    """All requests by so many clients, each with a connection of its own, taking the next one; seconds and calls."""
    left = list(enumerate(requests))[::-1]
    calls: list[Call | None] = [None] * len(requests)

    def work() -> None:
        with httpx2.Client() as client:
            while True:
                try:
                    number, request = left.pop()
                except IndexError:
                    return
                calls[number] = call(url, request, max_tokens, client)

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for job in [pool.submit(work) for _ in range(clients)]:
            job.result()
    return time.perf_counter() - began, [call for call in calls if call is not None]


def table(runs: dict[int, list[tuple[float, list[Call]]]], alone: Sequence[str | None]) -> str:
    """Markdown, a line for each number of clients; rates are ratios to the first of them."""
    first = next(iter(runs.values()))
    lines = [
        "| clients | requests | failures | other answers than alone | requests/s ÷ | tokens/s ÷ | p50, ms | p95, ms |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for clients, rounds in runs.items():
        calls = [call for _, of_round in rounds for call in of_round]
        failures = sum(call.text is None for call in calls)
        others = sum(
            call.text is not None and call.text != text
            for _, of_round in rounds
            for call, text in zip(of_round, alone, strict=True)
        )
        rates = [_ratio(rounds, first, lambda calls: sum(call.text is not None for call in calls))]
        rates.append(_ratio(rounds, first, lambda calls: sum(call.tokens for call in calls)))
        marks = statistics.quantiles((call.seconds * 1000 for call in calls), n=20)
        lines.append(
            f"| {clients} | {len(calls)} | {failures} | {others} | {rates[0]:.2f} | {rates[1]:.2f} | {marks[9]:.0f} | "
            f"{marks[18]:.0f} |"
        )
    return "\n".join(lines)


def _ratio(rounds: Sequence[Any], first: Sequence[Any], count: Any) -> float:
    """The median, over rounds, of a rate divided by that of the first number of clients in the same round."""
    pairs = zip(rounds, first, strict=True)
    return statistics.median((count(a) / seconds) / (count(b) / base) for (seconds, a), (base, b) in pairs)


if __name__ == "__main__":
    main()
