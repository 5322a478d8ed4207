"""NATTEN (Hassani et al. 2023), its backends hopper-fna and cutlass-fna: of each, the fastest of all tiles that it
lists for the inputs, chosen by measuring, forward and backward apart, and named.

neighborhood_self_attention is what a model built on NATTEN runs: torch.compile of normalisation and rotation, then
na2d.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.kernels import Case
from benchmarks.peers import Contestant, Implementation, Peer, Tensors, Unsupported, compiled
from hdit_kernels import reference

INSTALL = "pip install natten, of a build for this torch and CUDA (https://natten.org/install)"
CHOICE = timing.Effort(width=1.0, fewest=3, most=3)  # for one of up to 61 tiles


def _incomplete() -> str | None:
    has_kernels = importlib.import_module("natten").HAS_LIBNATTEN
    return None if has_kernels else f"NATTEN is here without its compiled part: {INSTALL}"


def _incomplete_or_no_hopper() -> str | None:
    if torch.cuda.get_device_capability()[0] != 9:
        return "its hopper-fna backend needs a Hopper GPU"
    return _incomplete()


PEERS = {
    "hopper-fna": Peer("NATTEN", "natten", INSTALL, needs_gpu=True, check=_incomplete_or_no_hopper),
    "cutlass-fna": Peer("NATTEN", "natten", INSTALL, needs_gpu=True, check=_incomplete),
}

Tile = dict[str, Any]  # keyword arguments of natten.na2d


def configurations(backend: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tile], list[Tile]]:
    """All that NATTEN lists for these inputs, as keyword arguments of na2d: forward and backward ones."""
    natten = importlib.import_module("natten")
    if backend == "hopper-fna":
        forward = [
            {"q_tile_shape": q, "kv_tile_shape": kv, "kernel_schedule": schedule}
            for (q, kv), schedule in natten.get_configs_for_cutlass_hopper_fna(query, key, value)
        ]
        pairs = natten.get_bwd_configs_for_cutlass_hopper_fna(query, key, value)
    else:
        forward = [
            {"q_tile_shape": q, "kv_tile_shape": kv} for q, kv in natten.get_configs_for_cutlass_fna(query, key, value)
        ]
        pairs = natten.get_bwd_configs_for_cutlass_fna(query, key, value)
    return forward, [{"backward_q_tile_shape": q, "backward_kv_tile_shape": kv} for q, kv in pairs]


def describe(tile: Tile) -> str:
    """ "forward 8x8/16x8 NonPersistent, backward 16x8/8x16": query tile / key tile."""
    parts = []
    for direction, prefix in (("forward", ""), ("backward", "backward_")):
        shapes = [tile.get(f"{prefix}{side}_tile_shape") for side in ("q", "kv")]
        if None not in shapes:
            schedule = getattr(tile.get("kernel_schedule"), "name", "") if not prefix else ""
            parts.append(f"{direction} {'/'.join('x'.join(map(str, s)) for s in shapes)} {schedule}".strip())
    return ", ".join(parts)


def choose(backend: str, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> Tile:
    """The fastest forward tile and, with it, the fastest backward one.

    query, key, value: [B, H, W, heads, D], without a gradient. settings: further keyword arguments of na2d. Raises
    Unsupported if none runs.
    """
    natten = importlib.import_module("natten")
    device = query.device
    forward, backward = configurations(backend, query, key, value)

    def attend(tile: Tile, *tensors: Tensor) -> Tensor:
        return natten.na2d(*tensors, backend=backend, **settings, **tile)

    def of_forward(tile: Tile) -> float:
        with torch.no_grad():
            return timing.queued_time(lambda: attend(tile, query, key, value), device, CHOICE).median

    best, _ = _fastest(backend, "forward", forward, of_forward)
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    dout = torch.randn_like(query)

    def of_backward(tile: Tile) -> float:
        out = attend(best | tile, *leaves)
        return timing.queued_time(
            lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), device, CHOICE
        ).median

    return best | _fastest(backend, "backward", backward, of_backward)[0]


def _fastest(backend: str, direction: str, tiles: list[Tile], time_of: Callable[[Tile], float]) -> tuple[Tile, float]:
    if not tiles:
        raise Unsupported(f"NATTEN lists no {direction} tile of {backend} for this head_dim and dtype")
    found, refused = [], ""
    for i, tile in enumerate(tiles):
        try:
            found.append((time_of(tile), i))
        except Exception as error:  # a tile that doesn't run leaves the others
            if timing.out_of_memory(error):
                raise
            refused = timing.one_line(error, 120)
    if not found:
        raise Unsupported(f"none of the {len(tiles)} {direction} tiles of {backend} runs: {refused}")
    time, i = min(found)
    return tiles[i], time


def _na2d(backend: str) -> Callable[[Case], Implementation]:
    def build(case: Case) -> Implementation:
        settings = {name: case.settings[name] for name in ("kernel_size", "dilation")}
        natten = importlib.import_module("natten")

        def with_tile(tile: Tile) -> Implementation:
            def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                return natten.na2d(query, key, value, backend=backend, **settings, **tile)

            return _settled(Implementation(function, detail=describe(tile)))

        def tune(tensors: Tensors) -> Implementation:
            return with_tile(choose(backend, **tensors, settings=settings))

        return replace(with_tile({}), tune=tune)

    return build


def _self_attention(backend: str) -> Callable[[Case], Implementation]:
    def build(case: Case) -> Implementation:
        natten = importlib.import_module("natten")
        settings = {"kernel_size": case.settings["kernel_size"], "scale": 1.0}
        ready = compiled.compile(reference.qk_norm_rope)

        def with_tile(tile: Tile) -> Implementation:
            def function(qkv: Tensor, scale: Tensor, theta_y: Tensor, theta_x: Tensor) -> Tensor:
                query, key, value = ready(qkv, scale, theta_y, theta_x).unbind(3)
                return natten.na2d(query, key, value, backend=backend, **settings, **tile)

            detail = f"after torch.compile of qk_norm_rope's reference; {describe(tile)}"
            return _settled(Implementation(function, detail=detail, compiles=True))

        def tune(tensors: Tensors) -> Implementation:
            query, key, value = (t.contiguous() for t in tensors["qkv"].detach().unbind(3))
            return with_tile(choose(backend, query, key, value, settings))

        return replace(with_tile({}), tune=tune)

    return build


def _settled(implementation: Implementation) -> Implementation:
    """It takes any grid, with the tile that was chosen."""
    return replace(implementation, at=lambda case: implementation)


CONTESTANTS = [
    Contestant(
        f"natten {backend}",
        peer,
        {"na2d": _na2d(backend), "neighborhood_self_attention": _self_attention(backend)},
    )
    for backend, peer in PEERS.items()
]
