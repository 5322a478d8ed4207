from __future__ import annotations

import os
import socket
import zipfile
from pathlib import Path

import pytest

from hdit.files import DataError, FolderFiles, ZipFiles

posix = pytest.mark.skipif(os.name != "posix", reason="needs links, pipes and sockets as POSIX has them")


def files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def listed(root: Path) -> tuple[list[str], dict[str, str]]:
    """Names found, sorted, and what was passed over with the reasons."""
    folder = FolderFiles(root)
    return sorted(folder.names()), dict(folder.passed_over)


# Links


@posix
@pytest.mark.parametrize("targets", [[".."], ["..", ".."], ["."], ["../dogs"], ["../../data/dogs"], ["../.."], ["/"]])
def test_a_link_to_a_folder_of_the_data_or_above_adds_nothing(tmp_path: Path, targets: list[str]) -> None:
    root = files(tmp_path / "data", "cats/0.png", "dogs/0.png", "dogs/deep/1.png")
    files(tmp_path, "other/2.png")
    for i, target in enumerate(targets):
        os.symlink(target, root / "cats" / f"link{i}")
    found, passed_over = listed(root)
    assert found == ["cats/0.png", "dogs/0.png", "dogs/deep/1.png"]
    reason = "a folder that is among the data already" if "dogs" in targets[0] else "a link to a folder above"
    assert passed_over == {f"cats/link{i}": reason for i in range(len(targets))}


@posix
def test_the_real_folder_wins_then_links_in_the_order_of_their_names(tmp_path: Path) -> None:
    root = files(tmp_path / "data", "zebras/0.png")
    files(tmp_path / "pool", "1.png", "inner/2.png")
    os.symlink(root / "zebras", root / "apes")
    for name in ("cats", "bees"):
        os.symlink(tmp_path / "pool", root / name)
    os.symlink(tmp_path / "pool" / "inner", root / "zebras" / "linked")
    found, passed_over = listed(root)
    assert found == ["bees/1.png", "bees/inner/2.png", "zebras/0.png"]
    assert sorted(passed_over) == ["apes", "cats", "zebras/linked"]


@posix
def test_links_beyond_links_are_followed_once(tmp_path: Path) -> None:
    root = files(tmp_path / "data", "0.png")
    files(tmp_path / "one", "1.png")
    files(tmp_path / "two", "2.png")
    os.symlink(tmp_path / "one", root / "a")
    os.symlink(tmp_path / "two", tmp_path / "one" / "b")
    os.symlink(root, tmp_path / "two" / "c")
    files(tmp_path / "pool", "cats/3.png", "dogs/4.png")
    os.symlink(tmp_path / "pool" / "cats", root / "cats")
    os.symlink("..", tmp_path / "pool" / "cats" / "up")
    found, passed_over = listed(root)
    assert found == ["0.png", "a/1.png", "a/b/2.png", "cats/3.png"]
    assert passed_over == dict.fromkeys(["a/b/c", "cats/up"], "a link to a folder above")


@posix
def test_files_with_several_names_stay(tmp_path: Path) -> None:
    root = files(tmp_path, "a/0.png")
    os.link(root / "a/0.png", root / "hard.png")
    os.symlink("a/0.png", root / "soft.png")
    assert listed(root) == (["a/0.png", "hard.png", "soft.png"], {})


@posix
def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    root = files(tmp_path, "0.png")
    for name, target in (("gone.png", "nothing"), ("cats", "unmounted/cats"), ("self.png", "self.png")):
        os.symlink(target, root / name)
    assert listed(root) == (["0.png"], dict.fromkeys(["cats", "gone.png", "self.png"], "a link that leads nowhere"))


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    root = files(tmp_path / ".data", "0.png", ".1.png", ".git/2.png", "a/__MACOSX/3.png", "a/.b/4.png")
    assert listed(root) == (["0.png"], {})


# What isn't a regular file


@posix
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    root = files(tmp_path, "0.png")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe.txt")  # isn't an image, and isn't opened either
    os.symlink("/dev/zero", root / "device.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "socket.png"))
        found, passed_over = listed(root)
        reason = "not a regular file but a pipe, socket or device"
        assert found == ["0.png"] and passed_over == dict.fromkeys(["device.png", "pipe.png", "socket.png"], reason)
        for name in passed_over:
            with pytest.raises(OSError, match=reason):
                FolderFiles(root).open(name)


@posix
def test_a_pipe_put_in_the_place_of_a_file_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, "0.png")
    os.mkfifo(tmp_path / "pipe.png")
    regular = os.stat(tmp_path / "0.png")
    folder = FolderFiles(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="not a regular file"):
        patch.setattr(os, "stat", lambda path: regular)
        folder.open("pipe.png")


def test_folders_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = files(tmp_path / "data", "cats/0.png", "dogs/0.png")
    scandir, closed = os.scandir, root / "dogs"

    def refusing(path: Path) -> object:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert listed(root) == (["cats/0.png"], {"dogs": "a folder that can't be read (Permission denied)"})
    closed = root
    with pytest.raises(DataError, match=r"data can't be read \(Permission denied\)"):
        listed(root)


# .zip files


def zipped(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name.replace("caf", "CAF"))
    return path


def test_odd_names_in_a_zip(tmp_path: Path) -> None:
    names = ("/abs/0.png", "../up/1.png", "./here/2.png", "a\\3.png", "caf?/4.png", "ä/5.png", ".hidden/6.png", "d/")
    path = zipped(tmp_path / "x.zip", *names)
    path.write_bytes(path.read_bytes().replace(b"caf?", b"caf\xe9"))  # no UTF-8, and not flagged as such
    archive = ZipFiles(path)
    assert archive.names() == ["abs/0.png", "../up/1.png", "here/2.png", "a/3.png", "cafΘ/4.png", "ä/5.png"]
    assert archive.open("../up/1.png").read() == b"../up/1.png" and archive.open("abs/0.png").read() == b"/abs/0.png"
    assert archive.open("a/3.png").read() == b"a\\3.png" and archive.open("cafΘ/4.png").read() == b"CAF?/4.png"
    assert archive.passed_over == []
    assert [entry.name for entry in tmp_path.rglob("*")] == ["x.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_last_of_several_files_of_one_name_counts(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for content in (b"first", b"second"):
            archive.writestr("0.png", content)
        archive.writestr("./0.png", b"third")
    files = ZipFiles(tmp_path / "x.zip")
    assert files.names() == ["0.png"] and files.open("0.png").read() == b"third"
    assert files.passed_over == [(str(tmp_path / "x.zip"), "2 files with the name of a later one")]


def test_encrypted_and_huge_files_in_a_zip_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", "0.png", "1.png")
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[6] |= 1
    content[directory + 8] |= 1  # "encrypted", in the file's header and in the directory
    second = content.index(b"PK\x01\x02", directory + 1)
    content[second + 24 : second + 28] = b"\xff\xff\xff\xf0"  # the size unpacked
    path.write_bytes(content)
    files = ZipFiles(path)
    with pytest.raises(RuntimeError, match="encrypted"):
        files.open("0.png")
    with pytest.raises(ValueError, match="more than the 2147483648 that are unpacked"):
        files.open("1.png")


def test_damaged_zips_are_one_line(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "x.zip", "ä.png", "1.png").read_bytes()
    directory = whole.index(b"PK\x01\x02")
    for damaged in (
        whole.replace("ä".encode(), b"\xff\xfe"),  # flagged as UTF-8
        whole[:directory] + b"XX" + whole[directory + 2 :],
        whole[: directory + 6] + b"\xff\x7f" + whole[directory + 8 :],  # of a version to come
    ):
        (tmp_path / "x.zip").write_bytes(damaged)
        with pytest.raises(DataError, match=r"x.zip is a damaged .zip file \(.*\): restore it$"):
            ZipFiles(tmp_path / "x.zip")


# Signatures


@pytest.mark.parametrize("size", [1, 5_000, 12_288, 100_000])
def test_signatures_show_files_replaced_in_place(tmp_path: Path, size: int) -> None:
    path, folder = tmp_path / "0.png", FolderFiles(tmp_path)
    path.write_bytes(bytes(size))
    seen = {folder.signature("0.png")}
    for changed in {0, size // 2, size - 1}:
        path.write_bytes(bytes(changed) + b"x" + bytes(size - changed - 1))
        seen.add(folder.signature("0.png"))
    path.write_bytes(bytes(size + 1))
    seen.add(folder.signature("0.png"))
    assert len(seen) == 2 + len({0, size // 2, size - 1})
    os.utime(path, (0, 0))
    assert folder.signature("0.png") in seen


def test_signatures_cost_the_same_for_files_of_any_size(tmp_path: Path) -> None:
    with open(tmp_path / "0.png", "wb") as file:
        file.truncate(2**40)  # a hole, which would take hours to read
    assert FolderFiles(tmp_path).signature("0.png")[0] == 2**40


def test_signatures_in_a_zip_show_other_contents(tmp_path: Path) -> None:
    seen = set()
    for content in (b"some", b"more"):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("0.png", content)
        seen.add(ZipFiles(tmp_path / "x.zip").signature("0.png"))
    assert len(seen) == 2 and {size for size, _ in seen} == {4}
