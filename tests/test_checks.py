"""What `checks.remembered` keeps and what it doesn't."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hdit_kernels import checks


@pytest.fixture
def calls():
    return []


@pytest.fixture
def check(calls):
    @checks.remembered
    def check(*arguments):
        calls.append(arguments)
        if "wrong" in arguments:
            raise TypeError("wrong")
        return len(calls)

    return check


def test_calls_that_are_alike_run_once(check, calls) -> None:
    for _ in range(2):
        assert check(torch.zeros(2, 3), None, 7, 0.5, torch.float16) == 1  # another tensor each time
        assert check(torch.zeros(2, 3), None, (7, 5)) == check(torch.zeros(2, 3), None, [7, 5]) == 2
    assert len(calls) == 2


def test_calls_that_are_not_alike(check) -> None:
    """Arguments that are equal and have one hash in Python among them; each is told from all others, twice."""
    numbers = [1, 1.0, True, 0, 0.0, False, None]
    tensors = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3).half(), torch.zeros(2, 3, device="meta")]
    several = [(1, 1), (1.0, 1.0), (1, True), (1,), ((1, 1), 1), (tensors[0],), (2, 3), ()]
    arguments = [*numbers, *tensors, *several, torch.float32]
    wanted = list(range(1, len(arguments) + 1))
    assert [check(a) for a in arguments] == wanted
    assert [check(a) for a in arguments] == wanted
    assert check(1, (1, 1)) != check((1, 1), 1) != check(1, 1, 1)


@pytest.mark.parametrize("argument", [iter([3, 3]), {3: 3}, "3", torch.zeros])
def test_what_could_change_is_checked_each_time(check, argument) -> None:
    assert [check(argument), check((argument,)), check(argument)] == [1, 2, 3]


def test_errors_are_not_kept(check, calls) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match="wrong") as error:
            check(1, "wrong")
        assert error.value.__suppress_context__ or error.value.__context__ is None
    assert len(calls) == 2


def test_no_end_of_memory(check, calls, monkeypatch) -> None:
    monkeypatch.setattr(checks, "MOST_REMEMBERED", 3)
    assert [check(i) for i in (0, 1, 2, 0, 3, 0, 3)] == [1, 2, 3, 1, 4, 5, 4]


def test_symbolic_sizes(check, calls) -> None:
    def function(x):
        check(x)
        return x + 1

    for _ in range(2):
        make_fx(function, tracing_mode="symbolic")(torch.zeros(5, 6))
    assert len(calls) == 2
    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=True)
    for length in (5, 7):
        torch.testing.assert_close(compiled(torch.zeros(length, 6)), torch.ones(length, 6))
