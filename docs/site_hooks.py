"""What mkdocs.yml can't say: pages that lie outside docs/, and links that lead there.

The Markdown files are read in a clone as well, where links lead to files of the repository. Here README.md,
CONTRIBUTING.md and their like become pages, and other files that a page links to are copied into the site under their
own paths. Tables of every measurement are made of the records here, and are in the site only.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from benchmarks import report

ROOT = Path(__file__).parent.parent
WIDE = ("benchmarks.md", "kernel-log.md", "operators.md", "correctness.md", "CONTRIBUTING.md", "benchmarks/SCHEMA.md")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/SCHEMA.md")
LINK = re.compile(r"(\]\(|\b(?:src|href)=\")([^)\s\"#]+)")


def address(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def relinked(markdown: str, page: str) -> tuple[str, set[str]]:
    """A page's Markdown with its links as they are in the site, and the files of the repository that they lead to.

    page: its path in the repository.
    """
    found: set[str] = set()

    def link(match: re.Match[str]) -> str:
        start, target = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if "://" in target or target.startswith("mailto:") or not (ROOT / path).is_file():
            return match[0]
        found.add(path)
        return start + os.path.relpath(address(path), posixpath.dirname(address(page)) or ".").replace(os.sep, "/")

    return LINK.sub(link, markdown), found


def on_files(files: Files, config: Any) -> Files:
    wanted = set(PAGES)
    for page in [*(f"docs/{file.src_uri}" for file in files.documentation_pages()), *PAGES]:
        wanted |= relinked(report.built((ROOT / page).read_text(encoding="utf-8"), ROOT / page), page)[1]
    for path in sorted(wanted):
        if not path.startswith("docs/"):
            files.append(File.generated(config, address(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    path = "README.md" if page.file.src_uri == "index.md" else page.file.src_uri
    path = path if path in PAGES else f"docs/{path}"
    return relinked(report.built(markdown, ROOT / path), path)[0]
