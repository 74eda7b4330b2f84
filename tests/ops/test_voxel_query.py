"""``voxel_query`` against a plain search, on every path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pc3d.ops.backend import use_backend
from pc3d.ops.voxel_query import voxel_query


def plain(coord, center, cells, places, reach, radius, samples):
    found = []
    limit = torch.tensor(radius) ** 2
    for cell, place in zip(cells.tolist(), places, strict=True):
        hits = []
        for row in sorted(range(len(coord)), key=lambda r: coord[r, [0, 3, 2, 1]].tolist()):
            own = coord[row].tolist()
            squares = (center[row] - place) ** 2
            near = (squares[0] + squares[1]) + squares[2] <= limit
            if own[0] == cell[0] and all(abs(a - b) <= reach for a, b in zip(own[1:], cell[1:], strict=True)) and near:
                hits.append(row)
        found.append((hits[:samples] + hits[:1] * samples)[:samples] or [-1] * samples)
    return torch.tensor(found).view(len(cells), samples)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    voxels=st.integers(0, 60),
    reach=st.integers(0, 3),
    radius=st.sampled_from([0.0, 0.5, 1.0, 1.7, 10.0]),
    samples=st.integers(1, 9),
    low=st.sampled_from([0, -3, 10**6]),
)
def test_equals_a_plain_search(backend, seed, voxels, reach, radius, samples, low) -> None:
    generator = torch.Generator().manual_seed(seed)
    coord = torch.randint(0, 5, (voxels, 4), generator=generator, dtype=torch.int32).unique(dim=0)
    coord = coord[torch.randperm(len(coord), generator=generator)]
    cells = torch.randint(-2, 8, (7, 4), generator=generator, dtype=torch.int32)
    # Halves are exact: distances that equal the radius are part of the test.
    center, places = coord[:, 1:] + 0.5, cells[:, 1:] + torch.randint(0, 3, (7, 3), generator=generator) / 2
    shift = torch.tensor([0, low, low, low], dtype=torch.int32)
    with use_backend(backend):
        found = voxel_query(coord + shift, center, cells + shift, places, reach, radius, samples)
    assert torch.equal(found, plain(coord, center, cells, places, reach, radius, samples))


def test_paths_agree_on_many_voxels() -> None:
    generator = torch.Generator().manual_seed(0)
    coord = torch.randint(0, 40, (9000, 4), generator=generator, dtype=torch.int32)
    coord[:, 0] %= 3
    coord = coord.unique(dim=0)
    places = torch.rand(3000, 3, generator=generator) * 40
    cloud = torch.randint(0, 3, (3000, 1), generator=generator)
    cells = torch.cat([cloud, places.floor().long()], 1).int()
    arguments = (coord, coord[:, 1:] + 0.5, cells, places, 4, 3.3, 16)
    fast = voxel_query(*arguments)
    with use_backend("reference"):
        assert torch.equal(fast, voxel_query(*arguments))
    assert (fast[:, 0] >= 0).float().mean() > 0.9


def test_grids_too_wide_are_refused() -> None:
    coord = torch.tensor([[0, 0, 0, 0], [0, 1, 2**20, 2**20]], dtype=torch.int32)
    with pytest.raises(ValueError, match="voxels span"):
        voxel_query(coord, coord[:, 1:].float(), coord, coord[:, 1:].float(), 1, 1.0, 1)
