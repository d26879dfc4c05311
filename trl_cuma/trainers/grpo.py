# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""GRPO with CuMA."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name

from ..adapter import CuMAConfig
from ..adapter.layer import CuMALayer
from .config import CuMAGRPOConfig
from .demographics import check_demographic_column
from .mixin import CuMATrainerMixin
from .reference import reset_needs_no_reference


class CuMAGRPOTrainer(CuMATrainerMixin, GRPOTrainer):
    """
    TRL's `GRPOTrainer`; the only change is that each row is routed by its demographic column, see
    [`CuMATrainerMixin`]: while its completion is generated (every turn of it, with tools), in the old and the
    reference log-probabilities, and in the loss. The reference is chosen as in DPO. Reward functions get the column
    like any other (`def reward(completions, demographic, **kwargs)`); a reward model sees the text only. A row for
    which a reward with `none_drops_row` (those of `trl_cuma.rewards`) gave `None` is left out of the step; where
    another did, TRL sums the rest.

    Args:
        model, reward_funcs, args, train_dataset, kwargs: as in TRL, by keyword after `model`.

    Raises:
        NotImplementedError: before anything is loaded, for what cannot carry a profile to the routers: `use_vllm`
            (for every routing), `use_transformers_continuous_batching`, `rollout_func`, a CuMA model as a reward
            function. At the first batch, for images.
        ValueError: if PEFT's `generate` would go past the adapter, for its task type.
    """

    config_class = CuMAGRPOConfig
    collates_profiles = False  # rows stay as they are, for the reward functions, until completions are generated

    _profiles: torch.Tensor | None = None  # (rows, dim), of the batch that is generated, scored or trained on

    def _check_before_loading(self, config: CuMAConfig, args: CuMAGRPOConfig, kwargs: dict[str, Any]) -> None:
        refuse_vllm(args)
        if args.cuma_reset_router and args.beta > 0:
            raise ValueError(reset_needs_no_reference())
        if config.routing == "semantic":
            return
        if args.use_transformers_continuous_batching:  # `use_transformers_paged` sets it
            raise NotImplementedError(
                "`use_transformers_continuous_batching=True` (formerly `use_transformers_paged`) puts the tokens of "
                "several people into one row and takes no profiles. Set it to False."
            )
        if kwargs.get("rollout_func") is not None:
            raise NotImplementedError(
                f"`rollout_func={get_callable_name(kwargs['rollout_func'])}`: TRL calls it with the prompts alone, so "
                "its completions would be generated without the people's profiles. Leave it out; `tools` and "
                "`environment_factory` are routed in every turn."
            )
        functions = kwargs.get("reward_funcs")
        for function in functions if isinstance(functions, list) else [functions]:
            if isinstance(function, nn.Module) and any(isinstance(module, CuMALayer) for module in function.modules()):
                raise NotImplementedError(
                    f"`reward_funcs` has a {type(function).__name__} with CuMA layers, which TRL would call without a "
                    "profile. Pass a function that calls it: it gets the data set's columns, `demographic_column` too."
                )
        task = getattr(config.task_type, "value", config.task_type)
        if task != "CAUSAL_LM":
            raise ValueError(
                f"The adapter has `task_type={task!r}`, with which PEFT's `generate` goes past the adapter's and "
                "takes no profile. Make it with `task_type='CAUSAL_LM'` in CuMAConfig, or leave that to the trainer "
                "by passing `peft_config`. A saved one has it in its adapter_config.json."
            )

    # ------------------------------------------------------------------ the profile's way: rows → generation → loss
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._routed:
            return super()._generate_and_score_completions(inputs)
        profiles = self.demographic_table([row[self._demographic_column] for row in inputs])
        profiles = profiles.to(self.accelerator.device)
        with self._for_people(profiles), _rows_kept_out_of_the_log():
            output = super()._generate_and_score_completions(inputs)
        # TRL shuffles, splits and buffers it with the rest of the batch.
        return output | {"demographic_embeds": profiles}

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        if self._profiles is None:
            return prompt_ids, images, fields
        if images is not None or (self._is_vlm and self.tools):
            raise NotImplementedError(
                "Images, in prompts or from tools with a vision-language processor: a vision tower's layers see "
                "patches, not rows of one person each, so the CuMA trainers don't route them yet. Remove the images; "
                "with tools, pass the tokenizer as `processing_class`."
            )
        # Of these fields, TRL passes tensors on to `generate`, and picks the rows that go on after a tool call.
        return prompt_ids, images, fields | {"demographic_embeds": self._profiles}

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)  # (rows, functions), NaN for None
        strict = [number for number, f in enumerate(self.reward_funcs) if getattr(f, "none_drops_row", False)]
        # TRL's sum would take a failure for 0; a row without any reward it leaves out.
        return rewards.masked_fill(rewards[:, strict].isnan().any(1, keepdim=True), torch.nan)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        profiles = self._profiles
        if profiles is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        start = 0

        def forward(**inputs: Any) -> Any:  # called for one chunk of rows after the other
            nonlocal start
            rows = slice(start, start := start + inputs["input_ids"].shape[0])
            return model(**inputs, demographic_embeds=profiles[rows])

        return super()._get_per_token_logps_and_entropies(forward, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._for_people(inputs.get("demographic_embeds")):
            return super().compute_loss(model, inputs, *args, **kwargs)

    @contextmanager
    def _for_people(self, profiles: torch.Tensor | None) -> Iterator[None]:
        self._profiles = profiles
        try:
            yield
        finally:
            self._profiles = None

    def _router_loss_scale(self, num_items_in_batch: Any) -> float:
        # TRL's losses divide by the accumulation steps themselves, so `Trainer` doesn't.
        return 1 / self.current_gradient_accumulation_steps

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if self._routed and eval_dataset is not None and not isinstance(eval_dataset, str):
            check_demographic_column(eval_dataset, self._demographic_column, "passed")
        return super().get_eval_dataloader(eval_dataset)


def refuse_vllm(args: CuMAGRPOConfig) -> None:
    """Raise `NotImplementedError` if completions shall come from vLLM."""
    if args.use_vllm:
        raise NotImplementedError(
            "`use_vllm=True`: TRL brings an adapter to vLLM by merging it into the base model's weights, and CuMA's "
            "experts, mixed anew for each token, have no weights that they could be merged into. Set "
            "`use_vllm=False`: completions are then generated by transformers, with the adapter."
        )


@contextmanager
def _rows_kept_out_of_the_log() -> Iterator[None]:
    """TRL's warning of a row without any reward prints the row's columns, and so the person's profile."""

    def shorten(record: logging.LogRecord) -> bool:
        text, found, _ = record.getMessage().partition(" for the following kwargs:")
        if found:
            record.msg, record.args = f"{text} for at least one row (not shown: it holds a person's profile).", ()
        return True

    logger = logging.getLogger(GRPOTrainer.__module__)
    logger.addFilter(shorten)
    try:
        yield
    finally:
        logger.removeFilter(shorten)
