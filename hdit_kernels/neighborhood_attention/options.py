"""What a call of `na2d` asks for beyond the plain one. The portable kernels take it in variants: the plain call's
binaries know nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor

from hdit_kernels.launch import Launch


class Options(NamedTuple):
    """Of a call that is not plain.

    group: heads of queries to one of keys and values. extra_k and extra_v: what every query sees, [B, extra, heads,
    head_dim], contiguous, at multiples of 16 bytes; where there are none (extra 0), any tensors.
    """

    group: int
    stride: Sequence[int]
    causal: Sequence[bool]
    extra: int
    extra_k: Tensor
    extra_v: Tensor

    def windows(self) -> dict[str, Any]:
        """Optional arguments of the portable kernels, the first of them."""
        (stride_y, stride_x), (causal_y, causal_x) = self.stride, self.causal
        axes = dict(stride_y=stride_y, stride_x=stride_x, causal_y=int(causal_y), causal_x=int(causal_x))
        return dict(group=self.group) | axes

    def arguments(self) -> dict[str, Any]:
        """All of them, in their order."""
        return self.windows() | dict(extra=self.extra, extra_k_ptr=self.extra_k, extra_v_ptr=self.extra_v)


def options(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    add_k: Tensor | None,
    add_v: Tensor | None,
    stride: Sequence[int] | None,
    causal: Sequence[bool] | None,
) -> Options | None:
    """None for a plain call."""
    one_by_one = stride is None or max(stride) == 1
    if one_by_one and add_k is None and (causal is None or not any(causal)) and query.shape == value.shape:
        return None
    group, stride, causal = query.shape[3] // key.shape[3], stride or (1, 1), causal or (False, False)
    if add_k is None or add_v is None or add_k.shape[1] == 0:
        return Options(group, stride, causal, 0, key, value)
    return Options(group, stride, causal, add_k.shape[1], _packed(add_k), _packed(add_v))


def _packed(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def with_options(plain: Launch, value_dim: int, arguments: dict[str, Any]) -> Launch:
    """The launch of the variant that takes these optional arguments."""
    constants = dict(OPTIONS=True, VALUE_D=value_dim, BLOCK_VALUE_D=max(16, triton.next_power_of_2(value_dim)))
    return plain._replace(constants={**plain.constants, **constants}, optional=arguments)
