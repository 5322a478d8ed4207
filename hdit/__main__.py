"""python -m hdit: what there is to run, and on what it would run here."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from hdit import __version__
from hdit._runtime import Parser, environment

PROGRAMS = ("demo", "train", "sample", "export")


def main(argv: Sequence[str] | None = None) -> None:
    Parser("python -m hdit", description=__doc__).parse_args(argv)
    print(f"hdit {__version__}, the Hourglass Diffusion Transformer\n")
    for name in PROGRAMS:
        summary = (importlib.import_module(f"hdit.{name}").__doc__ or "").partition("\n")[0].partition(":")[0]
        print(f"python -m hdit.{name:8} {summary}")
    print("\n--help after one of them tells its options. Here:\n")
    print("\n".join(environment()))


if __name__ == "__main__":
    main()
