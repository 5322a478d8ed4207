"""feed_forward: the launchers themselves, on tiny tensors (torch's products beside the kernels of the interpreter)."""

from __future__ import annotations

import pytest
import torch

from hdit_kernels import feed_forward_triton, reference, registration
from hdit_kernels.testing import relative_error


@pytest.mark.parametrize("d_ff", [16, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_reference(dtype, d_ff, seed) -> None:
    shapes = (2, 3, 7, 12), (2, 12), (2 * d_ff, 12), (12, d_ff)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    tensors[0] = tensors[0].transpose(1, 2)  # not contiguous
    dout = torch.randn(tensors[0].shape).to(dtype)
    exact = [t.double() for t in tensors]
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    out = feed_forward_triton.feed_forward_forward(*tensors, 1e-6)
    assert relative_error(out, reference.feed_forward(*exact)) < tolerance
    wanted = registration.vjp(reference.feed_forward, tuple(exact), (dout.double(),))
    found = feed_forward_triton.feed_forward_backward(dout, *tensors, 1e-6, [True] * 4)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype and relative_error(one, other) < tolerance
