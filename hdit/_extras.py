"""Packages that only some parts of hdit need."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports a module that torch doesn't bring.

    module: its dotted name. extra: the extra of our pyproject.toml that installs it.
    Raises ModuleNotFoundError naming both.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, one of its own imports is not
        raise ModuleNotFoundError(
            f'{package} is needed here: pip install "hdit-kernels[{extra}]"', name=package
        ) from error
