"""A run of hdit.train beside its steps: the lock on its folder, its log of losses, the signals that stop it, and what
is saved when it ends early.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from hdit._runtime import Stopped, in_words, tell
from hdit.checkpoint import Details, save_checkpoint
from hdit.model import HDiT

LOCK = ".hdit-train.lock"
HEADER = b"step,loss,gradient_norm\n"
AGAIN = 1.0  # seconds after the first signal from which on Ctrl-C is meant as a second one


class NonFiniteLoss(ArithmeticError):
    """The loss, a gradient or a weight became NaN or infinite; the message says which checkpoint is kept."""


class RunError(ValueError):
    """Something outside the run ended it; the message says what, and which checkpoint is kept."""


# One run a folder

_held: set[str] = set()  # folders locked by this process, which its own record locks would let in again


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keeps every other run out of folder while inside. Raises RunError, saying who is in it.

    A POSIX record lock: it ends with the process, however that dies, and forked data workers, which may outlive it,
    have no part in it. The file stays; it says who holds it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        say(f"{folder} can't be locked on this system: see that no other run writes into it")
        yield
        return
    path, name = folder / LOCK, os.path.realpath(folder)
    if name in _held:
        raise RunError(f"{folder} is in use by another run of this process: wait for its end, or pass another --output")
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "which doesn't say more of itself"
            message = f"{folder} is in use by another run, {holder}: wait for its end, or pass another --output"
            raise RunError(message) from error
        except OSError as error:  # a network file system without locks
            say(f"{path} can't be locked ({error.strerror}): see that no other run writes into {folder}")
        _held.add(name)
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            with suppress(OSError):  # a full disk: the lock holds all the same
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
            yield
        finally:
            _held.discard(name)
            with suppress(OSError):
                file.truncate(0)


# The losses


class LossLog:
    """loss.csv: step, loss, gradient_norm; a line a step, only ever appended.

    step, loss: of the checkpoint to go on from; 0 for a new run, which keeps the log of an earlier one under another
    name. Lines after that step, and one that a crash cut short, are taken back: by a new file in the place of the old.
    Raises ValueError, changing nothing, if the file is no such log or of another run than the checkpoint.
    """

    def __init__(self, path: Path, step: int = 0, loss: float | None = None) -> None:
        self.path = path
        lines = self._lines()
        kept = [line for number, line in lines if number <= step]
        if step and not lines:
            say(f"there are no losses in {path}: they begin with step {step + 1}")
        elif step and loss is not None:
            self._compare([line for number, line in lines if number == step], step, loss)
        elif lines and not step:
            earlier = next(name for n in count(1) if not (name := path.with_name(f"loss.{n}.csv")).exists())
            path.rename(earlier)
            say(f"the losses of an earlier run, which left no checkpoint, are in {earlier} now")
        whole = b"".join([HEADER, *kept])
        if not path.exists() or path.read_bytes() != whole:
            self._replace(whole)
        self._file = open(path, "ab", buffering=0)
        self._mean: float | None = None

    def write(self, step: int, loss: float, norm: float) -> float:
        """Adds a line; returns the loss smoothed over about fifty steps."""
        line = f"{step},{loss!r},{norm!r}\n".encode()
        with self._named():
            while line:
                line = line[self._file.write(line) :]
        self._mean = loss if self._mean is None else self._mean + 0.02 * (loss - self._mean)
        return self._mean

    def sync(self) -> None:
        """Waits until all lines are on disk: a checkpoint's step is in the log, come what may."""
        with self._named():
            os.fsync(self._file.fileno())

    def __enter__(self) -> LossLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _lines(self) -> list[tuple[int, bytes]]:
        """The whole lines after the header, each with its step."""
        if not self.path.exists():
            return []
        if not self.path.is_file():
            raise ValueError(f"{self.path} is not a file: move it away")
        header, *lines = self.path.read_bytes().splitlines(keepends=True) or [b""]
        if header.rstrip() != HEADER.rstrip() and not HEADER.startswith(header):
            raise ValueError(f"{self.path} is not a log of hdit.train (its first line is another): move it away")
        if lines and not lines[-1].endswith(b"\n"):
            del lines[-1]
        found = []
        for number, line in enumerate(lines, 2):
            try:
                step, *values = line.split(b",")
                _, _ = map(float, values)
                found.append((int(step), line))
            except ValueError as error:
                message = f"{self.path}, line {number} is none of hdit.train's: restore the file, or move it away"
                raise ValueError(message) from error
        return found

    def _compare(self, lines: list[bytes], step: int, loss: float) -> None:
        """Raises ValueError unless the last of these lines, of that step, has that loss."""
        if not lines or float(lines[-1].split(b",")[1]) != loss:
            there = f"another loss for step {step} than" if lines else f"no line for step {step}, which is that of"
            raise ValueError(
                f"{self.path} has {there} the checkpoint beside it, so they are of two runs: "
                "put the right one back, or move the log away to go on from the checkpoint"
            )

    def _replace(self, content: bytes) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            with self._named(), open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if self.path.exists():
                shutil.copymode(self.path, temporary)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of a write name the file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


# What stops a run


class Signals:
    """As a context manager: SIGINT, SIGTERM and SIGHUP ask the run to stop, which it does once its weights are whole.

    caught: the first that came. Inside `at_rest`, where no step is being made, it raises Stopped at once; elsewhere the
    next `at_rest` does. Later ones do nothing (schedulers send two), but for a Ctrl-C more than a second after the
    first, which raises KeyboardInterrupt. A signal that was ignored before, as SIGHUP by nohup, is still ignored.

    A data worker's death is likewise told inside `at_rest` only: torch raises its error wherever the program is.
    """

    caught: int | None = None

    def __init__(self) -> None:
        self._since = 0.0
        self._resting = self._alone = self._child_ended = False
        self._before: dict[int, Any] = {}
        self._tell: Callable[[int, FrameType | None], Any] = lambda number, frame: None

    def __enter__(self) -> Signals:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            self._handle(getattr(signal, name, None), self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._child_ended:  # torch's handler has it from now on, and would tell at any time
            with suppress(RuntimeError):
                self._tell(0, None)

    def stop(self) -> NoReturn:
        """Stops the run, whose weights are whole: a signal came to this process or to another of the run."""
        self.caught = self.caught or signal.SIGTERM
        raise Stopped(self.caught)

    def watch_workers(self) -> None:
        """To be called once a DataLoader has started its workers, and so torch's own handler."""
        number = getattr(signal, "SIGCHLD", None)
        if number is not None and callable(tell := signal.getsignal(number)):
            self._tell = tell
            self._handle(number, self._note_child)

    @contextmanager
    def at_rest(self, alone: bool = True) -> Iterator[None]:
        """Where the run may be stopped: its weights are whole. alone: False where other processes wait for what is done
        inside, so that a signal must not stop it.
        """
        self._resting, self._alone = True, alone
        try:
            if alone and self.caught is not None:
                raise Stopped(self.caught)
            if self._child_ended:
                self._note_child(0, None)
            yield
        finally:
            self._resting = False

    def _handle(self, number: int | None, handler: Callable[[int, FrameType | None], None]) -> None:
        if number is None or threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        before = signal.getsignal(number)
        if before not in (signal.SIG_IGN, None):
            self._before[number] = before
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.caught is None:
            self.caught, self._since = number, now
            if self._resting and self._alone:
                raise Stopped(number)
        elif number == signal.SIGINT and now - self._since > AGAIN:
            raise KeyboardInterrupt

    def _note_child(self, number: int, frame: FrameType | None) -> None:
        self._child_ended = not self._resting
        if self._resting:
            self._tell(number, frame)


@contextmanager
def no_ctrl_c() -> Iterator[None]:
    """Ctrl-C waits until the end; processes that are started inside never get it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_group(worker: int) -> None:
    """For data workers: signals to the process group (Ctrl-C, a scheduler's SIGTERM) reach the main process only, which
    ends the workers once it has saved. It tells of their death, too, so torch's own line about SIGSEGV is left out.
    """
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


# What is saved


class Saver:
    """Writes a run's checkpoints, at `path`. As a context manager it also saves the finished steps when an error or a
    signal ends the run, and adds to the message what is kept.

    details: those of the checkpoint that path holds, of step 0 if it holds none. log: of the same run; None in a
    process that has a part in the run, but saves nothing.
    """

    def __init__(
        self,
        path: Path,
        model: HDiT,
        ema_model: HDiT,
        optimizer: torch.optim.Optimizer,
        details: Details,
        log: LossLog | None,
        signals: Signals,
    ) -> None:
        self.path, self.details = path, details
        self._state, self._log, self._signals = (model, ema_model, optimizer), log, signals
        self._step, self._loss = details.step, details.loss
        self._whole = True

    def begin(self) -> None:
        """The weights are about to change: they are no longer those of a step."""
        self._whole = False

    def finish(self, step: int, loss: float) -> None:
        """The weights, their average and the optimizer have done that step."""
        self._step, self._loss, self._whole = step, loss, True

    def save(self) -> None:
        """Saves the finished steps. Raises NonFiniteLoss, keeping the last checkpoint, if a weight isn't finite."""
        if self._step == self.details.step:
            return
        details = replace(self.details, step=self._step, loss=self._loss)
        self._whole = False  # if this fails, there is no use in trying again
        if self._log is not None:
            self._log.sync()
            try:
                save_checkpoint(self.path, *self._state, details)
            except ArithmeticError as error:
                raise self.diverged(str(error)) from error
        self.details, self._whole = details, True

    def diverged(self, what: str) -> NonFiniteLoss:
        """The error for a loss, gradient or weight that isn't finite: what, and what to do."""
        lr, holds = self.details.options["lr"], f"{self.path} holds step {self.details.step}"
        if not self.details.step:
            advice = "start again with a lower --lr"
        elif self._step > self.details.step:
            advice = f"{holds}: --resume from it with a lower --lr"
        else:
            advice = f"{holds}, whose weights give this with any --lr: start another run with a lower one"
        return NonFiniteLoss(f"{what}; {advice} than {lr:g}")

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, (Exception, Stopped)) or isinstance(error, NonFiniteLoss):
            return  # the run's end, a second Ctrl-C, or weights that are not to be kept
        what, number = _mendable(error), self._signals.caught
        if self._log is None:
            if what is not None and isinstance(error, RuntimeError):
                raise RunError(what) from error
            return
        lost = ""
        if self._whole:
            try:
                self.save()
            except Exception as failure:
                lost = f"; the finished steps could not be saved ({in_words(failure) or failure})"
        kept = "nothing is saved yet: start again"
        if self.details.step:
            kept = f"saved {self.path} (step {self.details.step}), go on with --resume"
        if what is None:
            say(f"{kept}{lost}")  # before the traceback of a bug
        elif number is not None and self._whole and not isinstance(error, ConnectionError):
            raise Stopped(number, f"; {kept}") from error
        else:
            raise RunError(f"{what}; {kept}{lost}") from error


def _mendable(error: BaseException) -> str | None:
    """An error in words, if it is one that a user can mend."""
    died = re.match(r"DataLoader worker \(pid.*?\) (is |exited )[^.]*", str(error))
    if died and isinstance(error, RuntimeError):
        return f"a data worker died ({died[0]}): lower --workers, or --batch-size if memory is short"
    return in_words(error)


def say(message: str) -> None:
    """A line on stderr."""
    tell(f"hdit.train: {message}")
