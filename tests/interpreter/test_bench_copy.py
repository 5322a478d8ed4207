"""The benchmarks' copy kernel."""

from __future__ import annotations

import torch

from benchmarks import copy_triton


def test_copies_every_element() -> None:
    source = torch.randint(2**30, (3 * copy_triton.BLOCK,), dtype=torch.int32)
    target = torch.zeros_like(source)
    copy_triton.copy(source, target)
    assert torch.equal(source, target)
