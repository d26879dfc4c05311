# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
An OpenAI-compatible server whose answers depend on who asks. For development; for production see recipes/serving.

    pip install 'trl_cuma[serve]'
    python examples/serve.py --adapter runs/cuma

The profile travels in a request's `metadata`, field → value:

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
      "messages": [{"role": "user", "content": "What makes a good life?"}],
      "metadata": {"country": "Kenya", "age": "25-34"}, "max_tokens": 64, "stream": true}'

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="cuma", messages=[...], metadata={"country": "Kenya"}, max_tokens=64)

Endpoints: /v1/chat/completions and /v1/completions (streaming or not), /v1/models, /health, /metrics (Prometheus).
Requests of different people, with different settings, are decoded in one batch. Fields that the adapter doesn't know
are refused; a value that it doesn't know is answered as if it weren't given, with `warnings` in the response. No
profile, prompt or answer is logged. With CUMA_API_KEY in the environment, clients must send it as a bearer token.
"""

import argparse
import ipaddress
import os
import sys

from trl_cuma.generation.loading import add_loading_arguments, add_model_arguments, check_model_paths, load_model

LIMITS = {
    "max_batch": (16, "answers that are decoded at a time"),
    "wait_ms": (5.0, "milliseconds that a batch waits for company"),
    "max_queue": (128, "answers that may wait; beyond, 503"),
    "max_body": (256 * 1024, "bytes of a request; beyond, 413"),
    "max_total_tokens": (4096, "tokens of a prompt with its answer, at most the model's context; beyond, 400"),
    "default_max_tokens": (512, "tokens of an answer whose request gives no limit"),
    "max_choices": (8, "answers to one request (`n`, prompts)"),
}


def main(argv: list[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--name", default=None, help="of the model, for clients; default: the adapter's folder")
    parser.add_argument("--allow_no_key", action="store_true", help="serve other machines without CUMA_API_KEY")
    for name, (default, text) in LIMITS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text}; default: {default}")
    add_loading_arguments(parser)
    args = parser.parse_args(argv)
    key = os.environ.get("CUMA_API_KEY")
    if key is None and not is_loopback(args.host) and not args.allow_no_key:
        raise ValueError(
            f"`--host` is {args.host!r}, which other machines can reach, and there is no key. Set CUMA_API_KEY, or "
            "pass `--allow_no_key` if something before the server asks for one."
        )
    if args.model is None and args.adapter is None:
        raise ValueError("There is nothing to serve. Name an adapter with `--adapter`, or a model with `--model`.")
    check_model_paths(args.model, args.adapter)
    from trl_cuma.generation.answering import Answerer
    from trl_cuma.serving.app import ServerSettings, create_app  # first: without the extra it says how to get it

    import uvicorn  # isort: skip

    name = args.name or os.path.basename(os.path.normpath(args.adapter or args.model))
    settings = ServerSettings(name=name, api_key=key, **{name: getattr(args, name) for name in LIMITS})
    loading = {name: getattr(args, name) for name in ("dtype", "load_in_4bit", "trust_remote_code")}
    model, tokenizer, _ = load_model(args.model, args.adapter, **loading)
    app = create_app(Answerer(model, tokenizer), settings)
    print(f"Serving {name!r} on http://{args.host}:{args.port}/v1, {'with' if key else 'without'} a key.", flush=True)
    # No access log: lines of it would tell who asked when. The app's own log names errors and no content.
    uvicorn.run(app, host=args.host, port=args.port, access_log=False, log_level="warning")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"serve.py: error: {error}")
