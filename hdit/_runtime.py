"""What the command-line programs share: the device, errors in one line, and what to say about the machine."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from hdit import _interrupt
from hdit._extras import require
from hdit_kernels import backend


class Stopped(BaseException):
    """A signal ended the work, number: which one; and what became of the work.

    Like KeyboardInterrupt no Exception: it is raised in the middle of other packages, some of which go on after those.
    """

    def __init__(self, number: int, outcome: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{outcome}")
        self.number = number


def in_words(error: BaseException) -> str | None:
    """An error's message in one line, if it is one that a user can mend; None for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full ({text.partition('. ')[0]}): lower --batch-size"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        return "the memory is full: lower --batch-size"
    kinds = (ValueError, ArithmeticError, OSError, ImportError, Stopped)
    return (text or type(error).__name__) if isinstance(error, kinds) else None


def tell(line: str) -> None:
    """Prints a line on stderr, if that is still there: after SIGHUP the terminal may be gone."""
    with suppress(OSError):
        print(printable(line), file=sys.stderr)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turns what a user can mend into one line on stderr and exit status 2; bugs keep their traceback.

    Signals end the program in one line, too, with the status that a shell gives them.
    """
    _interrupt.end()
    try:
        yield
    except Stopped as stop:
        tell(f"{program}: {stop}")
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        tell(f"{program}: interrupted")
        sys.exit(130)
    except Exception as error:
        message = in_words(error)
        if message is None:
            raise
        tell(f"{program}: error: {message}")
        sys.exit(2)
    finally:
        _interrupt.over()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all others of the programs."""

    def error(self, message: str) -> NoReturn:
        tell(f"{self.prog.removeprefix('python -m ')}: error: {message} (see --help)")
        sys.exit(2)


def needs(*modules: str) -> None:
    """Raises ModuleNotFoundError, naming the package and its extra, if one of the extra "train" is missing."""
    for module in modules:
        require(module, "train")


def writable(folder: Path, needed: int = 0) -> None:
    """Raises OSError unless files can be written into folder, existing or to be made, and needed bytes are free there.

    It is tried with a file without a name in the nearest folder that exists, so nothing is left behind.
    """
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
        total, _, free = shutil.disk_usage(nearest)
    except OSError as error:
        raise OSError(f"{folder} can't be written to ({error.strerror or error}): pass another folder") from error
    if needed > free and total:  # some network file systems tell nothing
        raise OSError(f"{folder} needs {_bytes(needed)} of free space, and there are {_bytes(free)}: make room")


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.3g} GB" if count >= 1e9 else f"{count / 1e6:,.3g} MB"


def printable(text: str) -> str:
    r"""text in one line for a terminal: what it would act on or can't show is written as repr() does, \x1b for escape.

    That is control characters and escape sequences, line breaks, changes of the writing direction, unusual spaces, and
    the lone surrogates that stand for the bytes of a file name that is not UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar, redrawn twice a second on a terminal and every ten seconds where its lines pile up in a log."""
    interval = 0.5 if sys.stderr.isatty() else 10.0
    return require("tqdm", "train").tqdm(iterable, mininterval=interval, **options)


def at_least(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An argparse type: integers from minimum on, to maximum."""

    def parse(text: str) -> int:
        number = int(text)
        if number < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {number}")
        if maximum is not None and number > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum:,}, got {number}")
        return number

    parse.__name__ = "integer"  # argparse names it when int() fails
    return parse


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name: cpu, cuda, cuda:<number> or mps; without one a GPU if torch can use it, else the CPU.

    Raises ValueError if there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device: there is no device {name!r}; pass cpu, cuda, cuda:<number> or mps")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(f"--device {name}: torch finds no Apple GPU; pass --device cpu")
        return torch.device("mps")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: {unusable_gpu() or 'torch finds no GPU'}; pass --device cpu")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"--device {name}: there are GPUs 0 to {count - 1} here")
    return device


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 autocast on a GPU; nothing on the CPU, which runs in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compile_kernels(device: torch.device, call: Callable[[], Any]) -> None:
    """Compiles, side by side, the kernels that a call launches on a GPU, by a call whose results are thrown away."""
    if device.type == "cuda" and backend.triton_available():
        from hdit_kernels.launch import compiled_together

        with compiled_together():
            call()
        torch.cuda.empty_cache()  # a stream that graphs are made on could not use what this one has kept


def environment() -> list[str]:
    """torch, CUDA, driver and device, a line each; and why, if torch can't use a GPU that the machine has."""
    cuda = torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else "none in this torch")
    lines = [f"torch   {torch.__version__}", f"CUDA    {cuda}", f"driver  {_driver() or 'no NVIDIA driver found'}"]
    if torch.cuda.is_available():
        lines.append(f"device  {torch.cuda.get_device_name()}")
    else:
        lines.append(f"device  CPU, {torch.get_num_threads()} threads")
    reason = unusable_gpu()
    return lines if reason is None else [*lines, f"There is a GPU, but torch can't use it: {reason}"]


def unusable_gpu() -> str | None:
    """Why torch can't use a GPU that this machine has; None if it can, or there is none."""
    nvidia, amd = Path("/dev/nvidia0").exists() or _driver() is not None, Path("/dev/kfd").exists()
    if torch.cuda.is_available() or not (nvidia or amd):
        return None
    hidden = [name for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if os.environ.get(name) in ("", "-1")]
    if hidden:
        return f"{hidden[0]} hides it"
    if torch.version.cuda is None and torch.version.hip is None:
        kind = "CUDA" if nvidia else "ROCm"
        return f"torch {torch.__version__} is built without {kind}; install a build with it (make: TORCH_INDEX=…)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return "torch gives no reason"


def _driver() -> str | None:
    """Version of the NVIDIA driver, where nvidia-smi works."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.split("\n")[0].strip() or None if found.returncode == 0 else None
