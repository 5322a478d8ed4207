"""Runs every kernel, forward and backward, on small inputs: the program that compute-sanitizer watches."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from tests.test_gpu_operators import OPERATORS, kernels_of_the_package, on_gpu, run, variants

SMALL = 30_000  # elements
AGAIN = ("na2d_small_windows", "na2d_large_windows", "na2d_options", "feed_forward")  # whose sizes decide about kernels


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tests.sanitize", description=__doc__)
    parser.add_argument("seed", type=int)
    seed = parser.parse_args(argv).seed
    os.environ["HDIT_TEST_SEED"] = str(seed)  # of the cases
    launched: set[str] = set()
    launch = JITFunction.run

    def watch(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        launched.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    kernels = {k.fn.__name__ for k in kernels_of_the_package() if k.fn.__name__.endswith("_kernel")}
    with mock.patch.object(JITFunction, "run", watch):
        for attempt in range(100):  # until no kernel is missed
            for name, generate in OPERATORS.items():
                if attempt and name not in AGAIN:
                    continue
                for case in variants(generate, seed + attempt, SMALL):
                    run(case, case.call, on_gpu(case.tensors), None)
                    torch.cuda.synchronize()
                    print(f"ran {name}: {case.description}")
            missed = kernels - launched
            if not missed:
                break
    if missed:
        sys.exit(f"kernels that no case launched: {sorted(missed)}")


if __name__ == "__main__":
    main()
