"""Run files: what `python -m benchmarks kernels|model|train|scaling --output FILE` writes. SCHEMA.md describes them.

A file is written anew, atomically, after every case, so an interrupted run is taken up by giving the same file again.
Rows are only ever put together when device, versions and sources are the same.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results

Row = dict[str, Any]

SCHEMA = 1
KINDS = ("kernels", "model", "train", "scaling")
PASSES = ("forward", "backward", "forward+backward", "step")
STATUSES = ("ok", "failed", "unavailable", "out of memory", "not measured")
UNFINISHED = ("unavailable", "not measured")  # a run that is taken up tries these again

# What must be equal for rows to stand in one file: of the environment, and source_sha256 beside it.
SAME = ("device", "device_type", "python", "torch", "triton", "cuda", "hip", "driver")

_NUMBER, _NULL = (int, float), type(None)
FIELDS: dict[str, tuple[type, ...]] = {
    "case": (str,),
    "family": (str,),
    "operator": (str,),
    "settings": (dict,),
    "contestant": (str,),
    "detail": (str, _NULL),
    "pass": (str,),
    "status": (str,),
    "reason": (str, _NULL),
    "gpu_us": (dict, _NULL),
    "wall_us": (dict, _NULL),
    "host_us": (dict, _NULL),
    "first_call_s": (*_NUMBER, _NULL),
    "bytes": (int, _NULL),
    "flops": (int, _NULL),
    "floor_us": (*_NUMBER, _NULL),
    "ratio_to_floor": (*_NUMBER, _NULL),
    "error": (*_NUMBER, _NULL),
    "allowed_error": (*_NUMBER, _NULL),
    "peak_bytes": (int, _NULL),
    "parameters": (int, _NULL),
    "kernels": (int, _NULL),
    "images_per_s": (*_NUMBER, _NULL),
}
OPTIONAL = ("host_us", "first_call_s", "parameters", "kernels", "images_per_s")
STATS = {"median": _NUMBER, "p20": _NUMBER, "p80": _NUMBER, "repeats": (int,)}
HEADER: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "kind": (str,),
    "environment": (dict,),
    "source_sha256": (str,),
    "measuring_sha256": (str,),
    "command": (list,),
    "clocks": (dict,),
    "ceilings": (dict,),
    "rows": (list,),
    "continued": (list,),
}
ADDED = ("continued", "measuring_sha256")  # fields of HEADER that a run may lack
LATER: dict[str, tuple[type, ...]] = {"command": (list,), "commit": (str, _NULL), "date": (str,)}
LATER |= {name: HEADER[name] for name in ("clocks", "ceilings")}
"""What a later session, in "continued", is told of."""
CARD: dict[str, tuple[type, ...]] = {"gpu_uuid": (str, _NULL)}
"""And since which card it was is recorded, that."""


class RunError(ValueError):
    """What the user has to change, in one line."""


def row(case: str, contestant: str, direction: str, status: str, **fields: Any) -> Row:
    """A row with null in every field not given; direction: its "pass"."""
    found: Row = {name: None for name in FIELDS if name not in OPTIONAL}
    found |= {"case": case, "contestant": contestant, "pass": direction, "status": status}
    found |= {"family": "", "operator": "", "settings": {}}
    return found | fields


def key(row: Row) -> tuple[str, str, str]:
    return row["case"], row["contestant"], row["pass"]


def validate(data: Any) -> None:
    """Raises ValueError, naming the place, unless data is a run as SCHEMA.md has it."""
    _fields("the run", data, HEADER, required=[name for name in HEADER if name not in ADDED])
    for i, session in enumerate(data.get("continued", [])):
        _fields(f"continued {i}", session, LATER | CARD, required=LATER)
    _fields("environment", data["environment"], CARD | {"peers": (dict,)}, required=[*SAME, "commit", "date"])
    _expect(data["schema"] == SCHEMA, f"schema {data['schema']!r}, expected {SCHEMA}")
    _expect(data["kind"] in KINDS, f"kind {data['kind']!r}, expected one of {KINDS}")
    for i, found in enumerate(data["rows"]):
        where = f"row {i}"
        _fields(where, found, FIELDS, required=[name for name in FIELDS if name not in OPTIONAL])
        _expect(set(found) <= set(FIELDS), f"{where}: unknown fields {sorted(set(found) - set(FIELDS))}")
        _expect(found["pass"] in PASSES, f"{where}: pass {found['pass']!r}, expected one of {PASSES}")
        _expect(found["status"] in STATUSES, f"{where}: status {found['status']!r}, expected one of {STATUSES}")
        timed = False
        for name in ("gpu_us", "wall_us", "host_us"):
            if found.get(name) is not None:
                timed = True
                _fields(f"{where}, {name}", found[name], STATS, required=STATS)
        ok = found["status"] == "ok"
        _expect(ok == timed, f"{where}: {'a' if timed else 'no'} time, though its status is {found['status']!r}")
        _expect(ok or bool(found["reason"]), f"{where}: status {found['status']!r} without a reason")
    keys = [key(found) for found in data["rows"]]
    twice = next((k for k in keys if keys.count(k) > 1), None) if len(set(keys)) < len(keys) else None
    _expect(twice is None, f"two rows of {twice}")


def _fields(where: str, data: Any, types: Mapping[str, tuple[type, ...]], required: Iterable[str]) -> None:
    _expect(isinstance(data, dict), f"{where}: expected an object")
    missing = [name for name in required if name not in data]
    _expect(not missing, f"{where}: {missing} missing")
    for name, kinds in types.items():
        right = name not in data or (isinstance(data[name], kinds) and not isinstance(data[name], bool))
        _expect(right, f"{where}: {name} is {data.get(name)!r}")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def read(path: Path | str) -> dict[str, Any]:
    """A run file. Raises RunError if it can't be read, or is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        validate(data)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise RunError(f"{path} is not a run file of schema {SCHEMA}: {error}") from error
    return data


def check_writable(path: Path | str) -> None:
    """Raises RunError unless a file can be written there; its folder is made."""
    path = Path(path)
    try:
        if path.is_dir():
            raise RunError(f"can't write {path}: it is a folder")
        if path.exists() and not path.is_file():  # a device would be replaced by a file
            raise RunError(f"can't write {path}: it is neither a file nor a new one")
        folder = path.resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{path.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"can't write {path}: {error.strerror or error}") from error


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Why the rows of two runs can't stand in one file; empty if they can."""
    kind = _unequal("kind", first["kind"], second["kind"])
    sources = _unequal("sources", first["source_sha256"][:12], second["source_sha256"][:12])
    if "measuring_sha256" in first and "measuring_sha256" in second:
        name = "what measures, benchmarks/,"
        sources += _unequal(name, first["measuring_sha256"][:12], second["measuring_sha256"][:12])
    return kind + machine_differences(first, second) + sources


def machine_differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The part of it about devices and versions."""
    found = []
    for name in SAME:
        found += _unequal(name, first["environment"].get(name), second["environment"].get(name))
    peers, others = (run["environment"].get("peers", {}) for run in (first, second))
    for name in sorted(peers.keys() & others.keys()):
        found += _unequal(name, peers[name], others[name])
    return found


def _unequal(name: str, a: Any, b: Any) -> list[str]:
    return [] if a == b else [f"{name} {a} and {b}"]


def with_peers(environment: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """An environment, with the peers of another that it lacks."""
    return environment | {"peers": other.get("peers", {}) | environment.get("peers", {})}


def merge(first: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """One run with the rows of all: of two rows of a case, contestant and pass, the later one that was measured.

    The header is the first's, with the peers of all; the others' commands and ceilings follow in "continued". Raises
    RunError unless kind, device, versions and sources are equal.
    """
    rows = {key(found): found for found in first["rows"]}
    environment, continued = first["environment"], sessions(first)[1:]
    for other in others:
        if unequal := differences(first, other):
            raise RunError(f"these runs can't be merged: {', '.join(unequal)}")
        environment = with_peers(environment, other["environment"])
        continued += [session for session in sessions(other) if session not in (sessions(first)[0], *continued)]
        for found in other["rows"]:
            if key(found) not in rows or found["status"] not in UNFINISHED:
                rows[key(found)] = found
    merged = {**first, "environment": environment, "rows": list(rows.values())}
    return merged | ({"continued": continued} if continued else {})


def sessions(run: dict[str, Any]) -> list[dict[str, Any]]:
    """What LATER and CARD name, of the session that began a run and of those that continued it."""
    environment = run["environment"]
    first = {name: run[name] if name in run else environment[name] for name in LATER}
    return [first | {name: environment[name] for name in CARD if name in environment}, *run.get("continued", [])]


def write_csv(data: dict[str, Any], path: Path | str) -> None:
    """A line a row; a Stats is four columns (gpu_us_median, …), settings are JSON. Raises RunError if it can't."""
    nested = ("gpu_us", "wall_us", "host_us")
    columns = [c for name in FIELDS for c in ([f"{name}_{part}" for part in STATS] if name in nested else [name])]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for found in data["rows"]:
        line = {name: value for name, value in found.items() if name not in nested}
        line["settings"] = json.dumps(found["settings"])
        for name in nested:
            line |= {f"{name}_{part}": value for part, value in (found.get(name) or {}).items()}
        writer.writerow(line)
    _write(path, text.getvalue())


def _write(path: Path | str, text: str) -> None:
    try:
        results.write_text(path, text)
    except OSError as error:
        raise RunError(f"can't write {path}: {error.strerror or error}") from error


class Run:
    """A run in the making, and its file if it has one. timed: whether it was given a time since it was opened.

    session: where this session's ceilings and clocks go: the data itself, or for a run that is continued what `put`
    adds to its "continued" with the first time.
    """

    def __init__(self, data: dict[str, Any], path: Path | None = None, session: dict[str, Any] | None = None) -> None:
        self.data, self.path, self.timed = data, path, False
        self.session = data if session is None else session
        self._rows = {key(found): found for found in data["rows"]}

    @classmethod
    def open(cls, path: Path | str | None, kind: str, command: Sequence[str]) -> Run:
        """A new run; or the one that path already holds, to be continued.

        Raises RunError if path can't be written or holds something else: another kind, device, versions or sources.
        """
        data = {
            "schema": SCHEMA,
            "kind": kind,
            "environment": results.environment(),
            "source_sha256": results.source_hash(),
            "measuring_sha256": results.measuring_hash(),
            "command": list(command),
            "clocks": {"sm_mhz": None, "memory_mhz": None, "seen": None},
            "ceilings": {},
            "rows": [],
        }
        if path is None:
            return cls(data)
        path = Path(path)
        check_writable(path)
        if path.exists() and path.stat().st_size:
            old = read(path)
            if unequal := differences(old, data):
                raise RunError(f"{path} can't be continued, choose another --output: {', '.join(unequal)}")
            (session,) = sessions(data)
            return cls(old | {"environment": with_peers(old["environment"], data["environment"])}, path, session)
        return cls(data, path)

    def name_peer(self, name: str, version: str) -> None:
        """Records the version of a peer that is found by an option. Raises RunError if the run has rows of another."""
        peers = self.data["environment"].setdefault("peers", {})
        if peers.setdefault(name, version) != version:
            raise RunError(
                f"{self.path} can't be continued, choose another --output: {name} {peers[name]} and {version}"
            )

    def done(self, case: str, contestant: str, direction: str) -> bool:
        """Whether this has been measured, or has failed: what a run that is taken up leaves out."""
        found = self._rows.get((case, contestant, direction))
        return found is not None and found["status"] not in UNFINISHED

    def put(self, *rows: Row) -> None:
        """Adds rows, in place of those of the same case, contestant and pass. save() writes them."""
        for found in rows:
            self._rows[key(found)] = found
            if found["status"] == "ok" and not self.timed:
                self.timed = True
                if self.session is not self.data:
                    self.data["continued"] = [*self.data.get("continued", []), self.session]
        self.data["rows"] = list(self._rows.values())

    def save(self) -> None:
        """Raises RunError if the file can't be written (any more)."""
        validate(self.data)
        if self.path is not None:
            _write(self.path, results.as_json(self.data))
