# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The one mechanism that all CuMA trainers share: it carries the profile, and adds the router losses."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers.trainer_utils import get_last_checkpoint
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import create_model_from_path

from ..adapter import CuMAConfig, CuMAModel, reset_router
from .adapters import adapter_config, load_adapter
from .collation import ROW_NUMBERS, TOKEN_PROFILES, DemographicCollator, RowsWithProfiles
from .demographics import (
    Encoder,
    adopt_encoder,
    build_table,
    check_demographic_column,
    check_resumed_encoder,
    resolve_encoder,
)
from .finite import FiniteGuard
from .group_evaluation import GroupEvaluationMixin
from .hub import HubMixin
from .record import RecordMixin
from .routing import load_metrics
from .saving import SavingMixin, check_resumable

ROUTER_OUTPUTS = ("aux_loss", "z_loss", "router_load", "router_entropy")


class CuMATrainerMixin(GroupEvaluationMixin, RecordMixin, SavingMixin, HubMixin):
    """
    Put before a TRL trainer. Its changes: each batch holds `demographic_embeds` from the data set's demographic
    column; the router losses are added to the training loss (never to the evaluation loss, so that early stopping and
    best-model selection read the task loss); router statistics are logged.

    Args:
        model, args, train_dataset, eval_dataset, peft_config, kwargs: as in TRL, by keyword; `args.cuma_adapter_path`
            names an adapter to continue.
        demographic_encoder ([`TextEncoder`] or [`FieldEncoder`], *optional*): turns profiles into vectors; fitted on
            the training data if it is not yet. By default the encoder that the adapter was trained with; for a new
            adapter the paper's text encoder. A column of vectors needs none.

    Logged, of an adapter with routers: `aux_loss` (1 is an even load; of the published one, for comparison, the number
    of routers), `z_loss` where weighted, and since the last log `router/utilization`,
    `router/entropy` and `router/dead_experts` ([`load_metrics`]); at evaluation, with `cuma_group_by`, the same by
    group ([`GroupRouting`]).
    """

    config_class: type
    task_type = "CAUSAL_LM"  # of a new adapter: with it, the saved adapter's `generate` takes profiles
    load_base = staticmethod(create_model_from_path)
    rows_per_example = 1  # 2 where the collator stacks [chosen; rejected]
    collates_profiles = True  # False for a trainer that looks the rows' profiles up itself

    def __init__(
        self,
        model: Any,
        *,
        args: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        demographic_encoder: Encoder | None = None,
        **kwargs: Any,
    ) -> None:
        args = self.config_class() if args is None else args
        if not isinstance(args, self.config_class):
            raise TypeError(f"`args` must be a {self.config_class.__name__}, got {type(args).__name__}.")
        if not isinstance(train_dataset, Dataset | IterableDataset):
            raise TypeError(
                f"`train_dataset` must be a Dataset or an IterableDataset, got {type(train_dataset).__name__}. Of "
                "several splits, pass one, e.g. `dataset['train']`."
            )
        if args.cuma_adapter_path is not None and peft_config is not None:
            raise ValueError(
                "`peft_config` and `cuma_adapter_path` were both passed: the first makes a new adapter, the second "
                "continues a trained one. Leave one out."
            )
        # A copy: what this run writes into it (size, encoder) must not reach the caller's next run.
        peft_config = copy.deepcopy(peft_config)
        saved = None if args.cuma_adapter_path is None else CuMAConfig.from_pretrained(args.cuma_adapter_path)
        config = adapter_config(model, peft_config or saved)
        if peft_config is not None:
            config.training = None  # that of another adapter, if the configuration was
        if config.task_type is None and not isinstance(model, PeftModel):  # else PEFT has read it
            config.task_type = self.task_type
        self._routed = config.routing != "semantic"
        self._check_router_arguments(config, args)
        self._check_before_loading(config, args, kwargs)
        named = eval_dataset if isinstance(eval_dataset, Mapping) else {"evaluation": eval_dataset}
        if self._routed:
            self._refuse_what_loses_profiles(args, train_dataset)
            if any(isinstance(dataset, IterableDataset) for dataset in (train_dataset, *named.values())):
                args.accelerator_config.dispatch_batches = False  # as TRL does for a training set
            check_demographic_column(train_dataset, args.demographic_column, "training")
        if saved is not None:
            loaded = load_adapter(model, saved, args, kwargs, self.load_base)
            if isinstance(model, str) and args.model_init_kwargs is not None and "reward_funcs" not in kwargs:
                args = copy.copy(args)
                args.model_init_kwargs = None  # used; TRL would warn that they were not. Reward models need them, too.
            model = loaded
        config = adapter_config(model, peft_config)
        if args.cuma_reset_router and peft_config is not None:
            raise ValueError(
                "`cuma_reset_router=True` with a new adapter (`peft_config`), whose routers are new anyway. Leave it "
                "out, or name the trained adapter with `cuma_adapter_path`."
            )
        if self._routed:
            with args.main_process_first(desc="demographic encoder"):
                encoder = resolve_encoder(config, demographic_encoder, train_dataset, args)
            datasets = {"training": train_dataset, **{k: v for k, v in named.items() if v is not None}}
            self.demographic_table = build_table(config, encoder, datasets, args)
            if args.cuma_reset_router:
                reset_router(model, adapter_name=model.active_adapter, demographic_dim=self.demographic_table.dim)
                config = model.active_peft_config  # another than before
            adopt_encoder(config, encoder, self.demographic_table.dim, injected=peft_config is None)
        elif args.cuma_group_by:
            raise ValueError(
                "`cuma_group_by` with `routing='semantic'`, whose rows bring no profile to the router. Leave it out."
            )
        elif args.cuma_reset_router:
            reset_router(model, adapter_name=model.active_adapter)
        self._demographic_column = args.demographic_column
        self._router_metrics: dict[str, Any] = {}
        self._router_forwards = 0
        if args.cuma_group_by and eval_dataset is not None:
            for value in named.values():
                self._make_group_routing(value, args)  # its errors, before anything trains
        self._earlier_training = list(config.training or [])
        self._dataset_name: str | None = None
        trained = dict(model.named_parameters()) if isinstance(model, PeftModel) else {}
        trained = {name: parameter.data for name, parameter in trained.items() if parameter.requires_grad}
        super().__init__(
            model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            **kwargs,
        )
        self._settle_dtypes(trained)
        self._finite = FiniteGuard(self)
        self.add_callback(self._finite)
        parallelism = self.accelerator.parallelism_config  # of the arguments or of accelerate's own configuration
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise NotImplementedError(
                "Context and sequence parallelism give each process a part of a document, whose router losses the "
                "CuMA trainers don't put together yet. Set `cp_size=1` and `sp_size=1`."
            )
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError(
                "The base model is itself a mixture of experts whose router loss TRL adds under the same name. Set "
                "`router_aux_loss_coef=0`: the base's routers are frozen."
            )

    def _settle_dtypes(self, trained: dict[str, torch.Tensor]) -> None:
        """
        On a quantized base TRL casts the adapter to bfloat16, whose numbers are further apart than most updates at
        these learning rates: they would be lost. It is float32 again, a trained adapter with the values it had. Where
        DeepSpeed computes in bfloat16 it casts itself, and keeps float32 copies; ZeRO-3 gathers parameters together,
        which must be of one dtype.
        """
        for name, parameter in self.model.named_parameters():
            if CuMAModel.prefix not in name:
                continue
            if self._is_zero3:
                parameter.data = parameter.data.to(self.model.get_base_model().dtype)
            elif parameter.requires_grad:
                parameter.data = trained.get(name, parameter.data.float()).to(parameter.device)

    @staticmethod
    def _check_router_arguments(config: CuMAConfig, args: Any) -> None:
        if args.cuma_aux_loss_type == "published" and config.gate == "soft":
            raise ValueError(
                "`cuma_aux_loss_type='published'` is a constant for `gate='soft'`, whose gates are all positive. Use "
                "'switch', or leave the loss out with `cuma_aux_loss_coef=0`."
            )
        if args.cuma_group_by and not config.has_routers:
            raise ValueError(
                "`cuma_group_by` with one expert and `film_hidden`, an adapter without routers. Leave it out."
            )

    def _check_before_loading(self, config: CuMAConfig, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise for what a trainer cannot do with the adapter, its arguments, or the other keywords it was given."""

    def _refuse_what_loses_profiles(self, args: Any, train_dataset: Dataset | IterableDataset) -> None:
        images = sorted({"image", "images"} & set(get_dataset_column_names(train_dataset)))
        if images:
            raise NotImplementedError(
                f"The training data set has {images}: a vision tower's layers see patches, not rows of one person "
                "each, so the CuMA trainers don't route them yet. Remove the column to train on text."
            )
        if args.accelerator_config.dispatch_batches:
            raise ValueError(
                "`accelerator_config: {dispatch_batches: true}` cuts batches into equal parts for the processes, and "
                "with packed rows the profiles don't go with the documents. Leave it out."
            )
        if args.fsdp and (args.fsdp_config or {}).get("activation_checkpointing"):
            raise ValueError(
                "FSDP's `activation_checkpointing` loses the demographic profile when it recomputes a layer. Set it "
                "to false, and `gradient_checkpointing=True` in the trainer's arguments."
            )

    # ------------------------------------------------------------------ the profile's way into the batch
    @property
    def data_collator(self) -> Callable:
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collator: Callable) -> None:
        # Set by Trainer.__init__, before TRL precomputes reference log-probabilities with it.
        if self._routed and self.collates_profiles and not isinstance(collator, DemographicCollator):
            collator = DemographicCollator(
                collator, self.demographic_table, self._demographic_column, self.rows_per_example
            )
        self._data_collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._routed and self._demographic_column not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, self._demographic_column]

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        """
        A data loader's rows, with their profiles looked up once for all batches. Left to the collator: streams, which
        don't come here; packed rows, whose tokens have it in a column; a transform, which makes each row on its way.
        """
        columns, column = dataset.column_names, self._demographic_column
        is_packed = TOKEN_PROFILES in columns and column not in columns
        if not (self._routed and self.collates_profiles) or is_packed or dataset.format["type"] == "custom":
            return super()._remove_unused_columns(dataset, description)
        check_demographic_column(dataset, column, (description or "passed").lower())
        ids = self.demographic_table.lookup(dataset[column])
        if self.args.remove_unused_columns:
            dataset = dataset.remove_columns(column)
        return RowsWithProfiles(super()._remove_unused_columns(dataset, description), ids)

    def _prepare_dataset(self, dataset: Dataset | IterableDataset, *args: Any, **kwargs: Any) -> Any:
        if self._routed:  # also for a data set that `evaluate` brings
            check_demographic_column(dataset, self._demographic_column, "passed")
        return super()._prepare_dataset(dataset, *args, **kwargs)

    # ------------------------------------------------------------------ the router losses
    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows = inputs.pop(ROW_NUMBERS, None)  # for the guard, not for the model
        if not (self.model.training and torch.is_grad_enabled()):
            observed = model if self._group_routing is None else self._observed(model)
            return super().compute_loss(observed, inputs, *args, **kwargs)
        router: dict[str, torch.Tensor] = {}
        given = dict(inputs)
        published = self.args.cuma_aux_loss_type == "published"
        balance = "published" if published else self.args.cuma_aux_loss_scope

        def forward(*model_args: Any, **model_kwargs: Any) -> Any:
            if not torch.is_grad_enabled():  # a forward for metrics only
                return model(*model_args, **model_kwargs)
            outputs = model(*model_args, output_router_losses=balance, **model_kwargs)
            router.update({key: outputs[key] for key in ROUTER_OUTPUTS if key in outputs})
            return outputs

        result = super().compute_loss(forward, inputs, *args, **kwargs)
        loss, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, ())
        scale = self._router_loss_scale(kwargs.get("num_items_in_batch"))
        for key, weight in (("aux_loss", self.args.cuma_aux_loss_coef), ("z_loss", self.args.cuma_z_loss_coef)):
            if weight and router:  # one expert with FiLM has none
                loss = loss + scale * weight * router[key]
        for key, value in router.items():  # sums that stay on the device until `log`
            self._router_metrics[key] = self._router_metrics.get(key, 0.0) + value.detach()
        self._router_forwards += 1
        self._finite.observe(given, rows, kwargs, loss)
        return (loss, *rest) if rest else loss

    def _router_loss_scale(self, num_items_in_batch: Any) -> float:
        """Router losses are means over micro-batches; 1 where `Trainer` divides the loss by their number itself."""
        return 1.0

    # ------------------------------------------------------------------ resuming, logging
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint:
            last = resume_from_checkpoint is True
            checkpoint = get_last_checkpoint(self.args.output_dir) if last else resume_from_checkpoint
            if checkpoint is not None:  # else `Trainer` says so
                check_resumable(checkpoint, self.accelerator, self.args.save_on_each_node)
                if self._routed:
                    check_resumed_encoder(checkpoint, self.demographic_table.encoder)
        with self._finite.watching():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training and self._router_metrics:
            values = {name: (total / self._router_forwards)[None] for name, total in self._router_metrics.items()}
            means = {name: self.accelerator.gather(value).mean(0) for name, value in values.items()}
            logs["aux_loss"] = means["aux_loss"].item()
            if self.args.cuma_z_loss_coef:
                logs["z_loss"] = means["z_loss"].item()
            metrics = load_metrics(means["router_load"], means["router_entropy"])
            logs |= {f"router/{name}": value for name, value in metrics.items()}
            self._router_metrics, self._router_forwards = {}, 0
        elif self._group_routing is not None:
            logs |= self._group_routing.metrics(self._group_prefix, self.accelerator)
        super().log(logs, *args, **kwargs)
