# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""From an adapter to answers: load it with its base, read profiles, answer batches that mix profiles."""
