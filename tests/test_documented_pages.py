"""README.md and the site's pages: what a reader copies runs, in the order in which it stands there.

Python blocks run as they are, on the CPU, and print what they say. Shell commands run as they are but for their size:
SMALLER is what each program gets beside its own arguments. `make`, `pip`, what needs a GPU (pytest -m gpu) and several
processes (torchrun) are looked up, not run; benchmarks parse their arguments and measure nothing.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as benchmarks_program
from benchmarks.results import ROOT
from hdit import GlobalAttention, HDiTConfig, Level, Mapping
from hdit.options import Options, parser
from hdit.train import read_config
from tests.documented_code import in_order

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if in_order(page)]
NOTEBOOK = "docs/benchmarks.md"  # its Python is run by tests/test_docs.py, with made-up measurements
SMALL = HDiTConfig((Level(1, 16, attention=GlobalAttention(8)),), Mapping(1, 16), image_size=(16, 16))
SMALLER = {
    "hdit.train": "--config small.json --steps 1 --batch-size 2 --workers 0 --sample-every 0 --device cpu",
    "hdit.train --resume": "--steps 2 --device cpu",
    "hdit.sample": "--count 2 --steps 1 --device cpu",
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with a reader's images, and a package of emoji of two kinds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # on the CPU wherever they are run
    (tmp_path / "small.json").write_text(json.dumps(SMALL.to_dict()))
    for folder in ("FOLDER/cats", "FOLDER/dogs", "package/img/google/64"):
        (tmp_path / folder).mkdir(parents=True)
    for number, path in enumerate(("FOLDER/cats/1.png", "FOLDER/dogs/2.png", "package/img/google/64/a.png")):
        Image.new("RGBA", (64, 64), (number * 90, 50, 20, 128)).save(tmp_path / path)
    emoji = [
        {"category": category, "image": "a.png", "has_img_google": True}
        for category in ("Smileys & Emotion", "Flags", "Component")
    ]
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(emoji))
    return tmp_path


def run_python(code: str, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    capsys.readouterr()
    exec(compile(code, where, "exec"), {"__name__": "__main__"})
    shown = [line.partition("# prints ")[2] for line in code.splitlines() if "print(" in line]
    assert capsys.readouterr().out.splitlines() == shown


def run_shell(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command of a shell block. Fails on one that isn't known how to check."""
    match shlex.split(line, comments=True):
        case []:
            pass
        case ["python", "-m", "benchmarks", command, *arguments]:
            module = importlib.import_module(benchmarks_program.COMMANDS[command][0])
            monkeypatch.setattr(module, "run", lambda args: 0)
            assert benchmarks_program.main([command, *arguments]) == 0
        case ["python", "-m", module, *arguments] if module.partition(".")[0] in ("hdit", "benchmarks", "tools"):
            if "--config" in arguments:
                read_config(arguments[arguments.index("--config") + 1])
            kind = f"{module} --resume" if "--resume" in arguments else module
            program = importlib.import_module("hdit.__main__" if module == "hdit" else module)
            program.main([*arguments, *SMALLER.get(kind, "").split()])
        case ["python", "-m", "pytest", *arguments]:  # tests/test_documented_lanes.py starts what stands in the text
            given = set(arguments) & {"-m", "--record"}
            assert given == {word for word in arguments if word.startswith("-")} and (ROOT / "tests").is_dir()
        case ["torchrun", "--nproc_per_node", count, "-m", "hdit.train", *arguments]:
            chosen = parser().parse_args(arguments)
            assert getattr(chosen, "batch_size", Options.batch_size) % int(count) == 0
            if "--config" in arguments:
                read_config(chosen.config)
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target
        case ["pip", "install", "." | "-e", *_] | ["pip", "install", str()] as words:
            extras = re.search(r"\[(.*)\]", words[-1])
            for extra in extras[1].split(",") if extras else []:
                assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), extra
        case words:
            pytest.fail(f"there is no check for this command: {words}")


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_what_a_page_shows_runs(
    page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page.stem == "sampling":  # begins where the page on training ends
        run_shell("python -m hdit.train --data FOLDER --config flowers-256", monkeypatch)
    for number, (language, code) in enumerate(in_order(page), 1):
        if language == "sh":
            for line in code.splitlines():
                run_shell(line, monkeypatch)
        elif name(page) != NOTEBOOK:
            run_python(code, f"{name(page)} {number}", capsys)


def test_a_false_example_is_found(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    false: list[Callable[[], None]] = [
        lambda: run_python("print(1 + 1)  # prints 3", "made up", capsys),
        lambda: run_python("print(1 + 1)", "made up", capsys),
        lambda: run_shell("make coffee", monkeypatch),
        lambda: run_shell("torchrun --nproc_per_node 3 -m hdit.train --batch-size 64", monkeypatch),
        lambda: run_shell("rm -rf .", monkeypatch),
        lambda: run_shell('pip install ".[tea]"', monkeypatch),
        lambda: run_shell("python -m hdit.train --data FOLDER --config flowers-255", monkeypatch),
    ]
    for example in false:
        with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
            example()
    with pytest.raises(SystemExit):
        run_shell("python -m hdit.sample nothing.safetensors --tea", monkeypatch)


def test_the_site_has_every_page() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f": {page.name}\n" in site, f"{page.name} is in no menu"
