from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hdit import HDiT
from hdit.checkpoint import Details, save_checkpoint
from hdit.sample import SAMPLERS, class_indices, generate, image_grid, main, to_image
from tests.tiny import CONFIG, random_model

UNCONDITIONAL = replace(CONFIG, num_classes=0)


def write_checkpoint(path: Path, model: HDiT, class_names: list[str] | None = None) -> Path:
    optimizer = torch.optim.AdamW(model.parameters())
    names = [str(i) for i in range(10)] if class_names is None else class_names
    save_checkpoint(path, model, copy.deepcopy(model), optimizer, Details(model.config.to_dict(), 1, class_names=names))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path, seed: int) -> Path:
    return write_checkpoint(tmp_path / "x.safetensors", random_model())


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_and_repeats(name: str, seed: int) -> None:
    model, classes = random_model(), [0, 1, 9]
    torch.manual_seed(1)
    first = generate(model, 3, classes, sampler=name, steps=4, guidance=1.5, seed=7)
    torch.manual_seed(2)
    assert torch.equal(first, generate(model, 3, classes, sampler=name, steps=4, guidance=1.5, seed=7))
    assert first.shape == (3, 1, 8, 8) and first.dtype == torch.uint8
    assert not torch.equal(first, generate(model, 3, classes, sampler=name, steps=4, guidance=1.5, seed=8))


def test_samplers_are_those_of_the_library() -> None:
    assert {"euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde"} <= SAMPLERS.keys()


def test_an_image_does_not_depend_on_the_batch(seed: int) -> None:
    model, classes = random_model(), [1, 2, 3, 4, 5]
    whole = generate(model, 5, classes, steps=4, batch_size=64).int()
    parts = generate(model, 5, classes, steps=4, batch_size=2).int()
    assert (whole - parts).abs().max() <= 1  # matrix products of other sizes round otherwise
    assert (whole[0] - whole[1]).abs().max() > 10


def test_class_and_guidance_matter(seed: int) -> None:
    model = random_model()

    def one(digit: int, guidance: float) -> torch.Tensor:
        return generate(model, 1, [digit], guidance=guidance, steps=4).int()

    assert not torch.equal(one(3, 1.0), one(4, 1.0))
    assert not torch.equal(one(3, 1.0), one(3, 2.0))
    assert torch.equal(one(3, 0.0), one(4, 0.0))  # no guidance towards either


def test_generate_refuses_what_does_not_fit(seed: int) -> None:
    model, unconditional = random_model(), random_model(UNCONDITIONAL)
    with pytest.raises(ValueError, match="classes must be given exactly if the model has some, it has 10"):
        generate(model, 2)
    with pytest.raises(ValueError, match="classes must be given exactly if the model has some, it has 0"):
        generate(unconditional, 1, [1])
    with pytest.raises(ValueError, match="one for each of 2 images, got 1"):
        generate(model, 2, [1])
    with pytest.raises(ValueError, match="sampler must be one of .*, got 'magic'"):
        generate(model, 1, [1], sampler="magic")
    with pytest.raises(ValueError, match="guidance needs a model with classes"):
        generate(unconditional, 1, guidance=2.0)
    with torch.no_grad():
        model.patch_out.proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN images"):
        generate(model, 1, [1], steps=2)


def test_grid_and_images() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 6) * 40 + 40
    grid = np.asarray(image_grid(images, columns=2))
    assert grid.shape == (3 * 5 - 1, 2 * 7 - 1, 3)
    assert (grid[5:9, 7:13] == 160).all()  # the fourth: second row, second column
    assert (grid[10:, 7:] == 0).all() and (grid[4] == 0).all()
    assert image_grid(images).size == (3 * 7 - 1, 2 * 5 - 1)
    assert to_image(images[0, :1]).mode == "L"
    with pytest.raises(ValueError, match="1 or 3 channels"):
        to_image(torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_class_indices() -> None:
    names = ["cat", "dog", *"abcdefgh"]
    assert class_indices(["dog", "0", "9"], CONFIG, names) == [1, 0, 9]
    assert class_indices(["2"], CONFIG, ["2", *"abcdefghi"]) == [0]  # the folder 2, not the third folder
    for word in ("10", "-1", "bird"):
        with pytest.raises(ValueError, match=rf"there is no class '{word}'; pass some of 0…9 \(cat, dog, a"):
            class_indices([word], CONFIG, names)
    with pytest.raises(ValueError, match="the model has no classes"):
        class_indices(["1"], UNCONDITIONAL, [])


# The command line


def test_writes_a_grid(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "pictures" / "grid.png"
    main([str(checkpoint), "--output", str(picture), "--count", "4", "--steps", "2", "--device", "cpu"])
    with Image.open(picture) as image:
        assert image.size == (17, 17) and image.format == "PNG"
    assert capsys.readouterr().out.strip() == str(picture)


def test_writes_images_into_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "out", ["--steps", "2", "--guidance", "3", "--batch-size", "2", "--device", "cpu"]
    main([str(checkpoint), "--output", str(output), "--count", "3", "--classes", "7", "2", *options])
    assert sorted(path.name for path in output.iterdir()) == ["00000.png", "00001.png", "00002.png", "grid.png"]
    expected = generate(random_model_of(checkpoint), 3, [7, 2, 7], steps=2, guidance=3.0, batch_size=2)
    for i in range(3):
        assert np.array_equal(np.asarray(Image.open(output / f"{i:05}.png")), expected[i, 0].numpy())


def random_model_of(checkpoint: Path) -> HDiT:
    from hdit.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint)


def test_unconditional_model(tmp_path: Path, seed: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "x.safetensors", random_model(UNCONDITIONAL), [])
    main([str(checkpoint), "--output", str(tmp_path / "x.png"), "--count", "1", "--steps", "2", "--device", "cpu"])
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classes", "10"], "there is no class '10'; pass some of 0…9"),
        (["--device", "tpu7"], "there is no device 'tpu7': pass cpu or cuda"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(checkpoint), *arguments])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message
    assert message.startswith("hdit.sample: error: ") and message.count("\n") == 1


def test_missing_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nothing.safetensors")])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "there is no checkpoint" in message and message.count("\n") == 1
