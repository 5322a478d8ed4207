"""README.md and docs/: figures are recorded measurements of the present sources, examples run, links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import api, kernels, model, peers, plots, report, results, runs, scaling
from tests import documented_code, made_up_runs

DOCUMENTS = report.documents()
RECORD = re.compile(r"benchmarks/results/[\w.-]+\.json")


def name(document: Path) -> str:
    return document.relative_to(results.ROOT).as_posix()


def false_quotes(markdown: str, root: Path = results.ROOT) -> list[str]:
    """What is wrong with the measurements that a document quotes, a line each.

    A paragraph that names a JSON file under benchmarks/results must say "measured on an earlier version" exactly if the
    file's source_sha256 is not the present one.
    """
    present, wrong = results.source_hash(root), []
    for paragraph in re.split(r"\n\s*\n", markdown):
        says_earlier = "measured on an earlier version" in " ".join(paragraph.split())
        for record in sorted(set(RECORD.findall(paragraph))):
            if not (root / record).exists():
                wrong.append(f"{record} does not exist")
                continue
            measured = json.loads((root / record).read_text(encoding="utf-8")).get("source_sha256")
            if measured is None:
                wrong.append(f"{record} has no source_sha256")
            elif measured != present and not says_earlier:
                wrong.append(f"{record} measured other sources than the present and the text doesn't say so")
    return wrong


def dead_links(markdown: str, folder: Path) -> list[str]:
    """Relative links and pictures that lead to no file."""
    links = re.findall(r"\]\(([^)#\s]+)", markdown) + re.findall(r'(?:src|href)="([^"#]+)', markdown)
    return [link for link in links if "://" not in link and not (folder / link).exists()]


# The checker, on made-up documents


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    (tmp_path / "hdit").mkdir()
    (tmp_path / "hdit" / "a.py").write_text("1")
    folder = tmp_path / "benchmarks" / "results"
    results.write(folder / "present.json", {"source_sha256": results.source_hash(tmp_path)})
    results.write(folder / "old-1.0.json", {"source_sha256": "0" * 64})
    results.write(folder / "bare.json", {"seconds": 1})
    return tmp_path


@pytest.mark.parametrize(
    ("markdown", "wrong"),
    [
        ("No figure at all.", []),
        ("Fast, see `benchmarks/results/present.json`.", []),
        ("Fast, see [record](../benchmarks/results/present.json)\nand more.", []),
        ("Fast, see benchmarks/results/old-1.0.json.", ["old-1.0.json measured other sources"]),
        ("Fast (benchmarks/results/old-1.0.json, measured on an earlier version).", []),
        ("Fast: benchmarks/results/old-1.0.json,\nmeasured on an\nearlier version of the sources.", []),
        ("Measured on an earlier version.\n\nFast: benchmarks/results/old-1.0.json.", ["old-1.0.json measured other"]),
        ("| a |\n|---|\n| benchmarks/results/old-1.0.json |\n", ["old-1.0.json measured other sources"]),
        ("See benchmarks/results/absent.json", ["absent.json does not exist"]),
        ("See benchmarks/results/bare.json", ["bare.json has no source_sha256"]),
        (
            "benchmarks/results/old-1.0.json benchmarks/results/present.json benchmarks/results/absent.json",
            ["absent.json does not exist", "old-1.0.json measured other sources"],
        ),
    ],
)
def test_the_checker_finds_false_quotes(markdown: str, wrong: list[str], made_up: Path) -> None:
    found = false_quotes(markdown, made_up)
    assert len(found) == len(wrong)
    assert all(part in line for part, line in zip(wrong, found, strict=True)), found


def test_the_checker_notices_a_change_of_the_sources(made_up: Path) -> None:
    text = "See benchmarks/results/present.json"
    assert false_quotes(text, made_up) == []
    (made_up / "hdit" / "a.py").write_text("2")
    assert len(false_quotes(text, made_up)) == 1


def test_the_checker_finds_examples_and_dead_links(tmp_path: Path) -> None:
    text = "a\n```python\nx = 1\n```\n```sh\nls\n```\n[b](here.md) ![c](no.png) [d](https://e.f/g) [h](here.md#i)\n"
    (tmp_path / "here.md").write_text(text)
    assert documented_code.in_document(tmp_path / "here.md") == ["\n\nx = 1\n"]
    assert dead_links(text + '<img src="gone.png">', tmp_path) == ["no.png", "gone.png"]


# The documents themselves


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_quoted_measurements_are_of_the_present_sources(document: Path) -> None:
    wrong = false_quotes(document.read_text(encoding="utf-8"))
    assert not wrong, f"{wrong}: measure again, or run: python -m benchmarks report"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_generated_blocks_are_up_to_date(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert report.render(text, report.recorded(document)) == text, "run: python -m benchmarks report"


def test_the_pictures_show_the_recorded_measurements() -> None:
    records = report.recorded(results.ROOT / "README.md")
    expected = {
        f"{path.stem}-{name}.svg": plots.digest(run)
        for path, run in records.runs.items()
        for name in plots.pictures(run)
    }
    found = {path.name: path.read_text(encoding="utf-8") for path in records.pictures.glob("*")}
    assert sorted(found) == sorted(expected), "run: python -m benchmarks report"
    wrong = [name for name, digest in expected.items() if digest not in found[name]]
    assert not wrong, "run: python -m benchmarks report"


@pytest.mark.parametrize("document", [*DOCUMENTS, results.ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    assert dead_links(document.read_text(encoding="utf-8"), document.parent) == []


CODE = documented_code.everywhere()  # which make lint has mypy check
NOTEBOOKS = ["docs/benchmarks.md 1", "benchmarks/api.py 1"]  # calls the benchmarks as functions


def test_an_example_in_a_docstring_runs() -> None:
    assert "hdit_kernels/checks.py 1" in CODE
    for where, code in CODE.items():
        if ".py " in where and where not in NOTEBOOKS:
            exec(compile(code, where, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("where", NOTEBOOKS)
def test_the_benchmarks_examples_run(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With made-up measurements: names, arguments, patterns of cases and contestants are the real ones'."""

    def run_cases(cases: list[str], contestants: list[str], **_: Any) -> dict[str, Any]:
        for patterns, named in ((cases, kernels.all_cases()), (contestants, peers.all_contestants())):
            assert all(api.chosen([pattern], [one.name for one in named]) for pattern in patterns)
        return made_up_runs.kernels()

    def open_run(kind: str, **_: Any) -> runs.Run:
        return runs.Run(made_up_runs.scaling() if kind == "scaling" else made_up_runs.models(kind))

    for module, name, effect in (
        *((api, "run_cases", run_cases), (api, "open_run", open_run)),
        *((module, name, None) for module, name in ((scaling, "measure_models"), (scaling, "measure_attention"))),
        (model, "measure", None),
    ):
        monkeypatch.setattr(module, name, mock.create_autospec(getattr(module, name), side_effect=effect))
    code = CODE[where]
    exec(compile(code, where, "exec"), {"__name__": "__main__"})
    assert api.run_cases.called and scaling.measure_attention.called and "api.close_run(run)" in code  # type: ignore
    assert "na2d" in capsys.readouterr().out
