# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
An OpenAI-compatible server for development: answers by profile, where no inference engine knows routed adapters.

`examples/serve.py` runs it; it needs `pip install 'trl_cuma[serve]'`. For production see `recipes/serving`.
"""

from ..extras import needs_extra

with needs_extra("serve", "The server"):
    import fastapi  # noqa: F401  for all modules here
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
