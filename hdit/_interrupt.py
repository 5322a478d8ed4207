"""Ctrl-C while `python -m hdit.train`, or another of the programs, still loads torch: one line, as later on; and while
it ends, when all is said: nothing.

Imports nothing slow; the package imports it first.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

_is_program = False  # whether this process runs a program of the package, and nothing else


def begin() -> None:
    """Takes over Ctrl-C if Python is just loading this package to run a program of it."""
    global _is_program
    words = sys.orig_argv
    names = [word for option, word in zip(words, words[1:], strict=False) if option == "-m"]
    if sys.argv[:1] == ["-m"] and names and names[0].startswith("hdit."):
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end_at_once)
            _is_program = True


def end() -> None:
    """Gives Ctrl-C back to Python: KeyboardInterrupt from now on."""
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def over() -> None:
    """The program is done, but for Python's own end, in which Ctrl-C would make a traceback or kill it."""
    if _is_program:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    # Not an exception: half-loaded modules turn it into other errors.
    program = next(word for word in sys.orig_argv if word.startswith("hdit."))
    os.write(2, f"{program}: interrupted\n".encode())
    os._exit(130)


begin()
