"""What a call of `na2d` asks for beyond the plain one. The portable kernels take it in variants: the plain call's
binaries know nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Options(NamedTuple):
    """Of a call that is not plain."""

    causal: Sequence[bool]

    def arguments(self) -> dict[str, Any]:
        """The optional arguments of the portable kernels that walk windows, in their order."""
        return dict(causal_y=int(self.causal[0]), causal_x=int(self.causal[1]))


def with_options(constants: dict[str, Any], options: Options | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constants of a launch and its optional arguments."""
    return (constants, {}) if options is None else (constants | {"OPTIONS": True}, options.arguments())


def options(causal: Sequence[bool] | None) -> Options | None:
    """None for a plain call."""
    if causal is None or not any(causal):
        return None
    return Options(causal)
