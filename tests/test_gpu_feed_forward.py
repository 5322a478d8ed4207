"""feed_forward on a GPU where the random cases seldom come: tiles that are just cut off, float16's range, memory."""

from __future__ import annotations

import pytest
import torch

from hdit import GlobalAttention, Level
from hdit_kernels import feed_forward, reference
from hdit_kernels.feed_forward import is_one_kernel
from hdit_kernels.testing import poisoned, relative_error
from tests.test_feed_forward import drawn, separate
from tests.test_model import make_block

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [128, 256])
def test_lengths_beside_those_of_tiles(width: int, dtype: torch.dtype, seed: int) -> None:
    """A sample has two tiles of 64 tokens at a time; each must keep to its own tokens, and write them all."""
    for batch, length in ((1, 1), (3, 63), (1, 65), (3, 127), (3, 128), (1, 129), (3, 200)):
        x, scale, up, down = (t.cuda() for t in drawn(batch, length, width=width, d_ff=3 * width, dtype=dtype))
        scale = torch.stack([scale, 100 * scale], 1)[:, 0]  # a view: its rows are not beside each other
        with poisoned():
            out = feed_forward(x, 0.3 * scale, up / width**0.5, down / (3 * width) ** 0.5)
        wide = [t.double() for t in (x, 0.3 * scale, up / width**0.5, down / (3 * width) ** 0.5)]
        assert relative_error(out, reference.feed_forward(*wide)) < TOLERANCE[dtype], (batch, length)


@pytest.mark.parametrize("width", [128, 256])
def test_float16_reaches_as_far_as_separate_operators(width: int) -> None:
    """Hidden activations of 59,000 of the 65,504 that float16 holds."""
    tensors = [torch.ones(1, 70, width), torch.zeros(1, width)]
    tensors += [torch.full((128, width), 243 / width), torch.full((width, 64), 1e-4)]
    tensors = [t.half().cuda() for t in tensors]
    out, plain = feed_forward(*tensors), separate(*tensors)
    wanted = reference.feed_forward(*(t.double() for t in tensors))
    assert wanted.max() > 300 and relative_error(plain, wanted) < 2e-3 and relative_error(out, wanted) < 2e-3


def test_weights_of_another_dtype_are_rounded(seed: int) -> None:
    x, scale, up, down = (t.cuda() for t in drawn(2, 70, width=128, d_ff=128, dtype=torch.float32))
    rounded = [t.bfloat16() for t in (x, up, down)]
    with torch.autocast("cuda", torch.bfloat16):
        out = feed_forward(x, scale, up, down)
    assert torch.equal(out, feed_forward(rounded[0], scale, *rounded[1:]))


def test_a_block_takes_less_memory_than_separate_operators(seed: int) -> None:
    """Forward and backward, where one kernel does forward."""
    block = make_block(Level(1, 128, attention=GlobalAttention(64))).bfloat16().cuda()
    x = torch.randn(4, 64, 64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cond = torch.randn(4, 8, device="cuda", dtype=torch.bfloat16)

    def peak() -> int:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(block(x, cond), [x, *block.parameters()], x.detach())
        return torch.cuda.max_memory_allocated() - held

    if not is_one_kernel(x, 384):
        pytest.skip("needs a Hopper GPU and Triton's Gluon as known")
    peak()  # compiles, and makes cuBLAS take its workspace
    fused = peak()
    block.norm.register_forward_hook(lambda module, args, out: None)
    peak()
    assert fused < 0.8 * peak(), fused


def test_the_launcher_takes_what_the_model_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper both do, also while torch.compile traces; on other GPUs and with portable kernels neither."""
    from hdit_kernels import feed_forward_hopper, launch

    x, scale, up, down = (t.cuda() for t in drawn(2, 70, width=128, d_ff=128, dtype=torch.bfloat16))
    hopper = launch.gpu_family(x.device) == "hopper"
    traced = torch.compile(lambda x: x + 1 if is_one_kernel(x, 128) else x, fullgraph=True)
    for backend in ("auto", "triton"):
        monkeypatch.setattr("hdit_kernels.backend.chosen", backend)
        found = feed_forward_hopper.takes(x, scale, up, down)
        assert found == is_one_kernel(x, 128) == (hopper and backend == "auto")
        assert torch.equal(traced(x), x + 1 if found else x)
    monkeypatch.undo()
    with torch.autocast("cuda", torch.bfloat16):
        assert is_one_kernel(x.float(), 128) == is_one_kernel(x, 128)
    assert not is_one_kernel(x.float(), 128) and not is_one_kernel(x, 96) and not is_one_kernel(x[..., :64], 128)
