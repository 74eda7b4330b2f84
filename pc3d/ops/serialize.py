"""Space-filling curves: cells of a grid to int64 codes along a curve, and codes to the order they sort into."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.backend import cpu_kernels

Curve = Literal["z", "z-trans", "hilbert", "hilbert-trans"]
"""``"z"``: Morton, bits interleaved with x most significant. ``"hilbert"``: Skilling, "Programming the Hilbert curve",
AIP Conf. Proc. 707 (2004). A ``-trans`` curve takes y as its first axis and x as its second."""

CURVES: tuple[Curve, ...] = ("z", "z-trans", "hilbert", "hilbert-trans")
MAX_DEPTH = 16
"""Most bits per axis of a cell: codes then fill 48 bits, and the number of the cloud what is left of 63."""

_CODE_BITS = 63
_STEP_LEVELS = 3  # levels of a curve that one look-up walks down
_STEP_BITS = 3 * _STEP_LEVELS
_STEP_MASK = (1 << _STEP_BITS) - 1


def grid_depth(grid: Tensor, headroom: int = 1) -> int:
    """Bits per axis at which published models serialize a batch.

    Args:
        grid: ``(N, 3)`` integer cells, none negative.
        headroom: added to the largest cell before its bits are counted: 1 in Pointcept 1.6 and later, 0 before.

    Raises:
        InputError: if a cell is negative or the depth exceeds ``MAX_DEPTH``.
    """
    depth = (_largest_cell(grid) + headroom).bit_length()
    if depth > MAX_DEPTH:
        raise InputError(
            f"{_describe_extreme(grid, largest=True)} needs depth {depth}, the limit is {MAX_DEPTH}; "
            "use a larger grid size or crop the cloud"
        )
    return depth


def curve_codes(grid: Tensor, offsets: Tensor, depth: int, curves: Sequence[Curve]) -> list[Tensor]:
    """Place of each cell along space-filling curves, cloud after cloud.

    A code at ``depth`` shifted right by 3 bits is the code of the cell ``grid >> 1`` at ``depth - 1``, so coarser
    levels need no encoding of their own. Hilbert codes depend on ``depth`` modulo 3 (the axes rotate from level to
    level), z codes do not.

    Args:
        grid: ``(N, 3)`` integer cells, ``0 <= cell < 2**depth``.
        offsets: ``(B + 1,)`` int64 cloud borders.
        depth: bits per axis, at most ``MAX_DEPTH``.
        curves: which curves.

    Returns:
        For each curve ``(N,)`` int64, ``cloud << 3 * depth | place``: equal only for equal cells of one cloud.

    Raises:
        InputError: if a cell is negative or does not fit ``depth``, if depth and clouds together do not fit 63 bits,
            or if a curve is unknown.
    """
    _check(grid, offsets, depth, curves)
    kernels = cpu_kernels(grid, offsets)
    if kernels is None:
        return [_codes_reference(grid, offsets, depth, curve) for curve in curves]
    cells, borders = grid.to(torch.int32).contiguous(), offsets.contiguous()
    return [kernels.curve_codes(cells, borders, depth, _is_transposed(c), *_walk(c, depth)) for c in curves]


def sort_codes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Stable sort of codes.

    Args:
        codes: ``(N,)`` int64, none negative.

    Returns:
        ``order`` and ``inverse``, ``(N,)`` int64 each: ``codes[order]`` ascends, equal codes keep the order of their
        rows, and ``inverse[row]`` is the position of a row in ``order``.
    """
    kernels = cpu_kernels(codes)
    if kernels is not None:
        return kernels.sort_codes(codes.contiguous())
    order = torch.argsort(codes, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse


def _check(grid: Tensor, offsets: Tensor, depth: int, curves: Sequence[Curve]) -> None:
    for curve in curves:
        if curve not in CURVES:
            raise InputError(f"unknown curve '{curve}'; take one of {', '.join(CURVES)}")
    if not 0 <= depth <= MAX_DEPTH:
        raise InputError(f"serialization depth must be 0 to {MAX_DEPTH} bits per axis, got {depth}")
    if _largest_cell(grid) >> depth:
        raise InputError(
            f"{_describe_extreme(grid, largest=True)} does not fit depth {depth} (0 to {2**depth - 1}); "
            "use a larger depth or grid size"
        )
    clouds = len(offsets) - 1
    if 3 * depth + clouds.bit_length() > _CODE_BITS:
        raise InputError(
            f"a batch of {clouds} clouds at serialization depth {depth} does not fit {_CODE_BITS} bits; "
            "use smaller batches"
        )


def _largest_cell(grid: Tensor) -> int:
    """The largest coordinate, 0 for no cells; negative ones are refused."""
    if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype not in (torch.int16, torch.int32, torch.int64):
        raise ValueError(f"grid must be (N, 3) int32, got {tuple(grid.shape)} {grid.dtype}")
    if len(grid) == 0:
        return 0
    low, high = torch.stack(torch.aminmax(grid)).tolist()
    if low < 0:
        raise InputError(
            f"{_describe_extreme(grid, largest=False)} is negative; subtract the lowest cell of each cloud first"
        )
    return high


def _describe_extreme(grid: Tensor, largest: bool) -> str:
    cells = grid.reshape(-1)
    at = int(cells.argmax() if largest else cells.argmin())
    return f"cell {int(cells[at])} of point {at // 3} on axis {'xyz'[at % 3]}"


def _is_transposed(curve: Curve) -> bool:
    return curve.endswith("-trans")


def _walk(curve: Curve, depth: int) -> tuple[Tensor | None, int]:
    """The table that leads from z codes to the codes of a curve and the state to begin in; no table for z itself."""
    return (_hilbert_table(), _hilbert_start(depth)) if curve.startswith("hilbert") else (None, 0)


def _codes_reference(grid: Tensor, offsets: Tensor, depth: int, curve: Curve) -> Tensor:
    x, y, z = (_spread(axis) for axis in grid.long().unbind(1))
    codes = y << 2 | x << 1 | z if _is_transposed(curve) else x << 2 | y << 1 | z
    table, start = _walk(curve, depth)
    if table is not None:
        codes = _follow(codes, table.to(grid.device), start, depth)
    clouds = torch.arange(len(offsets) - 1, device=grid.device) << 3 * depth
    return codes | torch.repeat_interleave(clouds, offsets.diff(), output_size=len(grid))


def _spread(values: Tensor) -> Tensor:
    """Bit i of 16 goes to bit 3 i."""
    values = (values | values << 16) & 0xFF0000FF
    values = (values | values << 8) & 0x00F00F00F00F
    values = (values | values << 4) & 0x0C30C30C30C3
    return (values | values << 2) & 0x249249249249


def _follow(z_codes: Tensor, table: Tensor, start: int, depth: int) -> Tensor:
    """Codes of the curve of ``table``, a step at a time from the top; empty levels fill the first step up."""
    entries = table.reshape(-1).long()
    state = torch.full_like(z_codes, start << _STEP_BITS)
    codes = torch.zeros_like(z_codes)
    for shift in reversed(range(0, 3 * depth, _STEP_BITS)):
        entry = entries.index_select(0, state | (z_codes >> shift & _STEP_MASK))
        codes = codes << _STEP_BITS | entry & _STEP_MASK
        state = entry & ~_STEP_MASK
    return codes


# Skilling's transform, read from the top, as a state machine. A state is what the upper levels leave to do with the
# bits of the lower ones: (input axis of each axis, whether it is flipped, parity of the Gray code so far).
_State = tuple[tuple[int, ...], tuple[int, ...], int]
_ROOT: _State = ((0, 1, 2), (0, 0, 0), 0)


def _descend(state: _State, octant: int) -> tuple[_State, int]:
    """State below an octant (bits x, y, z) and the octant's 3 bits of the code."""
    axes, flips, parity = list(state[0]), list(state[1]), state[2]
    bits = [(octant >> (2 - axis) & 1) ^ flip for axis, flip in zip(axes, flips, strict=True)]
    digit = 0
    for i, bit in enumerate(bits):
        parity ^= bit
        digit = digit << 1 | parity
        if bit:
            flips[0] ^= 1
        else:
            axes[0], axes[i] = axes[i], axes[0]
            flips[0], flips[i] = flips[i], flips[0]
    return (tuple(axes), tuple(flips), parity), digit


@cache
def _hilbert_states() -> dict[_State, int]:
    """The states that can be reached from the root, numbered; the root is 0."""
    numbers, waiting = {_ROOT: 0}, [_ROOT]
    while waiting:
        state = waiting.pop()
        for below in (_descend(state, octant)[0] for octant in range(8)):
            if below not in numbers:
                numbers[below] = len(numbers)
                waiting.append(below)
    return numbers


@cache
def _hilbert_table() -> Tensor:
    """``(48, 512)`` int16: in a state, 9 bits of a z code lead to ``next state << 9 | 9 bits of the Hilbert code``."""
    numbers = _hilbert_states()
    level = [[_descend(state, octant) for octant in range(8)] for state in numbers]
    below = np.array([[numbers[state] for state, _ in row] for row in level])
    digits = np.array([[digit for _, digit in row] for row in level])
    z_codes = np.arange(1 << _STEP_BITS)
    state = np.arange(len(numbers))[:, None]
    codes = np.zeros_like(state)
    for shift in reversed(range(0, _STEP_BITS, 3)):
        octant = z_codes >> shift & 7
        codes = codes << 3 | digits[state, octant]
        state = below[state, octant]
    return torch.from_numpy((state << _STEP_BITS | codes).astype(np.int16))


@cache
def _hilbert_start(depth: int) -> int:
    """State from which the empty levels that fill up the first step lead to the root.

    An empty level only rotates the axes, and three of them are the identity.
    """
    state = _ROOT
    for _ in range(depth % _STEP_LEVELS):
        state = _descend(state, 0)[0]
    return _hilbert_states()[state]
