# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`CuMAConfig`: what an adapter is. What belongs to a training run is in the trainer configs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .card import write_card
from .peft_type import CUMA
from .router import GATES, check_gate

FORMAT_VERSION = 2  # the newest that is read; 2 brought `film_hidden`
DEFAULT_DEMOGRAPHIC_DIM = 1024  # the paper's Qwen3-Embedding-0.6B


@dataclass
class CuMAConfig(PeftConfig):
    """
    Configuration of a Cultural Mixture of Adapters (CuMA, arXiv 2601.04885): LoRA experts on frozen linear layers,
    mixed per token by a router that reads the token's hidden state and the demographic profile of the person whom the
    answer is for.

    For one layer, `y = W0 x + s · sum_i g_i(x, d) · B_i A_i x` with `g = gate(router(x, d))` and `s = lora_alpha / r`.
    With `film_hidden`, `(1 + γ_i(d)) ⊙ A_i x + β_i(d)` stands in place of `A_i x`.

    Args:
        target_modules (`list[str]` or `str`, *optional*): names of the linear layers to adapt, a regular expression,
            or `"all-linear"`. By default PEFT's LoRA targets of the architecture.
        exclude_modules (`list[str]` or `str`, *optional*): names (or a regular expression) to leave out.
        r (`int`): rank of each expert.
        lora_alpha (`float`): the residual is scaled by `lora_alpha / r`.
        lora_dropout (`float`): dropout on the experts' input; the router reads the input without it.
        use_rslora (`bool`): scale by `lora_alpha / sqrt(r)` instead.
        num_experts (`int`): number of experts E of each layer.
        top_k (`int`): experts mixed for a token; ignored by `gate="soft"`.
        gate (`str`): how logits become gates, see [`~trl_cuma.adapter.router.compute_gates`]: `"topk_softmax"`,
            `"softmax_topk"`, `"soft"` or `"double_softmax"`.
        routing (`str`): what the router reads: `"joint"` (hidden state and profile, as published), `"demographic"`
            (the profile alone: constant gates for a person) or `"semantic"` (the hidden state alone: a plain
            MoE-LoRA that needs no profile).
        demographic_dim (`int`, *optional*): length of a demographic embedding. `None` means 1024; a trainer sets it
            from its encoder before the adapter is made.
        demographic_projection (`int`, *optional*): if given, one trainable linear map (without bias) from
            `demographic_dim` to this size, shared by all routers. It keeps the zero vector at zero.
        router_hidden (`int`): width of the router's hidden layers.
        router_layers (`int`): linear layers in the router, with ReLU between them; 1 is a linear router.
        share_a (`bool`): one A for all experts of a layer (as HydraLoRA) instead of one each.
        film_hidden (`int`, *optional*): width of an MLP on the profile that scales and shifts the experts' low-rank
            activations (FiLM, arXiv 1709.07871): each layer has one, of two linear layers, with a γ_i and a β_i for
            each expert, also where A is shared. With `num_experts=1` it is a LoRA with FiLM and has no router.
            `None`: no FiLM.
        router_groups (`list[list[str]]`, *optional*): names of sibling modules that read the same input and share one
            router, e.g. `[["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]`. By default each target module
            has its own router, as published.
        missing_demographics (`str`): what a forward without profiles does: `"error"`, or `"zero"` (the zero vector,
            which after standardisation is the average profile).
        demographic_encoder (`dict`, *optional*): state of the encoder that made the embeddings; written by the
            trainers, read at inference.
        layers_to_transform, layers_pattern, rank_pattern, alpha_pattern, modules_to_save: as in `LoraConfig`.
        trainable_token_indices: as in `LoraConfig`; TRL sets it when a chat template brings new tokens.
        init_weights (`bool`): the residual starts at zero. `False` draws B at random, for tests.
        base_model_type (`str`, *optional*): `model_type` of the base; written when the adapter is made, checked when
            it is loaded.
        training (`list[dict]`, *optional*): what the adapter was trained on, one entry per run; written by the
            trainers, for the model card.
        format_version (`int`): version of the saved adapter's format: the first that can hold what it has.

    Raises:
        ValueError: on a value outside its range; the message names the field, the value and what to do.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linear layers to adapt: names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=16, metadata={"help": "The residual is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    num_experts: int = field(default=8, metadata={"help": "Number of experts of each layer."})
    top_k: int = field(default=2, metadata={"help": "Experts mixed for a token."})
    gate: Literal["topk_softmax", "softmax_topk", "soft", "double_softmax"] = field(
        default="topk_softmax", metadata={"help": f"How router logits become gates: one of {', '.join(GATES)}."}
    )
    routing: Literal["joint", "demographic", "semantic"] = field(
        default="joint", metadata={"help": "What the router reads: token and profile, profile alone, token alone."}
    )
    demographic_dim: int | None = field(
        default=None, metadata={"help": "Length of a demographic embedding; None means 1024."}
    )
    demographic_projection: int | None = field(
        default=None, metadata={"help": "Size of a trainable linear projection of the demographic embedding."}
    )
    router_hidden: int = field(default=256, metadata={"help": "Width of the router's hidden layers."})
    router_layers: int = field(default=2, metadata={"help": "Linear layers in the router."})
    share_a: bool = field(default=False, metadata={"help": "One A for all experts of a layer."})
    film_hidden: int | None = field(
        default=None, metadata={"help": "Width of an MLP on the profile that modulates the experts; None: no FiLM."}
    )
    router_groups: list[list[str]] | None = field(
        default=None, metadata={"help": "Groups of sibling modules that share one router."}
    )
    missing_demographics: Literal["error", "zero"] = field(
        default="error", metadata={"help": "What a forward without profiles does."}
    )
    demographic_encoder: dict[str, Any] | None = field(
        default=None, metadata={"help": "State of the demographic encoder, written by the trainers."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Rank for some modules."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "lora_alpha for some modules."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token indices whose embeddings are trained."}
    )
    init_weights: bool = field(default=True, metadata={"help": "The residual starts at zero."})
    base_model_type: str | None = field(default=None, metadata={"help": "Type of the base model, written by CuMA."})
    training: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "What the adapter was trained on, written by the trainers."}
    )
    format_version: int = field(default=1, metadata={"help": "Version of the saved format."})

    # Where the configuration was loaded from, as arguments of `hf_hub_download`, until the adapter's weights are, too.
    # Not a field: it isn't saved.
    source = None

    @property
    def has_routers(self) -> bool:
        """Whether there is anything to route. (One expert without FiLM has a router, too, that decides nothing.)"""
        return self.film_hidden is None or self.num_experts > 1

    @property
    def experts_per_token(self) -> int:
        """How many of a token's gates are not zero, at most."""
        return self.num_experts if self.gate == "soft" else self.top_k

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> CuMAConfig:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub_kwargs, *_ = cls._split_kwargs(kwargs)
        config.source = {"repo_id": os.fspath(pretrained_model_name_or_path), "subfolder": subfolder, **hub_kwargs}
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; beside an adapter's weights it also writes the model card, as README.md."""
        super().save_pretrained(save_directory, **kwargs)
        if os.path.isfile(os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)):
            write_card(save_directory, self)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """What `push_to_hub` does last: a configuration alone has no card, and leaves that on the Hub as it is."""
        os.remove(os.path.join(working_dir, "README.md"))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = CUMA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's configs
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        for name in ("r", "num_experts", "top_k", "router_hidden", "router_layers"):
            check_positive(name, getattr(self, name))
        for name in ("demographic_dim", "demographic_projection", "film_hidden"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        for name, values in (
            ("routing", ("joint", "demographic", "semantic")),
            ("missing_demographics", ("error", "zero")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, values))}, got {getattr(self, name)!r}."
                )
        check_gate(self.gate, self.top_k, self.num_experts)
        if self.routing == "semantic" and self.demographic_projection is not None:
            raise ValueError(
                f"`demographic_projection={self.demographic_projection}` has no effect with `routing='semantic'`, "
                "whose router reads no profile. Leave it unset, or use `routing='joint'`."
            )
        if self.routing == "semantic" and self.film_hidden is not None:
            raise ValueError(
                f"`film_hidden={self.film_hidden}` reads profiles, and with `routing='semantic'` the adapter gets "
                "none. Leave it unset, or use `routing='demographic'` or `'joint'`."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`: set both, or neither.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform={self.layers_to_transform}` has no effect with the regular expression "
                f"`target_modules={self.target_modules!r}`. List module names, or name the layers in the expression."
            )
        names = [name for group in self.router_groups or [] for name in group]
        if len(names) != len(set(names)):
            raise ValueError(f"`router_groups` names a module twice: {self.router_groups}. A module has one router.")
        check_positive("format_version", self.format_version)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"`format_version={self.format_version}` is newer than this trl_cuma reads ({FORMAT_VERSION}). "
                "Upgrade trl_cuma to load this adapter."
            )
        if self.film_hidden is not None:
            self.format_version = FORMAT_VERSION  # so that a trl_cuma that doesn't know it says so


def check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
