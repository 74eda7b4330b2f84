"""``ScanNet``: ScanNet v2, 20 or 200 classes, as downloaded or prepared."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pc3d.data.dataset import IGNORE, Split, map_labels
from pc3d.data.prediction import Prediction
from pc3d.datasets.meta import facts
from pc3d.datasets.scenes import Scene, SceneDataset
from pc3d.errors import InputError
from pc3d.io import read, scannet
from pc3d.io.ply import read_faces
from pc3d.metrics import Instances
from pc3d.points import Points


class ScanNet(SceneDataset):
    """Indoor RGB-D scans, 1201 / 312 / 100 scenes (Dai et al., "ScanNet", CVPR 2017, arXiv 1702.04405).

    Raw: ``scans/<scene>/`` (and ``scans_test/``) with ``_vh_clean_2.ply``, ``_vh_clean_2.0.010000.segs.json`` and
    ``.aggregation.json`` (or ``_vh_clean_2.aggregation.json``). Points are the mesh's vertices in file order, not axis
    aligned; normals are area-weighted means of the faces'. Classes come from the annotated groups' names, through
    ``scannetv2-labels.combined.tsv`` in the root if it is there. Prepared: ``{train,val,test}/<scene>/*.npy``.
    Attributes: ``color``, ``normal``, ``segment``, ``instance``, ``superpoint`` (ScanNet's own over-segmentation).

    Args:
        root: folder that holds ``scans``, or a prepared one.
        classes: 20 (the benchmark) or 200 (Rozenberszki et al., ECCV 2022, arXiv 2204.07761).
    """

    layouts = "scans/<scene>/<scene>_vh_clean_2.ply, or {train,val,test}/<scene>/coord.npy"

    def __init__(self, root: str | None = None, classes: Literal[20, 200] = 20) -> None:
        super().__init__(root)
        if classes not in (20, 200):
            raise InputError(f"ScanNet.classes: {classes} is neither 20 nor 200")
        rows = facts("scannet")[f"classes{classes}"]
        self.class_names = [name for _, name, *_ in rows]
        self.codes = [code for code, *_ in rows]
        self.label_map = {code: i for i, code in enumerate(self.codes)}
        self._palette = [tuple(rgb) for _, _, *rgb in rows]
        self.things = [name not in ("wall", "floor") for name in self.class_names]
        self.label_assets = (f"segment{classes}", f"segment{220 - classes}")

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        return self._palette

    def list_raw(self, split: Split) -> list[Scene] | None:
        assert self.root is not None
        folders = [self.root / name for name in ("scans", "scans_test") if (self.root / name).is_dir()]
        if not folders:
            return None
        names = facts("scannet")["splits"][split]
        found = ((name, folder / name) for name in names for folder in folders if (folder / name).is_dir())
        return [Scene(name, f"{split}/{name}", path) for name, path in found]

    def list_prepared(self, split: Split) -> list[Scene] | None:
        scenes = self.prepared_scenes([split])
        return [] if scenes is None and self.prepared_scenes(("train", "val", "test")) is not None else scenes

    def group(self, split: Split, index: int) -> str:
        return self.name(split, index).split("_")[0]  # scans of a room differ in what follows

    def files(self, scene: Scene) -> Iterable[Path]:
        if scene.raw is None:
            return super().files(scene)
        mesh, segments, groups = _paths(scene.raw)
        return [mesh, *(p for p in (segments, groups) if p is not None)]

    def load_raw(self, scene: Scene) -> Points:
        assert scene.raw is not None
        mesh, segments, groups = _paths(scene.raw)
        points = read(mesh)
        faces = read_faces(mesh)
        try:
            normal = vertex_normals(points.coord, faces)
        except ValueError as error:
            raise InputError(f"{mesh}: {error}") from error
        attrs = {"color": points.get("color")[:, :3].float(), "normal": normal}
        if segments is not None and groups is not None:
            attrs |= self._labels(points, segments, groups)
        elif not scene.place.startswith("test/"):
            missing = "segs.json" if segments is None else "aggregation.json"
            raise InputError(f"{scene.raw}: {scene.name}*.{missing} is missing: the scene has no labels")
        return Points(points.coord, attrs=attrs, meta=points.meta)

    def save_prediction(self, folder: Path, cloud: Points, prediction: Prediction) -> Path:
        """As the benchmark takes it: ``semantic/<scene>.txt``, and ``instance/<scene>.txt`` beside its masks."""
        codes, name, found = torch.tensor([*self.codes, 0]), cloud.meta[0]["name"], prediction.instances
        written = scannet.write_semantic(folder / "semantic" / f"{name}.txt", codes[prediction.segment.cpu()])
        if found is not None:
            masks = found.rows.cpu().split(found.sizes.tolist())
            ids = [self.codes[label] for label in found.classes.tolist()]
            scannet.write_instances(
                folder / "instance" / f"{name}.txt", masks, ids, found.scores.tolist(), cloud.num_points
            )
        return written

    def load_prediction(self, folder: Path, cloud: Points) -> Prediction:
        """From :meth:`save_prediction`, or any submission in these two folders; other label ids count as nothing."""
        assert self.label_map is not None
        name, count = cloud.meta[0]["name"], cloud.num_points
        path = folder / "semantic" / f"{name}.txt"
        segment = map_labels(scannet.read_semantic(path, count), self.label_map, str(path), "label", unknown="ignore")
        if not (folder / "instance").is_dir():
            return Prediction(segment)
        masks, ids, scores = scannet.read_instances(folder / "instance" / f"{name}.txt", count)
        classes = torch.tensor([self.label_map.get(code, IGNORE) for code in ids], dtype=torch.int64)
        borders = torch.tensor([0, *map(len, masks)]).cumsum(0)
        rows = torch.cat([*masks, torch.empty(0, dtype=torch.int64)])
        return Prediction(segment, Instances(rows, borders, classes, torch.tensor(scores)).take(classes >= 0))

    def _labels(self, points: Points, segments: Path, groups: Path) -> dict[str, Tensor]:
        segment = np.asarray(_json(segments, "segIndices"))
        if segment.shape != (points.num_points,) or segment.dtype.kind not in "iu":
            raise InputError(
                f"{segments}: field 'segIndices' has {len(segment)} numbers for {points.num_points} vertices"
            )
        ids, number = np.unique(segment, return_inverse=True)
        place = {int(value): i for i, value in enumerate(ids)}
        instance = np.full(len(ids), -1)
        codes = np.zeros((len(ids), 2), np.int64)  # ScanNet id and NYU40 id
        known = self._categories()
        for count, group in enumerate(_json(groups, "segGroups")):
            try:
                own = [place[int(value)] for value in group["segments"] if int(value) in place]
                codes[own], instance[own] = known.get(group["label"], (0, 0)), count
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{groups}: group {count} of 'segGroups' has no usable segments and label") from error
        labels = {"superpoint": torch.from_numpy(number), "instance": torch.from_numpy(instance[number])}
        for column, classes in ((1, 20), (0, 200)):
            table = {code: i for i, (code, *_) in enumerate(facts("scannet")[f"classes{classes}"])}
            mapped = np.array([table.get(int(code), IGNORE) for code in codes[:, column]], np.int64)
            labels[f"segment{classes}"] = torch.from_numpy(mapped[number])
        return labels

    def _categories(self) -> dict[str, tuple[int, int]]:
        """Raw category -> ScanNet id and NYU40 id."""
        assert self.root is not None
        path = self.root / "scannetv2-labels.combined.tsv"
        if not path.is_file():
            return {name: (a, b) for name, (a, b) in facts("scannet")["raw_categories"].items()}
        table: dict[str, tuple[int, int]] = {}
        try:
            with path.open(newline="") as file:
                for row in csv.DictReader(file, delimiter="\t"):
                    table.setdefault(row["raw_category"], (int(row["id"]), int(row["nyu40id"])))
        except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: needs the columns id, raw_category and nyu40id ({error})") from error
        return table


def vertex_normals(coord: Tensor, faces: np.ndarray) -> Tensor:
    """``(N, 3)`` float32 normals of mesh vertices: mean of the faces' normals by area; z up where there is no face.

    Args:
        coord: ``(N, 3)`` vertices.
        faces: ``(F, 3)`` vertex numbers.

    Raises:
        ValueError: if a face names a vertex that is not there.
    """
    triangles = torch.from_numpy(faces)
    if len(faces) and (int(triangles.min()) < 0 or int(triangles.max()) >= len(coord)):
        raise ValueError(f"a face names vertex {int(triangles.max())}, the mesh has {len(coord)}")
    corners = coord.double()[triangles]
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    total = torch.zeros(len(coord), 3, dtype=torch.float64)
    for corner in range(3):
        total.index_add_(0, triangles[:, corner], normal)
    length = total.norm(dim=1, keepdim=True)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    return torch.where(length > 0, total / length.clamp(min=1e-300), up).float()


def _paths(scene: Path) -> tuple[Path, Path | None, Path | None]:
    """Mesh, over-segmentation and annotation of a scene."""
    mesh = scene / f"{scene.name}_vh_clean_2.ply"
    if not mesh.is_file():
        raise InputError(f"{mesh}: is missing")
    candidates = (
        (f"{scene.name}_vh_clean_2.0.010000.segs.json",),
        (f"{scene.name}.aggregation.json", f"{scene.name}_vh_clean_2.aggregation.json"),
    )
    segments, groups = (next((p for n in names if (p := scene / n).is_file()), None) for names in candidates)
    return mesh, segments, groups


def _json(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text())[key]
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable JSON ({error})") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: field '{key}' is missing") from error
