"""make demo: what HDiT costs beside DiT on this machine, measured for a minute, and then hdit.demo, which trains one.

Writes scaling.png and scaling.json into demo_output/, beside what hdit.demo writes.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.runs import check_writable
from benchmarks.scaling import report
from hdit import demo
from hdit._extras import require
from hdit._runtime import Parser, one_line_errors, printable

SECONDS = 60.0  # of measuring
PICTURE = demo.OUTPUT / "scaling.png"


def main(argv: Sequence[str] | None = None) -> None:
    Parser("python -m benchmarks.demo", description=__doc__).parse_args(argv)
    with one_line_errors("benchmarks.demo"):
        demo.look_ahead()  # what the end needs is looked for ahead of a minute's measuring
        require("rich.progress", "demo")
        check_writable(PICTURE)
        print("1/2 The cost of HDiT-B/4 beside DiT-B/4")
        report(demo.OUTPUT, SECONDS)
        print(printable(f"scaling {PICTURE.resolve()}"))
        print("\n2/2 A small HDiT learns handwritten digits")
    demo.main([])


if __name__ == "__main__":
    main()
