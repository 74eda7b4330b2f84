"""Triangle meshes to files: PLY and OBJ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write
from pc3d.io.table import Array
from pc3d.ops.mesh import Mesh

MESH_FORMATS = (".ply", ".obj")


def write_mesh(path: str | Path, mesh: Mesh, origin: Sequence[float] = (0.0, 0.0, 0.0)) -> Path:
    """Write a mesh, binary PLY or text OBJ by the suffix; complete or not at all.

    Args:
        origin: added to the vertices in float64; where it is not zero, PLY gets double coordinates.

    Raises:
        InputError: for another suffix, a mesh without triangles, or a file that cannot be written.
    """
    path = Path(path)
    check_mesh_format(path)
    if not len(mesh.faces):
        raise InputError(f"{path}: the surface is empty, nothing is written")
    vertices, faces = mesh.vertices.cpu().numpy(), mesh.faces.cpu().numpy()
    if any(origin):
        vertices = vertices.astype(np.float64) + np.asarray(origin)
    with atomic_write(path) as temporary:
        (_write_ply if path.suffix.lower() == ".ply" else _write_obj)(temporary, vertices, faces)
    return path


def check_mesh_format(path: Path) -> None:
    """Raises InputError unless the suffix is one of :data:`MESH_FORMATS`."""
    if path.suffix.lower() not in MESH_FORMATS:
        raise InputError(f"{path}: a mesh is written as {' or '.join(MESH_FORMATS)}")


def _write_ply(path: Path, vertices: Array, faces: Array) -> None:
    kind = {4: "float", 8: "double"}[vertices.itemsize]
    properties = "\n".join(f"property {kind} {axis}" for axis in "xyz")
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\n{properties}\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = np.empty(len(faces), [("count", "u1"), ("corners", "<i4", (3,))])
    rows["count"], rows["corners"] = 3, faces
    with path.open("wb") as file:
        file.write(header.encode())
        file.write(np.ascontiguousarray(vertices, f"<f{vertices.itemsize}").tobytes())
        file.write(rows.tobytes())


def _write_obj(path: Path, vertices: Array, faces: Array) -> None:
    digits = 8 if vertices.itemsize == 4 else 14
    with path.open("w") as file:
        np.savetxt(file, vertices, f"v %.{digits}g %.{digits}g %.{digits}g")
        np.savetxt(file, faces + 1, "f %d %d %d")
