"""A model, images and runs small enough for a test."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from hdit import GlobalAttention, HDiT, HDiTConfig, Level, Mapping, NeighborhoodAttention

CONFIG = HDiTConfig(
    levels=(
        Level(1, 16, attention=NeighborhoodAttention(8, 3)),
        Level(1, 24, attention=GlobalAttention(8), dropout=0.1),
    ),
    mapping=Mapping(1, 16),
    image_size=(8, 8),
    in_channels=1,
    patch_size=(2, 2),
    num_classes=11,
)


def random_model(config: HDiTConfig = CONFIG) -> HDiT:
    """A model with no weight left at its zero start."""
    model = HDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def write_images(folder: Path, generator: torch.Generator) -> None:
    """Eight PNG files of random size and content: folder/cats/0.png … 3.png and folder/dogs/0.png … 3.png."""
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            height, width = torch.randint(9, 30, [2], generator=generator).tolist()
            pixels = torch.randint(0, 256, [height, width, 3], generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
