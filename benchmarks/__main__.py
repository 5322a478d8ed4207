"""`python -m benchmarks list|kernels|model|train|scaling|merge|report|compare|tune`.

A command is a module with add_arguments(parser) and run(args) -> exit status, imported only when it is asked for. Exit
status: 0; 1 if something failed, ran out of memory or became slower, or nothing was measured; 2 for what the user has
to change, in one line; 141 if whoever reads the output has gone, as of other commands in a pipe.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

COMMANDS = {
    "list": ("benchmarks.listing", "every case, its contestants, and which of them can run here"),
    "kernels": ("benchmarks.kernels.command", "the operators against NATTEN, FlexAttention, liger-kernel and others"),
    "model": ("benchmarks.model", "the presets against the reference HDiT and DiT"),
    "train": ("benchmarks.train", "training steps of the presets"),
    "scaling": ("benchmarks.scaling", "how cost grows with the image, HDiT beside DiT"),
    "merge": ("benchmarks.merge", "run files of equal machines, such as one for each GPU, put into one"),
    "report": ("benchmarks.report", "Markdown and pictures from a folder of run files"),
    "compare": ("benchmarks.compare", "two run files or git revisions, a verdict for each case"),
    "tune": ("benchmarks.tune", "the launch configurations of the portable neighborhood attention kernels, on Hopper"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()  # before torch is imported
    argv = sys.argv[1:] if argv is None else list(argv)
    asked = next((word for word in argv if not word.startswith("-")), None)
    parser = _Parser(prog="python -m benchmarks", description="Benchmarks of hdit-kernels.", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    module: Any = None
    try:
        for name, (path, text) in COMMANDS.items():
            own = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
            if name == asked:
                module = importlib.import_module(path)
                module.add_arguments(own)
        args = parser.parse_args(argv, argparse.Namespace(began=began))
        status: int = module.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `… | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 141
    except KeyboardInterrupt:
        print("python -m benchmarks: interrupted; the same command with the same --output goes on", file=sys.stderr)
        return 130
    except Exception as error:
        from benchmarks.measure import DeviceLost
        from benchmarks.runs import RunError

        if isinstance(error, (RunError, ModuleNotFoundError)):
            status = 2
        elif isinstance(error, DeviceLost):
            status = 1
        else:
            raise
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
