"""Augmentation of images that tells the model what was done (Karras et al. 2022, EDM, arXiv 2206.00364, appendix F.2).

The model gets nine numbers with each image, as aug_cond. It samples with zeros, which stand for an image as it is, so
nothing of the augmentation leaks into the samples:

    0     1 if mirrored left to right
    1     1 if mirrored top to bottom
    2     n, if enlarged by 2**(0.2 n)
    3, 4  cos r - 1 and sin r, if turned counterclockwise by r
    5, 6  n cos r and n sin r, if stretched by 2**(0.2 n) along the axis at the clockwise angle r to the rows, and as
          much narrowed across it
    7, 8  m and n, if moved to the right by m of 8 parts of the width, and down by n of 8 parts of the height

r is uniform in [-pi, pi), and m and n are standard normal. hdit.train doesn't call it yet.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from hdit_kernels import checks

LOG2_STEP, MOVE = 0.2, 1 / 8  # of scaling and anisotropy; of translation, in parts of the image
DRAWS = 13  # random numbers an image takes, whatever becomes of them


def augment(images: Tensor, p: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augments images, and says how.

    images: [B, C, H, W] of any floating dtype, which are left as they are. p: the probability in [0, 1] of each step:
    an image is mirrored top to bottom (and then only by half a chance), scaled, rotated, stretched and moved, each for
    itself; EDM and k-diffusion take 0.12 by default. Half of the images are mirrored left to right whatever p is, as in
    both, but none at p = 0. generator: on the CPU. Each image takes 13 numbers in a row from it whatever p is, so what
    becomes of an image depends on how many came before it, not on its batch, nor on the device of images.
    Returns the augmented images, like images, and their numbers [B, 9] on the same device, in at least float32.
    Raises TypeError or ValueError, naming the argument.

    As in k-diffusion the steps act on an image in the order translation, anisotropy, rotation, scaling, flips, about
    its centre, and what comes in from outside is its reflection about the outermost pixels' centres. (EDM's code takes
    the opposite order, turns the axis of anisotropy the other way, and leaves it horizontal in half of the cases.)
    Mirroring is exact. The rest is resampled once by bicubic interpolation (torch's, a = -0.75; k-diffusion's has
    a = -0.5), in at least float32. A shrunken image is not smoothed first, as EDM's band-limited resampling does: fine
    patterns in it can alias. At edges the values may pass those of the image, and are not clipped, as in both.
    """
    checks.floating(images=images)
    checks.shape("images", images, ["B", "C", "H", "W"])
    checks.nonempty("images", images)
    p = checks.number("p", p, at_least=0, at_most=1)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {checks.shown(generator)}")
    if generator.device.type != "cpu":
        raise ValueError(f"generator: expected one on the CPU, got one on {generator.device}")
    a = _draw(images.shape[0], p, generator)
    numbers = _conditioning(a).to(images.device, torch.promote_types(images.dtype, torch.float32))
    return _transformed(images, a), numbers


def _draw(count: int, p: float, generator: torch.Generator) -> Tensor:
    """EDM's a0 to a7 for each image: float64 [count, 8], zeros where nothing is to be done."""
    # Uniform numbers come from a CPU's generator one after the other however many are asked for; normal ones don't.
    u = torch.rand(count, DRAWS, dtype=torch.float64, generator=generator)
    normal = torch.special.ndtri(u.clamp(min=2.0**-54))
    angle = (2 * u - 1) * math.pi
    coin = (u < 0.5).double()
    y_flip, scaled, rotated, stretched, moved = (u[:, i] < p for i in range(1, 6))
    return torch.stack(
        [
            coin[:, 0] * (p > 0),
            coin[:, 6] * y_flip,
            normal[:, 7] * scaled,
            angle[:, 8] * rotated,
            angle[:, 9] * stretched,
            normal[:, 10] * stretched,
            normal[:, 11] * moved,
            normal[:, 12] * moved,
        ],
        dim=1,
    )


def _conditioning(a: Tensor) -> Tensor:
    """The nine numbers [B, 9] of a [B, 8]."""
    x_flip, y_flip, scale, turn, axis, stretch, right, down = a.unbind(1)
    return torch.stack(
        [x_flip, y_flip, scale, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin(), right, down],
        dim=1,
    )


def _linear(a: Tensor) -> Tensor:
    """[B, 2, 2]: where scaling, rotation and anisotropy take a point (x to the right, y down) around the centre."""
    scale, stretch = (2 ** (LOG2_STEP * a[:, i]) for i in (2, 5))
    squeeze = torch.diag_embed(torch.stack([stretch, 1 / stretch], dim=1))
    return scale[:, None, None] * (_rotation(-a[:, 3]) @ _rotation(a[:, 4]) @ squeeze @ _rotation(-a[:, 4]))


def _rotation(angle: Tensor) -> Tensor:
    """[B, 2, 2]: the rotation from x towards y, which is clockwise where y points down."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)


def _transformed(images: Tensor, a: Tensor) -> Tensor:
    """Images [B, C, H, W] as a [B, 8] says; those that only stay or are mirrored keep their values to the bit."""
    result = images.clone()
    resampled = (a[:, 2:] != 0).any(1).nonzero().flatten()
    if resampled.numel():
        chosen = resampled.to(images.device)
        result[chosen] = _resample(images[chosen], a[resampled]).to(images.dtype)
    for column, dim in ((0, 3), (1, 2)):
        chosen = a[:, column].nonzero().flatten().to(images.device)
        result[chosen] = result[chosen].flip(dim)
    return result


def _resample(images: Tensor, a: Tensor) -> Tensor:
    """Images [B, C, H, W] moved, stretched, rotated and scaled as a [B, 8] says, in at least float32."""
    height, width = images.shape[2:]
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    # Counted from the centre, the pixel at a point is taken from the source with _linear(a) @ (source + shift) = point.
    y, x = (torch.arange(size).to(wide) - (size - 1) / 2 for size in (height, width))
    inverse = torch.linalg.inv(_linear(a)).to(wide)[:, None, None]
    shift = (MOVE * a[:, 6:] * a.new_tensor([width, height])).to(wide)[:, None, None]
    sources = inverse[..., 0] * x[:, None] + inverse[..., 1] * y[:, None, None] - shift  # [B, H, W, 2]
    unit = sources.new_tensor([width - 1, height - 1]).clamp(min=1) / 2  # grid_sample has 1 at the outermost pixels
    return functional.grid_sample(wide, sources / unit, mode="bicubic", padding_mode="reflection", align_corners=True)
