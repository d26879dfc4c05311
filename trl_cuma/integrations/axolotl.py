# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
`adapter: cuma` in axolotl's YAML, for SFT and DPO:

    plugins: [trl_cuma.integrations.axolotl.CuMAPlugin]
    adapter: cuma
    lora_r: 8
    lora_alpha: 16
    lora_target_modules: [q_proj, v_proj]
    cuma_num_experts: 8
    cuma_encoder: field  # or text, by default the paper's; none for a column of vectors
    datasets:
      - path: answers.jsonl  # rows: {"messages": […], "demographic": {"country": "Kenya", "age": "25-34"}}
        ds_type: json
        type: trl_cuma.integrations.axolotl  # keeps the profile; see `cuma_prompt_strategy`

`cuma_prompt_strategy` names axolotl's strategy for the rows, by default `chat_template`. Rows that are tokenized
already (`input_ids`, `attention_mask`, `labels`) need no `type`, nor do DPO's (`prompt`, `chosen`, `rejected`). The
other `cuma_*` and `demographic_*` keys are those of our own recipes; rank, alpha, dropout, targets and
`lora_model_dir` (a trained CuMA adapter) are axolotl's.

Versions: axolotl 0.19.0 pins peft 0.20.0, transformers 5.16.1, trl 1.9.0, accelerate 1.13.0 and datasets 4.8.4, all
older than what trl_cuma needs, so pip can't install both. Beside trl_cuma's versions (`pip install --no-deps axolotl`,
and what it imports) its trainers don't import, for want of `trl.experimental.prm`, which TRL 1.16 no longer has. With
a stand-in for that module its command line trains by SFT and DPO, on the CPU with a tiny model: `tests/integrations`.
"""

from __future__ import annotations

import copy
import difflib
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, get_type_hints

from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, create_model, model_validator
from transformers import PreTrainedModel

from ..adapter import CuMAConfig
from ..arguments import CuMAModelConfig
from ..demographics import DemographicEncoder, DemographicTable
from ..trainers.config import CuMATrainingArguments
from ..trainers.demographics import check_demographic_column, resolve_encoder

try:
    from axolotl.integrations.base import AdapterCapabilities, BasePlugin
except ModuleNotFoundError as error:
    raise ImportError(
        f"The plugin needs {error.name}, which is not installed: run `pip install 'axolotl'`; this module's docstring "
        "tells of versions.",
        name=error.name,
    ) from error

__all__ = ["CuMAPlugin"]

ADAPTER = "cuma"

# Of our own recipes' keys, what has no place here, and why.
ELSEWHERE = {
    "cuma_adapter_path": "name the trained adapter with `lora_model_dir`",
    "cuma_encoder_rows": "axolotl's streaming data sets are not supported",
    "cuma_reset_router": "change the encoder in `trl-cuma sft`",
    "cuma_group_by": "evaluate by group with `trl-cuma evaluate`",
    "cuma_min_group_size": "evaluate by group with `trl-cuma evaluate`",
}

# Of axolotl's options, what would lose the profile or the adapter, and what to do instead.
REFUSED = {
    "sample_packing": "it makes rows of several people's documents",
    "batch_flattening": "it makes rows of several people's documents",
    "pretraining_dataset": "its documents are joined, and have no profile",
    "streaming": "the encoder is fitted on the whole data set",
    "reward_model": "train it with `trl-cuma reward`",
    "process_reward_model": "its rows are steps",
    "relora": "it merges the adapter, and CuMA's depends on the person",
    "load_in_4bit": "axolotl quantizes the base for its own adapters only; use `trl-cuma sft`",
    "load_in_8bit": "axolotl quantizes the base for its own adapters only; use `trl-cuma sft`",
    "peft_use_dora": "CuMA's experts have none",
}
METHODS = (None, "dpo")


def _keys() -> dict[str, Any]:
    """The plugin's keys with their types: those of our recipes, all optional."""
    found: dict[str, Any] = {}
    for cls in (CuMAModelConfig, CuMATrainingArguments):
        types = get_type_hints(cls)
        found |= {f.name: types[f.name] | None for f in fields(cls) if f.name.startswith(("cuma_", "demographic_"))}
    return {name: kind for name, kind in found.items() if name not in ELSEWHERE} | {"cuma_prompt_strategy": str | None}


class _Checked(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def check_cuma(cls, data: Any) -> Any:
        """Refuse keys and combinations that would otherwise be dropped in silence."""
        known = _keys()
        for key in data:
            if not key.startswith(("cuma_", "demographic_")) or key in known:
                continue
            close = difflib.get_close_matches(key, known, n=1)
            hint = ELSEWHERE.get(key) or (f"did you mean `{close[0]}`?" if close else f"known are {sorted(known)}")
            raise ValueError(f"`{key}` is no key of the CuMA plugin: {hint}.")
        if data.get("adapter") != ADAPTER:
            return data
        for key, reason in REFUSED.items():
            if data.get(key):
                raise ValueError(f"`{key}: {data[key]}` with `adapter: cuma`: {reason}. Leave it out.")
        if data.get("rl") not in METHODS:
            raise ValueError(
                f"`rl: {data['rl']}` with `adapter: cuma`: only SFT (without `rl`) and dpo are supported."
            )
        return data


CuMAArgs = create_model("CuMAArgs", __base__=_Checked, **{name: (kind, None) for name, kind in _keys().items()})
"""What the plugin adds to axolotl's configuration (pydantic)."""


class CuMAPlugin(BasePlugin):
    """
    axolotl's plugin: what it adds are the adapter, the keys above, and trainers whose only change to axolotl's is ours
    ([`CuMATrainerMixin`]). Without `adapter: cuma` it does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder: DemographicEncoder | None = None  # of the run; fitted for SFT
        self._dim: int | None = None

    def get_input_args(self) -> str:
        return f"{__name__}.CuMAArgs"

    def get_training_args_mixin(self) -> str:
        return "trl_cuma.trainers.config.CuMATrainingArguments"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        if cfg.adapter != ADAPTER:
            return None
        given = {f.name: cfg.get(f.name) for f in fields(CuMATrainingArguments)}
        if cfg.rl and cfg.lora_model_dir:  # else `load_adapter` loads it
            given["cuma_adapter_path"] = cfg.lora_model_dir
        return {name: value for name, value in given.items() if value is not None}

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """axolotl's own data; for SFT the encoder is fitted here, since the adapter's size follows from it."""
        if cfg.adapter != ADAPTER or preprocess or cfg.rl:
            return None
        from axolotl.common.datasets import load_datasets

        data = load_datasets(cfg=cfg)
        self._fit(cfg, data.train_dataset)
        return data

    def _fit(self, cfg: Any, dataset: Dataset) -> None:
        options = model_options(cfg)
        self.encoder = options.encoder() if cfg.lora_model_dir is None else None  # a trained adapter has its own
        config = _saved(cfg) or options.adapter_config()
        if config.routing == "semantic":
            return
        defaults = {f.name: f.default for f in fields(CuMATrainingArguments)}
        args = SimpleNamespace(**{**defaults, **(self.get_training_args(cfg) or {}), "disable_tqdm": False})
        check_demographic_column(dataset, args.demographic_column, "training")
        self.encoder = resolve_encoder(config, self.encoder, dataset, args)
        table = DemographicTable(self.encoder, missing=config.missing_demographics)
        if self.encoder is None:
            table.add(dataset[args.demographic_column])
        self._dim = table.dim

    def pre_model_load(self, cfg: Any) -> None:
        if cfg.adapter != ADAPTER or not cfg.rl:
            return
        # Not by `get_trainer_cls`: to a class from there axolotl's builder for preferences passes no model.
        cfg.trainer_cls = "trl_cuma.integrations.axolotl_trainers.CuMAAxolotlDPOTrainer"
        self.encoder = model_options(cfg).encoder() if cfg.lora_model_dir is None else None

    def get_trainer_cls(self, cfg: Any) -> type | None:
        if cfg.adapter != ADAPTER or cfg.rl:
            return None
        from .axolotl_trainers import CuMAAxolotlTrainer

        return CuMAAxolotlTrainer

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PreTrainedModel | PeftModel | None, PeftConfig | None] | None:
        """
        The adapter on the base model; for DPO its configuration alone.

        Returns:
            the model and a configuration that holds nothing of the encoder, since axolotl sends it to its telemetry.
        """
        if cfg.adapter != ADAPTER:
            return None
        if config_only:
            return None, (None if cfg.lora_model_dir else model_options(cfg).adapter_config())
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
        else:
            config = model_options(cfg).adapter_config()
            config.demographic_dim = self._dim
            model = get_peft_model(model, config)
        model.print_trainable_parameters()
        shown = copy.deepcopy(model.active_peft_config)
        shown.demographic_encoder = shown.training = None
        return model, shown


def model_options(cfg: Any) -> CuMAModelConfig:
    """axolotl's configuration as the options of our recipes."""
    options = {f.name: cfg.get(f.name) for f in fields(CuMAModelConfig) if f.name.startswith("cuma_")}
    options |= {"lora_r": cfg.lora_r, "lora_alpha": cfg.lora_alpha, "lora_dropout": cfg.lora_dropout}
    options |= {"lora_modules_to_save": cfg.lora_modules_to_save, "use_rslora": cfg.peft_use_rslora}
    options["lora_target_modules"] = ["all-linear"] if cfg.lora_target_linear else cfg.lora_target_modules
    options["lora_task_type"] = "CAUSAL_LM"
    return CuMAModelConfig(**{name: value for name, value in options.items() if value is not None})


def _saved(cfg: Any) -> CuMAConfig | None:
    return CuMAConfig.from_pretrained(cfg.lora_model_dir) if cfg.lora_model_dir else None


class KeepsProfile:
    """
    One of axolotl's prompt strategies, whose tokenized rows keep their profile, and the person where it is told.

    Args:
        strategy: axolotl's.
        column, person_column (`str`): the data set's columns.
    """

    def __init__(self, strategy: Any, column: str, person_column: str) -> None:
        self.strategy, self.column, self.person_column = strategy, column, person_column

    def __getattr__(self, name: str) -> Any:
        if name == "strategy":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def tokenize_prompt(self, prompt: Any) -> dict[str, Any]:
        """A row, or a batch of rows where the strategy takes batches."""
        if self.column not in prompt:
            raise ValueError(
                f"The rows have no {self.column!r} column, only {sorted(prompt)}. Add it, or name yours with "
                "`demographic_column`."
            )
        out = dict(self.strategy.tokenize_prompt(prompt))
        kept = {name: prompt[name] for name in (self.column, self.person_column) if name in prompt}
        if self.strategy.supports_batched and any(len(out["input_ids"]) != len(column) for column in kept.values()):
            raise ValueError(
                f"{type(self.strategy).__name__} makes other rows than it gets, so a profile no longer belongs to "
                "a row. Set `cuma_prompt_strategy` to one that makes one row of each."
            )
        return out | kept


def load(tokenizer: Any, cfg: Any, ds_cfg: dict[str, Any] | None = None, processor: Any = None) -> KeepsProfile:
    """axolotl's way to a prompt strategy, for `type: trl_cuma.integrations.axolotl` in an entry of `datasets`."""
    from axolotl.prompt_strategies import load as load_strategy

    name = cfg.cuma_prompt_strategy or "chat_template"
    strategy = load_strategy(name, tokenizer, cfg, ds_cfg, processor=processor)
    if strategy is None:
        raise ValueError(f"`cuma_prompt_strategy` is {name!r}, which axolotl doesn't know as a module of strategies.")
    defaults = {f.name: f.default for f in fields(CuMATrainingArguments)}
    columns = [cfg.get(key) or defaults[key] for key in ("demographic_column", "demographic_person_column")]
    return KeepsProfile(strategy, *columns)
