"""The public names of both packages and their signatures, as tests/public_api.txt holds them.

python -m tests.public_api writes the file anew. A change of it is a change for users: CHANGELOG.md tells of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import griffe

ROOT = Path(__file__).parent.parent
FILE = Path(__file__).with_suffix(".txt")
MODULES = ("hdit_kernels", "hdit_kernels.compat.natten", "hdit", "hdit.sampling", "hdit.densities", "hdit.sample")


def public_api(root: Path = ROOT) -> str:
    """A line for each public function, class, field and method, read from the sources without importing them."""
    loader = griffe.GriffeLoader(search_paths=[root], allow_inspection=False)
    for package in ("hdit_kernels", "hdit"):
        loader.load(package, try_relative_path=False)
    loader.resolve_aliases(implicit=False, external=False)
    modules = [loader.modules_collection[name] for name in MODULES]
    return "".join(f"{line}\n" for module in modules for name, found in _public(module) for line in _lines(name, found))


def _public(module: griffe.Object | griffe.Alias) -> Iterator[tuple[str, griffe.Object | griffe.Alias]]:
    """What a module's __all__ names, else what it defines itself; but for modules, which are listed for themselves."""
    for name, member in sorted(module.members.items()):
        listed = name in module.exports if module.exports else not (name.startswith("_") or member.is_alias)
        if listed and member.is_module:  # hdit_kernels.geglu is a module, and what the package exports its function
            listed, member = name in member.members, member.members.get(name, member)
        if listed:
            yield f"{module.path}.{name}", member


def _lines(name: str, found: griffe.Object | griffe.Alias) -> Iterator[str]:
    if found.is_function:
        yield from (f"{name}{_parameters(one)} -> {one.returns}" for one in found.overloads or [found])
    elif found.is_class:
        yield f"class {name}({', '.join(map(str, found.bases))}){_parameters(found)}"
        for member, inner in sorted(found.members.items()):
            if member == "__call__" or not (member.startswith("_") or (inner.is_attribute and not inner.annotation)):
                yield from _lines(f"{name}.{member}", inner)
    else:
        yield f"{name}: {found.annotation}" if found.annotation else name


def _parameters(found: griffe.Object | griffe.Alias) -> str:
    """(self, x: Tensor, *, eps: float = 1e-6), as in the sources."""
    shown: list[str] = []
    for parameter in found.parameters:
        kind, default = parameter.kind, "" if parameter.default is None else f" = {parameter.default}"
        starred = any(line.startswith("*") for line in shown)
        if kind is griffe.ParameterKind.keyword_only and not starred:
            shown.append("*")
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(kind, "")
        annotation = "" if parameter.annotation is None else f": {parameter.annotation}"
        shown.append(f"{stars}{parameter.name}{annotation}{'' if stars else default}")
        if kind is griffe.ParameterKind.positional_only:
            shown.append("/")
    return f"({', '.join(shown)})"


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser("python -m tests.public_api", description=__doc__).parse_args(argv)
    FILE.write_text(public_api(), encoding="utf-8")


if __name__ == "__main__":
    main()
