"""Prints the oldest version of each dependency that pyproject.toml allows, as constraints for pip: make test-oldest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import requires


def oldest(requirements: Iterable[str]) -> list[str]:
    """Lines as `pillow==12.3; python_version < "3.11"`, of requirements as an installed package's metadata has them."""
    lines = []
    for requirement in requirements:
        need, _, marker = requirement.partition(";")
        marker = re.sub(r'( and )?extra == "\w+"', "", marker).strip()  # a constraint holds for every extra
        if ">=" in need:
            lines.append(need.strip().replace(">=", "==") + (f"; {marker}" if marker else ""))
    return sorted(set(lines))


if __name__ == "__main__":
    print("\n".join(oldest(requires("hdit-kernels") or [])))
