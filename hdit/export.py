"""Writes a trained model's weights alone into one file: python -m hdit.export CHECKPOINT OUTPUT [options]"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hdit._files import regular_file
from hdit._runtime import Parser, needs, one_line_errors, printable, tell, writable
from hdit._weights import not_finite
from hdit.checkpoint import Details, load_checkpoint, read_details, write_safetensors, write_weights
from hdit.kdiffusion import config_to_kdiffusion
from hdit.model import HDiT

FORMATS = ("hdit", "k-diffusion")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "python -m hdit.export",
        description="Writes the averaged weights of a trained model, with its configuration and the names of its "
        "classes, into one file. hdit.sample and load_checkpoint read it; training can't be resumed from it.",
    )
    parser.add_argument("checkpoint", help="a .safetensors file of hdit.train, or a checkpoint of k-diffusion")
    parser.add_argument("output", help="the .safetensors file to write")
    parser.add_argument(
        "--format", choices=FORMATS, default="hdit",
        help="k-diffusion: what its convert_for_inference.py writes, for its sample.py; it has no place for the names "
        "of classes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="of what was learned; a model is in float32 again when it is loaded (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-ema", action="store_true", help="take the last weights instead of their average")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT, if it exists")
    args = parser.parse_args(argv)

    with one_line_errors("hdit.export"):
        needs("safetensors")
        output = Path(args.output)
        check_output(output, args.checkpoint, args.overwrite)
        details = read_details(args.checkpoint)
        model = load_checkpoint(args.checkpoint, ema=not args.no_ema)
        tensors = stored(model, args.dtype)
        names = details.class_names if details is not None else []
        config = config_to_kdiffusion(model.config) if args.format == "k-diffusion" else None
        output.parent.mkdir(parents=True, exist_ok=True)
        if config is None:
            only = "model" if args.no_ema else "ema"
            step = 0
            if details is not None:
                only, step = details.only or only, details.step
            write_weights(output, tensors, Details(model.config.to_dict(), step, class_names=names, only=only))
        else:
            write_safetensors(output, tensors, {"format": "pt", "config": json.dumps(config)})
            if names:
                tell(f"hdit.export: k-diffusion has no place for the names of the {len(names)} classes: left out")
        print(printable(str(output)))


def check_output(output: Path, checkpoint: str, overwrite: bool) -> None:
    """Raises ValueError or OSError unless output can be written and nothing is lost by it."""
    if output.suffix != ".safetensors":  # by which it is known when it is read
        raise ValueError(f"OUTPUT: expected a name that ends in .safetensors, got {str(output)!r}")
    if output.exists():
        regular_file("OUTPUT", output)
        if os.path.exists(checkpoint) and output.samefile(checkpoint):
            raise ValueError(f"OUTPUT: expected another file than the checkpoint, got {output}")
    if os.path.lexists(output) and not overwrite:
        raise ValueError(f"OUTPUT: {output} exists: pass another name, or --overwrite to replace it")
    writable(output.parent)


def stored(model: HDiT, dtype: str) -> dict[str, Tensor]:
    """A model's tensors as they are to be written: its parameters in another dtype, the few buffers as they are.

    Raises ValueError if a number is beyond the dtype.
    """
    buffers = dict(model.named_buffers())  # angles and frequencies, whose rounding would move whole waves
    tensors = {name: t if name in buffers else t.to(DTYPES[dtype]) for name, t in model.state_dict().items()}
    name = not_finite(tensors)
    if name is not None:
        raise ValueError(f"--dtype {dtype}: {name} holds numbers beyond it: pass another")
    return tensors


if __name__ == "__main__":
    main()
