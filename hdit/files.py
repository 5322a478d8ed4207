"""The files of a data set, in a folder or a .zip file, each by a name with slashes. Nothing is written to disk."""

from __future__ import annotations

import io
import os
import stat
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

from hdit._runtime import printable
from hdit.images import is_image

PIECE = 4096  # bytes read at the beginning, the middle and the end of a file to notice that it was replaced
LARGEST = 2**31  # bytes of a file in a .zip, which is unpacked in memory


class DataError(ValueError):
    """The data can't be trained on; the message is one line, fit for a terminal, that says what to do.

    (A DataLoader's worker process hands an error on as the text of its traceback, whose last line is the message.)
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):
            message = message.strip().splitlines()[-1].removeprefix(f"{__name__}.DataError: ")
        super().__init__(printable(message))


class FolderFiles:
    """The files below a folder, by their paths relative to it.

    Each folder is entered once, by device and inode: first without following links, then through links in the order of
    their names, then through links found there. passed_over: (name, reason) of what names() found but left out.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DataError(f"there is no folder or .zip file {path}: check --data")
        self.path = path
        self.passed_over: list[tuple[str, str]] = []

    def names(self) -> list[str]:
        """All files, hidden ones and those in hidden folders excepted. DataError if the folder can't be read."""
        found: list[str] = []
        entered: set[tuple[int, int]] = set()
        to_enter = [""]
        while to_enter:
            links: list[str] = []
            for folder in to_enter:
                if self._leads_up(folder):
                    self.passed_over.append((folder, "a link to a folder above"))
                else:
                    self._walk(folder, entered, found, links)
            to_enter = sorted(links)
        return found

    def _leads_up(self, link: str) -> bool:
        """Whether a link leads to a folder that it lies in, or that all data do: what else is in there isn't meant."""
        target, places = (self.path / link).resolve(), {self.path.resolve(), (self.path / link).parent.resolve()}
        return link != "" and any(place.is_relative_to(target) for place in places)

    def _walk(self, top: str, entered: set[tuple[int, int]], found: list[str], links: list[str]) -> None:
        """Adds the files below top to found, and the links to folders there to links."""
        folders = [top]
        while folders:
            folder = folders.pop()
            try:
                status = os.stat(self.path / folder)
                if (status.st_dev, status.st_ino) in entered:
                    self.passed_over.append((folder, "a folder that is among the data already"))
                    continue
                entered.add((status.st_dev, status.st_ino))
                with os.scandir(self.path / folder) as entries:
                    visible = sorted((entry for entry in entries if not _hidden(entry.name)), key=lambda e: e.name)
            except OSError as error:
                if not folder:
                    raise DataError(f"{self.path} can't be read ({error.strerror}): check --data") from error
                self.passed_over.append((folder, f"a folder that can't be read ({error.strerror})"))
                continue
            for entry in visible:
                name = f"{folder}/{entry.name}" if folder else entry.name
                try:
                    is_folder, is_file = entry.is_dir(), entry.is_file()
                except OSError:  # a link to itself, or to where nobody may look
                    is_folder = is_file = False
                if is_folder:
                    (links if entry.is_symlink() else folders).append(name)
                elif is_file:
                    found.append(name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    self.passed_over.append((name, "a link that leads nowhere"))
                elif is_image(name):
                    self.passed_over.append((name, _NOT_REGULAR))

    def open(self, name: str, buffering: int = -1) -> IO[bytes]:
        """Opens a regular file; an OSError for any other, which could hang or do something when it is opened."""
        path = os.path.join(self.path, name)
        _check_regular(os.stat(path))
        # A pipe put there since is opened without waiting for a writer, and refused.
        file = open(path, "rb", buffering, opener=lambda p, flags: os.open(p, flags | getattr(os, "O_NONBLOCK", 0)))
        try:
            _check_regular(os.fstat(file.fileno()))
        except OSError:
            file.close()
            raise
        return file

    def signature(self, name: str) -> tuple[int, int]:
        """The size, and a checksum of some bytes, at little cost: another file of this name very likely has another."""
        with self.open(name, buffering=0) as file:
            size, checksum = os.fstat(file.fileno()).st_size, 0
            for position in (0, (size - PIECE) // 2, size - PIECE):
                file.seek(max(position, 0))
                checksum = zlib.crc32(file.read(PIECE), checksum)
        return size, checksum


class ZipFiles:
    """The files in a .zip file. Each process opens it for itself: a file's position is shared across a fork.

    passed_over: as in FolderFiles. DataError if the file isn't a .zip, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed_over: list[tuple[str, str]] = []
        self._process = 0
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is neither a folder nor a .zip file: check --data")
        try:
            self._open()
        except Exception as error:  # zipfile raises almost anything on damaged files
            raise DataError(f"{path} is a damaged .zip file ({error}): restore it") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "passed_over": self.passed_over, "_process": 0}

    def names(self) -> list[str]:
        """All files, hidden ones and those in hidden folders excepted; of several with one name the last."""
        copies = len([member for member in self._zip.infolist() if not member.is_dir()]) - len(self._members)
        if copies:
            self.passed_over.append((str(self.path), f"{copies} files with the name of a later one"))
        return [name for name in self._members if not any(map(_hidden, name.split("/")))]

    def open(self, name: str) -> IO[bytes]:
        """A whole file in memory, its checksum compared. Anything zipfile raises if it is damaged or encrypted."""
        if self._process != os.getpid():
            self._open()
        member = self._members[name]
        if member.file_size > LARGEST:
            raise ValueError(f"{member.file_size} bytes, more than the {LARGEST} that are unpacked")
        return io.BytesIO(self._zip.read(member))

    def signature(self, name: str) -> tuple[int, int]:
        """The size and the checksum that the .zip file's directory holds."""
        member = self._members[name]
        return member.file_size, member.CRC

    def _open(self) -> None:
        self._zip = zipfile.ZipFile(self.path)
        self._process = os.getpid()
        members = (member for member in self._zip.infolist() if not member.is_dir())
        # Some programs on Windows write backslashes, some others write "./cats/0.png" or "/cats/0.png".
        self._members = {m.filename.replace("\\", "/").removeprefix("./").lstrip("/"): m for m in members}


_NOT_REGULAR = "not a regular file but a pipe, socket or device"


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(_NOT_REGULAR)


def _hidden(part: str) -> bool:
    return (part.startswith(".") and part != "..") or part == "__MACOSX"
