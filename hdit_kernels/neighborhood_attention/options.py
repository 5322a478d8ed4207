"""What a call of `na2d` asks for beyond the plain one. The portable kernels take it in variants: the plain call's
binaries know nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Options(NamedTuple):
    """Of a call that is not plain."""

    stride: Sequence[int]
    causal: Sequence[bool]

    def arguments(self) -> dict[str, Any]:
        """The optional arguments of the portable kernels that walk windows, in their order."""
        (stride_y, stride_x), (causal_y, causal_x) = self.stride, self.causal
        return dict(stride_y=stride_y, stride_x=stride_x, causal_y=int(causal_y), causal_x=int(causal_x))


def with_options(constants: dict[str, Any], options: Options | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constants of a launch and its optional arguments."""
    return (constants, {}) if options is None else (constants | {"OPTIONS": True}, options.arguments())


def options(stride: Sequence[int] | None, causal: Sequence[bool] | None) -> Options | None:
    """None for a plain call."""
    if (stride is None or max(stride) == 1) and (causal is None or not any(causal)):
        return None
    return Options(stride or (1, 1), causal or (False, False))
