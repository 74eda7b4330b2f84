"""``pc3d overview``: a map of a folder of LAS and LAZ files within seconds, from one point per chunk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from pc3d.cli.parser import Parser
from pc3d.errors import InputError

if TYPE_CHECKING:
    from pc3d.data.overview import Overview, Rasters

EXAMPLES = """\
  pc3d overview tiles/ -o map.png
  pc3d overview tiles/ -o map.png --decode 100
  pc3d overview scan.copc.laz -o sketch.ply
  pc3d overview tiles/ -o map.png --network ipes_cnn.pt

Only headers, chunk tables and the first point of every chunk are read (of COPC files the upper nodes). The picture
shows height and density, a .ply has the samples, an .npz samples and maps: coord, color, weight, boxes, height,
density, estimate (points per cell), low and cell."""


def main(arguments: list[str]) -> int:
    parser = Parser("overview", "A map of scans larger than memory, from one point per chunk.", EXAMPLES)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="LAS, LAZ or COPC files, or folders of them")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help=".png, .ply or .npz")
    parser.add_argument("--cell", type=float, metavar="METRES", help="edge of a cell of the maps; default by density")
    parser.add_argument("--decode", type=int, default=0, metavar="N", help="read N chunks whole, for more detail")
    parser.add_argument("--network", metavar="FILE", help="weights of LidarScout's height-map network (TorchScript)")
    options = parser.parse_args(arguments)
    target = Path(options.output)
    if target.suffix.lower() not in (".png", ".ply", ".npz"):
        raise InputError(f"{target}: an overview is written as .png, .ply or .npz")
    if target.suffix.lower() == ".ply" and (options.cell is not None or options.network is not None):
        raise InputError(f"{target}: holds samples and no maps: --cell and --network are for .png and .npz")
    if options.decode < 0:
        raise InputError(f"--decode {options.decode}: give a number of chunks, 0 or more")

    from pc3d.data.overview import Overview
    from pc3d.io import LasIndex

    begin = time.perf_counter()
    index = LasIndex.open(options.inputs)
    overview = Overview.of(index, options.decode)
    seconds = time.perf_counter() - begin
    size, read = index.num_bytes, index.bytes_read
    print(
        f"{len(index.files):,} files, {index.num_points:,} points in {len(index.file):,} chunks; "
        f"{len(overview.coord):,} samples in {seconds:.2f} s; "
        f"read {read / 1e6:.1f} of {size / 1e6:.1f} MB ({100 * read / max(size, 1):.2f} %)"
    )
    if target.suffix.lower() == ".ply":
        _write_cloud(target, overview)
    else:
        rasters = overview.rasters(options.cell)
        if options.network is not None:
            rasters = _with_network(rasters, overview, options.network)
        (_write_maps if target.suffix.lower() == ".png" else _write_arrays)(target, overview, rasters)
    print(f"wrote {target}")
    return 0


def _with_network(rasters: Rasters, overview: Overview, weights: str) -> Rasters:
    """The same maps with the network's heights where it has enough samples."""
    from dataclasses import replace

    import numpy as np

    from pc3d.data.height_patches import PIXEL, HeightPatches
    from pc3d.models.convert import load_height_map

    mosaic = HeightPatches(overview, load_height_map(weights)).mosaic()
    if np.isnan(mosaic).all():
        raise InputError("--network: no window of 960 m has 25 samples: too small a scan, or add --decode 100")
    rows, columns = (
        np.minimum((np.arange(count) + 0.5) * rasters.cell // PIXEL, limit - 1).astype(int)
        for count, limit in zip(rasters.height.shape, mosaic.shape, strict=True)
    )
    learned = mosaic[np.ix_(rows, columns)]
    use = np.isfinite(learned) & np.isfinite(rasters.height)
    return replace(rasters, height=np.where(use, learned, rasters.height))


def _write_cloud(target: Path, overview: Overview) -> None:
    import numpy as np
    import torch

    from pc3d.io import write
    from pc3d.points import Points

    origin = np.floor(overview.coord.min(0)) if len(overview.coord) else np.zeros(3)
    attrs = {"weight": torch.from_numpy(overview.weight.astype(np.float32))}
    if overview.color is not None:
        attrs["color"] = torch.from_numpy(overview.color.astype(np.float32))
    coord = torch.from_numpy((overview.coord - origin).astype(np.float32))
    write(target, Points(coord, attrs=attrs, meta=[{"origin": tuple(origin.tolist())}]))


def _write_arrays(target: Path, overview: Overview, rasters: Rasters) -> None:
    import numpy as np

    from pc3d.io import atomic_write

    arrays = {name: value for name, value in {**vars(overview), **vars(rasters)}.items() if value is not None}
    with atomic_write(target) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _write_maps(target: Path, overview: Overview, rasters: Rasters) -> None:
    from pc3d.viz.figures import save_maps

    height, width = rasters.height.shape
    (x, y), cell = rasters.low, rasters.cell
    panels = [("height", "metres", rasters.height), ("density", "points per square metre", rasters.density)]
    title = f"{overview.weight.sum():,.0f} points, {len(overview.coord):,} samples, cells of {cell:.3g} m"
    save_maps(target, panels, (x, x + width * cell, y, y + height * cell), overview.boxes[:, [0, 1, 3, 4]], title)
