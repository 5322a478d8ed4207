from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hdit import augment as module
from hdit.augment import _conditioning, _draw, _linear, _transformed, augment
from tests.tiny import random_model

# Places of a0 to a7, as EDM's appendix F.2 and k-diffusion call them
X_FLIP, Y_FLIP, SCALE, TURN, AXIS, STRETCH, RIGHT, DOWN = range(8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(**values: float) -> torch.Tensor:
    """a [1, 8] that is zero but for the named places."""
    a = torch.zeros(1, 8, dtype=torch.float64)
    for name, value in values.items():
        a[0, globals()[name]] = value
    return a


def smooth(height: int, width: int) -> torch.Tensor:
    """An image [1, 1, H, W] that interpolation can follow: a broad spot off the centre."""
    y, x = torch.meshgrid(torch.arange(height) - 0.45 * height, torch.arange(width) - 0.6 * width, indexing="ij")
    return torch.exp(-((x / width) ** 2 * 15 + (y / height) ** 2 * 30))[None, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nothing_happens_at_0(dtype: torch.dtype, seed: int) -> None:
    images = torch.rand(50, 3, 5, 7).to(dtype)
    out, numbers = augment(images, 0, generator())
    assert torch.equal(out, images) and out.dtype == dtype and out.data_ptr() != images.data_ptr()
    assert numbers.shape == (50, 9) and not numbers.any()
    assert numbers.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    ("flips", "dims", "numbers"),
    [
        ({"X_FLIP": 1}, (3,), [1, 0]),
        ({"Y_FLIP": 1}, (2,), [0, 1]),
        ({"X_FLIP": 1, "Y_FLIP": 1}, (2, 3), [1, 1]),
    ],
)
def test_flips(flips: dict[str, float], dims: tuple[int, ...], numbers: list[int], seed: int) -> None:
    images, a = torch.randn(1, 3, 5, 8), parameters(**flips)
    assert torch.equal(_transformed(images, a), images.flip(dims))
    assert _conditioning(a).tolist() == [[*numbers, 0, 0, 0, 0, 0, 0, 0]]


def test_small_probabilities_flip_exactly(seed: int) -> None:
    """At a p too small for the rest half of the images are mirrored, and their numbers tell which."""
    images = torch.randn(200, 1, 4, 6)
    out, numbers = augment(images, 1e-9, generator())
    mirrored = numbers[:, 0] == 1
    assert 70 < mirrored.sum() < 130 and not numbers[:, 1:].any()
    assert torch.equal(out[mirrored], images[mirrored].flip(3)) and torch.equal(out[~mirrored], images[~mirrored])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
def test_moved_by_whole_pixels(height: int, width: int, seed: int) -> None:
    """1 is an eighth of the size, to the right or down; what comes in is reflected about the edge's pixels."""
    images = torch.randn(1, 2, height, width)
    right, down = width // 8, height // 8
    out = _transformed(images, parameters(RIGHT=1))
    torch.testing.assert_close(out[..., right:], images[..., :-right], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[..., :right], images[..., 1 : right + 1].flip(3), atol=1e-5, rtol=0)
    out = _transformed(images, parameters(DOWN=-1))
    torch.testing.assert_close(out[..., :-down, :], images[..., down:, :], atol=1e-5, rtol=0)
    assert _conditioning(parameters(RIGHT=1, DOWN=-2)).tolist() == [[0, 0, 0, 0, 0, 0, 0, 1, -2]]


@pytest.mark.parametrize("turns", [-1, 1, 2])
def test_quarter_turns(turns: int, seed: int) -> None:
    images, a = torch.randn(1, 2, 9, 9), parameters(TURN=turns * math.pi / 2)
    torch.testing.assert_close(_transformed(images, a), images.rot90(turns, (2, 3)), atol=1e-5, rtol=0)
    wanted = torch.zeros(1, 9, dtype=torch.float64)
    wanted[0, 3:5] = torch.tensor([-2.0, 0.0] if turns == 2 else [-1.0, turns])
    torch.testing.assert_close(_conditioning(a), wanted)


def test_scaling_and_anisotropy_by_powers_of_two(seed: int) -> None:
    """5 is a factor of 2: the pixel that far from the centre then lies half or twice as far."""
    images = torch.randn(1, 1, 9, 9)
    half = images[..., ::2, ::2]
    torch.testing.assert_close(_transformed(images, parameters(SCALE=-5))[..., 2:7, 2:7], half, atol=1e-5, rtol=0)
    twice = _transformed(images, parameters(SCALE=5))
    torch.testing.assert_close(twice[..., ::2, ::2], images[..., 2:7, 2:7], atol=1e-5, rtol=0)
    wide = _transformed(images, parameters(STRETCH=5))  # twice as wide, half as high
    torch.testing.assert_close(wide[..., 2:7, ::2], images[..., ::2, 2:7], atol=1e-5, rtol=0)
    high = _transformed(images, parameters(STRETCH=5, AXIS=math.pi / 2))
    torch.testing.assert_close(high[..., ::2, 2:7], images[..., 2:7, ::2], atol=1e-5, rtol=0)
    wanted = torch.tensor([[0, 0, -5, 0, 0, 3 * 0.5, 3 * 3**0.5 / 2, 0, 0]]).double()
    torch.testing.assert_close(_conditioning(parameters(SCALE=-5, STRETCH=3, AXIS=math.pi / 3)), wanted)


def test_stretched_along_the_axis() -> None:
    """Which is turned from x (to the right) towards y (down)."""
    linear = _linear(parameters(STRETCH=5, AXIS=math.pi / 3))[0]
    along = torch.tensor([0.5, 3**0.5 / 2]).double()
    across = torch.tensor([-(3**0.5) / 2, 0.5]).double()
    torch.testing.assert_close(linear @ along, 2 * along)
    torch.testing.assert_close(linear @ across, across / 2)


def test_interpolation_is_bicubic() -> None:
    """One white pixel moved by half a pixel: the kernel of a = -0.75 at 1.5, 0.5, -0.5 and -1.5."""
    image = torch.zeros(1, 1, 1, 16)
    image[..., 8] = 1
    out = _transformed(image, parameters(RIGHT=0.25))
    torch.testing.assert_close(out[0, 0, 0, 7:11], torch.tensor([-3.0, 19, 19, -3]) / 32, atol=1e-5, rtol=0)


def test_order() -> None:
    """Moved, then stretched, turned, scaled and mirrored: at once as one by one, in k-diffusion's order."""
    values = {"RIGHT": 0.6, "DOWN": -0.3, "STRETCH": 0.9, "AXIS": 0.7, "TURN": 1.1, "SCALE": 0.4, "Y_FLIP": 1.0}
    image = smooth(96, 96)
    at_once = _transformed(image, parameters(**values))
    for names in (("RIGHT", "DOWN"), ("STRETCH", "AXIS"), ("TURN",), ("SCALE",), ("Y_FLIP",)):
        image = _transformed(image, parameters(**{name: values[name] for name in names}))
    inside = (..., slice(24, 72), slice(24, 72))  # each step reflects at the edges
    assert image[inside].std() > 0.15
    torch.testing.assert_close(at_once[inside], image[inside], atol=0.01, rtol=0)


def test_statistics() -> None:
    count, p = 40_000, 0.3
    a = _draw(count, p, generator())
    used = a != 0
    shares = used.double().mean(0)
    wanted = torch.tensor([0.5, p / 2, p, p, p, p, p, p]).double()
    torch.testing.assert_close(shares, wanted, atol=0.015, rtol=0)
    assert torch.equal(used[:, AXIS], used[:, STRETCH]) and torch.equal(used[:, RIGHT], used[:, DOWN])
    assert ((a[:, :2] == 0) | (a[:, :2] == 1)).all()
    for place in (SCALE, STRETCH, RIGHT, DOWN):
        values = a[used[:, place], place]
        assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
        assert abs((values.abs() < 1).double().mean() - 0.683) < 0.02
    for place in (TURN, AXIS):
        values = a[used[:, place], place] / math.pi
        assert abs(values.mean()) < 0.03 and abs(values.std() - 3**-0.5) < 0.02 and values.abs().max() <= 1
    correlations = torch.corrcoef(torch.cat([a, used[:, [1, 2, 3, 4, 6]].double()], dim=1).T)
    apart = correlations[:8, :8] - torch.eye(8)
    assert apart.abs().max() < 0.03  # drawn for themselves
    together = torch.corrcoef(used[:, [SCALE, TURN, STRETCH, RIGHT]].double().T) - torch.eye(4)
    assert together.abs().max() < 0.03
    everything = _draw(1000, 1, generator())
    assert (everything[:, 2:] != 0).all() and 400 < everything[:, Y_FLIP].sum() < 600


def test_an_image_does_not_depend_on_its_batch(seed: int) -> None:
    images = torch.randn(9, 3, 8, 12)
    whole, numbers = augment(images, 0.6, generator(3))
    again, same_numbers = augment(images, 0.6, generator(3))
    assert torch.equal(whole, again) and torch.equal(numbers, same_numbers)
    assert not torch.equal(numbers, augment(images, 0.6, generator(4))[1])
    one, parts = generator(3), []
    for batch in images.split([1, 2, 6]):
        parts.append(augment(batch, 0.6, one))
    assert torch.equal(torch.cat([n for _, n in parts]), numbers)
    assert torch.equal(torch.cat([i for i, _ in parts]), whole)


def test_draws_do_not_depend_on_p() -> None:
    """So that a run that goes on with another p gives the same images what they share."""
    states = []
    for p in (0, 0.1, 1):
        used = generator(1)
        augment(torch.zeros(5, 1, 2, 2), p, used)
        states.append(used.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    few, many = _draw(500, 0.1, generator(1)), _draw(500, 0.9, generator(1))
    assert torch.equal(few[few != 0], many[few != 0])


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (2, 2)])
@pytest.mark.parametrize("batch", [0, 40])
def test_smallest_images(size: tuple[int, int], batch: int, seed: int) -> None:
    out, numbers = augment(torch.randn(batch, 1, *size), 1, generator())
    assert out.shape == (batch, 1, *size) and out.isfinite().all() and numbers.shape == (batch, 9)


def test_half_precision_is_resampled_in_float32(seed: int) -> None:
    images = torch.randn(8, 3, 8, 8)
    out, numbers = augment(images.bfloat16(), 1, generator())
    wanted, same_numbers = augment(images.bfloat16().float(), 1, generator())
    assert torch.equal(out, wanted.bfloat16()) and torch.equal(numbers, same_numbers)


def test_the_model_takes_the_numbers(seed: int) -> None:
    images, numbers = augment(torch.randn(3, 1, 8, 8), 1, generator())
    model, sigma, classes = random_model(), torch.ones(3), torch.zeros(3, dtype=torch.long)
    out = model(images, sigma, aug_cond=numbers, class_cond=classes)
    assert not torch.allclose(out, model(images, sigma, class_cond=classes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": [1]}, "images: expected a torch.Tensor, got list"),
        ({"images": torch.zeros(1, 1, 2, 2, dtype=torch.uint8)}, "images: expected bfloat16.*, got uint8"),
        ({"images": torch.zeros(1, 2, 2)}, r"images: expected shape \[B, C, H, W\], got \[1, 2, 2\]"),
        ({"images": torch.zeros(1, 1, 0, 2)}, r"images: expected every size but the batch's .* \[1, 1, 0, 2\]"),
        ({"p": 1.5}, "p: expected a number of at least 0 and at most 1, got 1.5"),
        ({"p": float("nan")}, "p: expected a number"),
        ({"p": "often"}, "p: expected a number"),
        ({"generator": 3}, r"generator: expected a torch.Generator, got 3 \(int\)"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    given = {"images": torch.zeros(1, 1, 2, 2), "p": 0.1, "generator": generator()} | arguments
    with pytest.raises((TypeError, ValueError), match=message):
        module.augment(**given)
