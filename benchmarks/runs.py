"""Run files: what `python -m benchmarks kernels|model|train|scaling --output FILE` writes. SCHEMA.md describes them.

A file is written anew, atomically, after every case, so an interrupted run is taken up by giving the same file again.
Rows are only ever put together when device and versions are the same; each row says which session measured it, and
that one what it measured.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results, sources

Row = dict[str, Any]

SCHEMA = 2
KINDS = ("kernels", "model", "train", "scaling")
PASSES = ("forward", "backward", "forward+backward", "step")
STATUSES = ("ok", "failed", "unavailable", "out of memory", "not measured")
UNFINISHED = ("unavailable", "not measured")  # a run that is taken up tries these again

# What of the environment must be equal for rows to stand in one file.
SAME = ("device", "device_type", "python", "torch", "triton", "cuda", "hip", "driver")

_NUMBER, _NULL = (int, float), type(None)
FIELDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "session": (int,),
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
    "captured_us": (dict, _NULL),
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
OPTIONAL = ("host_us", "captured_us", "first_call_s", "parameters", "kernels", "images_per_s")
TIMES = ("gpu_us", "wall_us", "host_us", "captured_us")
STATS = {"median": _NUMBER, "p20": _NUMBER, "p80": _NUMBER, "repeats": (int,)}
HEADER: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "environment": (dict,),
    "sessions": (list,),
    "rows": (list,),
    "gpu_tests": (dict,),
}
SESSION: dict[str, tuple[type, ...]] = {
    "command": (list,),
    "commit": (str, _NULL),
    "date": (str,),
    "gpu_uuid": (str, _NULL),
    "sources": (dict,),
    "measuring": (str,),
    "clocks": (dict,),
    "ceilings": (dict,),
}


class RunError(ValueError):
    """What the user has to change, in one line."""


def row(case: str, contestant: str, direction: str, status: str, **fields: Any) -> Row:
    """A row with null in every field not given; direction: its "pass". Run.put gives it its kind and session."""
    found: Row = {name: None for name in FIELDS if name not in OPTIONAL}
    found |= {"case": case, "contestant": contestant, "pass": direction, "status": status}
    found |= {"family": "", "operator": "", "settings": {}}
    return found | fields


def key(row: Row) -> tuple[str, str, str]:
    return row["case"], row["contestant"], row["pass"]


def subject(row: Row) -> str:
    """Which of sources.ENTRIES a row, or the contestant beside it, runs."""
    if row["family"] != "model":
        return str(row["operator"])
    return sources.STEP if row["pass"] == "step" else sources.NETWORK


def validate(data: Any) -> None:
    """Raises ValueError, naming the place, unless data is a run as SCHEMA.md has it."""
    _fields("the run", data, HEADER, required=["schema"])
    _expect(data["schema"] == SCHEMA, f"schema {data['schema']!r}, expected {SCHEMA}")
    _fields("the run", data, {}, required=[name for name in HEADER if name != "gpu_tests"])
    _fields("environment", data["environment"], {"peers": (dict,)}, required=SAME)
    for i, session in enumerate(data["sessions"]):
        _fields(f"session {i}", session, SESSION, required=SESSION)
    for i, found in enumerate(data["rows"]):
        where = f"row {i}"
        _fields(where, found, FIELDS, required=[name for name in FIELDS if name not in OPTIONAL])
        _expect(set(found) <= set(FIELDS), f"{where}: unknown fields {sorted(set(found) - set(FIELDS))}")
        _expect(found["kind"] in KINDS, f"{where}: kind {found['kind']!r}, expected one of {KINDS}")
        _expect(found["session"] in range(len(data["sessions"])), f"{where}: there is no session {found['session']}")
        _expect(found["pass"] in PASSES, f"{where}: pass {found['pass']!r}, expected one of {PASSES}")
        _expect(found["status"] in STATUSES, f"{where}: status {found['status']!r}, expected one of {STATUSES}")
        timed = False
        for name in TIMES:
            if found.get(name) is not None:
                timed = True
                _fields(f"{where}, {name}", found[name], STATS | {"samples": (list,)}, required=STATS)
        ok = found["status"] == "ok"
        _expect(ok == timed, f"{where}: {'a' if timed else 'no'} time, though its status is {found['status']!r}")
        _expect(ok or bool(found["reason"]), f"{where}: status {found['status']!r} without a reason")
    if "gpu_tests" in data:
        place = data["gpu_tests"].get("session")
        _expect(place in range(len(data["sessions"])), f"gpu_tests: there is no session {place}")
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
    """Why the rows of two runs can't stand in one file: devices and versions; empty if they can."""
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
    """One run with the rows of all: of two rows of a case, contestant and pass, the later one that was measured, and
    of GPU tests the last. Peers and sessions are those of all.

    Raises RunError unless device and versions are equal.
    """
    merged = first | {"sessions": list(first["sessions"])}
    rows = {key(found): found for found in first["rows"]}
    for other in others:
        if unequal := differences(first, other):
            raise RunError(f"these runs can't be merged: {', '.join(unequal)}")
        merged["environment"] = with_peers(merged["environment"], other["environment"])
        merged["sessions"] += [session for session in other["sessions"] if session not in merged["sessions"]]
        places = [{"session": merged["sessions"].index(session)} for session in other["sessions"]]
        for found in other["rows"]:
            if key(found) not in rows or found["status"] not in UNFINISHED:
                rows[key(found)] = found | places[found["session"]]
        if tests := other.get("gpu_tests"):
            merged["gpu_tests"] = tests | places[tests["session"]]
    return _pruned(merged | {"rows": list(rows.values())})


def _pruned(run: dict[str, Any]) -> dict[str, Any]:
    """Without the sessions that nothing is left of."""
    tests = {name: run[name] for name in ("gpu_tests",) if name in run}
    used = sorted({found["session"] for found in [*run["rows"], *tests.values()]})
    places = {session: {"session": place} for place, session in enumerate(used)}
    pruned = run | {"sessions": [run["sessions"][session] for session in used]}
    pruned["rows"] = [found | places[found["session"]] for found in run["rows"]]
    return pruned | {name: found | places[found["session"]] for name, found in tests.items()}


def date(run: dict[str, Any]) -> str:
    """That of the newest session."""
    return max((session["date"] for session in run["sessions"]), default="")


def of_kind(run: dict[str, Any], kind: str) -> dict[str, Any]:
    return part(run, [found for found in run["rows"] if found["kind"] == kind])


def part(run: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """A run with some of its rows, and the sessions that measured them."""
    return _pruned({name: run[name] for name in run if name != "gpu_tests"} | {"rows": rows})


def write_csv(data: dict[str, Any], path: Path | str) -> None:
    """A line a row; a Stats is four columns (gpu_us_median, …), settings are JSON. Raises RunError if it can't."""
    columns = [c for name in FIELDS for c in ([f"{name}_{part}" for part in STATS] if name in TIMES else [name])]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for found in data["rows"]:
        line = {name: value for name, value in found.items() if name not in TIMES}
        line["settings"] = json.dumps(found["settings"])
        for name in TIMES:
            line |= {f"{name}_{part}": found[name][part] for part in STATS if found.get(name)}
        writer.writerow(line)
    _write(path, text.getvalue())


def write(data: dict[str, Any], path: Path | str) -> None:
    """Raises ValueError unless data is a run, RunError if it can't be written."""
    validate(data)
    _write(path, results.as_json(data))


def _write(path: Path | str, text: str) -> None:
    try:
        results.write_text(path, text)
    except OSError as error:
        raise RunError(f"can't write {path}: {error.strerror or error}") from error


def _recorded(row: Row) -> Row:
    """With samples of the time that it is judged by alone, and numbers to six digits."""
    others = [name for name in TIMES[1 if row["gpu_us"] else 2 :] if row.get(name)]
    row = row | {name: {part: row[name][part] for part in STATS} for name in others}
    return {name: _rounded(value) for name, value in row.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Run:
    """A run in the making, and its file if it has one. timed: whether it was given a time since it was opened.

    kind: of the rows that it is given. session: where this session's ceilings and clocks go, the last of the data's.
    """

    def __init__(self, data: dict[str, Any], kind: str, session: dict[str, Any], path: Path | None = None) -> None:
        self.kind, self.path, self.timed = kind, path, False
        self.session = session
        self.data = data | {"sessions": [*data["sessions"], session]}
        self._rows = {key(found): found for found in data["rows"]}

    @classmethod
    def open(cls, path: Path | str | None, kind: str, command: Sequence[str]) -> Run:
        """A new run; or the one that path already holds, to be continued.

        Raises RunError if path can't be written or holds something else: another device, other versions.
        """
        data = {"schema": SCHEMA, "environment": results.environment(), "sessions": [], "rows": []}
        session = {"command": list(command), **results.origin()}
        session |= {"sources": sources.present(), "measuring": results.measuring_hash()}
        session |= {"clocks": {"sm_mhz": None, "memory_mhz": None, "seen": None}, "ceilings": {}}
        if path is None:
            return cls(data, kind, session)
        path = Path(path)
        check_writable(path)
        if path.exists() and path.stat().st_size:
            old = read(path)
            if unequal := differences(old, data):
                raise RunError(f"{path} can't be continued, choose another file: {', '.join(unequal)}")
            data = old | {"environment": with_peers(old["environment"], data["environment"])}
        return cls(data, kind, session, path)

    @property
    def own(self) -> dict[str, Any]:
        """The data with the rows of its kind."""
        return of_kind(self.data, self.kind)

    def name_peer(self, name: str, version: str) -> None:
        """Records the version of a peer that is found by an option. Raises RunError if the run has rows of another."""
        peers = self.data["environment"].setdefault("peers", {})
        if peers.setdefault(name, version) != version:
            raise RunError(f"{self.path} can't be continued, choose another file: {name} {peers[name]} and {version}")

    def done(self, case: str, contestant: str, direction: str) -> bool:
        """Whether this has been measured, or has failed, as it is now: what a run that is taken up leaves out."""
        found = self._rows.get((case, contestant, direction))
        return found is not None and found["status"] not in UNFINISHED and self._present(found)

    def _present(self, row: Row) -> bool:
        """Whether neither what a row runs nor what measures it has changed."""
        then, what = self.data["sessions"][row["session"]], subject(row)
        same = then["sources"].get(what) == self.session["sources"].get(what)
        return bool(same and then["measuring"] == self.session["measuring"])

    def put(self, *rows: Row) -> None:
        """Adds rows, in place of those of the same case, contestant and pass. save() writes them."""
        mine = {"kind": self.kind, "session": len(self.data["sessions"]) - 1}
        self._rows |= {key(found): _recorded(found) | mine for found in rows}
        self.timed = self.timed or any(found["status"] == "ok" for found in rows)
        self.data["rows"] = list(self._rows.values())

    def put_tests(self, seen: dict[str, Any]) -> None:
        """Keeps what the GPU tests saw."""
        self.data["gpu_tests"] = {"session": len(self.data["sessions"]) - 1} | seen

    def save(self) -> None:
        """Raises RunError if the file can't be written (any more)."""
        if self.path is not None:
            write(_pruned(self.data), self.path)
