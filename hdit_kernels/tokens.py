"""`token_merge` and `token_split`: the steps between levels, pixel-unshuffle and -shuffle with their projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdit_kernels import checks, reference, registration
from hdit_kernels.autograd import differentiable, wanted


def token_merge(x: Tensor, weight: Tensor, patch_size: Sequence[int] = (2, 2)) -> Tensor:
    """Each h x w patch of tokens becomes one: pixel-unshuffle, then projection without bias.

    Args:
        x: [B, H·h, W·w, C], bfloat16, float16 or float32 (float64 takes the reference); any strides.
        weight: [out, h·w·C], columns in the order (row of the patch, column of the patch, channel); may have another
            dtype than x, and is then rounded to x's for the product.
        patch_size: (h, w).

    Returns:
        [B, H, W, out] in x's dtype, contiguous. Under autocast x is cast to the autocast dtype first. A backward pass
        needs a rearranged copy of x, which is kept for it: x's bytes once more. (x itself is kept for derivatives
        beyond the first; not in a graph of torch.compile.)

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape, or the patches do not tile x.

    Source: HDiT, Crowson et al. 2024, arXiv:2401.11605, section 4.1.
    """
    checks.floating(x=x, weight=weight)
    h, w = _patch(patch_size)
    checks.shape("x", x, ["B", "H·h", "W·w", "C"])
    if x.shape[1] % h != 0 or x.shape[2] % w != 0:
        raise ValueError(
            f"x: expected height and width divisible by patch_size {(h, w)}, got {x.shape[1]} x {x.shape[2]}"
        )
    checks.shape("weight", weight, ["out", h * w * x.shape[3]])
    _check_sizes_and_float64(x, weight)
    x = registration.cast(x, registration.autocast_dtype(x))
    return _merge(x, weight, (h, w))


def token_split(
    x: Tensor,
    weight: Tensor,
    patch_size: Sequence[int] = (2, 2),
    skip: Tensor | None = None,
    fac: Tensor | None = None,
) -> Tensor:
    """Each token becomes an h x w patch: projection without bias y, pixel-shuffle; with a skip skip + fac · (y − skip).

    Args:
        x: [B, H, W, in], bfloat16, float16 or float32 (float64 takes the reference); any strides, copied where its rows
            can't be seen as those of a matrix.
        weight: [h·w·C, in], rows in the order (row of the patch, column of the patch, channel); may have another
            dtype than x, and is then rounded to x's for the product.
        patch_size: (h, w).
        skip: [B, H·h, W·w, C] or None, any strides and floating dtype.
        fac: [1], given exactly when skip is: the weight of y. It is read on the device and stays in its own dtype.

    Returns:
        [B, H·h, W·w, C] in x's dtype, contiguous. Under autocast x and skip are cast to the autocast dtype first. With
        a skip y is rounded to x's dtype before it is weighted, unless a kernel has both: in 16 bits on a GPU, for fewer
        than 768 input features, a multiple of 64 (32 elsewhere than on Hopper), at multiples of 16 bytes. A backward
        pass with a skip needs y − skip, which is kept for it, rounded to x's dtype: the output's bytes once more. (skip
        itself is kept for derivatives beyond the first; not in a graph of torch.compile.)

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape, or only one of skip and fac is given.

    Source: HDiT, Crowson et al. 2024, arXiv:2401.11605, section 4.1 (the learned linear interpolation with the skip).
    """
    if (skip is None) != (fac is None):
        missing, given = ("fac", "skip") if fac is None else ("skip", "fac")
        raise ValueError(f"{missing}: expected a tensor when {given} is, got None")
    if skip is None or fac is None:
        checks.floating(x=x, weight=weight)
    else:
        checks.floating(x=x, weight=weight, skip=skip, fac=fac)
    h, w = _patch(patch_size)
    checks.shape("x", x, ["B", "H", "W", "in"])
    checks.shape("weight", weight, ["h·w·C", x.shape[3]])
    if weight.shape[0] % (h * w) != 0:
        raise ValueError(f"weight: expected rows divisible by the patch, {h} · {w}, got {weight.shape[0]} rows")
    _check_sizes_and_float64(x, weight)
    dtype = registration.autocast_dtype(x)
    if skip is None or fac is None:
        return _split(registration.cast(x, dtype), weight, (h, w))
    checks.shape("skip", skip, _split_shape(x.shape, weight.shape, (h, w)))
    checks.shape("fac", fac, [1])
    return _split_with_skip(registration.cast(x, dtype), weight, registration.cast(skip, dtype), fac, (h, w))


def _patch(patch_size: Sequence[int]) -> tuple[int, int]:
    if isinstance(patch_size, int):
        raise TypeError(f"patch_size: expected two integers (rows, columns), got {checks.shown(patch_size)}")
    return checks.pair("patch_size", patch_size)


def _check_sizes_and_float64(x: Tensor, weight: Tensor) -> None:
    checks.nonempty("x", x)
    checks.nonempty("weight", weight, first=0)
    if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"weight: expected float64 exactly when x is, got {weight.dtype} beside {x.dtype}")


def _split_shape(x: Sequence[int], weight: Sequence[int], patch_size: Sequence[int]) -> list[int]:
    h, w = patch_size
    return [x[0], x[1] * h, x[2] * w, weight[0] // (h * w)]


# The operators. needed: which of the gradients to compute; the others come back empty.


def _patches(fine: Tensor, patch_size: Sequence[int]) -> Tensor:
    """[B, H·h, W·w, C] -> [B, H, W, h·w·C]."""
    (h, w), (batch, height, width, channels) = patch_size, fine.shape
    rows = fine.reshape(batch, height // h, h, width // w, w * channels)
    return rows.transpose(2, 3).clone(memory_format=torch.contiguous_format).flatten(3)  # never a view


def _unpatched(patches: Tensor, patch_size: Sequence[int]) -> Tensor:
    """[B, H, W, h·w·C] -> [B, H·h, W·w, C]."""
    (h, w), (batch, height, width, columns) = patch_size, patches.shape
    rows = patches.view(batch, height, width, h, columns // h).transpose(2, 3)
    return rows.reshape(batch, height * h, width * w, columns // (h * w))


def _reference_merge_forward(x: Tensor, weight: Tensor, patch_size: list[int], save: bool) -> list[Tensor]:
    return [reference.token_merge(x, weight, patch_size)] + save * [_patches(x, patch_size)]


def _reference_merge_backward(
    dout: Tensor, patches: Tensor, weight: Tensor, patch_size: list[int], needed: list[bool]
) -> Any:
    x = _unpatched(patches, patch_size)
    return registration.gradients(
        lambda x, weight: reference.token_merge(x, weight, patch_size), (x, weight), dout, needed
    )


def _reference_split_forward(
    x: Tensor, weight: Tensor, patch_size: list[int], skip: Tensor | None, fac: Tensor | None, save: bool
) -> list[Tensor]:
    out = reference.token_split(x, weight, patch_size, skip, fac)
    if not save or skip is None:
        return [out]
    wide = torch.promote_types(x.dtype, torch.float32)
    y = reference.token_split(x.to(wide), weight, patch_size)
    return [out, _patches((y - skip).to(x.dtype), patch_size)]


def _reference_split_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    patch_size: list[int],
    difference: Tensor | None,
    fac: Tensor | None,
    skip_dtype: torch.dtype | None,
    needed: list[bool],
) -> Any:
    def split(x: Tensor, weight: Tensor) -> Tensor:
        return reference.token_split(x, weight, patch_size)

    if difference is None or fac is None:
        return (*registration.gradients(split, (x, weight), dout, needed[:2]), dout.new_empty(0), dout.new_empty(0))
    wide = torch.promote_types(x.dtype, torch.float32)
    gradient, part = dout.to(wide), fac.to(wide)
    dx, dweight = registration.gradients(split, (x.to(wide), weight), part * gradient, needed[:2])
    dskip = ((1 - part) * gradient).to(skip_dtype)
    dfac = (gradient * _unpatched(difference, patch_size)).sum()[None].to(fac.dtype)
    found = dx.to(x.dtype), dweight, dskip, dfac
    return tuple(gradient if wanted else dout.new_empty(0) for gradient, wanted in zip(found, needed, strict=True))


def _flops(x: Sequence[int], weight: Sequence[int]) -> int:
    """One product of as many rows as the weight's projection has: 2 · rows · in · out, for either operator."""
    elements = 1
    for size in x:
        elements *= size
    return 2 * elements * weight[0]


def _merge_flops(x, weight, patch_size, save):  # type: ignore[no-untyped-def]
    """2 · rows · h·w·C · out; x has rows · h·w·C elements."""
    return _flops(x, weight)


def _merge_backward_flops(dout, patches, weight, patch_size, needed):  # type: ignore[no-untyped-def]
    return _flops(patches, weight) * sum(needed)


def _split_flops(x, weight, patch_size, skip, fac, save):  # type: ignore[no-untyped-def]
    """2 · rows · in · h·w·C; x has rows · in elements."""
    return _flops(x, weight)


def _split_backward_flops(dout, x, weight, patch_size, difference, fac, skip_dtype, needed):  # type: ignore[no-untyped-def]
    return _flops(x, weight) * (needed[0] + needed[1])


def _kernels():
    """The launchers' module, which imports Triton."""
    from hdit_kernels import tokens_triton

    return tokens_triton


def _fake_merge_forward(x, weight, patch_size, save):  # type: ignore[no-untyped-def]
    grid = (x.shape[0], x.shape[1] // patch_size[0], x.shape[2] // patch_size[1])
    return [x.new_empty((*grid, size)) for size in (weight.shape if save else weight.shape[:1])]


def _fake_merge_backward(dout, patches, weight, patch_size, needed):  # type: ignore[no-untyped-def]
    (h, w), (batch, height, width, columns) = patch_size, patches.shape
    dx = dout.new_empty((batch, height * h, width * w, columns // (h * w)) if needed[0] else 0)
    return dx, weight.new_empty(weight.shape) if needed[1] else dout.new_empty(0)


def _fake_split_forward(x, weight, patch_size, skip, fac, save):  # type: ignore[no-untyped-def]
    kept = [x.new_empty((*x.shape[:3], weight.shape[0]))] if save and skip is not None else []
    return [x.new_empty(_split_shape(x.shape, weight.shape, patch_size)), *kept]


def _fake_split_backward(dout, x, weight, patch_size, difference, fac, skip_dtype, needed):  # type: ignore[no-untyped-def]
    like = [(x, x.dtype), (weight, weight.dtype), (dout, skip_dtype), (fac, fac.dtype if fac is not None else None)]
    return tuple(
        t.new_empty(t.shape, dtype=dtype) if wanted and t is not None else dout.new_empty(0)
        for (t, dtype), wanted in zip(like, needed, strict=True)
    )


_merge_forward = registration.define(
    "token_merge_forward",
    "(Tensor x, Tensor weight, int[] patch_size, bool save) -> Tensor[]",
    reference=_reference_merge_forward,
    launcher=lambda: _kernels().token_merge_forward,
    fake=_fake_merge_forward,
    flops=_merge_flops,
)
_merge_backward = registration.define(
    "token_merge_backward",
    "(Tensor dout, Tensor patches, Tensor weight, int[] patch_size, bool[] needed) -> (Tensor, Tensor)",
    reference=_reference_merge_backward,
    launcher=lambda: _kernels().token_merge_backward,
    fake=_fake_merge_backward,
    flops=_merge_backward_flops,
)
_split_forward = registration.define(
    "token_split_forward",
    "(Tensor x, Tensor weight, int[] patch_size, Tensor? skip, Tensor? fac, bool save) -> Tensor[]",
    reference=_reference_split_forward,
    launcher=lambda: _kernels().token_split_forward,
    fake=_fake_split_forward,
    flops=_split_flops,
)
_split_backward = registration.define(
    "token_split_backward",
    "(Tensor dout, Tensor x, Tensor weight, int[] patch_size, Tensor? difference, Tensor? fac, "
    "ScalarType? skip_dtype, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_split_backward,
    launcher=lambda: _kernels().token_split_backward,
    fake=_fake_split_backward,
    flops=_split_backward_flops,
)
_merge = differentiable(
    reference.token_merge,
    forward=_merge_forward,
    backward=lambda cotangents, tensors, saved, settings, needed: wanted(
        _merge_backward(*cotangents, *saved, tensors[1], *settings, needed), needed
    ),
    inputs=2,
    extras=1,
    keep_output=False,
)
_split = differentiable(
    reference.token_split,
    forward=lambda x, weight, patch_size: _split_forward(x, weight, patch_size, None, None, False)[0],
    backward=lambda cotangents, tensors, saved, settings, needed: wanted(
        _split_backward(*cotangents, *tensors, *settings, None, None, None, [*needed, False, False])[:2], needed
    ),
    inputs=2,
)


def _blend_gradients(
    cotangents: Any, tensors: Any, saved: Any, settings: Any, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    x, weight, skip, fac = tensors
    return wanted(_split_backward(*cotangents, x, weight, *settings, *saved, fac, skip.dtype, needed), needed)


_split_with_skip = differentiable(
    lambda x, weight, skip, fac, patch_size: reference.token_split(x, weight, patch_size, skip, fac),
    forward=lambda x, weight, skip, fac, patch_size, save: _split_forward(x, weight, patch_size, skip, fac, save),
    backward=_blend_gradients,
    inputs=4,
    extras=1,
    keep_output=False,
)
