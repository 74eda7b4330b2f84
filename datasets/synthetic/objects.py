"""Miniatures of published object data sets, file for file in their layouts; nothing of the real data is in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pc3d.datasets.meta import facts
from pc3d.datasets.synthetic.organs import ORGANS, body
from pc3d.datasets.synthetic.shapes import SHAPES, Array, Pieces, Rng, scan
from pc3d.datasets.synthetic.solids import SOLIDS, Solid, cuboid, fitted, joined, surface_and_space
from pc3d.errors import InputError
from pc3d.io import write
from pc3d.points import Points


def modelnet40(root: Path, seed: int = 0) -> None:
    """Both releases of six classes: text with normals, and HDF5."""
    names, used = facts("objects")["modelnet40"], ["airplane", "bottle", "chair", "night_stand", "sofa", "table"]
    text, h5 = root / "modelnet40_normal_resampled", root / "modelnet40_ply_hdf5_2048"
    for folder in (text, h5):
        folder.mkdir(parents=True, exist_ok=True)
    (text / "modelnet40_shape_names.txt").write_text("\n".join(names) + "\n")
    (h5 / "shape_names.txt").write_text("\n".join(names) + "\n")
    for split, numbers in (("train", range(1, 7)), ("test", range(7, 9))):
        ids = [(name, f"{name}_{number:04d}") for name in used for number in numbers]
        (text / f"modelnet40_{split}.txt").write_text("\n".join(i for _, i in ids) + "\n")
        clouds, labels = [], []
        for number, (name, identity) in enumerate(ids):
            rng = np.random.default_rng([1, seed, len(split), number])
            coord, normal, _ = _upright(SHAPES["carton" if name == "night_stand" else name](rng), 600, rng)
            (text / name).mkdir(exist_ok=True)
            rows = (",".join(f"{value:.6f}" for value in row) for row in np.concatenate([coord, normal], 1))
            (text / name / f"{identity}.txt").write_text("\n".join(rows) + "\n")
            clouds.append(coord)
            labels.append(names.index(name))
        data = {"data": np.stack(clouds).astype("f4"), "label": np.array(labels, "u1")[:, None]}
        _write_h5(h5 / f"ply_data_{split}0.h5", data)
        (h5 / f"{split}_files.txt").write_text(f"data/{h5.name}/ply_data_{split}0.h5\n")


def scanobjectnn(root: Path, seed: int = 0) -> None:
    """The three variants of six classes; background is a piece of floor."""
    names = facts("objects")["scanobjectnn"]
    used = {"bed": "bed", "box": "carton", "chair": "chair", "display": "monitor", "pillow": "pillow", "shelf": "shelf"}
    for folder, suffix, background in (
        ("main_split_nobg", "", False),
        ("main_split", "", True),
        ("main_split", "_augmentedrot_scale75", True),
    ):
        for split, each in (("training", 6), ("test", 2)):
            arrays: dict[str, list[Array]] = {"data": [], "label": [], "mask": []}
            for number in range(each * len(used)):
                rng = np.random.default_rng([2, seed, len(split), len(suffix), background, number])
                name = list(used)[number % len(used)]
                coord, _, _ = _upright(SHAPES[used[name]](rng), 512, rng, turned=bool(suffix))
                mask = np.zeros(512, "i4")
                if background:
                    floor = rng.uniform(-0.6, 0.6, (100, 3))
                    floor[:, 1] = coord[:, 1].min()
                    coord[:100], mask[:100] = floor, -1
                arrays["data"].append(coord.astype("f4"))
                arrays["label"].append(np.array(names.index(name), "i4"))
                arrays["mask"].append(mask)
            path = root / "h5_files" / folder / f"{split}_objectdataset{suffix}.h5"
            _write_h5(path, {name: np.stack(values) for name, values in arrays.items()})


def shapenetpart(root: Path, seed: int = 0) -> None:
    """Both releases of five categories: text with normals, and HDF5."""
    known = facts("objects")["shapenetpart"]
    text, h5 = (
        root / "shapenetcore_partanno_segmentation_benchmark_v0_normal",
        root / "shapenet_part_seg_hdf5_data",
    )
    (text / "train_test_split").mkdir(parents=True, exist_ok=True)
    lines = [f"{name}\t{entry['synset']}" for name, entry in known.items()]
    (text / "synsetoffset2category.txt").write_text("\n".join(lines) + "\n")
    for split, each in (("train", 6), ("val", 2), ("test", 2)):
        listed: list[str] = []
        arrays: dict[str, list[Any]] = {"data": [], "label": [], "pid": []}
        for number in range(5 * each):
            name = ["Airplane", "Cap", "Chair", "Mug", "Table"][number % 5]
            rng = np.random.default_rng([4, seed, len(split), each, number])
            coord, normal, part = _upright(SHAPES[name.lower()](rng), 512, rng)
            part = part + known[name]["parts"][0]
            identity = f"{rng.integers(1 << 62):032x}"
            folder = text / known[name]["synset"]
            folder.mkdir(exist_ok=True)
            rows = np.concatenate([coord, normal, part[:, None]], 1)
            content = "\n".join(" ".join(f"{value:.6f}" for value in row) for row in rows)
            (folder / f"{identity}.txt").write_text(content + "\n")
            listed.append(f"shape_data/{folder.name}/{identity}")
            arrays["data"].append(coord.astype("f4"))
            arrays["label"].append(np.array([list(known).index(name)], "u1"))
            arrays["pid"].append(part.astype("u1"))
        (text / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps(listed))
        _write_h5(h5 / f"ply_data_{split}0.h5", {name: np.stack(values) for name, values in arrays.items()})


def shapenet55(root: Path, seed: int = 0) -> None:
    """Eight categories of ShapeNet-55, five of them in ShapeNet-34."""
    synsets = {name: synset for synset, name in facts("objects")["shapenet_synsets"].items()}
    used = ["airplane", "bed", "bottle", "cap", "car", "chair", "lamp", "table"]
    base = root / "ShapeNet55-34"
    (base / "shapenet_pc").mkdir(parents=True, exist_ok=True)
    for split, each in (("train", 4), ("test", 2)):
        listed = []
        for number in range(each * len(used)):
            rng = np.random.default_rng([5, seed, len(split), number])
            name = used[number % len(used)]
            coord, _, _ = _upright(SHAPES[name](rng), 1024, rng)
            file = f"{synsets[name]}-{rng.integers(1 << 62):032x}.npy"
            np.save(base / "shapenet_pc" / file, coord.astype("f4"))
            listed.append((name, file))
        for subset, kept in ((55, used), (34, used[3:])):
            (base / f"ShapeNet-{subset}").mkdir(exist_ok=True)
            lines = [file for name, file in listed if name in kept]
            (base / f"ShapeNet-{subset}" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def medpoints(root: Path, seed: int = 0) -> None:
    """Ten organs in five folds to classify and to complete, and a body in each fold to segment."""
    known = facts("objects")
    coarse = {name: int(code) for code, name in known["medpoints_coarse"].items()}
    fine = {known["medpoints_raw_to_coarse"][name]: code for name, code in known["medpoints_raw_to_fine"].items()}
    for fold in range(1, 6):
        for number, (organ, build) in enumerate(ORGANS.items()):
            for i in range(2):
                rng = np.random.default_rng([6, seed, fold, number, i])
                coord, _, _ = scan(build(rng), 1024, rng, 0.005)
                coord = coord * rng.uniform(60, 140) + rng.uniform(-200, 200, 3)  # millimetres, as scanned
                identity = f"{organ}_{fold}{i:02d}.ply"
                _write_ply(root / "classification" / f"fold{fold}" / organ / identity, coord)
                distance = np.linalg.norm(coord - coord[rng.integers(len(coord))], axis=1)
                pair = {"partial": coord[np.argsort(distance)[len(coord) // 5 :]], "target": coord}
                for kind, points in pair.items():
                    _write_ply(root / "completion" / f"fold{fold}" / kind / organ / identity, points)
        coord, names = body(6000, np.random.default_rng([7, seed, fold]))
        folder = root / "segmentation" / f"fold{fold}"
        _write_ply(folder / "pcd" / f"body_{fold}.ply", coord * 1000)
        codes = np.array([coarse[name] for name in names])
        for kind, values in (("coarse", codes), ("fine", np.array([fine[int(code)] for code in codes]))):
            (folder / f"{kind}_label").mkdir(parents=True, exist_ok=True)
            np.savetxt(folder / f"{kind}_label" / f"body_{fold}.seg", values)


def shapenet_occupancy(root: Path, seed: int = 0) -> None:
    """Solids under three synsets of ShapeNet, in half precision and packed bits."""
    for synset in ("02691156", "03001627", "04379243"):
        for split, each in (("train", 4), ("val", 2), ("test", 2)):
            models = []
            for number in range(each):
                rng = np.random.default_rng([8, seed, int(synset), len(split), number])
                solid = fitted(list(SOLIDS.values())[number % len(SOLIDS)](rng), rng)
                models.append(f"{rng.integers(1 << 62):032x}")
                folder = root / synset / models[-1]
                _write_occupancy(folder / "pointcloud.npz", folder / "points.npz", solid, rng)
            (root / synset / f"{split}.lst").write_text("\n".join(models))


def occupancy_rooms(root: Path, seed: int = 0) -> None:
    """Rooms of solids on a floor, y up; two pairs of files each."""
    for objects in (4, 5):
        base = root / f"rooms_0{objects}"
        for split, each in (("train", 2), ("val", 1), ("test", 1)):
            models = []
            for number in range(each):
                rng = np.random.default_rng([9, seed, objects, len(split), number])
                things = [
                    fitted(SOLIDS[str(rng.choice(list(SOLIDS)))](rng), rng).moved(
                        np.eye(3), 0.25, np.array([*rng.uniform(-0.35, 0.35, 2), 0.0])[[0, 2, 1]]
                    )
                    for _ in range(objects)
                ]
                floor = cuboid((0.95, 0.05, 0.95)).moved(np.eye(3), 1.0, np.array([0, -0.14, 0]))
                models.append(f"{number:08d}")
                for pair in range(2):
                    folder, ending = base / models[-1], f"_{pair:02d}.npz"
                    files = folder / "pointcloud" / f"pointcloud{ending}", folder / "points_iou" / f"points_iou{ending}"
                    _write_occupancy(*files, joined([floor, *things]), rng)
            (base / f"{split}.lst").write_text("\n".join(models))


def _write_occupancy(on_surface: Path, in_space: Path, solid: Solid, rng: Rng) -> None:
    points, normals, around, inside = surface_and_space(solid, 2000, 4000, rng)
    for path in (on_surface, in_space):
        path.parent.mkdir(parents=True, exist_ok=True)
    loc, scale = np.zeros(3), np.array(1.0)
    np.savez(on_surface, points=points.astype("f2"), normals=normals.astype("f2"), loc=loc, scale=scale)
    np.savez(in_space, points=around.astype("f2"), occupancies=np.packbits(inside), loc=loc, scale=scale)


def _upright(pieces: Pieces, count: int, rng: Rng, turned: bool = False) -> tuple[Array, Array, Array]:
    """A scan with y up, in the unit sphere; ``turned`` about y at random."""
    coord, normal, part = scan(pieces, count, rng, 0.004)
    coord, normal = coord[:, [0, 2, 1]] * [1, 1, -1], normal[:, [0, 2, 1]] * [1, 1, -1]
    turn = rng.uniform(-np.pi, np.pi) if turned else 0.0
    rotation = np.array([[np.cos(turn), 0, -np.sin(turn)], [0, 1, 0], [np.sin(turn), 0, np.cos(turn)]])
    coord = coord - coord.mean(0)
    return coord @ rotation / np.linalg.norm(coord, axis=1).max(), normal @ rotation, part


def _write_ply(path: Path, coord: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, Points(torch.from_numpy(coord.astype("f4"))))


def _write_h5(path: Path, arrays: dict[str, Array]) -> None:
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: HDF5 files need h5py: pip install pc3d[h5]") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")


FIXTURES: dict[str, Callable[[Path, int], None]] = {
    "modelnet40": modelnet40,
    "scanobjectnn": scanobjectnn,
    "shapenetpart": shapenetpart,
    "shapenet55": shapenet55,
    "medpoints": medpoints,
    "shapenet-occupancy": shapenet_occupancy,
    "occupancy-rooms": occupancy_rooms,
}
