# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`python modules.py`: imports every module of trl_cuma; fails for one that fails without a hint what to install."""

import importlib
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def module_names() -> list[str]:
    """Every module of the installed package, by its file; none is imported but the package itself."""
    import trl_cuma

    root = Path(trl_cuma.__file__).parent
    names = (".".join(path.relative_to(root.parent).with_suffix("").parts) for path in root.rglob("*.py"))
    return sorted(name.removesuffix(".__init__") for name in names)


def import_all() -> tuple[dict[str, str], list[str]]:
    """
    Import every module.

    Returns:
        module → its error, of those that ask for an extra; and a traceback for each that fails in another way.
    """
    asking, broken = {}, []
    for name in module_names():
        try:
            importlib.import_module(name)
        except ImportError as error:
            if "pip install '" in str(error):
                asking[name] = str(error)
            else:
                broken.append(f"{name}\n{traceback.format_exc()}")
        except Exception:
            broken.append(f"{name}\n{traceback.format_exc()}")
    return asking, broken


if __name__ == "__main__":
    asking, broken = import_all()
    for name, error in asking.items():
        print(f"{name}: {error}")
    print(*broken, sep="\n", file=sys.stderr)
    sys.exit(1 if broken else 0)
