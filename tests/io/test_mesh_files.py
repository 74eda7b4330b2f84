"""Meshes in files: right, exact far from the origin, complete or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pc3d import InputError
from pc3d.io import read
from pc3d.io.mesh import write_mesh
from pc3d.ops.mesh import Mesh

MESH = Mesh(torch.rand(5, 3), torch.tensor([[0, 1, 2], [2, 3, 4]]))


def test_ply_is_read_back(tmp_path: Path) -> None:
    path = write_mesh(tmp_path / "a.ply", MESH)
    assert torch.equal(read(path).coord, MESH.vertices)
    data = path.read_bytes()
    assert data.endswith(b"\x03\x02\x00\x00\x00\x03\x00\x00\x00\x04\x00\x00\x00")
    far = read(write_mesh(tmp_path / "b.ply", MESH, (600_000.0, 5_000_000.0, 10.0)))
    assert far.meta[0]["origin"][1] >= 4_000_000
    true = far.coord.double() + torch.tensor(far.meta[0]["origin"], dtype=torch.float64)
    expected = MESH.vertices.double() + torch.tensor([600_000.0, 5_000_000.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(true, expected, atol=1e-3, rtol=0)


def test_obj_counts_from_one(tmp_path: Path) -> None:
    lines = write_mesh(tmp_path / "a.obj", MESH).read_text().splitlines()
    assert lines[5:] == ["f 1 2 3", "f 3 4 5"]
    vertices = torch.tensor([[float(word) for word in line.split()[1:]] for line in lines[:5]])
    torch.testing.assert_close(vertices, MESH.vertices, atol=1e-7, rtol=0)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_mesh(tmp_path / "a.ply", MESH)
    before = path.read_bytes()
    with pytest.raises(InputError, match="surface is empty"):
        write_mesh(path, Mesh(MESH.vertices, MESH.faces[:0]))
    assert path.read_bytes() == before
    with pytest.raises(InputError, match=r"\.ply or \.obj"):
        write_mesh(tmp_path / "a.stl", MESH)
