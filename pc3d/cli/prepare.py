"""``pc3d prepare``: raw data sets to prepared folders, and miniatures of data sets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pc3d.cli.parser import Parser, suggest
from pc3d.errors import InputError

if TYPE_CHECKING:
    from pc3d.datasets.scenes import SceneDataset

EXAMPLES = """\
  pc3d prepare scannet --raw /data/scannet --out /data/scannet-prepared --workers 8
  pc3d prepare s3dis --raw /data/Stanford3dDataset_v1.2_Aligned_Version --out /data/s3dis
  pc3d prepare scannet --raw /data/scannet --out /shared/scannet --shard 3/16   (one job of 16)
  pc3d prepare semantickitti --raw /data/kitti --out /data/kitti-check          (checks and sums up; read as it is)
  pc3d prepare fixture scannet --out /tmp/scannet                               (a miniature in the raw layout)

A run that was stopped goes on where it was. Then: pc3d train --config configs/<dataset>/... --data.root OUT"""


def main(arguments: list[str]) -> int:
    parser = Parser("prepare", "Check a raw data set, write it prepared, sum it up; or make a miniature.", EXAMPLES)
    parser.add_argument("dataset", metavar="DATASET", help="name of a data set, or 'fixture'")
    parser.add_argument("name", nargs="?", metavar="NAME", help="after 'fixture': the data set to imitate")
    parser.add_argument("--raw", metavar="DIR", help="the data set as downloaded; only read")
    parser.add_argument("--out", metavar="DIR", required=True, help="where the prepared clouds (or the miniature) go")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="only every N-th scene from the I-th (0-based)")
    parser.add_argument("--seed", type=int, default=0, help="of a miniature")
    options = parser.parse_args(arguments)
    from pc3d import datasets
    from pc3d.datasets.synthetic import objects, scenes

    fixtures = scenes.FIXTURES | objects.FIXTURES
    known: dict[str, Callable[..., SceneDataset]] = {
        "scannet": datasets.ScanNet,
        "s3dis": datasets.S3DIS,
        "semantickitti": datasets.SemanticKITTI,
        "kitti": datasets.KITTIObject,
        "nuscenes": datasets.NuScenes,
        "waymo": datasets.Waymo,
        "modelnet40": datasets.ModelNet40,
        "scanobjectnn": datasets.ScanObjectNN,
        "scanobjectnn-obj-only": partial(datasets.ScanObjectNN, variant="OBJ_ONLY"),
        "scanobjectnn-obj-bg": partial(datasets.ScanObjectNN, variant="OBJ_BG"),
        "shapenetpart": datasets.ShapeNetPart,
        "shapenet55": datasets.ShapeNet55,
        "shapenet-occupancy": datasets.ShapeNetOccupancy,
        "occupancy-rooms": datasets.OccupancyRooms,
        "medpoints": datasets.MedPointS,
        "medpoints-segmentation": partial(datasets.MedPointS, task="segmentation"),
        "medpoints-completion": partial(datasets.MedPointS, task="completion"),
    }
    out = Path(options.out)
    if options.dataset == "fixture":
        name = options.name or ""
        if name not in fixtures:
            raise InputError(
                f"pc3d prepare fixture: no data set '{name}'{suggest(name, fixtures)} ({', '.join(fixtures)})"
            )
        fixtures[name](out, options.seed)
        print(f"wrote a miniature of {name} to {out}")
        return 0
    if options.dataset not in known:
        hint = suggest(options.dataset, known)
        raise InputError(f"pc3d prepare: no data set '{options.dataset}'{hint} ({', '.join(known)}, fixture)")
    if options.name is not None:
        raise InputError(f"pc3d prepare {options.dataset}: unknown argument '{options.name}'")
    if options.raw is None:
        raise InputError("pc3d prepare: --raw is missing: the folder of the data set as downloaded")

    from rich.console import Console

    from pc3d.datasets.prepare import prepare

    dataset = known[options.dataset](root=options.raw)
    result = prepare(dataset, out, options.workers, _shard(options.shard))
    result.print(Console())
    for problem in result.problems:
        print(f"problem: {problem}")
    if result.problems:
        raise InputError(f"{len(result.problems)} scenes could not be used; the first: {result.problems[0]}")
    print(f"prepared: {out}")
    return 0


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise InputError(f"--shard {text}: expected I/N with 0 <= I < N, e.g. 0/4")
    return int(index), int(count)
