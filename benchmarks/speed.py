# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
What CuMA costs beside LoRA: layers, whole models, decoding, loading data. One process, one Markdown table.

    python benchmarks/speed.py                                        # CPU
    python benchmarks/speed.py --device cuda --dtype bfloat16 --model 8b-slice
    python benchmarks/speed.py --quick                                # does it run? Not a measurement

All arms of a case run once in each round, in changing order; a ratio is the median over rounds of (arm / reference),
with its quartiles. The reference is LoRA of rank k·r: as many adapter operations per token as k experts of rank r.

Every arm's step includes the gradient of its input (in a model: of the embeddings' output, as with gradient
checkpointing). Without it the frozen base would have no backward at all, and an arm's would end at its lowest adapter,
so that arms would be charged for parts of the *base's* backward. In a long model the difference is one layer.

A step is forward and backward; `--optimizer` adds AdamW's part. In bfloat16 the base is in bfloat16 and the step runs
under autocast with adapters in float32, as PEFT and Trainer do; with `--adapters base` adapters are in the base's
dtype, without autocast.

Columns: the *ratio* is that of "ratio of": of times, or of rates, which are inverse times; *forward* is the forward's
time over the reference's, within the same steps. Counts are of one step (of decoding: of one new token after the
first): *aten ops* without views; *syncs*, where the host waits for the device (on a CPU: would wait for an
accelerator); *kernels* launched, on CUDA. *Saved* is what is kept for the backward beyond the frozen base. *Peak* is
what torch allocates at most beyond parameters and inputs (on a CPU by the profiler's record of allocations). *GFLOP*
are of matrix products and attention, *FLOP ratio* over the reference's; the *floor* is the least that any
implementation needs over the reference's least (`speed_arms.least_flops`), both with the frozen base. Of decoding it
is the rate that reading each weight once for a token allows, over the reference's (`speed_arms.weights_read`).
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from machine import processor
from speed_arms import (
    ALL_LINEAR,
    BASE,
    LOOP,
    PUBLISHED,
    QUERY_VALUE,
    REFERENCE,
    Adapter,
    add_adapter,
    check_same,
    decoding_arms,
    give_gates,
    layer_arms,
    least_flops,
    model_cases,
    weights_read,
)
from speed_data import loaders
from speed_measure import Counts, alternate, count
from speed_table import print_table, result_rows
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config
from transformers.utils import logging

BATCH = 4
MODELS = {  # Qwen3-8B's proportions at an eighth; four of its layers
    "hidden-512": dict(hidden_size=512, intermediate_size=1536, head_dim=64, num_hidden_layers=8),
    "8b-slice": dict(hidden_size=4096, intermediate_size=12288, head_dim=128, num_hidden_layers=4),
    "quick": dict(hidden_size=64, intermediate_size=192, head_dim=16, num_hidden_layers=2),
}
HEADS = {"hidden-512": (8, 2), "8b-slice": (32, 8), "quick": (4, 2)}


@dataclass(frozen=True)
class Sizes:
    """What the suites run on; `tokens` are of all `BATCH` rows together."""

    layers: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 1024), (4096, 14336))
    layer_ranks: tuple[int, ...] = (8, 64)
    layer_tokens: int = 256  # on CUDA 4096
    model: str = "hidden-512"
    model_tokens: int = 1024  # of the 8B slice 2048
    prompt: int = 64
    new_tokens: int = 48
    data_rows: int = 20_000
    countries: int = 50  # 40 profiles each
    batches: int = 100


QUICK = Sizes(((256, 256), (256, 512)), (8,), 64, "quick", 128, 8, 8, 400, 5, 10)


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class Step:
    """
    One arm's training step, on fixed inputs.

    Args:
        model (`nn.Module`): with its adapter.
        forward (`Callable`): gives the loss, or an output with `gradient` as its gradient.
        inputs (`list[torch.Tensor]`): leaves whose gradients are dropped between steps.
        optimizer (`bool`): the step ends with one of AdamW on the adapter's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[], torch.Tensor],
        inputs: list[torch.Tensor],
        optimizer: bool,
        gradient: torch.Tensor | None = None,
    ) -> None:
        self.model, self.forward, self.inputs, self.gradient = model, forward, inputs, gradient
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True) if optimizer and self.trained else None

    def clear(self) -> None:
        for tensor in (*self.trained, *self.inputs):
            tensor.grad = None

    def run(self, mark: Callable[[], None]) -> None:
        output = self.forward()
        mark()
        output.backward(self.gradient)
        if self.optimizer is not None:
            self.optimizer.step()
        mark()

    def count(self, device: torch.device) -> Counts:
        if self.optimizer is not None:
            self.run(lambda: None)  # its state is made at its first step
        ignore = (*self.model.parameters(), *self.model.buffers(), *self.inputs)
        return count(self.run, device, self.clear, ignore)


class Bench:
    """The options of one run, and the rows of its table."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.in_float32 = options.adapters == "float32"
        self.sizes = QUICK if options.quick else Sizes(model=options.model)
        if options.model == "8b-slice" and not options.quick:
            self.sizes = replace(self.sizes, model_tokens=2048)
        if self.device.type == "cuda" and not options.quick:
            self.sizes = replace(self.sizes, layer_tokens=4096)  # 256 are too few to keep one busy
        if options.tokens:
            self.sizes = replace(self.sizes, layer_tokens=options.tokens, model_tokens=options.tokens)
        self.rows: list[dict[str, Any]] = []
        self.uncounted: set[str] = set()

    def autocast(self) -> Any:
        casts = self.in_float32 and self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if casts else nullcontext()

    def profiles(self, dim: int) -> torch.Tensor:
        return torch.randn(BATCH, dim, generator=torch.Generator().manual_seed(2)).to(self.device)

    def adapt(self, base: nn.Module, adapter: Adapter, targets: Any, task_type: str | None) -> tuple[nn.Module, dict]:
        """The model with the arm's adapter, and what its calls take besides the model's own arguments."""
        profiles = self.profiles(adapter.demographic_dim)
        model = add_adapter(base, adapter, targets, profiles, task_type, self.in_float32)
        return model, {"demographic_embeds": profiles} if adapter.kind == "cuma" else {}

    # ------------------------------------------------------------------------------------------------ suites
    def layers(self) -> None:
        shapes = itertools.product(self.sizes.layers, self.sizes.layer_ranks, (True, False))
        for (n_in, n_out), r, share_a in shapes:
            case = f"{n_in}→{n_out}, r={r}, {'shared' if share_a else 'separate'} A"
            adapters = layer_arms(r, share_a)
            torch.manual_seed(0)
            with self.device:
                base = OneLayer(n_in, n_out).to(self.dtype)
                x = torch.randn(BATCH, self.sizes.layer_tokens // BATCH, n_in, dtype=self.dtype).requires_grad_()
                gradient = torch.randn(*x.shape[:2], n_out, dtype=self.dtype)
            steps = {a.label: self.layer_step(base, a, x, gradient) for a in adapters}
            check_same(*(steps[label].forward for label in (LOOP, PUBLISHED, BASE.label)), self.dtype)
            self.compare("layers", case, adapters, steps, [("proj", n_in, n_out)], self.sizes.layer_tokens)

    def layer_step(self, base: nn.Module, adapter: Adapter, x: torch.Tensor, gradient: torch.Tensor) -> Step:
        model, given = self.adapt(base, adapter, ["proj"], None)
        inputs = [x]
        if adapter.gates_given:
            inputs.append(give_gates(model, *x.shape[:2], self.device))

        def forward() -> torch.Tensor:
            with self.autocast():
                return model(x, **given)

        return Step(model, forward, inputs, self.options.optimizer, gradient)

    def models(self) -> None:
        base = self.base_model()
        tokens = torch.randint(2, 4096, (BATCH, self.sizes.model_tokens // BATCH)).to(self.device)
        for case, targets, adapters in model_cases(self.sizes.model, self.device.type):
            steps = {a.label: self.model_step(base, a, targets, tokens) for a in adapters}
            logits = [functools.partial(steps[label].forward, labels=None) for label in (LOOP, PUBLISHED, BASE.label)]
            check_same(*logits, self.dtype)
            linears = [
                (name, module.in_features, module.out_features)
                for name, module in base.named_modules()
                if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
            ]
            self.compare("models", f"{self.sizes.model}, {case}", adapters, steps, linears, tokens.numel())

    def base_model(self) -> nn.Module:
        heads, key_value_heads = HEADS[self.sizes.model]
        config = Qwen3Config(
            vocab_size=4096,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            pad_token_id=0,
            eos_token_id=1,
            **MODELS[self.sizes.model],
        )
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype).to(self.device)

    def model_step(self, base: nn.Module, adapter: Adapter, targets: tuple[str, ...], tokens: torch.Tensor) -> Step:
        model, given = self.adapt(base, adapter, targets, "CAUSAL_LM")
        model.train()
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(torch.is_grad_enabled()))
        if adapter.router_losses:
            given["output_router_losses"] = "local"

        def forward(labels: torch.Tensor | None = tokens) -> torch.Tensor:
            with self.autocast():
                output = model(input_ids=tokens, labels=labels, use_cache=False, **given)
            if labels is None:
                return output.logits
            return output.loss + 0.01 * output["aux_loss"] if adapter.router_losses else output.loss

        return Step(model, forward, [tokens], self.options.optimizer)

    def decode(self) -> None:
        base = self.base_model()
        prompt = torch.randint(2, 4096, (BATCH, self.sizes.prompt)).to(self.device)
        for case, targets in (("q/v, r=8", QUERY_VALUE), ("all-linear, r=8", ALL_LINEAR)):
            case = f"{self.sizes.model}, {case}"
            self.progress("decode", case)
            adapters = decoding_arms()
            runs, counts, read = {}, {}, {}
            for adapter in adapters:
                model, given = self.adapt(base, adapter, targets, "CAUSAL_LM")
                run = functools.partial(self.generate, model.eval(), prompt, given, self.sizes.new_tokens)
                one, nine = (functools.partial(self.generate, model, prompt, given, new) for new in (1, 9))
                runs[adapter.label] = run
                read[adapter.label] = weights_read(adapter, model)
                counts[adapter.label] = count(nine, self.device).beyond(count(one, self.device), 8)
            times = alternate(runs, self.options.rounds, self.device)
            floors = {label: read[REFERENCE] / numbers for label, numbers in read.items() if numbers}
            rate = {"rate": "tokens/s", "floors": floors}
            self.add_rows("decode", case, adapters, times, counts, reference=REFERENCE, **rate)

    def generate(
        self, model: nn.Module, prompt: torch.Tensor, given: dict[str, Any], new: int, mark: Callable[[], None]
    ) -> None:
        settings = GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=1
        )
        with self.autocast():
            made = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, **given
            )
        mark()
        assert made.shape[1] == prompt.shape[1] + new

    def data(self) -> None:
        case = f"{self.sizes.data_rows} rows, {40 * self.sizes.countries} profiles, batch 16"
        self.progress("data", case)
        with loaders(self.sizes.data_rows, self.sizes.countries, self.sizes.batches, self.device) as runs:
            times = alternate(runs, 3 * self.options.rounds, self.device)
        plain, cuma = runs
        adapters = [Adapter(plain, "base"), Adapter(cuma, "cuma", goals={"rate": 0.97})]
        self.add_rows("data", case, adapters, times, {}, reference=plain, rate="batches/s")

    # ------------------------------------------------------------------------------------------------ results
    def progress(self, suite: str, case: str) -> None:
        print(f"[{suite}] {case}", file=sys.stderr, flush=True)

    def compare(
        self, suite: str, case: str, adapters: list[Adapter], steps: dict[str, Step], linears: list, tokens: int
    ) -> None:
        self.progress(suite, case)

        def clear() -> None:
            for step in steps.values():
                step.clear()

        counts = {label: step.count(self.device) for label, step in steps.items()}
        times = alternate({label: step.run for label, step in steps.items()}, self.options.rounds, self.device, clear)
        least = {a.label: counts[BASE.label].flops + least_flops(a, linears, tokens, BATCH) for a in adapters}
        floors = {label: flops / least[REFERENCE] for label, flops in least.items()}
        self.add_rows(suite, case, adapters, times, counts, reference=REFERENCE, floors=floors, tokens=tokens)
        steps.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def add_rows(
        self, suite: str, case: str, adapters: list[Adapter], times: dict, counts: dict[str, Counts], **kwargs: Any
    ) -> None:
        self.uncounted.update(*(counted.uncounted for counted in counts.values()))
        goals = {adapter.label: adapter.goals for adapter in adapters}
        self.rows += result_rows({"suite": suite, "case": case}, goals, times, counts, **kwargs)


def machine(options: argparse.Namespace, sizes: Sizes) -> str:
    """One line: what the numbers were made on and with."""
    parts = [processor()]
    if options.device.startswith("cuda"):
        parts.append(torch.cuda.get_device_name(options.device))
    parts += [f"{name} {version(name)}" for name in ("torch", "peft", "transformers", "trl")]
    adapters = "" if options.dtype == "float32" else f", adapters {options.adapters}"
    parts += [f"{options.dtype}{adapters}", f"{options.threads} threads", f"{options.rounds} rounds"]
    parts.append(f"layers {sizes.layer_tokens} tokens, models {sizes.model_tokens}, in {BATCH} rows")
    parts += ["a step includes AdamW"] if options.optimizer else []
    return "; ".join(parts) + ("; --quick: not a measurement" if options.quick else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = ("layers", "models", "decode", "data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--adapters", choices=("float32", "base"), default="float32", help="see above")
    parser.add_argument("--suite", nargs="+", choices=suites, default=suites)
    parser.add_argument("--model", choices=("hidden-512", "8b-slice"), default="hidden-512")
    parser.add_argument("--rounds", type=int, help="timed rounds, at least 2 (default: 5; the data suite times 3 x)")
    parser.add_argument("--tokens", type=int, help=f"in {BATCH} rows; see Sizes for the defaults")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optimizer", action="store_true", help="a step ends with AdamW's")
    parser.add_argument("--quick", action="store_true", help="small shapes, two rounds: does it run?")
    parser.add_argument("--output", help="also write the rows as JSON to this file")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: quartiles need at least 2.")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {options.device}: this torch sees no CUDA device. Leave it out to run on the CPU.")
    if options.tokens and options.tokens % BATCH:
        parser.error(f"--tokens is {options.tokens}: give a multiple of {BATCH}, the number of rows.")
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.freeze()  # the collections between arms then pass over what the imports made
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines
    bench = Bench(options)
    for suite in options.suite:
        getattr(bench, suite)()
    line = machine(options, bench.sizes)
    print_table(line, bench.rows, bench.uncounted)
    if options.output:
        with open(options.output, "w") as file:
            json.dump({"machine": line, "rows": bench.rows}, file, indent=1)


if __name__ == "__main__":
    main()
