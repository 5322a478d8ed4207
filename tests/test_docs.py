"""README.md and docs/: figures are what the records say, examples run, links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from benchmarks import api, kernels, model, peers, report, results, runs, scaling
from tests import documented_code, made_up_runs

DOCUMENTS = report.documents()


def name(document: Path) -> str:
    return document.relative_to(results.ROOT).as_posix()


def dead_links(markdown: str, folder: Path) -> list[str]:
    """Relative links and pictures that lead to no file."""
    links = re.findall(r"\]\(([^)#\s]+)", markdown) + re.findall(r'(?:src|href)="([^"#]+)', markdown)
    return [link for link in links if "://" not in link and not (folder / link).exists()]


# The checker, on made-up documents


def test_the_checker_finds_examples_and_dead_links(tmp_path: Path) -> None:
    text = "a\n```python\nx = 1\n```\n```sh\nls\n```\n[b](here.md) ![c](no.png) [d](https://e.f/g) [h](here.md#i)\n"
    (tmp_path / "here.md").write_text(text)
    assert documented_code.in_document(tmp_path / "here.md") == ["\n\nx = 1\n"]
    assert dead_links(text + '<img src="gone.png">', tmp_path) == ["no.png", "gone.png"]


# The documents themselves


def test_the_documents_are_what_the_records_make_of_them() -> None:
    assert report.differences() == [], "run: python -m benchmarks report"


def test_records_and_pictures_stay_small() -> None:
    records = list((results.ROOT / "benchmarks" / "results").glob("*.json"))
    pictures = list((results.ROOT / report.PICTURES).iterdir())
    assert len(pictures) <= 10
    assert max(path.stat().st_size for path in records) < 1.5e6 and max(p.stat().st_size for p in pictures) < 1e5


@pytest.mark.parametrize("document", [*DOCUMENTS, results.ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    assert dead_links(report.built(document.read_text(encoding="utf-8"), document), document.parent) == []


def test_the_site_shows_every_recorded_case_of_a_kernel() -> None:
    pytest.importorskip("mkdocs", reason='needs the extra "docs", as make docs does')
    document = results.ROOT / "docs" / "benchmarks.md"
    hooks = runpy.run_path(str(results.ROOT / "docs" / "site_hooks.py"))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="benchmarks.md"), meta={})
    shown = hooks["on_page_markdown"](document.read_text(encoding="utf-8"), page=page)
    assert "<!-- built:" not in shown
    for path, run in report.recorded(document).of("kernels"):
        assert f"](benchmarks/results/{path.name})" in shown
        lines = {f"| {row['case'].partition(' ')[2]} | {row['pass']} |" for row in run["rows"]}
        assert [line for line in lines if line not in shown] == []


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
        made = made_up_runs.scaling() if kind == "scaling" else made_up_runs.models(kind)
        return runs.Run(made, kind, made["sessions"][0])

    for module, name, effect in (
        *((api, "run_cases", run_cases), (api, "open_run", open_run)),
        *((module, name, None) for module, name in ((scaling, "measure_models"), (scaling, "measure_attention"))),
        (model, "measure_networks", None),
    ):
        monkeypatch.setattr(module, name, mock.create_autospec(getattr(module, name), side_effect=effect))
    code = CODE[where]
    exec(compile(code, where, "exec"), {"__name__": "__main__"})
    assert api.run_cases.called and scaling.measure_attention.called and "api.close_run(run)" in code  # type: ignore
    assert "na2d" in capsys.readouterr().out
