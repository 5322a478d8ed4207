"""Trains an HDiT: python -m hdit.train --data FOLDER --config PRESET --output RUN

torchrun --nproc_per_node N -m hdit.train … does it with N processes, each on a GPU of its own (see hdit.processes).

The run's folder gets checkpoint.safetensors (see hdit.checkpoint), loss.csv and samples/<step>.png. Ctrl-C, SIGTERM,
SIGHUP and errors from outside (see hdit.run) save a checkpoint and stop; --resume continues with exactly the losses
that an unbroken run has: batches, noise, noise levels and dropout are functions of the seed and the step alone, so no
generator's state needs saving.

The recipe is k-diffusion's for HDiT (Crowson et al. 2024, arXiv 2401.11605): AdamW, gradients clipped to norm 1, noise
levels from the interpolated cosine schedule, stratified over the batch, soft-min-SNR weighting, an average of the
weights with a warm-up, one label in ten dropped for classifier-free guidance, bfloat16 autocast on a GPU. A k-diffusion
configuration brings its own; entries that are not used are printed (see hdit.recipe).
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from hdit import processes
from hdit._files import read_json
from hdit._memory import require_memory
from hdit._runtime import Stopped, needs, one_line_errors, printable, progress, writable
from hdit.checkpoint import CheckpointError, Details, read_details, resume
from hdit.config import HDiTConfig, presets
from hdit.data import BatchOrder, DataError, Digits, Images, collate, open_images, seed_of
from hdit.images import MODES
from hdit.kdiffusion import config_from_kdiffusion
from hdit.model import HDiT
from hdit.options import Options, changes, chosen_options, options_of, parser
from hdit.recipe import Recipe, recipe_from_kdiffusion
from hdit.run import LOCK, LossLog, Saver, Signals, leave_group, no_ctrl_c, only_run, say
from hdit.run import NonFiniteLoss as NonFiniteLoss
from hdit.run import RunError as RunError
from hdit.sample import generate, image_grid
from hdit.training_step import TrainingStep
from hdit_kernels import checks

CHECKPOINT = "checkpoint.safetensors"


def train(
    config: HDiTConfig,
    images: Images | None,
    options: Options,
    output: Path,
    device: torch.device,
    resuming: bool = False,
    recipe: Recipe | None = None,
) -> HDiT:
    """Trains a model from its beginning, or from the checkpoint in output if resuming, until options.steps.

    images: may be None for a run that has done its steps already, which is left as it is. recipe: Recipe() if not
    given. Returns the averaged model. Options that differ from the checkpoint's are named on stderr. In one of several
    processes (see hdit.processes) a part of each batch is trained on, and only the first writes into output.
    Raises TypeError, ValueError or OSError, before anything is written, on what can't be trained; CheckpointError if
    output has a checkpoint and shouldn't, or the other way round, or one of another configuration or recipe; DataError
    if resuming with other images; RunError if another run is in output. Once it trains: NonFiniteLoss, keeping the last
    checkpoint; Stopped after a signal and RunError after an error from outside, with the finished steps saved.
    """
    for name, value, kind in (("config", config, HDiTConfig), ("options", options, Options), ("output", output, Path)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {checks.shown(value)}")
    device = checks.device("device", device)
    details = read_details(output / CHECKPOINT) if resuming else None
    recipe = recipe or Recipe()
    look_ahead(config, recipe, options, output, device, 0 if details is None else details.step)
    with ExitStack() as stack:
        if processes.is_first():
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_run(output))
        if torch.get_default_device().type != "cpu":  # what is made without naming a device is made on the CPU
            stack.enter_context(torch.device("cpu"))
        return _train(config, recipe, images, options, output, device, resuming)


def _train(
    config: HDiTConfig,
    recipe: Recipe,
    images: Images | None,
    options: Options,
    output: Path,
    device: torch.device,
    resuming: bool,
) -> HDiT:
    """`train`, with the folder to itself."""
    lr = recipe.lr if options.lr is None else options.lr
    options = replace(options, lr=lr)
    path = output / CHECKPOINT
    if path.exists() and not resuming:
        raise CheckpointError(f"{path} exists: pass --resume to go on with it, or another --output")

    torch.manual_seed(seed_of(options.seed, "model"))
    model = HDiT(config).to(device).train()
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = recipe.optimizer(model.param_groups(lr), fused=device.type == "cuda")
    found = Details(config.to_dict(), 0)
    if resuming:
        found = resume(path, model, ema_model, optimizer)
        different = kept_recipe(path, found).difference(recipe)
        if different is not None:
            what = f"{path} is of another recipe ({different} here)"
            raise CheckpointError(f"{what}: leave the configuration as it was, or start another run")
        for change in changes(found.options, options):
            say(change)
        if found.step >= options.steps:
            say(f"{path} has done {found.step} of {options.steps} steps: nothing is left to do")
            return ema_model
    if images is None:
        raise TypeError("images: expected those to train on, since there are steps left to do, got None")
    checks.shape("images", images[0][0], [config.in_channels, *config.image_size])
    if resuming and found.data != images.fingerprint:
        raise DataError(f"{options.data} holds other images than those {path} was trained on: restore them")
    details = Details(
        config.to_dict(),
        found.step,
        asdict(options),
        list(images.class_names),
        list(images.excluded),
        images.fingerprint,
        recipe.to_dict(),
        found.loss,
    )

    processes.require_same(asdict(details))
    several, writes = processes.count() > 1, processes.is_first()
    if several and options.capture and device.type == "cuda":
        say("several processes: steps and samples are not captured as CUDA graphs")
        options = replace(options, capture=False)

    part = processes.part(options.batch_size)
    order = BatchOrder(len(images), options.batch_size, options.seed, details.step, options.steps, part)
    workers = 0 if isinstance(images, Digits) else options.workers  # the digits are in memory
    pinned = device.type == "cuda"
    loader = DataLoader(
        images, batch_sampler=order, num_workers=workers, pin_memory=pinned, worker_init_fn=leave_group,
        collate_fn=collate,
    )  # fmt: skip
    training = TrainingStep(model, ema_model, optimizer, config, recipe, options.capture)
    with (
        LossLog(output / "loss.csv", details.step, details.loss) if writes else nullcontext() as log,
        Signals() as signals,
        Saver(path, model, ema_model, optimizer, details, log, signals) as saver,
        progress(batches(loader, signals), desc="training", initial=details.step, total=options.steps) as bar,
    ):

        def keep(step: int) -> None:
            """Saves and samples what has done this step, where it is time to."""
            last = step == options.steps
            if last or step % options.save_every == 0:
                saver.save()
            if writes and options.sample_every and (last or step % options.sample_every == 0):
                # Of several processes none stops by itself: the grid is given up, and soon they agree to stop.
                with suppress(Stopped) if several and not last else nullcontext(), signals.at_rest():
                    save_samples(ema_model, output / "samples" / f"{step:08}.png", options)

        for step, (pixels, labels) in enumerate(bar, details.step + 1):
            torch.manual_seed(seed_of(options.seed, "step", step))
            try:
                numbers = training.gradients(pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            except ValueError as error:  # on a CPU: a scale that is no longer positive, which gives NaN on a GPU
                if step == 1:
                    raise
                raise saver.diverged(f"step {step}: {error}") from error
            loss, norm, stopping = processes.mean(*numbers, signals.caught is not None)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise saver.diverged(f"step {step}: the loss is {loss:g} and the norm of its gradient {norm:g}")
            if step > details.step + 1:
                keep(step - 1)  # only now: these weights have shown a finite loss and gradient
            if log is not None:  # before the weights take the step, so that none is without its line
                bar.set_postfix(loss=f"{log.write(step, loss, norm):.4f}", refresh=False)
            saver.begin()
            training.update(step - 1)
            saver.finish(step, loss)
            if stopping:
                signals.stop()
        keep(options.steps)
    return ema_model


def kept_recipe(path: Path, details: Details) -> Recipe:
    """The recipe in the details of the checkpoint at path. Raises CheckpointError if it is none."""
    try:
        return Recipe.from_dict(details.recipe)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: its recipe can't be used: {error}") from error


def look_ahead(
    config: HDiTConfig,
    recipe: Recipe,
    options: Options,
    output: Path,
    device: torch.device,
    done: int,
    source: str = "config",
) -> None:
    """Looks for what a run that has done so many steps needs at its end: packages, a model that can be trained and
    sampled, a folder to write into with room for checkpoints. Writes nothing. Raises ModuleNotFoundError, ValueError
    or OSError. source: what errors call the configuration.
    """
    if done >= options.steps:
        return
    with _naming(source):
        recipe.check(config)
        if config.mapping_cond_dim:
            raise ValueError(
                f"mapping_cond_dim: expected 0, since images have no such vector, got {config.mapping_cond_dim}"
            )
    part = processes.part(options.batch_size)
    require_memory(source, config, device, part.stop - part.start, training=True)
    needs("safetensors.torch", "numpy", "PIL.Image", "tqdm")
    if options.sample_every and config.in_channels not in MODES:
        raise ValueError(f"--sample-every: images of {config.in_channels} channels can't be saved, 1 or 3 can: pass 0")
    if not processes.is_first():
        return
    with torch.device("meta"):
        model = HDiT(config)
    if (output / LOCK).exists():
        with only_run(output):  # to learn of another run before the images are read
            pass
    size = 4 * sum(tensor.nbytes for tensor in model.state_dict().values())  # weights, average and Adam's two moments
    path = output / CHECKPOINT
    existing = path.stat().st_size if path.is_file() else 0
    writable(output, 2 * size - existing)  # the old one stays until the new one is written
    if options.sample_every:
        writable(output / "samples")


def batches(loader: DataLoader[Any], signals: Signals) -> Iterator[Any]:
    """The loader's batches. The run may be stopped while it waits for one."""
    with no_ctrl_c():
        iterator = iter(loader)
    signals.watch_workers()
    while True:
        with signals.at_rest(alone=processes.count() == 1):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def save_samples(model: HDiT, path: Path, options: Options, count: int = 36) -> None:
    """Writes a grid of samples, of each class in turn; a process's batch at a time, since so many fit into memory."""
    classes = [i % max(model.config.num_classes - 1, 1) for i in range(count)] if model.config.num_classes else None
    batch_size = options.batch_size // processes.count()
    grid = image_grid(generate(model, count, classes, batch_size=batch_size, capture=options.capture))
    try:
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def read_config(name: str) -> HDiTConfig:
    """A preset by its name, or a .json file with HDiTConfig.to_dict() or a k-diffusion configuration.

    Raises ValueError, naming the file, if it is neither.
    """
    if name in presets:
        return presets[name]
    content = _content(name)
    with _naming(f"--config {name}"):
        return config_from_kdiffusion(content) if "model" in content else HDiTConfig.from_dict(content)


def read_recipe(name: str, lr: float | None = None) -> tuple[Recipe, list[str]]:
    """The recipe of what read_config takes, and a line on each entry that is not used: a k-diffusion configuration's
    own, else the default one. lr: of the run, if it is not to be the recipe's.
    """
    if name in presets:
        return Recipe(), []
    content = _content(name)
    with _naming(f"--config {name}"):
        return recipe_from_kdiffusion(content, lr) if "model" in content else (Recipe(), [])


def _content(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--config: there is no file {name}, and the presets are {', '.join(presets)}")
    content = read_json("--config", path)
    if not isinstance(content, dict):
        raise ValueError(f"--config {name}: it holds no JSON object")
    return content


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Errors about a configuration say where it is from."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error


def open_once(source: str, config: HDiTConfig, excluded: Sequence[str] | None) -> Images:
    """open_images for config. Of several processes the first alone looks for images that can't be read."""
    arguments = source, config.image_size, config.in_channels
    images = open_images(*arguments, excluded) if processes.is_first() else None
    excluded = processes.from_first(None if images is None else images.excluded)
    return open_images(*arguments, excluded) if images is None else images


def fit_classes(config: HDiTConfig, images: Images, class_cond: bool | None) -> HDiTConfig:
    """config with the class table that class_cond asks for: made for the data's classes, none, or left as it is.

    Raises DataError if the table and the data's classes don't fit.
    """
    count = len(images.class_names)
    if class_cond is False:
        return replace(config, num_classes=0)
    if class_cond and not count:
        raise DataError("--class-cond: the images have no classes; put each into a folder named after its class")
    if class_cond:
        return replace(config, num_classes=count + 1)
    if config.num_classes and config.num_classes != count + 1:
        raise DataError(
            f"the model has {config.num_classes - 1} classes, the data {count}: "
            "pass --class-cond to make the model's as the data's, or --no-class-cond to train without"
        )
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors("hdit.train"), processes.joined():
        args = vars(parser().parse_args(arguments))
        if not args["output"]:
            raise ValueError("--output: expected a folder, got ''")
        output, resuming, device = Path(args["output"]), "resume" in args, processes.device(args.get("device"))
        chosen = {name: value for name, value in args.items() if name in Options.__dataclass_fields__}
        details = read_details(output / CHECKPOINT) if resuming else None
        if resuming and details is None:
            raise CheckpointError(f"{output / CHECKPOINT} was not written by hdit.train: pass another --output")
        if details is not None:
            options = chosen_options(chosen, options_of(output / CHECKPOINT, details))
            config, recipe = HDiTConfig.from_dict(details.config), kept_recipe(output / CHECKPOINT, details)
        elif "data" in args and "config" in args:
            options = chosen_options(chosen)
        else:
            raise ValueError("--data and --config are needed (or --resume): see --help")
        if "config" in args:
            config = read_config(args["config"])
            recipe, notes = read_recipe(args["config"], options.lr)
            for note in notes:
                say(f"{args['config']}: {note}")
        if "image_size" in args:
            try:
                config = replace(config, image_size=(args["image_size"], args["image_size"]))
            except ValueError as error:
                raise ValueError(f"--image-size {args['image_size']}: {error}") from error
        # before the images, too, which take a while to look at
        source = f"--config {args['config']}" if "config" in args else str(output / CHECKPOINT)
        look_ahead(config, recipe, options, output, device, 0 if details is None else details.step, source)
        images = None
        if details is None or details.step < options.steps:  # a finished run's may be gone
            excluded = details.excluded if details is not None else None
            images = open_once(options.data, config, excluded)
            class_cond = args.get("class_cond")
            if details is None or class_cond is not None:  # a run's own configuration has been made to fit
                config = fit_classes(config, images, class_cond)
            several = f"{processes.count()} processes, this one on " if processes.count() > 1 else ""
            found = f"{len(images):,} images, {len(images.class_names) or 'no'} classes"
            print(f"{found}, on {several}{device}", file=sys.stderr)
        train(config, images, options, output, device, resuming, recipe)
        print(printable(str(output / CHECKPOINT)))


if __name__ == "__main__":
    main()
