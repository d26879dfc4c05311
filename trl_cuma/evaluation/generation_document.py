# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
An evaluation's part on free texts: people's own choices first; and, where they are asked for, answers of two models
that a judge compares, and how much answers differ between profiles.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..rewards import ProfileJudge
    from .generation import GeneratedAnswers
    from .option_tokens import Prompt
    from .own_choices import OwnChoices
    from .preference_rows import DrawnRows

ROWS = 200
"""To write answers for, where a judge is given."""

REQUESTS_PER_ROW = 4
"""To the judge: two models' answers, and what the person chose and rejected, each in both orders."""

LEAST = {
    "generate": 0,
    "max_new_tokens": 1,
    "temperature": 0,
    "profiles_per_prompt": 0,
    "generate_batch": 1,
    "max_requests": REQUESTS_PER_ROW,
}
"""Of the arguments added here, the least values."""

GREEDY = "greedy answers have no variety within a profile: set a `--temperature`"
BLIND = "the model is told no profile, so that profiles make no difference"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments on answers and their judge, for `trl-cuma evaluate`."""
    group = parser.add_argument_group(
        "answers", "For rows in which people chose between texts. Without --judge, nothing leaves this machine."
    )
    add = group.add_argument
    add(
        "--generate", type=int, default=None, metavar="N", help=f"rows to answer; default: {ROWS} with --judge, else 0"
    )
    add("--max_new_tokens", type=int, default=512, help="of an answer; default: 512")
    add("--temperature", type=float, default=0.7, help="of the answers; 0: greedy; default: 0.7")
    add(
        "--profiles_per_prompt",
        type=int,
        default=4,
        help="answer prompts for so many profiles, so often each, to see how much profiles change; default: 4; 0: no",
    )
    add("--generate_batch", type=int, default=16, help="answers to write at a time; default: 16")
    add("--cache_dir", type=Path, default=None, help="keeps answers and verdicts, to go on after an interruption")
    group = parser.add_argument_group(
        "judge",
        "With --judge, people's PROFILES, PROMPTS AND ANSWERS ARE SENT to its endpoint: name one to which you may "
        "send them.",
    )
    add = group.add_argument
    add("--judge", default=None, metavar="MODEL", help="compares answers; the key is read from OPENAI_API_KEY")
    add("--judge_url", default=None, metavar="URL", help="its endpoint; default: OPENAI_BASE_URL, or OpenAI's")
    add("--max_requests", type=int, default=None, help=f"to the judge; a row takes up to {REQUESTS_PER_ROW}")
    add(
        "--against",
        default=None,
        metavar="MODEL_OR_ADAPTER",
        help="whose answers to compare with; default: the model's without its adapter",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        `ValueError`: An argument needs another one.
    """
    if args.judge is None:
        for name in ("judge_url", "max_requests", "against"):
            if getattr(args, name) is not None:
                raise ValueError(f"`--{name}` is for a judge. Name its model with `--judge`, or leave it out.")
    elif args.generate == 0:
        raise ValueError(
            "`--generate` is 0, so that there is nothing for `--judge` to compare. Leave one of them out."
        )
    elif args.against is None and args.adapter is None:
        raise ValueError("`--judge` compares two models. Name the other one with `--against`.")


def rows_to_draw(args: argparse.Namespace) -> int:
    """How many choices to write answers for: so many that the judge's budget is enough for all of them."""
    number = args.generate if args.generate is not None else ROWS if args.judge else 0
    return number if args.max_requests is None else min(number, args.max_requests // REQUESTS_PER_ROW)


def make_judge(args: argparse.Namespace) -> ProfileJudge:
    """The judge, before any model is loaded: it may lack a key."""
    from ..rewards import ProfileJudge

    if args.cache_dir:
        args.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return ProfileJudge(
        args.judge,
        base_url=args.judge_url,
        cache_path=args.cache_dir and args.cache_dir / "verdicts.sqlite",
        max_requests=args.max_requests,
        on_budget="drop",
        demographic_column=args.demographic_column,
    )


def own_choices(
    args: argparse.Namespace,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Dataset],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """
    What a model makes of people's own choices, by split: the document, and the scores of each choice for `cells.npz`.
    Under `accelerate launch` all processes must call it.

    Raises:
        `ValueError`: Columns are missing, or more rows can't be scored than `--max_bad_share` allows.
    """
    from .cell_scores import Scores
    from .own_choices import own_choice_accuracy

    document, arrays = {}, {}
    for split, rows in splits.items():
        found = own_choice_accuracy(
            model,
            tokenizer,
            rows,
            demographic_column=args.demographic_column,
            person_column=args.person_column,
            max_batch_tokens=args.batch_tokens,
        )
        bad = ", ".join(f"{count:,} {reason}" for reason, count in found.bad_rows.items())
        if sum(found.bad_rows.values()) > args.max_bad_share * found.rows:
            raise ValueError(
                f"Of the {found.rows:,} rows of split {split!r}, more can't be scored than "
                f"`--max_bad_share {args.max_bad_share}` allows: {bad}."
            )
        if bad:
            logger.warning("Of the %s rows of split %r, some can't be scored: %s.", f"{found.rows:,}", split, bad)
        document[split] = found.document(num_samples=args.num_samples, seed=args.seed)
        scores = Scores(found.scores, (found.person, found.prompt), ("person", "prompt"), np.ones(len(found.person)))
        arrays[f"{split}/key"] = np.array(_key(rows, found))
        arrays |= scores.arrays(f"{split}/own_choices")
    return document, arrays


def prompts_and_fields(args: argparse.Namespace, rows: Dataset) -> tuple[bool | None, list[Prompt], list[str]]:
    """Whether prompts state profiles; some prompts, if they don't; and the fields to group people by."""
    from .preference_rows import LOOKED_AT, states_profile

    if args.demographic_column not in rows.features:
        return None, [], []
    some = rows.select(np.unique(np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).astype(int)))
    prompts = some["prompt"][:]
    stated = states_profile(prompts, some[args.demographic_column][:])[0]
    feature = rows.features[args.demographic_column]
    fields = sorted(feature, key=lambda field: (field != "country", field)) if isinstance(feature, Mapping) else []
    return stated, [prompt for prompt in prompts if prompt and stated is False], args.group_by or fields


def draw(
    args: argparse.Namespace, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, splits: Mapping[str, Dataset]
) -> dict[str, DrawnRows]:
    """The rows of each split to write answers for, see [`~trl_cuma.evaluation.preference_rows.draw_rows`]."""
    from ..generation.batches import context_length, encode_prompt
    from .preference_rows import draw_rows

    limit = context_length(model) or float("inf")
    return {
        split: draw_rows(
            rows,
            rows_to_draw(args),
            profiles_per_prompt=args.profiles_per_prompt,
            fits=lambda prompt: len(encode_prompt(tokenizer, prompt)) + args.max_new_tokens <= limit,
            demographic_column=args.demographic_column,
            person_column=args.person_column,
            seed=args.seed,
        )
        for split, rows in splits.items()
    }


def read_against(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """`--against` as a model and an adapter; an adapter names its own base."""
    from transformers.utils.peft_utils import find_adapter_config_file

    is_adapter = find_adapter_config_file(args.against) is not None
    return (None, args.against) if is_adapter else (args.against, None)


@dataclass(frozen=True, eq=False, repr=False)
class WrittenAnswers:
    """
    What a model wrote for [`~trl_cuma.evaluation.preference_rows.DrawnRows`].

    Attributes:
        model (`dict`): What the document says of the model: `name` and `adapter`.
        judged ([`GeneratedAnswers`], *optional*): An answer for each row that a judge compares; `None` without one.
        diversity (`dict`): How much answers differ between profiles, a metric.
        spread (`dict`, *optional*): Counts of the answers behind it.
    """

    model: dict[str, Any]
    judged: GeneratedAnswers | None
    diversity: dict[str, Any]
    spread: dict[str, Any] | None


def write_answers(
    args: argparse.Namespace,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    about: Mapping[str, Any],
    drawn: Mapping[str, DrawnRows],
) -> dict[str, WrittenAnswers]:
    """Answer the rows of each split. Under `accelerate launch` all processes must call it."""
    from ..generation.vectors import demographic_table
    from .answer_store import model_fingerprint
    from .generation import answer_diversity, generate_answers
    from .metrics.intervals import Estimate
    from .preference_rows import states_profile
    from .resampling import metric

    settings: dict[str, Any] = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    settings |= {"seed": args.seed, "batch_size": args.generate_batch}
    if args.cache_dir:
        settings |= {"cache_path": args.cache_dir / "answers.sqlite", "fingerprint": model_fingerprint(model)}
    written = {}
    for split, rows in drawn.items():
        judged, spread, note = None, None, rows.note
        if args.judge:
            judged = generate_answers(model, tokenizer, rows.prompts, rows.demographics, **settings)
        if args.temperature == 0:
            note = GREEDY
        elif demographic_table(model) is None and not states_profile(rows.prompts, rows.demographics)[0]:
            note = BLIND
        if note is None:
            asked = (rows.spread_prompts, rows.spread_demographics)
            samples = {"num_samples": args.profiles_per_prompt, "description": "Answers for several profiles"}
            answers = generate_answers(model, tokenizer, *asked, **settings, **samples)
            options: dict[str, Any] = {"prompt_groups": rows.spread_groups, "seed": args.seed}
            diversity, spread = answer_diversity(answers, *asked, **options), answers.document()
        else:
            diversity = metric(Estimate(None, None, None, 0, note), "prompt")
        model_name = {"name": about["name"], "adapter": about["adapter"]}
        written[split] = WrittenAnswers(model_name, judged, diversity, spread)
    return written


def answers_document(
    args: argparse.Namespace,
    drawn: Mapping[str, DrawnRows],
    answers: Sequence[Mapping[str, WrittenAnswers]],
    judge: ProfileJudge | None,
) -> dict[str, Any]:
    """
    The answers of a model, and of another one to compare them with, for the evaluation's document: by split, and
    without any text. One process calls it.

    Returns:
        `dict`: Of each split `rows` and the `choices` they were drawn from; `settings`; by model (`"model"`,
        `"other"`) its name, `answers`, `spread_answers` and `diversity`; and with a judge `judge`, `win_rate`
        ([`~trl_cuma.evaluation.winrate.pairwise_win_rate`]) and `agreement`
        ([`~trl_cuma.evaluation.winrate.judge_agreement`]). Where the judge gave up, `note` says why.
    """
    names = ("temperature", "max_new_tokens", "profiles_per_prompt", "seed")
    document = {}
    for split, rows in drawn.items():
        found: dict[str, Any] = {"rows": len(rows.prompts), "choices": rows.choices, "too_long": rows.too_long}
        found["settings"] = {name: getattr(args, name) for name in names}
        for name, written in zip(("model", "other"), answers, strict=False):
            each = written[split]
            counts = {"answers": each.judged and each.judged.document(), "spread_answers": each.spread}
            found[name] = each.model | counts | {"diversity": each.diversity}
        if judge is not None:
            found |= {"judge": args.judge} | _judged(args, judge, rows, *(written[split] for written in answers))
        document[split] = found
    return document


def _judged(
    args: argparse.Namespace, judge: ProfileJudge, rows: DrawnRows, ours: WrittenAnswers, theirs: WrittenAnswers
) -> dict[str, Any]:
    from ..rewards import JudgeError
    from .winrate import judge_agreement, pairwise_win_rate

    assert ours.judged is not None and theirs.judged is not None
    texts = (ours.judged.first, theirs.judged.first)
    options = {"num_samples": args.num_samples, "seed": args.seed}
    found: dict[str, Any] = {}
    try:
        found["win_rate"] = pairwise_win_rate(judge, rows.prompts, *texts, rows.demographics, **options)
        pairs = (rows.prompts, rows.chosen, rows.rejected, rows.demographics, rows.person_ids)
        options |= {"prompt_groups": rows.prompt_groups, "description": "Judge, of people's choices"}
        found["agreement"] = judge_agreement(judge, *pairs, **options)
    except JudgeError as error:  # what else was measured is not lost
        found["note"] = str(error)
        logger.warning("The judge gave up: %s With the same --cache_dir, another run goes on from there.", error)
    return found


def _key(rows: Dataset, found: OwnChoices) -> str:
    """Of which choices: equal for every model that is asked the same."""
    digest = hashlib.sha256(repr([len(sizes) for sizes in found.num_tokens]).encode())
    for numbers in (found.person, found.prompt):
        digest.update(numbers.tobytes())
    for row in rows.select_columns(["prompt", "chosen", "rejected"]):
        digest.update(repr(row).encode())
    return digest.hexdigest()
