"""What an operator or a network runs, as a hash: it tells which recorded figures are of the present sources.

Parsed syntax is hashed: comments, docstrings and formatting don't count. Of a module, only those top-level definitions
count that a public function reaches by the names used in each, imports inside functions included.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path

import hdit_kernels

ROOT = Path(__file__).resolve().parent.parent
OURS = ("hdit", "hdit_kernels")
_NOT_OPERATORS = ("get_backend", "set_backend", "merge_attentions")  # without kernels: nothing to measure
OPERATORS = tuple(name for name in hdit_kernels.__all__ if name not in _NOT_OPERATORS)
NETWORK, STEP = "network", "training step"
# HDiT, the DiT beside it, which has our norms and gates, and what else benchmarks.networks takes of ours.
_NETWORK = ("hdit:HDiT", "hdit:presets", "hdit._runtime:autocast")
_NETWORK += ("hdit_kernels:ada_layer_norm", "hdit_kernels:gated_residual")
_STEP = ("hdit:Denoiser", "hdit.recipe:Recipe", "hdit.recipe:batch_loss", "hdit.ema:ema_update")
ENTRIES = {name: (f"hdit_kernels:{name}",) for name in OPERATORS} | {NETWORK: _NETWORK, STEP: _NETWORK + _STEP}
"""By what a record is of, "module:name" of what it calls."""

Place = tuple[str, str]
"""A module and a name at its top level, or "*" for all of it."""


@functools.cache
def present(root: Path = ROOT) -> dict[str, str]:
    """The hash of each of ENTRIES; without those that an older revision, of benchmarks.compare, has no name of."""
    sources = Sources(root)
    found = {}
    for name, entries in ENTRIES.items():
        with suppress(KeyError):
            found[name] = sources.digest(*entries)
    return found


def syntax(*paths: Path) -> str:
    """The hash of whole files."""
    return _hash(_text(path.read_bytes()) for path in paths)


@functools.cache
def _text(content: bytes) -> str:
    return Code(ast.parse(content).body, "").text


class Code:
    """Statements of a package. text: their syntax, the same in every version of Python. names: what they call by name,
    ("a", "b", "()", "c") for a.b().c; returned: what a `return` gives by a name alone, which is not among those.
    imported: the names that import statements in them bind, and where those are from."""

    def __init__(self, statements: list[ast.stmt], package: str) -> None:
        self.names: set[tuple[str, ...]] = set()
        self.returned: set[str] = set()
        self.imported: dict[str, Place] = {}
        self._package = package
        self.text = self._read(statements)

    def _read(self, node: object) -> str:
        if isinstance(node, list):
            return f"[{', '.join(self._read(item) for item in node if not _is_string(item))}]"
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Name):
            self.returned.add(node.value.id)
            return f"Return({node.value.id})"
        if names := _dotted(node):
            self.names.add(names)
            return ".".join(names)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self._import(node)
        # Fields differ from version to version of Python where they are empty.
        fields = {name: value for name in node._fields if (value := getattr(node, name, None)) not in (None, [])}
        text = ", ".join(f"{name}={self._read(value)}" for name, value in fields.items() if name != "body")
        if "body" in fields:
            around, self.names = self.names, set()
            text += f", body={self._read(fields['body'])}"
            self.names = around | {names for names in self.names if names[0] not in _parameters(node)}
        return f"{type(node).__name__}({text})"

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                origin = resolve_name("." * node.level + (node.module or ""), self._package)
                self.imported[alias.asname or alias.name] = origin, alias.name
            else:
                module = alias.name if alias.asname else alias.name.partition(".")[0]
                self.imported[alias.asname or module] = module, "*"


def _parameters(node: ast.AST) -> set[str]:
    """Of a function; none of anything else."""
    if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
        return set()
    given = node.args
    rest = [each for each in (given.vararg, given.kwarg) if each]
    return {each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, *rest)}


def _is_string(node: object) -> bool:
    """Whether it is a statement that is a string alone, as docstrings are."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _dotted(node: ast.AST) -> tuple[str, ...]:
    """() for what does not begin with a name, or is called with arguments."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Call):
        inner = () if node.args or node.keywords else _dotted(node.func)
        return (*inner, "()") if inner else ()
    inner = _dotted(node.value) if isinstance(node, ast.Attribute) else ()
    return (*inner, node.attr) if inner else ()


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


@dataclass
class Module:
    """defined: the statements that give a name its value; under "" those at the top level that give none, which an
    import runs. imported: the names that stand for something of elsewhere."""

    defined: dict[str, Code]
    imported: dict[str, Place]


@functools.cache
def parsed(content: bytes, package: str) -> Module:
    """A file of a package."""
    defined: dict[str, list[ast.stmt]] = {}
    imported: dict[str, Place] = {}
    for statement in ast.parse(content).body:
        if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            imported |= Code([statement], package).imported
        if not isinstance(statement, (ast.Import, ast.ImportFrom)):
            for name in _bound(statement) or {""}:
                defined.setdefault(name, []).append(statement)
    return Module({name: Code(statements, package) for name, statements in defined.items()}, imported)


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement at the top level gives a value, inside an `if` or `try`, too; imports aside."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    inner = [node for node in ast.walk(statement) if isinstance(node, ast.stmt) and node is not statement]
    return {name for node in inner for name in _bound(node)}


class Sources:
    """The packages OURS in a folder."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self._modules: dict[str, Module | None] = {}

    def digest(self, *entries: str) -> str:
        """The hash of what is reached from each "module:name". Raises KeyError for a name that is not there."""
        reached: dict[Place, str] = {}
        waiting: list[Place] = []
        for entry in entries:
            place = self._find(*entry.split(":"))
            if place is None:
                raise KeyError(f"{entry}: no such name in {self.root}")
            waiting.append(place)
        while waiting:
            module, name = place = waiting.pop()
            there = self.module(module)
            if there is None or place in reached:
                continue
            waiting += [(module, other) for other in (there.defined if name == "*" else [""])]
            code = there.defined.get(name)
            reached[place] = code.text if code else ""
            waiting += self._used(code, module, there) if code else []
        return _hash(f"{module}:{name} {text}" for (module, name), text in sorted(reached.items()))

    def file(self, module: str) -> Path | None:
        """None for what is not ours, or not there."""
        path = self.root.joinpath(*module.split("."))
        files = [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
        return files[0] if files and module.partition(".")[0] in OURS else None

    def module(self, name: str) -> Module | None:
        """None likewise."""
        if name not in self._modules:
            path = self.file(name)
            package = name if path and path.name == "__init__.py" else name.rpartition(".")[0]
            self._modules[name] = parsed(path.read_bytes(), package) if path else None
        return self._modules[name]

    def imports(self, name: str) -> set[str]:
        """The modules that one of ours imports, inside functions, too, as far as names tell: "a.b" and "a.b.c" for
        `from a.b import c`."""
        module = self.module(name)
        every = [module.imported, *(code.imported for code in module.defined.values())] if module else []
        places = [place for imported in every for place in imported.values()]
        return {name for origin, inner in places for name in (origin, f"{origin}.{inner}")}

    def _find(self, module: str, name: str) -> Place | None:
        """Where what a module calls by a name is defined; None if that is not ours."""
        found = self.module(module)
        if found is None or name == "*" or name in found.defined:
            return None if found is None else (module, name)
        if (origin := found.imported.get(name, (module, name))) != (module, name):
            return self._find(*origin)
        return self._find(f"{module}.{name}", "*")

    def _used(self, code: Code, name: str, module: Module) -> Iterator[Place]:
        """What of ours a module's code calls by name."""
        known = code.imported.keys() | module.defined.keys() | module.imported.keys()
        for first, *then in code.names:
            place = self._called(code, name, first) if first in known else None
            while place is not None and place[1] == "*" and then:
                place = self._find(place[0], then.pop(0))
            if place is not None:
                yield place
                for other in self._modules_returned(*place):
                    attribute = then[1] if then[:1] == ["()"] and then[1:] else "*"
                    yield self._find(other, attribute) or (other, "*")
        for returned in code.returned & known:
            place = self._called(code, name, returned)
            if place is not None and place[1] != "*":  # of a module, who calls this takes what he needs
                yield place

    def _called(self, code: Code, module: str, name: str) -> Place | None:
        """What a name stands for in a module's code."""
        return self._find(*code.imported.get(name, (module, name)))

    def _modules_returned(self, module: str, name: str) -> list[str]:
        """The modules that a function of a module returns."""
        there = self.module(module)
        code = there.defined.get(name) if there else None
        places = [self._called(code, module, returned) for returned in code.returned] if code else []
        return [place[0] for place in places if place is not None and place[1] == "*"]
