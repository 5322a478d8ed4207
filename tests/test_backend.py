"""Which implementation operators run: `set_backend` and HDIT_KERNELS_BACKEND. On a GPU: test_gpu_backend.py."""

from __future__ import annotations

import runpy
from collections.abc import Iterator

import pytest
import torch

from hdit_kernels import backend, geglu, get_backend, na2d, set_backend


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = get_backend()
    yield
    set_backend(before)


def test_the_variable_is_read_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("auto", "triton", "reference"):
        monkeypatch.setenv("HDIT_KERNELS_BACKEND", name)
        assert runpy.run_path(backend.__file__)["chosen"] == name
    monkeypatch.delenv("HDIT_KERNELS_BACKEND")
    assert runpy.run_path(backend.__file__)["chosen"] == "auto"


@pytest.mark.parametrize("word", ["cuda", "", "Triton"])
def test_an_unknown_word_is_an_error_at_import(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDIT_KERNELS_BACKEND", word)
    expected = f"HDIT_KERNELS_BACKEND: expected one of auto, triton, reference, got '{word}'"
    with pytest.raises(ValueError, match=expected):
        runpy.run_path(backend.__file__)
    with pytest.raises(ValueError, match=f"backend: expected one of auto, triton, reference, got '{word}'"):
        set_backend(word)


def test_set_backend_returns_the_one_before() -> None:
    set_backend("auto")
    assert set_backend("reference") == "auto"
    assert set_backend("auto") == "reference"
    assert get_backend() == "auto"


def test_reference_on_a_cpu_is_what_auto_runs() -> None:
    x = torch.randn(3, 8)
    wanted = geglu(x)
    set_backend("reference")
    assert torch.equal(geglu(x), wanted)


@pytest.mark.parametrize(
    ("without", "expected"),
    [("a GPU", "tensors on a GPU .or TRITON_INTERPRET=1., got one on cpu"), ("Triton", "Triton to be installed")],
)
def test_triton_without_what_it_needs_is_an_error(without: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "triton_available", lambda: without != "Triton")
    set_backend("triton")
    query = torch.randn(1, 5, 5, 1, 8, requires_grad=True)
    for call in (lambda: geglu(torch.randn(3, 8)), lambda: na2d(query, query, query, 3)):
        with pytest.raises(RuntimeError, match="HDIT_KERNELS_BACKEND or set_backend.: expected " + expected):
            call()


def test_triton_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_available", lambda: True)
    set_backend("triton")
    with pytest.raises(RuntimeError, match="expected bfloat16, float16 or float32, got float64"):
        geglu(torch.randn(3, 8, dtype=torch.float64))


def test_triton_takes_an_empty_batch() -> None:
    set_backend("triton")
    assert geglu(torch.randn(0, 8)).shape == (0, 4)


@pytest.mark.parametrize("window", [7, 13])
def test_triton_never_launches_gluon(window: int) -> None:
    """Of the launchers, with Hopper's configurations; on a CPU nothing runs."""
    pytest.importorskip("triton", reason="the launchers need Triton: install the extra [test] on Linux")
    from hdit_kernels.neighborhood_attention.dispatch import na2d_backward, na2d_forward
    from tests.lanes import recorded

    query = torch.empty(1, 20, 19, 2, 64, dtype=torch.bfloat16, device="meta")
    stats = torch.empty(1, 1, 20, 19, 2, device="meta")
    settings = ([window, window], None, [1, 1], None, 0.125)
    found = {}
    for name in ("auto", "triton"):
        set_backend(name)
        with recorded("hopper") as launches:
            na2d_forward(query, query, query, None, None, *settings, False, True)
            na2d_backward(query, None, query, query, query, None, None, query, stats, *settings)
        found[name] = [launch.kernel.is_gluon() for launch in launches]
    assert found == {"auto": [True] * 3 if window == 7 else [False, False, True], "triton": [False] * 3}
