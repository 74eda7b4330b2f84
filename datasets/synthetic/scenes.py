"""Miniatures of published scene data sets, file for file in their layouts: for tests and first tries without a licence.

Rooms come from :class:`~pc3d.datasets.SyntheticRooms`, streets from :func:`street`; nothing of the real data is in
them.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from pc3d.data.dataset import Split
from pc3d.datasets.meta import facts
from pc3d.datasets.nuscenes import LABEL_MAP
from pc3d.datasets.s3dis import CLASSES as S3DIS_CLASSES
from pc3d.datasets.scenes import write_prepared
from pc3d.datasets.semantic_kitti import SemanticKITTI
from pc3d.datasets.synthetic_rooms import SyntheticRooms
from pc3d.datasets.synthetic_streets import CALIBRATION, SyntheticStreets, label
from pc3d.io.kitti_object import write_objects
from pc3d.io.labels import write_labels
from pc3d.points import Points

ROOM_POINTS = 3000
_NYU = {"ceiling": "ceiling", "lamp": "lamp", "bookcase": "bookshelf", "sofa": "couch"}  # our names -> ScanNet's


def scannet(root: Path, seed: int = 0) -> None:
    """Two training scenes, one to validate on and one to test on, as meshes with ScanNet's annotation files."""
    splits = facts("scannet")["splits"]
    rooms = _rooms(4, seed)
    for number, (split, name) in enumerate([("train", 0), ("train", 1), ("val", 0), ("test", 0)]):
        scene = splits[split][name]
        folder = root / ("scans_test" if split == "test" else "scans") / scene
        folder.mkdir(parents=True, exist_ok=True)
        _mesh(folder / f"{scene}_vh_clean_2.ply", rooms[number])
        (folder / f"{scene}.txt").write_text("axisAlignment = 1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1 \nnumDepthFrames = 1\n")
        if split != "test":
            _annotate(folder, scene, rooms[number])
    lines = [f"{ids[0]}\t{name}\t{ids[1]}" for name, ids in facts("scannet")["raw_categories"].items()]
    (root / "scannetv2-labels.combined.tsv").write_text("\n".join(["id\traw_category\tnyu40id", *lines]) + "\n")


def _annotate(folder: Path, scene: str, room: Points) -> None:
    """Over-segmentation (each object halved along x) and groups of segments with raw category names."""
    instance, segment = room.get("instance"), room.get("segment")
    halves = 2 * instance + (room.coord[:, 0] > room.coord[:, 0].median()).long()
    groups = []
    for number, identity in enumerate(instance.unique().tolist()):
        own = instance == identity
        name = SyntheticRooms().class_names[int(segment[own][0])]
        parts = halves[own].unique().tolist()
        groups.append({"id": number, "objectId": number, "segments": parts, "label": _NYU.get(name, name)})
    segments = {"params": {"kThresh": "0.0001"}, "sceneId": scene, "segIndices": halves.tolist()}
    (folder / f"{scene}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(segments))
    content = {
        "sceneId": scene,
        "appId": "fixture",
        "segGroups": groups,
        "segmentsFile": f"{scene}_vh_clean_2.segs.json",
    }
    (folder / f"{scene}.aggregation.json").write_text(json.dumps(content))


def _mesh(path: Path, room: Points) -> None:
    """A binary mesh with vertices x y z red green blue alpha and some triangles between near points."""
    from pc3d.ops.neighbours import knn

    count = room.num_points
    vertex = np.zeros(count, [(axis, "<f4") for axis in "xyz"] + [(c, "u1") for c in ("red", "green", "blue", "alpha")])
    for i, (axis, color) in enumerate(zip("xyz", ("red", "green", "blue"), strict=True)):
        vertex[axis], vertex[color] = room.coord[:, i], room.get("color")[:, i]
    vertex["alpha"] = 255
    near = knn(room.coord, room.offsets, room.coord, room.offsets, 3)[0].numpy()
    faces = np.zeros(count, [("n", "u1"), ("v", "<i4", (3,))])
    faces["n"], faces["v"] = 3, near
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"property uchar {name}" for name in ("red", "green", "blue", "alpha")]
    header += [f"element face {count}", "property list uchar int vertex_indices", "end_header", ""]
    path.write_bytes("\n".join(header).encode() + vertex.tobytes() + faces.tobytes())


def s3dis(root: Path, seed: int = 0) -> None:
    """A room in each of areas 1, 2 and 5; one annotation line has a damaged number, as in the real release."""
    for number, (area, room) in enumerate([(1, "office_1"), (2, "hallway_1"), (5, "office_19")]):
        points = _rooms(1, seed + number)[0]
        folder = root / f"Area_{area}" / room
        (folder / "Annotations").mkdir(parents=True, exist_ok=True)
        names, rows = SyntheticRooms().class_names, torch.cat([points.coord, points.get("color").round()], 1).numpy()
        for identity in points.get("instance").unique().tolist():
            own = (points.get("instance") == identity).numpy()
            label = names[int(points.get("segment")[own][0])]
            label = label if label in S3DIS_CLASSES else "clutter"
            text = "\n".join(f"{x:.3f} {y:.3f} {z:.3f} {r:.0f} {g:.0f} {b:.0f}" for x, y, z, r, g, b in rows[own])
            (folder / "Annotations" / f"{label}_{identity + 1}.txt").write_text(text + "\n")
        if area == 5:
            path = sorted((folder / "Annotations").glob("ceiling_*.txt"))[0]
            lines = path.read_bytes().splitlines()
            lines[1] = b"1.500 2.\x100 2.700 103 100 99"
            path.write_bytes(b"\n".join(lines) + b"\n")
        everything = [p.read_bytes() for p in sorted((folder / "Annotations").glob("*.txt"))]
        (folder / f"{room}.txt").write_bytes(b"".join(everything))


def semantic_kitti(root: Path, seed: int = 0) -> None:
    """Two scans of sequence 00, two of 08 and one of 11 (without labels), with poses and calibration."""
    known = SemanticKITTI()
    for sequence, scans in (("00", 2), ("08", 2), ("11", 1)):
        folder = root / "sequences" / sequence
        (folder / "velodyne").mkdir(parents=True, exist_ok=True)
        pose = "1 0 0 {:.3f} 0 1 0 0 0 0 1 0"
        (folder / "poses.txt").write_text("".join(pose.format(0.5 * i) + "\n" for i in range(scans)))
        identity = "1 0 0 0 0 1 0 0 0 0 1 0"
        (folder / "calib.txt").write_text("".join(f"{n}: {identity}\n" for n in ("P0", "P1", "P2", "P3", "Tr")))
        (folder / "times.txt").write_text("".join(f"{0.1 * i:.6e}\n" for i in range(scans)))
        for number in range(scans):
            cloud = street(seed + 10 * int(sequence) + number)
            rows = torch.cat([cloud.coord, cloud.get("strength")], 1).numpy().astype("<f4")
            (folder / "velodyne" / f"{number:06d}.bin").write_bytes(rows.tobytes())
            if sequence != "11":
                (folder / "labels").mkdir(exist_ok=True)
                labels = known.raw_labels(cloud.get("segment"))
                write_labels(folder / "labels" / f"{number:06d}.label", labels, cloud.get("instance") + 1)


def kitti_object(root: Path, seed: int = 0, frames: Mapping[Split, int] | None = None) -> None:
    """Frames of :class:`~pc3d.datasets.SyntheticStreets` with calibration, labels and lists.

    Args:
        frames: of every split; by default two to train, one to validate and one to test on.
    """
    data = SyntheticStreets(seed=seed)
    calibration = {
        "P0": "721.5 0 609.6 0 0 721.5 172.9 0 0 0 1 0",
        "P1": "721.5 0 609.6 -387.6 0 721.5 172.9 0 0 0 1 0",
        "P2": _numbers(CALIBRATION.p2),
        "P3": "721.5 0 609.6 -339.5 0 721.5 172.9 2.2 0 0 1 0.00273",
        "R0_rect": _numbers(CALIBRATION.r0),
        "Tr_velo_to_cam": _numbers(CALIBRATION.velo_to_cam),
        "Tr_imu_to_velo": "1 0 0 0 0 1 0 0 0 0 1 0",
    }
    text = "".join(f"{name}: {values}\n" for name, values in calibration.items())
    start = {"training": 0, "testing": 0}
    numbers: Mapping[Split, int] = frames or {"train": 2, "val": 1, "test": 1}
    for split, count in numbers.items():
        folder = root / ("testing" if split == "test" else "training")
        first = start[folder.name]
        start[folder.name] += count
        names = [f"{first + i:06d}" for i in range(count)]
        for i, name in enumerate(names):
            scan = data.scan(split, i)
            rows = np.column_stack([scan.coord, scan.strength]).astype("<f4")
            _write(folder / "velodyne" / f"{name}.bin", rows.tobytes())
            _write(folder / "calib" / f"{name}.txt", text.encode())
            if split != "test":
                (folder / "label_2").mkdir(exist_ok=True)
                write_objects(folder / "label_2" / f"{name}.txt", label(scan))
        _write(root / "ImageSets" / f"{split}.txt", "".join(f"{name}\n" for name in names).encode())


def _numbers(matrix: np.ndarray) -> str:
    return " ".join(f"{value:.12e}" for value in matrix.reshape(-1))


def nuscenes(root: Path, seed: int = 0) -> None:
    """Two training keyframes and one each to validate and test on, with info files like Pointcept's."""
    codes = torch.tensor([next(code for code, number in LABEL_MAP.items() if number == i) for i in range(16)] + [0])
    to_nuscenes = {0: 3, 8: 10, 10: 12, 12: 14, 14: 15, 15: 15, 16: 13, 17: 14}
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        entries = []
        for number in range(count):
            cloud = street(seed + 100 + number + 10 * len(split))
            name = f"{split}{number}__LIDAR_TOP"
            scan, labels = f"samples/LIDAR_TOP/{name}.pcd.bin", f"lidarseg/v1.0-trainval/{name}_lidarseg.bin"
            rows = torch.cat([cloud.coord, cloud.get("strength") * 255, torch.zeros(cloud.num_points, 1)], 1)
            _write(root / "raw" / scan, rows.numpy().astype("<f4").tobytes())
            entry = {"lidar_path": scan, "lidar_token": name, "sweeps": [], "pose": np.eye(4)}
            if split != "test":
                classes = torch.tensor([to_nuscenes.get(int(c), -1) for c in cloud.get("segment")])
                _write(root / "raw" / labels, codes[classes].numpy().astype("u1").tobytes())
                entry["gt_segment_path"] = labels
            entries.append(entry)
        _write(root / "info" / f"nuscenes_infos_10sweeps_{split}.pkl", pickle.dumps(entries))


def waymo(root: Path, seed: int = 0) -> None:
    """Two training frames and one to validate on, prepared."""
    to_waymo = {0: 0, 8: 17, 10: 21, 12: 13, 14: 14, 15: 15, 16: 19, 17: 9}
    for folder, count in (("training", 2), ("validation", 1)):
        for number in range(count):
            cloud = street(seed + 200 + number + len(folder))
            classes = torch.tensor([to_waymo.get(int(c), -1) for c in cloud.get("segment")])
            kept = {"strength": cloud.get("strength"), "segment": classes}
            frame = root / folder / f"segment-{number}" / f"{1_000_000 + number}"
            write_prepared(frame, Points(cloud.coord, attrs=kept), {})


def street(seed: int, count: int = 4000) -> Points:
    """A street as a car's LiDAR sees it: road, sidewalks, walls, cars, poles, trees, lawn; SemanticKITTI's classes.

    Attributes ``strength`` (N, 1), ``segment``, ``instance`` (cars; -1 none). Density falls with distance, ranges end
    at 40 m.
    """
    rng = np.random.default_rng([7, seed])
    parts: list[tuple[np.ndarray, int, int]] = []

    def flat(label: int, y: tuple[float, float], z: float, share: float) -> None:
        n = int(share * count)
        x = 40 * rng.random(n) ** 1.5 * rng.choice([-1, 1], n)
        parts.append((np.stack([x, rng.uniform(*y, n), z + 0.02 * rng.standard_normal(n)], 1), label, -1))

    def wall(
        label: int, x: tuple[float, float], y: float, z: tuple[float, float], share: float, instance: int = -1
    ) -> None:
        n = int(share * count)
        points = np.stack([rng.uniform(*x, n), y + 0.03 * rng.standard_normal(n), rng.uniform(*z, n)], 1)
        parts.append((points, label, instance))

    ground = -1.7
    flat(8, (-4, 4), ground, 0.3)
    for side in (-1, 1):
        flat(10, (min(4 * side, 6 * side), max(4 * side, 6 * side)), ground + 0.12, 0.06)
        flat(16, (min(6 * side, 8 * side), max(6 * side, 8 * side)), ground + 0.1, 0.05)
        wall(12, (-35, 35), 8.0 * side, (ground, 6), 0.1)
    for car in range(3):
        x, y = rng.uniform(-25, 25), rng.choice([-3, 3])
        for edge in (-0.9, 0.9):
            wall(0, (x - 2, x + 2), y + edge, (ground + 0.2, ground + 1.5), 0.02, car)
    for _ in range(4):
        x, y = rng.uniform(-30, 30), rng.choice([-5, 5])
        wall(17, (x - 0.05, x + 0.05), y, (ground, 2.5), 0.01)
        x = rng.uniform(-30, 30)
        wall(15, (x - 0.15, x + 0.15), -y * 1.4, (ground, 0.5), 0.01)
        crown = rng.standard_normal((int(0.03 * count), 3)) * 0.8 + [x, -y * 1.4, 1.5]
        parts.append((crown, 14, -1))
    coord = np.concatenate([points for points, _, _ in parts]).astype(np.float32)
    label = np.concatenate([np.full(len(points), label) for points, label, _ in parts])
    instance = np.concatenate([np.full(len(points), number) for points, _, number in parts])
    strength = (0.1 + 0.04 * label + 0.05 * rng.random(len(label))).clip(0, 1).astype(np.float32)
    order = rng.permutation(len(label))
    attrs = {"strength": strength[order, None], "segment": label[order], "instance": instance[order]}
    return Points(torch.from_numpy(coord[order]), attrs={name: torch.from_numpy(v) for name, v in attrs.items()})


def _rooms(count: int, seed: int) -> list[Points]:
    data = SyntheticRooms(count, 0, 0, points=ROOM_POINTS, seed=seed)
    return [data.load("train", i) for i in range(count)]


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


FIXTURES: dict[str, Callable[[Path, int], None]] = {
    "scannet": scannet,
    "s3dis": s3dis,
    "semantickitti": semantic_kitti,
    "kitti": kitti_object,
    "nuscenes": nuscenes,
    "waymo": waymo,
}
