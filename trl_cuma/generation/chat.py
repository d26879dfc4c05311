# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma chat`: talk to a model as several people at once, and see how the answers differ."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from . import loading
from .profiles import AS_JSON, parse_profile

HELP = "Each line is a turn. /clear forgets the turns so far; /exit or Ctrl-D ends; Ctrl-C stops an answer."


def chat_parser() -> argparse.ArgumentParser:
    """The parser of `trl-cuma chat`."""
    parser = argparse.ArgumentParser(
        prog="trl-cuma chat",
        description="Talk to a model as one or several people: each has a conversation of their own, and all are "
        "answered in one batch. In a terminal answers stand side by side and grow as they are written; elsewhere they "
        "come one below the other, under the number of the profile and its fields. Nothing is stored.",
        epilog="Example: trl-cuma chat --adapter runs/cuma --profile country=Kenya,age=25-34 --profile country=Japan "
        f'--prompt "What makes a good life?". {AS_JSON}',
        allow_abbrev=False,
    )
    loading.add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--profile",
        action="append",
        default=None,
        metavar="FIELD=VALUE,…",
        help="a person; once for each. Or as JSON, if a value contains a comma",
    )
    add(
        "--prompt",
        action="append",
        default=None,
        help="what is said; again for a second turn. Without it: lines of the standard input",
    )
    add("--system", default=None, help="the system message of every conversation")
    group = parser.add_argument_group("answers", "default: the model's own generation settings")
    group.add_argument("--max_new_tokens", type=int, default=None, help="default: 512, or half the context")
    group.add_argument("--temperature", type=float, default=None, help="0 is greedy")
    group.add_argument("--top_p", type=float, default=None, help="mass of the most likely tokens that are drawn from")
    group.add_argument("--top_k", type=int, default=None, help="how many of them; 0: all")
    group.add_argument("--seed", type=int, default=0, help="of the draws, the same for all profiles; default: 0")
    loading.add_loading_arguments(parser.add_argument_group("model"))
    return parser


def main(argv: Sequence[str]) -> int:
    """Run `trl-cuma chat`; returns the exit code."""
    args = chat_parser().parse_args(argv)
    if args.model is None and args.adapter is None:
        raise ValueError("There is nothing to talk to. Name an adapter with `--adapter`, or a model with `--model`.")
    loading.check_model_paths(args.model, args.adapter)
    texts = args.profile or [""]
    profiles = [parse_profile(text, f"`--profile` number {number}") for number, text in enumerate(texts, start=1)]

    from transformers.utils import logging

    from .answering import Answerer
    from .batches import context_length

    logging.disable_progress_bar()
    model, tokenizer, _ = loading.load_model(
        args.model,
        args.adapter,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
        trust_remote_code=args.trust_remote_code,
    )
    if args.max_new_tokens is None:
        args.max_new_tokens = min(512, (context_length(model) or 1024) // 2)
    answerer = Answerer(model, tokenizer)
    return Chat(answerer, profiles, args).run()


class Chat:
    """Conversations side by side, one for each profile, with the same questions."""

    def __init__(self, answerer: Any, profiles: Sequence[Any], args: argparse.Namespace) -> None:
        self.answerer = answerer
        self.profiles = profiles
        self.prompts = args.prompt
        settings = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
        self.settings, self.seed, self.turn = settings, args.seed, 0
        answerer.sampling(**settings, seed=args.seed)  # says now what is wrong with them
        several = len(profiles) > 1
        for number, profile in enumerate(profiles, start=1):
            what = f"Profile {number}" if several else "The profile"
            for warning in answerer.check_profile(profile, what):
                _say(f"Warning: {warning}")
        if args.system is not None and not answerer.reads_conversations:
            raise ValueError("`--system` needs a conversation, and the tokenizer has no chat template. Leave it out.")
        self.opening = [] if args.system is None else [{"role": "system", "content": args.system}]
        self.clear()

    def clear(self) -> None:
        """Forget the turns so far."""
        self.conversations = [list(self.opening) for _ in self.profiles]

    def run(self) -> int:
        """Until the prompts are answered or the input ends; returns the exit code."""
        typed = self.prompts is None and sys.stdin.isatty()
        if not self.answerer.reads_conversations:
            _say("The tokenizer has no chat template: each prompt is continued as plain text, by itself.")
        if typed:
            _say(HELP)
        for prompt in self._typed() if typed else self.prompts or (line.rstrip("\n") for line in sys.stdin):
            if not prompt.strip():
                continue
            try:
                self.answer(prompt)
            except ValueError as error:
                if not typed:
                    raise
                _say(f"Error: {error}")
            except KeyboardInterrupt:
                if not typed:
                    raise
                _say("Stopped; the turn is forgotten.")
        return 0

    def _typed(self) -> Iterator[str]:
        try:
            import readline  # noqa: F401  gives input() a history
        except ImportError:  # not on every system
            pass
        while True:
            try:
                line = input("\n> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.strip() == "/exit":
                return
            if line.strip() == "/clear":
                self.clear()
                _say("Forgotten.")
            elif line.strip().startswith("/"):
                _say(HELP)
            else:
                yield line

    def answer(self, prompt: str) -> list[str]:
        """One turn: ask all profiles the same, show the answers, and remember them."""
        from .answering import Question
        from .chat_view import make_view

        conversations = [[*turns, {"role": "user", "content": prompt}] for turns in self.conversations]
        sampling = self.answerer.sampling(**self.settings, seed=self.seed + self.turn)
        questions = [
            Question(self.answerer.encode(turns if self.answerer.reads_conversations else prompt), profile, sampling)
            for turns, profile in zip(conversations, self.profiles, strict=True)
        ]
        with make_view(self.profiles) as view:
            replies = self.answerer.answer(questions, on_text=view.add)
        if any(reply.ending == "length" for reply in replies):
            _say(f"(cut off at `--max_new_tokens` {sampling.max_new_tokens})")
        self.turn += 1
        self.conversations = [
            [*turns, {"role": "assistant", "content": reply.text}]
            for turns, reply in zip(conversations, replies, strict=True)
        ]
        return [reply.text for reply in replies]


def _say(text: str) -> None:
    """To the error output, so that the standard output holds answers alone."""
    print(text, file=sys.stderr, flush=True)
