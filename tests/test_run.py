from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hdit import _interrupt, run
from hdit._runtime import Stopped, in_words, one_line_errors, pick_device
from hdit.run import LOCK, LossLog, RunError, Signals, only_run

fcntl = pytest.importorskip("fcntl")
HEADER = "step,loss,gradient_norm\n"
LINES = [f"{step},{step / 8!r},1.5\n" for step in range(1, 9)]

# The log of losses


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "loss.csv"


def test_a_new_log(path: Path) -> None:
    with LossLog(path) as log:
        assert log.write(1, 0.5, 0.25) == 0.5
        assert log.write(2, 1.5, 2.0) == pytest.approx(0.52)
        assert path.read_text() == HEADER + "1,0.5,0.25\n2,1.5,2.0\n"  # before it is closed


@pytest.mark.parametrize("after", ["", "".join(LINES[5:]), LINES[5] + "7,0.", "6,0.1", "\0" * 50])
def test_lines_after_the_checkpoint_are_taken_back(path: Path, after: str) -> None:
    path.write_text(HEADER + "".join(LINES[:5]) + after)
    with LossLog(path, 5, 5 / 8) as log:
        log.write(6, 0.5, 1.0)
    assert path.read_text() == HEADER + "".join(LINES[:5]) + "6,0.5,1.0\n"
    assert os.listdir(path.parent) == ["loss.csv"]


def test_a_log_without_lines_to_cut_is_not_written_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(HEADER + "".join(LINES * 3))  # as long as it may be

    def opened(name: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        assert "w" not in mode and "+" not in mode
        return open(name, mode, *arguments, **named)

    monkeypatch.setattr(run, "open", opened, raising=False)
    monkeypatch.setattr(os, "replace", None)
    with LossLog(path, 8, 1.0) as log:
        log.write(9, 1.0, 1.0)
    assert path.read_text() == HEADER + "".join(LINES * 3) + "9,1.0,1.0\n"


def test_a_crash_while_lines_are_cut_loses_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(HEADER + "".join(LINES))

    def crash(*names: Path) -> None:
        assert names[0].read_text() == HEADER + "".join(LINES[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        LossLog(path, 5, 5 / 8)
    assert path.read_text() == HEADER + "".join(LINES) and os.listdir(path.parent) == ["loss.csv"]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"step,loss\n1,0.125\n", "not a log of hdit.train"),
        (b"1,0.125,1.5\n", "not a log of hdit.train"),
        (b"\xff\xfe\n", "not a log of hdit.train"),
        (b"step,loss,gradient_norm\n1,0.125,1.5\n\xff,1,1\n2,0.25,1.5\n", "line 3 is none"),
        (b"step,loss,gradient_norm\n1,0.125,1.5\n\n2,0.25,1.5\n", "line 3 is none"),
        (b"step,loss,gradient_norm\n1,0.125\n2,0.25,1.5\n", "line 2 is none"),
        (b"step,loss,gradient_norm\n1,0.125,1.5\n", "no line for step 2"),
        (b"step,loss,gradient_norm\n1,0.125,1.5\n2,0.5,1.5\n3,0.5,1.5\n", "another loss for step 2"),
    ],
)
def test_another_log_is_refused_and_kept(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        LossLog(path, 2, 0.25)
    assert str(path) in str(error.value) and path.read_bytes() == content


def test_what_is_no_file_is_refused(path: Path, tmp_path: Path) -> None:
    path.mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in (path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"{name} is not a file"):
            LossLog(name)


def test_without_a_log_a_resumed_run_says_so(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LossLog(path, 5, 0.5) as log:
        log.write(6, 0.5, 1.0)
    assert f"there are no losses in {path}: they begin with step 6" in capsys.readouterr().err
    assert path.read_text() == HEADER + "6,0.5,1.0\n"


def test_a_new_run_keeps_the_losses_of_an_earlier_one(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(HEADER)
    LossLog(path)
    assert os.listdir(path.parent) == ["loss.csv"]  # no losses, nothing to keep
    for number in (1, 2):
        path.write_text(HEADER + LINES[number])
        LossLog(path)
        assert path.with_name(f"loss.{number}.csv").read_text() == HEADER + LINES[number]
        assert f"loss.{number}.csv" in capsys.readouterr().err
        assert path.read_text() == HEADER


def test_a_full_disk_is_named(path: Path) -> None:
    log = LossLog(path)
    log._file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(OSError, match="No space left on device.*loss.csv") as error:
        log.write(1, 0.5, 0.5)
    assert error.value.errno == errno.ENOSPC


# The lock


def test_one_run_a_folder(tmp_path: Path) -> None:
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+b', buffering=0); fcntl.lockf(file, fcntl.LOCK_EX);"
        "file.write(b'process 7 on elsewhere since noon\\n'); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", code, tmp_path / LOCK], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(RunError, match="in use by another run, process 7 on elsewhere since noon: wait"):
            with only_run(tmp_path):
                pass
        other.kill()
    with only_run(tmp_path):  # what a dead process leaves is no obstacle
        holder = (tmp_path / LOCK).read_text()
        assert holder.startswith(f"process {os.getpid()} on ") and str(time.localtime().tm_year) in holder
        with pytest.raises(RunError, match="another run of this process"):
            with only_run(tmp_path):
                pass
    with only_run(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == ""


def test_children_that_outlive_a_run_do_not_hold_its_lock(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    run_process = os.fork()
    if not run_process:
        with only_run(tmp_path):
            worker = os.fork()
            if not worker:
                time.sleep(60)
                os._exit(0)
            os.write(writing, str(worker).encode())
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(reading, 20))
    try:
        with pytest.raises(RunError), only_run(tmp_path):
            pass
        os.kill(run_process, signal.SIGKILL)
        os.waitpid(run_process, 0)
        with only_run(tmp_path):
            os.kill(worker, 0)  # still there
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)
    with only_run(tmp_path):
        pass
    assert "can't be locked (No locks available): see that no other run" in capsys.readouterr().err


# Signals


@pytest.fixture
def signals() -> Iterator[Signals]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    with Signals() as inside:
        yield inside
    assert [signal.getsignal(number) for number in numbers] == before


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_waits_for_the_step_and_others_do_nothing(signals: Signals, first: int) -> None:
    with signals.at_rest():
        pass
    send(first, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    assert signals.caught == first
    with pytest.raises(Stopped, match=f"stopped by {signal.Signals(first).name}"), signals.at_rest():
        pytest.fail("not to be reached")


def test_at_rest_a_signal_stops_at_once(signals: Signals) -> None:
    with pytest.raises(Stopped) as stop, signals.at_rest():
        send(signal.SIGTERM)
        time.sleep(10)
    assert stop.value.number == signals.caught == signal.SIGTERM
    send(signal.SIGTERM)  # while it is being saved


def test_other_packages_do_not_go_on_after_a_signal(signals: Signals) -> None:
    with pytest.raises(Stopped), signals.at_rest():
        with contextlib.suppress(Exception):
            send(signal.SIGTERM)
            time.sleep(10)
        pytest.fail("not to be reached")


@pytest.mark.parametrize("error", [None, ValueError("wrong"), KeyboardInterrupt(), Stopped(signal.SIGTERM)])
def test_ctrl_c_while_python_ends(error: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is said then: it would be a traceback, of the data workers' end for one."""
    before = signal.getsignal(signal.SIGINT)
    try:
        for is_program in (False, True):
            monkeypatch.setattr(_interrupt, "_is_program", is_program)
            with contextlib.suppress(SystemExit), one_line_errors("hdit.train"):
                if error is not None:
                    raise error
            assert (signal.getsignal(signal.SIGINT) is signal.SIG_IGN) is is_program
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_after_a_while_interrupts(signals: Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    send(signal.SIGTERM)
    monkeypatch.setattr(run, "AGAIN", 0.0)
    send(signal.SIGTERM, signal.SIGHUP)  # never
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_ignored_signals_stay_ignored() -> None:  # nohup
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            send(signal.SIGHUP)
            assert signals.caught is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_need_no_signals() -> None:
    def inside() -> None:
        with Signals() as signals, signals.at_rest():
            done.append(signals)

    done: list[Signals] = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert len(done) == 1


def test_a_worker_s_death_is_told_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def torch_tells(number: int, frame: Any) -> None:  # as torch.utils.data does, wherever the program is
        told.append(number)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    told: list[int] = []
    before = signal.signal(signal.SIGCHLD, torch_tells)
    try:
        with Signals() as signals:
            signals.watch_workers()
            send(signal.SIGCHLD)
            assert not told
            with pytest.raises(RuntimeError, match="is killed"), signals.at_rest():
                pytest.fail("not to be reached")
            with signals.at_rest():
                pass
            with pytest.raises(RuntimeError, match="is killed"), signals.at_rest():
                send(signal.SIGCHLD)
            assert len(told) == 2
            send(signal.SIGCHLD)
        assert len(told) == 3  # lest torch tells later
        assert signal.getsignal(signal.SIGCHLD) is torch_tells
    finally:
        signal.signal(signal.SIGCHLD, before)


# What the programs share


def test_errors_in_words() -> None:
    for error, words in (
        (ValueError("a\n b"), "a b"),
        (OSError(28, "No space left", "file"), "[Errno 28] No space left: 'file'"),
        (MemoryError(), "the memory is full: lower --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "the memory is full: lower"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            "the GPU's memory is full (CUDA out of memory)",
        ),
        (Stopped(signal.SIGTERM, "; saved it"), "stopped by SIGTERM; saved it"),
    ):
        assert (in_words(error) or "").startswith(words)
    assert in_words(RuntimeError("a bug")) is None


def test_devices_are_picked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        assert pick_device(name) == torch.device(name)
    assert pick_device() == torch.device("cuda")
    for name, words in (("cuda:2", "GPUs 0 to 1"), ("meta", "no device 'meta'"), ("", "no device ''")):
        with pytest.raises(ValueError, match=f"--device.*{words}"):
            pick_device(name)
