"""A folder from which Hugging Face's `kernels` library loads hdit_kernels.

python -m tools.huggingface FOLDER writes

    build.toml, torch-ext/hdit_kernels   what kernel-builder makes build/ of
    build/torch-<backend>                what `kernels` loads: the same files, and metadata.json

`kernels` imports a copy under the id in its metadata, so that several versions can live in one process. Therefore the
copy's imports are relative; its operators are registered under the name of the package as it was imported.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hdit_kernels
from hdit._runtime import Parser, one_line_errors, printable, writable

NAME = hdit_kernels.__name__
PACKAGE = Path(hdit_kernels.__file__).parent
BACKENDS = ("cpu", "cuda", "metal", "rocm")
VERSION = int(hdit_kernels.__version__.partition(".")[0])  # `kernels` counts incompatible versions only
BUILD = f"""\
[general]
name = "{NAME.replace("_", "-")}"
version = {VERSION}
edition = 5
license = "MIT"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""


def relative(source: str, path: str) -> str:
    """The source of the package's module at path, its imports of the package made relative.

    Raises ValueError on `import hdit_kernels`, which has no relative form.
    """
    lines = source.encode().splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == NAME for alias in node.names):
            raise ValueError(f"{path}, line {node.lineno}: expected from … import …, got {ast.unparse(node)}")
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").partition(".")[0] == NAME:
            module = "." * len(Path(path).parts) + (node.module or "").partition(".")[2]
            line = lines[node.lineno - 1]
            start, end = f"from {node.module} ".encode(), f"from {module} ".encode()
            lines[node.lineno - 1] = line[: node.col_offset] + line[node.col_offset :].replace(start, end, 1)
    return b"".join(lines).decode()


def files() -> dict[str, bytes]:
    """What a copy of the package holds, by path in it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*")):
        name = path.relative_to(PACKAGE).as_posix()
        if path.suffix == ".py":
            found[name] = relative(path.read_text(encoding="utf-8"), name).encode()
        elif path.name == "py.typed":
            found[name] = path.read_bytes()
    return found


def metadata(backend: str, copy: dict[str, bytes]) -> dict[str, Any]:
    digests = {name: hashlib.sha256(content).digest() for name, content in copy.items()}
    version = hashlib.sha256(b"".join(digests.values())).hexdigest()[:10]
    return {
        "id": f"_{NAME}_{backend}_{version}",
        "name": NAME.replace("_", "-"),
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def write(folder: Path) -> None:
    """Raises ValueError unless folder is new or empty, OSError where it can't be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"FOLDER: expected a new or an empty folder, got {folder}")
    writable(folder)
    copy = files()
    for target in (folder / "torch-ext" / NAME, *(folder / "build" / f"torch-{backend}" for backend in BACKENDS)):
        for name, content in copy.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
    for backend in BACKENDS:
        text = json.dumps(metadata(backend, copy), indent=2) + "\n"
        (folder / "build" / f"torch-{backend}" / "metadata.json").write_text(text, encoding="utf-8")
    (folder / "build.toml").write_text(BUILD, encoding="utf-8")
    shutil.copy(PACKAGE.parent / "LICENSE", folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("python -m tools.huggingface", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or an empty folder to write it into")
    args = parser.parse_args(argv)
    with one_line_errors("tools.huggingface"):
        write(args.folder)
        print(printable(str(args.folder)))


if __name__ == "__main__":
    main()
