"""Runs every operator once, forward and backward, on small inputs: the program that compute-sanitizer watches."""

from __future__ import annotations

import random
import sys

import torch

from tests.test_gpu_operators import OPERATORS, on_gpu, run

SMALL = 30_000  # elements


def main() -> None:
    seed = int(sys.argv[1])
    for name, generate in OPERATORS.items():
        sizes, values = random.Random(seed), torch.Generator().manual_seed(seed)
        case = generate(sizes, values, torch.bfloat16, True)
        while max(t.numel() for t in case.tensors.values()) > SMALL:
            case = generate(sizes, values, torch.bfloat16, True)
        run(case, case.call, on_gpu(case.tensors), None)
        torch.cuda.synchronize()
        print(f"ran {name}: {case.description}")


if __name__ == "__main__":
    main()
