# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""CuMA in other training frameworks."""
