"""Surfaces: from coarse to fine, closed, right side out; sampling them and asking what they contain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pc3d import InputError
from pc3d.ops.isosurface import extract_surface
from pc3d.ops.mesh import Mesh, contains

pytest.importorskip("skimage")


def ball(points: Tensor) -> Tensor:
    return 0.35 - (points - torch.tensor([0.03, -0.02, 0.01])).norm(dim=1)


def torus(points: Tensor) -> Tensor:
    flat = points[:, :2].norm(dim=1) - 0.28
    return 0.11 - (flat**2 + points[:, 2] ** 2).sqrt()


def volume(mesh: Mesh) -> float:
    a, b, c = mesh.corners.double().unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def edges_are_shared_by_two(mesh: Mesh) -> bool:
    edges = mesh.faces[:, [0, 1, 1, 2, 2, 0]].view(-1, 2).sort(1).values
    return bool((edges.unique(dim=0, return_counts=True)[1] == 2).all())


@pytest.mark.parametrize(
    ("field", "expected"), [(ball, 4 / 3 * math.pi * 0.35**3), (torus, 2 * math.pi**2 * 0.28 * 0.11**2)]
)
def test_extracted_surfaces_are_closed_and_face_outwards(field, expected: float) -> None:
    mesh = extract_surface(field, resolution=16, steps=2)
    assert edges_are_shared_by_two(mesh)
    assert volume(mesh) == pytest.approx(expected, rel=5e-3)
    assert float(field(mesh.vertices).abs().max()) < 2e-3


def test_refinement_gives_the_same_surface_as_the_fine_grid_with_fewer_values() -> None:
    asked = []

    def counting(points: Tensor) -> Tensor:
        asked.append(len(points))
        return torus(points)

    fine = extract_surface(torus, resolution=64, steps=0)
    mesh = extract_surface(counting, resolution=16, steps=2)
    assert torch.equal(mesh.faces, fine.faces)
    torch.testing.assert_close(mesh.vertices, fine.vertices, atol=1e-6, rtol=0)
    assert sum(asked) < 65**3 / 4


def test_a_surface_is_followed_out_of_the_cells_that_showed_it() -> None:
    """A thin rod leaves the ball between the corners of the coarse grid."""

    def rod(points: Tensor) -> Tensor:
        side = 0.02 - (points[:, 1:] - 0.032).norm(dim=1)
        return torch.maximum(0.2 - points.norm(dim=1), torch.minimum(side, 0.45 - points[:, 0].abs()))

    mesh = extract_surface(rod, resolution=8, steps=3)
    assert float(mesh.vertices[:, 0].max()) == pytest.approx(0.45, abs=0.01)


def test_a_solid_that_leaves_the_cube_ends_on_it() -> None:
    mesh = extract_surface(lambda points: points[:, 0], half_size=0.55, resolution=4, steps=1)
    assert edges_are_shared_by_two(mesh)
    assert volume(mesh) == pytest.approx(0.55 * 1.1**2, rel=1e-4)
    empty = extract_surface(lambda points: points[:, 0] - 9, resolution=4, steps=1)
    assert (len(empty.vertices), len(empty.faces)) == (0, 0)
    with pytest.raises(InputError, match="too small"):
        extract_surface(ball, resolution=0)


def test_the_level_is_where_the_surface_is() -> None:
    mesh = extract_surface(ball, level=0.1, resolution=16, steps=2)
    assert volume(mesh) == pytest.approx(4 / 3 * math.pi * 0.25**3, rel=1e-2)


@pytest.mark.parametrize("field", [ball, torus])
def test_a_mesh_contains_what_its_field_does(field) -> None:
    mesh = extract_surface(field, resolution=32, steps=1)
    points = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.6
    value = field(points)
    clear = value.abs() > 2e-3
    assert torch.equal(contains(mesh, points)[clear], (value > 0)[clear])


def cube() -> Mesh:
    """Two triangles per face; points of a regular grid lie exactly under their edges."""
    vertices = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))]
    return Mesh(vertices, torch.tensor(faces))


def test_rays_through_edges_and_corners_count_once() -> None:
    steps = torch.arange(-1, 10) / 8
    points = torch.cartesian_prod(steps, steps, torch.tensor([-0.5, 0.25, 0.5, 1.5]))
    inside = ((points > 0) & (points < 1)).all(1)
    sure = inside | ((points < 0) | (points > 1)).any(1)
    assert torch.equal(contains(cube(), points)[sure], inside[sure])
    assert volume(cube()) == pytest.approx(1)


def test_containment_is_the_same_in_small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = extract_surface(torus, resolution=16, steps=0)
    points = torch.rand(3000, 3) - 0.5
    expected = contains(mesh, points)
    monkeypatch.setattr("pc3d.ops.mesh._PAIRS", 50)
    assert torch.equal(contains(mesh, points), expected)
    assert 0 < int(expected.sum()) < 3000
    nothing = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    assert not contains(nothing, points).any()
    assert contains(mesh, points[:0]).shape == (0,)


def test_samples_are_even_on_the_surface() -> None:
    points, normals = cube().sample(12000, torch.Generator().manual_seed(0))
    on = torch.cat([points == 0, points == 1], 1)
    assert torch.equal(on.sum(1), torch.ones(12000, dtype=torch.int64))
    assert (on.sum(0) / 12000 - 1 / 6).abs().max() < 0.02
    assert torch.equal(normals, on[:, 3:].float() - on[:, :3].float())
    assert points.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.02)
    flat = Mesh(torch.zeros(3, 3), torch.tensor([[0, 1, 2]]))
    assert flat.sample(5)[0].shape == (0, 3)
    assert torch.equal(flat.normals(), torch.zeros(1, 3))
