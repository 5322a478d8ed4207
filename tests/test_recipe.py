"""The recipe of hdit.train against its definitions, and what it takes from k-diffusion's configurations."""

from __future__ import annotations

import copy
import csv
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hdit import Denoiser, HDiT, HDiTConfig, config_from_kdiffusion, training_step
from hdit import train as training
from hdit.checkpoint import CheckpointError, read_details
from hdit.data import open_images
from hdit.recipe import Recipe, batch_loss, recipe_from_kdiffusion
from hdit.train import CHECKPOINT, Options, main, train
from tests import golden_files
from tests.test_kdiffusion import FLOWERS, MNIST
from tests.tiny import CONFIG, random_model

CPU = torch.device("cpu")
SCHEDULED = Recipe(
    lr=0.02,
    betas=(0.5, 0.8),
    eps=0.1,
    weight_decay=0.3,
    lr_sched={"type": "inverse", "warmup": 0.5, "inv_gamma": 2.0, "power": 1.0},
    max_gradient_norm=0.7,
    loss_weighting="karras",
    sigma_sample_density={"type": "lognormal", "mean": -1.2, "std": 1.2},
    cond_dropout_rate=0.5,
    ema_power=0.5,
    ema_max_value=0.4,
)


# A run of three steps against an independent implementation


@dataclass
class Run:
    """weights: before each step and after the last. gradients: of each step, before clipping."""

    weights: list[dict[str, Tensor]]
    average: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    losses: list[float]
    batches: list[tuple[Tensor, Tensor, Tensor]]  # images, noise, noise levels
    recipe: dict[str, Any]


def three_steps(folder: Path, recipe: Recipe | None) -> Run:
    run = Run([], {}, [], [], [], {})
    original, factors = training_step.batch_loss, [1e3, 1e-3, 1.0]  # the first step's gradients are clipped

    def spied(denoiser: Any, *arguments: Any) -> Tensor:
        parameters = dict(denoiser.model.named_parameters())
        run.weights.append({name: parameter.detach().clone() for name, parameter in parameters.items()})

        class Spy:
            def loss(self, x: Tensor, noise: Tensor, sigma: Tensor, **cond: Tensor) -> Tensor:
                run.batches.append((x, noise, sigma))
                return denoiser.loss(x, noise, sigma, **cond)

        loss = factors[len(run.gradients)] * original(Spy(), *arguments)  # type: ignore[arg-type]
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        run.gradients.append(dict(zip(parameters, found, strict=True)))
        return loss

    images = open_images("digits", CONFIG.image_size, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step, "batch_loss", spied)
        options = Options("digits", steps=3, batch_size=16, sample_every=0)
        train(CONFIG, images, options, folder, CPU, recipe=recipe)
    saved = load_file(folder / CHECKPOINT)
    run.weights.append({name: saved[f"model.{name}"] for name in run.weights[0]})
    run.average = {name: saved[f"ema.{name}"] for name in run.weights[0]}
    with open(folder / "loss.csv", newline="") as file:
        run.losses = [float(row["loss"]) / factor for row, factor in zip(csv.DictReader(file), factors, strict=True)]
    details = read_details(folder / CHECKPOINT)
    assert details is not None
    run.recipe = details.recipe
    return run


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return three_steps(tmp_path_factory.mktemp("default"), None)


@pytest.fixture(scope="module")
def scheduled_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return three_steps(tmp_path_factory.mktemp("scheduled"), SCHEDULED)


def assert_moves_as_adamw(
    run: Run, rates: list[float], betas: tuple[float, float], eps: float, decay: float, longest: float
) -> None:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) in float64, gradients clipped to length longest,
    with the learning rate of each step; each step from the run's own weights.
    """
    model = HDiT(CONFIG)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = model.param_groups(1.0)  # tested against k-diffusion's in test_model.py
    norms = [math.sqrt(sum(g.double().square().sum().item() for g in step.values())) for step in run.gradients]
    assert norms[0] > 100 and norms[1] < 0.1
    for group in groups:
        for name in (names[parameter] for parameter in group["params"]):
            m = v = torch.zeros(())
            for t, (gradients, norm, rate) in enumerate(zip(run.gradients, norms, rates, strict=True), 1):
                g = gradients[name].double() * min(1.0, longest / norm)
                m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
                m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
                before, after = (run.weights[i][name].double() for i in (t - 1, t))
                shrunk = before * (1 - rate * group["lr"] * group.get("weight_decay", decay))
                wanted = shrunk - rate * group["lr"] * m_hat / (v_hat.sqrt() + eps)
                error = (after - wanted).abs()
                # float32's rounding; a decay of 1e-3 at the rate 5e-4 is 5e-7 of the weight
                allowed = 2e-7 * before.abs() + 1e-5 * (wanted - before).abs() + 1e-10
                assert (error <= allowed).all(), (name, t, (error / allowed).max())


def test_weights_move_by_adamw_with_clipped_gradients(default_run: Run) -> None:
    assert_moves_as_adamw(default_run, [5e-4] * 3, (0.9, 0.95), 1e-8, 1e-3, 1.0)
    assert Recipe.from_dict(default_run.recipe) == Recipe()


def test_weights_move_by_the_recipe_given(scheduled_run: Run) -> None:
    rates = [0.02 * 0.5, 0.02 * 0.75 * 2 / 3, 0.02 * 0.875 * 2 / 4]
    assert_moves_as_adamw(scheduled_run, rates, (0.5, 0.8), 0.1, 0.3, 0.7)
    assert Recipe.from_dict(scheduled_run.recipe) == SCHEDULED


def assert_average(run: Run, decays: list[float]) -> None:
    for name, start in run.weights[0].items():
        average = start.double()
        for weights, decay in zip(run.weights[1:], decays, strict=True):
            average = decay * average + (1 - decay) * weights[name].double()
        torch.testing.assert_close(run.average[name].double(), average, rtol=3e-7, atol=1e-9)


def test_the_average_of_the_weights(default_run: Run, scheduled_run: Run) -> None:
    (golden,) = golden_files.read_json("optim_A.json")["ema_warmup"]
    assert golden["arguments"] == {"power": 0.75, "max_value": 0.9999}
    assert_average(default_run, [golden["value_at_step"][str(step)] for step in range(3)])
    assert_average(scheduled_run, [0.0, 1 - 2**-0.5, 0.4])


def test_loss_is_weighted(default_run: Run, scheduled_run: Run) -> None:
    """A new model's network gives 0, so that D(x) = c_skip x. The loss is its error over sigma² + sigma_data² with
    soft-min-SNR, over c_out² with Karras's weights.
    """

    def wanted(run: Run, soft_min_snr: bool) -> float:
        x, noise, sigma = (tensor.double() for tensor in run.batches[0])
        total, data = sigma**2 + CONFIG.sigma_data**2, CONFIG.sigma_data**2
        noised = x + noise * sigma[:, None, None, None]
        error = (noised * (data / total)[:, None, None, None] - x).square().mean((1, 2, 3))
        return (error / (total if soft_min_snr else sigma**2 * data / total)).mean().item()

    assert default_run.losses[0] == pytest.approx(wanted(default_run, True), rel=1e-5)
    assert scheduled_run.losses[0] == pytest.approx(wanted(scheduled_run, False), rel=1e-5)


def test_optimizer_of_the_default_recipe() -> None:
    groups = Recipe().optimizer(HDiT(CONFIG).param_groups(3e-4)).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([3e-4, 3e-4, 1e-4, 1e-4])
    assert [group["weight_decay"] for group in groups] == [1e-3, 0, 1e-3, 0]
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in groups)


# Functions of the step


def test_decays_of_the_average_equal_golden() -> None:
    for case in golden_files.read_json("optim_A.json")["ema_warmup"]:
        arguments = {f"ema_{name}": value for name, value in case["arguments"].items()}
        for step, value in case["value_at_step"].items():
            assert Recipe(**arguments).ema_decay(int(step)) == pytest.approx(value, rel=1e-12)
            assert Recipe().ema_decay(int(step)) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ({"type": "constant", "warmup": 0.0}, {0: 1, 1: 1, 10**6: 1}),
        ({"type": "constant", "warmup": 0.5}, {0: 0.5, 1: 0.75, 2: 0.875, 60: 1}),
        ({"type": "inverse", "warmup": 0.0, "inv_gamma": 10.0, "power": 2.0}, {0: 1, 10: 1 / 4, 30: 1 / 16}),
        ({"type": "exponential", "warmup": 0.0, "num_steps": 100.0, "decay": 0.5}, {0: 1, 50: 0.5**0.5, 300: 1 / 8}),
        ({"type": "exponential", "warmup": 0.5, "num_steps": 1.0, "decay": 0.5}, {0: 0.5, 1: 0.375, 2: 0.21875}),
    ],
)
def test_learning_rate_schedules(schedule: dict[str, Any], values: dict[int, float]) -> None:
    recipe = Recipe(lr_sched=schedule)
    assert {step: recipe.lr_factor(step) for step in values} == pytest.approx(values)


# What is drawn for a batch


class Recorder:
    """In place of a denoiser."""

    def loss(self, x: Tensor, noise: Tensor, sigma: Tensor, **cond: Tensor) -> Tensor:
        self.x, self.noise, self.sigma, self.cond = x, noise, sigma, cond
        return sigma


def drawn(config: HDiTConfig, count: int, recipe: Recipe | None = None) -> tuple[Recorder, Tensor, Tensor]:
    """What a batch's loss is asked of, its pixels and its labels."""
    recorder = Recorder()
    pixels = torch.randint(0, 256, [count, config.in_channels, 8, 8], dtype=torch.uint8)
    labels = torch.arange(count) % 10
    batch_loss(recorder, config, pixels, labels, recipe)  # type: ignore[arg-type]
    return recorder, pixels, labels


@pytest.mark.parametrize("rate", [None, 0.0, 0.3, 1.0])
def test_share_of_labels_dropped(rate: float | None) -> None:
    torch.manual_seed(0)
    count, expected = 20_000, 0.1 if rate is None else rate
    recorder, _, labels = drawn(CONFIG, count, None if rate is None else Recipe(cond_dropout_rate=rate))
    found = recorder.cond["class_cond"]
    dropped = found == CONFIG.null_class
    assert torch.equal(found[~dropped], labels[~dropped])
    bound = 5 * math.sqrt(expected * (1 - expected) / count)  # 0.1 ± 0.011
    assert abs(dropped.double().mean().item() - expected) <= bound
    if 0 < expected < 1:  # whatever the label
        shares = torch.bincount(labels[dropped], minlength=10) / dropped.sum()
        assert (shares - 0.1).abs().max() < 0.03
    assert drawn(replace(CONFIG, num_classes=0), 4)[0].cond == {}


def test_pixels_and_noise() -> None:
    torch.manual_seed(0)
    recorder, pixels, _ = drawn(CONFIG, 1000)
    torch.testing.assert_close(recorder.x, (pixels.double() / 255 * 2 - 1).float())
    count = recorder.noise.numel()
    assert recorder.noise.shape == recorder.x.shape
    assert abs(recorder.noise.mean()) < 5 / math.sqrt(count)
    assert abs(recorder.noise.std() - 1) < 5 / math.sqrt(2 * count)


def cosine_interpolated(t: float, side: int, low: int, high: int, config: HDiTConfig, least: float) -> float:
    """Hoogeboom et al. (arXiv 2301.11093): the cosine schedule's logSNR -2 log tan, shifted by 2 log(d / side) for d =
    low and high, cut to [least, 1000], and mixed.
    """
    sigma_max, data = 1e3, config.sigma_data

    def log_snr(d: int) -> float:
        first, last = (math.atan(sigma / data * d / side) for sigma in (sigma_max, least))
        return -2 * math.log(math.tan(first + t * (last - first))) + 2 * math.log(d / side)

    return data * math.exp(-((1 - t) * log_snr(low) + t * log_snr(high)) / 2)


@pytest.mark.parametrize(
    ("side", "low", "recipe"),
    [
        (8, 8, Recipe()),
        (64, 32, Recipe()),
        (8, 32, Recipe(sigma_sample_density={"type": "cosine-interpolated"})),  # k-diffusion's own default
        (64, 16, Recipe(sigma_sample_density={"type": "cosine-interpolated", "noise_d_low": 16})),
    ],
)
def test_one_noise_level_in_each_stratum(side: int, low: int, recipe: Recipe) -> None:
    torch.manual_seed(0)
    count, config = 50, replace(CONFIG, image_size=(side, side), sigma_min=1e-4)
    sigma = drawn(config, count, recipe)[0].sigma.tolist()
    edges = [cosine_interpolated(i / count, side, low, side, config, 1e-4) for i in range(count + 1)]
    assert all(above >= level >= below for above, level, below in zip(edges, sigma, edges[1:], strict=False))


def test_lognormal_noise_levels() -> None:
    torch.manual_seed(0)
    sigma = drawn(CONFIG, 50, SCHEDULED)[0].sigma.double()
    u = torch.distributions.Normal(-1.2, 1.2).cdf(sigma.log())
    assert torch.equal((u * 50).floor(), torch.arange(50.0, dtype=torch.float64))


# k-diffusion's configurations


def with_entries(config: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """config with entries set (model__loss_scales=2) or, given ..., taken out."""
    config = copy.deepcopy(config)
    for name, value in entries.items():
        part, _, entry = name.partition("__")
        if value is ...:
            config[part].pop(entry)
        else:
            config.setdefault(part, {})[entry] = value
    return config


def notes(**entries: Any) -> list[str]:
    """What is said of the flowers' configuration with these entries, beside its data set."""
    found = recipe_from_kdiffusion(with_entries(FLOWERS, **entries))[1]
    return [note for note in found if not note.startswith("dataset.")]


def test_the_published_recipe_is_the_default() -> None:
    """But for the densities of sides below 32, and what is k-diffusion's default for an entry left out."""
    schedules = {"ema_sched": {"type": "inverse", "power": 0.75, "max_value": 0.9999}}
    recipe, found = recipe_from_kdiffusion(FLOWERS | schedules)
    assert recipe == Recipe(sigma_sample_density={"type": "cosine-interpolated"})
    assert found == [
        'dataset.type "huggingface" is not used',
        'dataset.location "nelorth/oxford-flowers" is not used',
        'dataset.image_key "image" is not used',
    ]


def test_what_k_diffusion_fills_in() -> None:
    """The defaults in its config.py for image_transformer_v2."""
    recipe, found = recipe_from_kdiffusion({"model": {"type": "image_transformer_v2"}})
    assert recipe == Recipe(
        lr=5e-4,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=1e-4,
        lr_sched={"type": "constant", "warmup": 0.0},
        loss_weighting="karras",
        cond_dropout_rate=0.1,
        ema_power=0.6667,
        ema_max_value=0.9999,
    )
    assert found == ["model.sigma_sample_density is missing: noise levels are drawn as for hdit's presets"]


def test_everything_said_is_used() -> None:
    config = {
        "model": {
            "loss_weighting": "snr",
            "augment_prob": 0.0,
            "loss_scales": 1,
            "has_variance": False,
            "sigma_sample_density": {"type": "loguniform", "min_value": 0.1, "max_value": 10},
        },
        "dataset": {"num_classes": 3, "cond_dropout_rate": 0.2},
        "optimizer": {"type": "adamw", "lr": 1e-3, "betas": [0.8, 0.97], "eps": 1e-7, "weight_decay": 0},
        "lr_sched": {"type": "exponential", "warmup": 0.99, "num_steps": 1000, "decay": 0.5},
        "ema_sched": {"type": "inverse", "power": 0.5, "max_value": 1},
    }
    assert recipe_from_kdiffusion(config) == (
        Recipe(
            lr=1e-3,
            betas=(0.8, 0.97),
            eps=1e-7,
            weight_decay=0.0,
            lr_sched={"type": "exponential", "warmup": 0.99, "num_steps": 1000, "decay": 0.5},
            loss_weighting="snr",
            sigma_sample_density={"type": "loguniform", "min_value": 0.1, "max_value": 10},
            cond_dropout_rate=0.2,
            ema_power=0.5,
            ema_max_value=1.0,
        ),
        [],
    )


@pytest.mark.parametrize(
    ("entries", "note"),
    [
        ({"model__augment_prob": 0.12}, "model.augment_prob 0.12"),
        ({"model__loss_scales": 2}, "model.loss_scales 2"),
        ({"model__has_variance": True}, "model.has_variance true"),
        ({"model__skip_stages": 1}, "model.skip_stages 1"),
        ({"model__depth": 3}, "model.depth 3"),
        ({"optimizer__momentum": 0.9}, "optimizer.momentum 0.9"),
        ({"lr_sched__num_steps": 7}, "lr_sched.num_steps 7"),  # the type is constant
        ({"ema_sched__inv_gamma": 2}, "ema_sched.inv_gamma 2"),  # nor does k-diffusion's train.py
        ({"logging__every": 5}, 'logging {"every": 5}'),
        ({"model__loss_config": "simple"}, 'model.loss_weighting "soft-min-snr"'),
    ],
)  # fmt: skip
def test_entries_not_used_are_named(entries: dict[str, Any], note: str) -> None:
    assert notes(**entries) == [f"{note} is not used"]


def test_notes_are_one_line_each() -> None:
    long = "\x1b[31m\n" + "x" * 1000
    config = {"model": {"type": "image_transformer_v2", long[:9]: long, "sigma_sample_density": {"type": "cosine"}}}
    (note,) = recipe_from_kdiffusion(config)[1]
    assert note.isprintable() and len(note) < 120 and "model.\\u001b[31m\\nxxx" in note


def test_the_simple_loss_is_the_error_of_the_predicted_noise(seed: int) -> None:
    recipe, _ = recipe_from_kdiffusion(with_entries(FLOWERS, model__loss_config="simple", model__loss_weighting=...))
    x, noise = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64)
    sigma = torch.rand(5, dtype=torch.float64) + 0.1

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return x.sin()

    denoiser = training_step.Denoiser(network, 0.5, recipe.loss_weighting)  # type: ignore[arg-type]
    noised = x + noise * sigma[:, None, None, None]
    predicted = (noised - denoiser(noised, sigma)) / sigma[:, None, None, None]
    torch.testing.assert_close(denoiser.loss(x, noise, sigma), (predicted - noise).square().mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"optimizer__type": "sgd"}, "optimizer.type: expected one of adamw, got 'sgd'"),
        ({"optimizer__type": "adam8bit"}, "optimizer.type: expected one of adamw, got 'adam8bit'"),
        ({"optimizer__lr": -1}, "lr: expected a number above 0"),
        ({"optimizer__lr": math.nan}, "lr: expected a number above 0"),
        ({"optimizer__lr": 1e30}, "lr: expected a number above 0 and at most 1"),
        ({"optimizer__lr": "fast"}, "lr: expected a number above 0 .* got 'fast'"),
        ({"optimizer__betas": [0.9]}, "betas: expected two numbers"),
        ({"optimizer__betas": [0.9, 1]}, "betas: expected a number of at least 0 and below 1, got 1"),
        ({"optimizer__eps": math.inf}, "eps: expected a number of at least 0, got inf"),
        ({"optimizer__weight_decay": None}, "weight_decay: expected a number of at least 0, got None"),
        ({"lr_sched__type": "cosine"}, "lr_sched.type: expected one of constant, inverse, exponential, got 'cosine'"),
        ({"lr_sched__type": "inverse"}, "lr_sched.inv_gamma: expected a number above 0, got None"),
        ({"lr_sched__warmup": 1}, "lr_sched.warmup: expected a number of at least 0 and below 1, got 1"),
        ({"ema_sched__type": "constant"}, "ema_sched.type: expected one of inverse, got 'constant'"),
        ({"ema_sched__power": -1}, "ema_power: expected a number of at least 0"),
        ({"model__loss_config": "other"}, "model.loss_config: expected one of karras, simple, got 'other'"),
        ({"model__loss_weighting": "min-snr"}, "loss_weighting: expected one of karras, .*, got 'min-snr'"),
        (
            {"model__sigma_sample_density": "cosine"},
            "sigma_sample_density: expected an object .* got 'cosine'",
        ),
        ({"dataset__cond_dropout_rate": 1.5}, "cond_dropout_rate: expected a number of at least 0 and at most 1"),
    ],
)
def test_entries_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        recipe_from_kdiffusion(with_entries(FLOWERS, **entries))


@pytest.mark.parametrize(
    ("density", "message"),
    [
        ({"type": "normal"}, "sigma_sample_density.type: unknown density of noise levels 'normal'"),
        ({"type": "lognormal", "mean": -1.2}, "sigma_sample_density.std: expected an entry of that name"),
        ({"type": "lognormal", "mean": "0", "std": 1}, "sigma_sample_density.mean: expected a finite number, got '0'"),
        ({"type": "lognormal", "mean": -1.2, "std": -1.0}, "sigma_sample_density.std: expected a number above 0"),
        ({"type": "lognormal", "mean": 0, "std": 1, "image_d": 9}, "expected entries of 'lognormal', got 'image_d'"),
        ({"type": "lognormal", "mean": 1e6, "std": 1.0}, "loc: expected a number of at least -700 and at most 700"),
    ],
)
def test_densities_refused(density: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe(sigma_sample_density=density).check(CONFIG)


def test_densities_that_do() -> None:
    for config in (FLOWERS, with_entries(MNIST, model__sigma_sample_density={"type": "loglogistic"})):
        recipe_from_kdiffusion(config)[0].check(config_from_kdiffusion(config))


def test_what_is_no_recipe_or_batch_is_named() -> None:
    for values in ({"a": 1, 2: 3}, {"lr_sched": {"type": "constant", "warmup": 0.0, "a": 3, 1: 2}}):
        with pytest.raises(ValueError, match=r"unknown entries \[2, 'a'\]|entries of 'constant', got \[1, 'a'\]"):
            Recipe.from_dict(values)
    with pytest.raises(TypeError, match="config: expected an object of entries, got None"):
        recipe_from_kdiffusion(None)  # type: ignore[arg-type]
    denoiser, labels = Denoiser(random_model(), 0.5), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="pixels: expected uint8"):
        batch_loss(denoiser, CONFIG, torch.zeros(2, 1, 8, 8), labels)


def test_recipes_are_plain_data() -> None:
    for recipe in (Recipe(), SCHEDULED):
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe().difference(Recipe()) is None
    assert Recipe().difference(SCHEDULED) == "lr 0.0005, but 0.02"
    with pytest.raises(ValueError, match=r"unknown entries \['speed'\] in a recipe"):
        Recipe.from_dict({"speed": 1})
    with pytest.raises(ValueError, match=r"lr_sched: expected entries of 'constant', got \['power'\]"):
        Recipe(lr_sched={"type": "constant", "warmup": 0.0, "power": 1.0})


# The command line


TINY = {
    "model": {
        "type": "image_transformer_v2", "input_channels": 1, "input_size": [8, 8], "patch_size": [2, 2], "depths": [1],
        "widths": [8], "self_attns": [{"type": "global", "d_head": 8}], "mapping_width": 8, "mapping_depth": 1,
        "sigma_min": 0.01, "sigma_max": 80, "sigma_data": 0.5, "loss_weighting": "snr", "augment_prob": 0.25,
        "sigma_sample_density": {"type": "lognormal", "mean": -1.2, "std": 1.2},
    },
    "dataset": {"type": "mnist", "location": "data", "num_classes": 10, "cond_dropout_rate": 0.3},
    "optimizer": {"type": "adamw", "lr": 2e-3, "betas": [0.8, 0.97], "eps": 1e-7, "weight_decay": 0.07},
    "lr_sched": {"type": "inverse", "warmup": 0.5, "inv_gamma": 2, "power": 1},
    "ema_sched": {"type": "inverse", "power": 0.5, "max_value": 0.99},
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(TINY))
    return path


def command(*words: object) -> None:
    small = ["--batch-size", 2, "--sample-every", 0, "--device", "cpu"]
    main([*map(str, [*words, *small])])


def losses(run: Path) -> list[list[str]]:
    with open(run / "loss.csv", newline="") as opened:
        return list(csv.reader(opened))


def test_a_run_uses_the_file_and_says_what_not(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command("--data", "digits", "--config", file, "--output", whole, "--steps", 3)
    said = [line for line in capsys.readouterr().err.splitlines() if "not used" in line]
    unused = ["model.augment_prob 0.25", 'dataset.type "mnist"', 'dataset.location "data"']
    assert said == [f"hdit.train: {file}: {name} is not used" for name in unused]
    details = read_details(whole / CHECKPOINT)
    assert details is not None and details.options["lr"] == 2e-3
    assert Recipe.from_dict(details.recipe) == recipe_from_kdiffusion(TINY)[0]

    command("--data", "digits", "--config", file, "--output", parts, "--steps", 1)
    command("--output", parts, "--resume", "--steps", 2)  # the checkpoint's recipe
    command("--output", parts, "--resume", "--steps", 3, "--config", file)
    assert losses(parts) == losses(whole)


def test_a_run_is_not_resumed_with_another_recipe(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ours = tmp_path / "run", tmp_path / "ours.json"
    command("--data", "digits", "--config", file, "--output", run, "--steps", 1)
    ours.write_text(json.dumps(config_from_kdiffusion(TINY).to_dict()))  # the model alone
    with pytest.raises(SystemExit) as stop:
        command("--output", run, "--resume", "--steps", 2, "--config", ours)
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "is of another recipe (lr 0.002, but 0.0005 here): leave the configuration as it was" in message


def test_lr_of_the_command_line_comes_first_and_is_said(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command("--data", "digits", "--config", file, "--output", run, "--steps", 1, "--lr", 0.01)
    assert f"hdit.train: {file}: optimizer.lr 0.002 is not used" in capsys.readouterr().err.splitlines()
    details = read_details(run / CHECKPOINT)
    assert details is not None and details.options["lr"] == 0.01 and details.recipe["lr"] == 2e-3


@pytest.mark.parametrize("recipe", [{"lr": -1}, {"lr": "1"}, {"speed": 1}, {"lr_sched": 1}])
def test_a_checkpoint_whose_recipe_is_damaged(tmp_path: Path, recipe: Any) -> None:
    details = training.Details(CONFIG.to_dict(), 1, recipe=recipe)
    with pytest.raises(CheckpointError, match="x.safetensors: its recipe can't be used: .*(lr|recipe)"):
        training.kept_recipe(tmp_path / "x.safetensors", details)
