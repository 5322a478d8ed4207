"""Which Gluon kernels have passed on a GPU, the only place where they run.

    python -m tests.gluon_records [--processes N]

On a GPU: runs the tests that compare these kernels with the reference, and records each file whose kernels all ran, if
all tests passed. Elsewhere, of a file that has changed: carries a record over where the change is a move or renaming,
that is where everything it compiles for the ahead-of-time lane is equal. `make test` fails while a file that defines
kernels has no record of its present syntax and of that of the Gluon files it imports.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results, runs, sources
from benchmarks.sources import ROOT, Sources

FILE = ROOT / "tests" / "gluon_records.json"
COMMAND = "python -m tests.gluon_records"
OPERATORS = "na2d or neighborhood_self_attention or feed_forward"
COMPARING = f"(random_cases and ({OPERATORS}) and not (options or float32)) or strips_that_run_at_once"
DTYPES = ("bfloat16", "float16")  # which Gluon kernels take

Records = dict[str, dict[str, Any]]
"""By file. "sources": the hash. "gpus": by name, what passed there. "ptx": digests by version of Triton. "carried",
where another syntax passed: whose, and what showed that it compiles to the same."""


def read(path: Path = FILE) -> Records:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def hashes(root: Path = ROOT) -> dict[str, str]:
    """Of each file that defines Gluon kernels: the hash of it and of the Gluon files that it imports."""
    every = Sources(root)
    paths = [path for path in (root / "hdit_kernels").rglob("*.py") if b"triton.experimental" in path.read_bytes()]
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    gluon = {name: every.imports(name) for name in names}
    found = {}
    for name in sorted(gluon):
        path = every.file(name)
        assert path is not None
        if kernels(path):
            files = [every.file(other) for other in sorted(_reached(name, gluon) - {name})]
            found[path.relative_to(root).as_posix()] = sources.syntax(path, *filter(None, files))
    return found


def _reached(name: str, imported: dict[str, set[str]]) -> set[str]:
    """A Gluon module and those that it imports, and those that they do."""
    reached, waiting = set[str](), [name]
    while waiting:
        if (module := waiting.pop()) in imported and module not in reached:
            reached.add(module)
            waiting += imported[module]
    return reached


def kernels(path: Path) -> set[str]:
    """The names of the kernels that a file defines: its functions decorated by launch.kernel, in one way or another."""
    functions = [each for each in ast.parse(path.read_bytes()).body if isinstance(each, ast.FunctionDef)]
    return {each.name for each in functions if any("kernel" in ast.unparse(by) for by in each.decorator_list)}


def unproven(records: Records, root: Path = ROOT) -> list[str]:
    """The files whose kernels have passed on no GPU as they are."""
    return [file for file, digest in hashes(root).items() if records.get(file, {}).get("sources") != digest]


def recorded(records: Records, run: dict[str, Any], command: Sequence[str], root: Path = ROOT) -> Records:
    """The records with what a run of GPU tests (`pytest --record`) has shown.

    Raises ValueError if a test failed, or a kernel was not launched.
    """
    tests = run["gpu_tests"]
    counts, launched = tests["tests"], tests.get("launched", {})
    if not counts["passed"] or counts["failed"] or counts["error"]:
        raise ValueError(f"nothing is recorded: of the GPU tests {counts}")
    environment, session = run["environment"], run["sessions"][tests["session"]]
    proof = {name: environment[name] for name in ("torch", "triton", "driver")}
    proof |= {
        "commit": session["commit"],
        "date": session["date"],
        "command": " ".join(command),
        "passed": counts["passed"],
    }
    found = {}
    for file, digest in hashes(root).items():
        if missing := sorted(kernels(root / file) - launched.get(file, {}).keys()):
            raise ValueError(f"nothing is recorded: the GPU tests launched no {', '.join(missing)} of {file}")
        old = records.get(file, {})
        same = old if old.get("sources") == digest else {}
        gpus = {} if "carried" in same else same.get("gpus", {})
        found[file] = {"sources": digest, "gpus": gpus | {environment["device"]: proof}, "ptx": same.get("ptx", {})}
    return found


def carried(records: Records, ptx: dict[str, list[str]], version: str, root: Path = ROOT) -> Records:
    """The records with those that this version of Triton shows to be of files that were moved or renamed.

    ptx: by file, as `digests` gives them. Files of which nothing is known stay as they are.
    """
    found, there = dict(records), hashes(root)
    for file in unproven(records, root):
        proven = [(name, old) for name, old in records.items() if set(ptx[file]) & set(old["ptx"].get(version, []))]
        if not ptx[file] or not set(ptx[file]) <= {digest for _, old in proven for digest in old["ptx"][version]}:
            continue
        origin = {name: old["sources"] for name, old in proven}
        gpus = {name: proof for _, old in proven for name, proof in old["gpus"].items()}
        same = {"from": origin, "shown_by": f"equal PTX, grids and arguments for sm_90, Triton {version}"}
        found[file] = {"sources": there[file], "gpus": gpus, "ptx": {version: ptx[file]}, "carried": same}
    left = unproven(found, root)
    return {file: old for file, old in found.items() if file in there or left}


def digests() -> dict[str, list[str]]:
    """By file, of what each Gluon kernel compiles to for the ahead-of-time lane, and of the grid and arguments that it
    is launched with. Needs Triton. Raises ValueError if that lane leaves a kernel out."""
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    import torch

    from tests import lanes
    from tests.aot import neighborhood_attention as aot

    found: dict[str, dict[str, set[str]]] = {file: {} for file in hashes()}
    for dtype in DTYPES:
        for wide in (False, True):
            with lanes.recorded("hopper") as launches:
                aot.launch(getattr(torch, dtype), wide)
            for launch in launches:
                if launch.kernel.is_gluon():
                    file = f"{launch.kernel.fn.__module__.replace('.', '/')}.py"
                    found[file].setdefault(launch.kernel.fn.__name__, set()).add(_digest(launch))
    for file, launched in found.items():
        if missing := sorted(kernels(ROOT / file) - launched.keys()):
            raise ValueError(
                f"tests/aot/neighborhood_attention.py: expected a launch of {', '.join(missing)} of {file}"
            )
    return {file: sorted(set[str]().union(*launched.values())) for file, launched in found.items()}


def _digest(launch: Any) -> str:
    ptx = launch.compile("sm_90").asm["ptx"].replace(launch.kernel.fn.__name__, "KERNEL")
    ptx = " ".join(re.sub(r"//.*", "", ptx).split())  # where comments begin depends on the name's length
    return hashlib.sha256(f"{ptx}{launch.grid}{launch.values}".encode()).hexdigest()[:16]


def on_gpu(processes: int) -> tuple[dict[str, Any], list[str]]:
    """What the tests that compare the kernels saw, and their command."""
    import pytest

    file = "tests/test_gpu_operators.py"
    options = ["-m", "gpu", "-k", COMPARING]
    options += ["-n", str(processes), "--dist", "loadgroup"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seen.json"
        pytest.main([str(ROOT / file), *options, "--record", str(path)])  # here, where torch is imported already
        if not path.exists():
            raise ValueError("nothing is recorded: the GPU tests did not run to their end")
        return runs.read(path), ["python", "-m", "pytest", file, *options]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    cores = min(os.cpu_count() or 1, 16)  # compiling is most of the time; on more, workers wait for each other
    parser.add_argument(
        "--processes", type=int, default=cores, metavar="N", help="on a GPU (default: one a core, at most 16)"
    )
    args = parser.parse_args(argv)
    import torch

    records = read()
    try:
        if torch.cuda.is_available():
            records = recorded(records, *on_gpu(args.processes))
        else:
            import triton

            ptx = digests()
            records = carried(records, ptx, triton.__version__)
            for file in ptx.keys() - set(unproven(records)):
                records[file]["ptx"] |= {triton.__version__: ptx[file]}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    results.write(FILE, dict(sorted(records.items())))
    for file in unproven(records):
        print(f"{file}: not passed on a GPU as it is; on one, run {COMMAND}")
    return 1 if unproven(records) else 0


if __name__ == "__main__":
    sys.exit(main())
