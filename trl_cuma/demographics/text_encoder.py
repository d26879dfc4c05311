# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Profiles to standardised text embeddings, with any sentence-transformers model."""

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..extras import needs_extra
from .encoder_state import MissingPolicy, check_missing_policy, check_state, fingerprint_of, missing_error
from .profile import DemographicProfile, read_profiles

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


_STATE_KEYS = {"model", "revision", "pooling", "template", "max_seq_length", "dim", "mean", "rms"}
_FOLDER_HASH = "sha256:"


class TextEncoder:
    """
    The embedding of a profile's canonical text, minus the mean, divided by one global RMS.

    Mean and RMS are taken over the unique training profiles. Text embeddings of profiles share one large common
    component, which would drown what tells people apart; without it the zero vector is the average profile.

    Runs in fp32. A text's vector does not depend on the texts beside it: no batch mixes token lengths, so none is
    padded. The model is loaded when it is first needed; a fitted encoder knows its `dim` without it.

    Args:
        model (`str`, defaults to `"Qwen/Qwen3-Embedding-0.6B"`):
            A hub id or the path of a local folder. A folder that has moved since the state was saved: set
            `encoder.model` to where it is now, before the first `encode`; its content is still checked.
        revision (`str`, *optional*):
            The hub revision. After `fit` the commit it stands for or, for a local folder, `"sha256:…"` over its files.
        template (`str`, defaults to `"{text}"`):
            The text to embed, `{text}` being the canonical text. A model's instruction goes here.
        batch_size (`int`, defaults to `32`):
            The most texts per forward pass.
        device (`str`, defaults to `"cpu"`):
            Where the model runs. Not part of the state; may be set before the first `encode`.
        centre (`bool`, defaults to `True`):
            `False` leaves the mean in, as the paper's published code does: for comparisons.
    """

    def __init__(
        self,
        model: str = "Qwen/Qwen3-Embedding-0.6B",
        *,
        revision: str | None = None,
        template: str = "{text}",
        batch_size: int = 32,
        device: str = "cpu",
        centre: bool = True,
    ) -> None:
        if "{text}" not in template:
            raise ValueError(f"`template` is {template!r}: it must contain {{text}}, where the profile's text goes.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}, expected at least 1.")
        self.model = os.fspath(model)
        self.revision = revision
        self.template = template
        self.batch_size = batch_size
        self.device = device
        self.centre = centre
        self._pooling: str | None = None
        self._max_seq_length: int | None = None
        self._mean: torch.Tensor | None = None
        self._rms: float | None = None
        self._loaded: SentenceTransformer | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether the encoder can encode."""
        return self._mean is not None

    @property
    def dim(self) -> int:
        """The length of a vector; loads the model if the encoder is not fitted."""
        return self._embed(["dim"], show_progress=False).shape[1] if self._mean is None else len(self._mean)

    def fit(
        self,
        profiles: Iterable[DemographicProfile | Mapping[str, Any] | str | None],
        *,
        person_ids: Sequence[Hashable] | None = None,
        show_progress: bool = False,
    ) -> "TextEncoder":
        """
        Take mean and RMS over the unique profiles; neither order nor repetition matters.

        Args:
            profiles (`Iterable`):
                The training profiles; those of which nothing is known are left out.
            person_ids (`Sequence[Hashable]`, *optional*):
                Not used: each distinct profile counts once, whoever has it.
            show_progress (`bool`, defaults to `False`):
                Show a progress bar over the unique profiles.

        Raises:
            ValueError: There are fewer than two distinct profiles, or their embeddings do not differ.
        """
        texts = sorted({profile.text for profile in read_profiles(profiles) if not profile.is_missing})
        if len(texts) < 2:
            raise ValueError(
                f"The TextEncoder got {len(texts)} distinct known profiles to fit on and needs at least 2: their "
                "spread around the mean sets the scale."
            )
        embeddings = self._embed(texts, show_progress=show_progress).double()
        mean = embeddings.mean(0) if self.centre else torch.zeros_like(embeddings[0])
        rms = (embeddings - mean).square().mean().sqrt().float().item()
        if not 0 < rms < float("inf"):
            raise ValueError(f"The embeddings of the training profiles have a spread of {rms}: is the model intact?")
        self._mean, self._rms = mean.float(), rms
        return self

    def encode(
        self,
        profiles: Sequence[DemographicProfile | Mapping[str, Any] | str | None],
        *,
        missing: MissingPolicy = "error",
        show_progress: bool = False,
    ) -> torch.Tensor:
        """
        The standardised vectors of `profiles`, `(len(profiles), dim)`, float32 on the CPU.

        Args:
            profiles (`Sequence`): Mappings of fields, plain texts, or `None`.
            missing (`"error"` or `"zero"`): What becomes of a row of which nothing is known.
            show_progress (`bool`, defaults to `False`): Show a progress bar over the unique profiles.

        Raises:
            RuntimeError: The encoder is not fitted.
            ValueError: A profile is missing, or the local model is not the one the encoder was fitted with.
        """
        profiles = read_profiles(profiles)
        self.check(profiles, missing)
        assert self._mean is not None and self._rms is not None  # it is fitted
        vectors = torch.zeros(len(profiles), self.dim)
        known = [row for row, profile in enumerate(profiles) if not profile.is_missing]
        if known:
            texts = sorted({profiles[row].text for row in known})
            position = {text: i for i, text in enumerate(texts)}
            embeddings = (self._embed(texts, show_progress=show_progress) - self._mean) / self._rms
            vectors[known] = embeddings[[position[profiles[row].text] for row in known]]
        return vectors

    def check(self, profiles: Sequence[DemographicProfile], missing: MissingPolicy) -> None:
        """Raise the error that `encode` would raise for these rows."""
        self._require_fit()
        check_missing_policy(missing)
        unknown = [row for row, profile in enumerate(profiles) if profile.is_missing]
        if unknown and missing == "error":
            raise missing_error(unknown)

    @property
    def fingerprint(self) -> str:
        """The sha256 of the state."""
        return self.state()["fingerprint"]

    def state(self) -> dict[str, Any]:
        """
        Everything inference needs, JSON-serialisable: model, revision, pooling, template, max_seq_length, dim, mean
        and RMS. The mean is an aggregate over all training profiles; no text is stored.
        """
        self._require_fit()
        assert self._mean is not None
        state = {
            "type": "text",
            "model": self.model,
            "revision": self.revision,
            "pooling": self._pooling,
            "template": self.template,
            "max_seq_length": self._max_seq_length,
            "dim": self.dim,
            "mean": self._mean.tolist(),
            "rms": self._rms,
        }
        return state | {"fingerprint": fingerprint_of(state)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "TextEncoder":
        """
        The fitted encoder that `state()` described. The model itself is loaded, and a local folder's content checked,
        at the first `encode`.

        Raises:
            ValueError: The state is of another type, incomplete, or was changed.
        """
        check_state(state, "text", _STATE_KEYS)
        encoder = cls(state["model"], revision=state["revision"], template=state["template"])
        encoder._pooling = state["pooling"]
        encoder._max_seq_length = state["max_seq_length"]
        encoder._mean = torch.tensor(state["mean"], dtype=torch.float32)
        encoder._rms = state["rms"]
        return encoder

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a data loader's worker loads the model again if it needs it at all.
        return self.__dict__ | {"_loaded": None}

    def _require_fit(self) -> None:
        if not self.is_fitted:
            raise RuntimeError("The TextEncoder is not fitted: call fit(training profiles) or use from_state(state).")

    def _load(self) -> "SentenceTransformer":
        if self._loaded is not None:
            return self._loaded
        with needs_extra("text-encoder", "TextEncoder"):
            from sentence_transformers import SentenceTransformer

        folder_hash = _hash_folder(Path(self.model)) if Path(self.model).is_dir() else None
        if folder_hash and self.revision not in (None, folder_hash):
            raise ValueError(
                f"The encoder model in {self.model} has content {folder_hash}, expected revision {self.revision}: "
                "set `encoder.model` to the folder it was fitted with, or fit a new encoder."
            )
        if not folder_hash and (self.revision or "").startswith(_FOLDER_HASH):
            raise ValueError(
                f"The encoder was fitted with a local model, and {self.model} is not a folder: set `encoder.model` to "
                "where it is now."
            )
        try:
            model = SentenceTransformer(
                self.model,
                revision=None if folder_hash else self.revision,
                device=self.device,
                model_kwargs={"dtype": torch.float32},
            )
        except OSError as error:
            raise OSError(
                f"The text encoder `model={self.model!r}` could not be loaded: it is no local folder of a sentence "
                f"encoder, and no model that the hub (or its cache, offline) has. {error}"
            ) from error
        if self.is_fitted:
            model.max_seq_length = self._max_seq_length
        else:
            self.revision = folder_hash or _commit_of(self.model, self.revision)
            # A static (bag of tokens) model reports no limit or an infinite one.
            self._max_seq_length = model.max_seq_length if isinstance(model.max_seq_length, int) else None
            self._pooling = _describe_pooling(model)
        self._loaded = model
        return model

    def _embed(self, texts: list[str], *, show_progress: bool) -> torch.Tensor:
        """Raw embeddings `(len(texts), dim)`, in batches of one token length each."""
        model = self._load()
        texts = [self.template.replace("{text}", text) for text in texts]
        # A prompt that the model applies by default is part of what it reads.
        prompt = (model.prompts or {}).get(model.default_prompt_name or "") or ""
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(self._token_lengths(model, [prompt + text for text in texts])):
            by_length[length].append(row)
        batches = [
            rows[start : start + self.batch_size]
            for _, rows in sorted(by_length.items())
            for start in range(0, len(rows), self.batch_size)
        ]
        embeddings = [torch.empty(0)] * len(texts)  # each is replaced
        with tqdm(total=len(texts), desc="Encoding profiles", unit="profile", disable=not show_progress) as progress:
            for rows in batches:
                batch = model.encode(
                    [texts[row] for row in rows],
                    batch_size=len(rows),
                    convert_to_tensor=True,
                    show_progress_bar=False,
                )
                for row, embedding in zip(rows, batch.float().cpu(), strict=True):
                    embeddings[row] = embedding
                progress.update(len(rows))
        return torch.stack(embeddings)

    def _token_lengths(self, model: "SentenceTransformer", texts: list[str]) -> list[int]:
        """How many tokens the model reads of each text."""
        if not callable(model.tokenizer):
            return [0] * len(texts)  # a static model has no attention, hence no padding
        lengths = [len(ids) for ids in model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        limit = self._max_seq_length
        if limit is None:
            return lengths
        cut = sum(length > limit for length in lengths)
        if cut:
            warnings.warn(
                f"{cut} of {len(texts)} profiles are longer than the model's max_seq_length={limit} and were cut.",
                stacklevel=4,
            )
        return [min(length, limit) for length in lengths]


def _hash_folder(folder: Path) -> str:
    """The sha256 over a model folder's weights, configurations and vocabularies: all that decides its vectors."""
    digest = hashlib.sha256()
    suffixes = {".safetensors", ".bin", ".json", ".txt", ".model"}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix in suffixes and path.is_file() and not hidden:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{relative.as_posix()}\0{content}\n".encode())
    return _FOLDER_HASH + digest.hexdigest()


def _commit_of(model: str, revision: str | None) -> str | None:
    """The hub commit from which a model was just loaded; `revision` with a warning where the hub's cache has none."""
    from huggingface_hub import try_to_load_from_cache

    cache = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    # sentence-transformers looks up a bare name under its own organisation.
    for repo in (model, f"sentence-transformers/{model}") if "/" not in model else (model,):
        path = try_to_load_from_cache(repo, "config.json", cache_dir=cache, revision=revision)
        if isinstance(path, str):
            return Path(path).parent.name
    warnings.warn(
        f"The hub commit of the encoder model {model} is unknown, the encoder keeps revision={revision}: if the model "
        "changes on the hub, the vectors change. Pass `revision=` with a commit.",
        stacklevel=2,
    )
    return revision


def _describe_pooling(model: "SentenceTransformer") -> str:
    """The model's modules in order, with the settings of its pooling."""
    parts = []
    for module in model:
        name = type(module).__name__
        if name == "Pooling":
            settings = module.get_config_dict()  # type: ignore[operator]  # a module's attributes are tensors to mypy
            name += "(" + ", ".join(f"{key}={settings[key]}" for key in sorted(settings)) + ")"
        parts.append(name)
    return " > ".join(parts)
