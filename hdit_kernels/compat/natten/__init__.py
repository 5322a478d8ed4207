"""NATTEN's interface on hdit_kernels: the functions and modules of 0.21.7, and what is cheap to give of 0.14 to 0.17.

    import hdit_kernels.compat.natten as natten

or, for code that says `import natten` itself, before it is imported:

    from hdit_kernels.compat import natten
    natten.install()

docs/from-natten.md has the whole surface, line by line.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from hdit_kernels import __version__ as _own_version
from hdit_kernels.compat.natten import context, functional, modules
from hdit_kernels.compat.natten.functional import attention, merge_attentions, na1d, na2d, na3d
from hdit_kernels.compat.natten.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__version__ = f"0.21.7+hdit.kernels.{_own_version}"
"""Of NATTEN, whose interface this is, and of what runs."""

HAS_LIBNATTEN = True
"""Whether fused kernels are there; here the functions run on any device."""

__all__ = [
    "HAS_LIBNATTEN",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "attention",
    "install",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "uninstall",
]

_MODULES = {"natten": None, "natten.context": context, "natten.functional": functional, "natten.modules": modules}
_replaced: dict[str, ModuleType] = {}


class _Distribution(importlib.metadata.Distribution):
    """For programs that ask importlib.metadata whether natten is there, and which version (transformers does)."""

    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: natten\nVersion: {__version__}\n" if filename == "METADATA" else None

    def locate_file(self, path: str | PathLike[str]) -> Path:  # type: ignore[override]
        return Path(__file__).parent / path


class _Finder(importlib.metadata.DistributionFinder):
    def find_spec(self, *_: Any) -> None:
        """Modules are found in sys.modules."""

    def find_distributions(self, context: Any = importlib.metadata.DistributionFinder.Context()) -> Iterator[Any]:  # noqa: B008
        if context.name == "natten":
            yield _Distribution()


_finder = _Finder()


def install(*, force: bool = False) -> None:
    """Makes `import natten`, in this process, import this module; `uninstall` takes it back.

    importlib.metadata.version("natten") answers, too.

    Args:
        force: also where another natten is imported already. What holds its functions by then keeps them.

    Raises:
        RuntimeError: another natten is imported already.
    """
    ours = sys.modules[__name__]
    present = sys.modules.get("natten")
    if present is ours:
        return
    if present is not None and not force:
        origin = getattr(present, "__file__", None) or "no file"
        raise RuntimeError(
            f"natten: expected none imported yet, got version {getattr(present, '__version__', 'unknown')} from "
            f"{origin}. Call install() before anything imports natten, or install(force=True)"
        )
    _replaced.clear()
    for name in [name for name in sys.modules if name == "natten" or name.startswith("natten.")]:
        _replaced[name] = sys.modules.pop(name)
    sys.modules.update({name: ours if module is None else module for name, module in _MODULES.items()})
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Undoes `install`: `import natten` finds what it found before, if anything."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    if sys.modules.get("natten") is not sys.modules[__name__]:
        return
    for name in [name for name in sys.modules if name == "natten" or name.startswith("natten.")]:
        del sys.modules[name]
    sys.modules.update(_replaced)
    _replaced.clear()


_MISSING = {
    "experimental": "natten.na2d itself runs inside torch.compile",
    "flops": "torch.utils.flop_counter counts na2d",
    "get_memory_usage_preference": "ask is_memory_usage_default()",
    "profiler": "measure with torch.profiler",
    "na3d_qk_with_bias": "use na3d_qk(..., rpb=...)",
    "natten3dqkrpb": "use na3d_qk(..., rpb=...)",
    "utils": "there are no tiles and variable lengths to prepare",
}


def __getattr__(name: str) -> Any:
    if name in context.__all__:
        return getattr(context, name)
    advice = f": {_MISSING[name]}" if name in _MISSING else ""
    raise AttributeError(f"natten.{name} is not in hdit_kernels' compatible layer{advice}")
