# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What belongs to a CuMA training run, beside TRL's own arguments."""

from dataclasses import dataclass, field
from typing import Literal

from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig


@dataclass
class CuMATrainingArguments:
    """
    Arguments that every CuMA trainer adds to TRL's.

    Args:
        cuma_aux_loss_coef (`float`): weight of the load-balancing loss (paper: 0.01); 0 leaves it out.
        cuma_aux_loss_type (`str`): `"switch"`, the load-balancing loss of the Switch Transformer, which reads the
            routers' probabilities, weighs each document the same and is the mean over routers; or `"published"`, for
            comparison: what the paper's published code computes from its `gate="double_softmax"`, which reads the
            gates, weighs each token the same and is the sum over routers.
        cuma_z_loss_coef (`float`): weight of the router z-loss.
        cuma_aux_loss_scope (`str`): whose load the balance loss reads: `"local"`, each process's micro-batch, or
            `"ranks"`, that of all processes.
        cuma_adapter_path (`str`, *optional*): a trained CuMA adapter to go on training, e.g. from SFT to DPO. It is
            loaded as the trainable adapter `default`.
        cuma_reset_router (`bool`): of a trained adapter keep the experts, and start the routers anew: the way to
            another demographic encoder. Not where the reference is a copy of the adapter (DPO, KTO, GRPO with `beta`).
        cuma_group_by (`list[str]`, *optional*): fields of the profile, such as `["country"]`, by whose values the
            routing statistics of an evaluation are reported.
        cuma_min_group_size (`int`): a group with fewer people in the evaluation set is not reported.
        demographic_column (`str`): the data set's column with each row's profile: text, a mapping from field to value,
            or a vector.
        demographic_person_column (`str`): a column that tells people apart, where the data set has it: a field
            encoder's minimum count is then over people and not over rows.
        demographic_cache_dir (`str`, *optional*): where text embeddings of profiles are kept between runs; by default
            a folder in the Hugging Face cache. Hashed keys and vectors, no profile text.
    """

    cuma_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balancing loss."})
    cuma_aux_loss_type: Literal["switch", "published"] = field(
        default="switch", metadata={"help": "The load-balancing loss: Switch's, or that of the paper's code."}
    )
    cuma_z_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    cuma_aux_loss_scope: Literal["local", "ranks"] = field(
        default="local", metadata={"help": "Whose load the balance loss reads: this process's, or all ranks'."}
    )
    cuma_adapter_path: str | None = field(default=None, metadata={"help": "A trained CuMA adapter to go on training."})
    cuma_reset_router: bool = field(
        default=False, metadata={"help": "Start a trained adapter's routers anew, e.g. for another encoder."}
    )
    cuma_group_by: list[str] | None = field(
        default=None, metadata={"help": "Profile fields by whose values evaluations report routing statistics."}
    )
    cuma_min_group_size: int = field(
        default=30, metadata={"help": "A group with fewer people in the evaluation set is not reported."}
    )
    demographic_column: str = field(
        default="demographic", metadata={"help": "The data set's column with each row's profile."}
    )
    demographic_person_column: str = field(
        default="person_id", metadata={"help": "A column that tells people apart, used where it exists."}
    )
    demographic_cache_dir: str | None = field(
        default=None, metadata={"help": "Where text embeddings of profiles are kept between runs."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # TRL's: this is a mixin
        for name in ("cuma_aux_loss_coef", "cuma_z_loss_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        if self.cuma_min_group_size < 1:
            raise ValueError(f"`cuma_min_group_size` must be 1 or more, got {self.cuma_min_group_size}.")
        if isinstance(self.cuma_group_by, str):
            raise ValueError(f"`cuma_group_by` must be a list of fields, got {self.cuma_group_by!r}.")
        if self.cuma_aux_loss_scope not in ("local", "ranks"):
            raise ValueError(f"`cuma_aux_loss_scope` must be 'local' or 'ranks', got {self.cuma_aux_loss_scope!r}.")
        if self.cuma_aux_loss_type not in ("switch", "published"):
            raise ValueError(f"`cuma_aux_loss_type` must be 'switch' or 'published', got {self.cuma_aux_loss_type!r}.")
        if self.cuma_aux_loss_type == "published" and self.cuma_aux_loss_scope != "local":
            raise ValueError(
                f"`cuma_aux_loss_scope={self.cuma_aux_loss_scope!r}` with `cuma_aux_loss_type='published'`, which "
                "reads each process's micro-batch. Set it to 'local'."
            )


@dataclass
class CuMASFTConfig(CuMATrainingArguments, SFTConfig):
    """
    TRL's `SFTConfig` and [`CuMATrainingArguments`].

    Args:
        demographic_dropout (`float`): share of training rows whose profile is replaced by zeros (the average profile),
            so that the adapter also learns to answer without one.
    """

    demographic_dropout: float = field(
        default=0.0, metadata={"help": "Share of training rows whose profile is replaced by zeros."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.demographic_dropout <= 1.0:
            raise ValueError(f"`demographic_dropout` must be in [0, 1], got {self.demographic_dropout}.")


@dataclass
class CuMADPOConfig(CuMATrainingArguments, DPOConfig):
    """TRL's `DPOConfig` and [`CuMATrainingArguments`]."""


@dataclass
class CuMAKTOConfig(CuMATrainingArguments, KTOConfig):
    """TRL's `KTOConfig` and [`CuMATrainingArguments`]."""


@dataclass
class CuMARewardConfig(CuMATrainingArguments, RewardConfig):
    """TRL's `RewardConfig` and [`CuMATrainingArguments`]."""


@dataclass
class CuMAGRPOConfig(CuMATrainingArguments, GRPOConfig):
    """TRL's `GRPOConfig` and [`CuMATrainingArguments`]."""
