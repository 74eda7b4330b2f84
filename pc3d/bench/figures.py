"""Pictures of benchmark rows: how much faster than each peer, and time against size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pc3d.io.atomic import atomic_write

Rows = Sequence[dict[str, Any]]


def draw_ratios(rows: Rows, target: Path) -> None:
    """Bars per case, one panel per cloud and number of threads: each peer's time over ours."""
    panels = list(dict.fromkeys((row["data"], row["threads"]) for row in rows))
    peers = list(dict.fromkeys(peer for row in rows for peer in row["ratio"]))
    figure = Figure(figsize=(14, 3.4 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        shown = [row for row in rows if (row["data"], row["threads"]) == panel]
        width = 0.8 / max(len(peers), 1)
        for number, peer in enumerate(peers):
            places = [i + (number - (len(peers) - 1) / 2) * width for i in range(len(shown))]
            axes.bar(places, [row["ratio"].get(peer, 0.0) for row in shown], width, label=peer)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(shown)), [row["op"] for row in shown], rotation=35, ha="right", fontsize=8)
        axes.set_title(f"{panel[0]}, {shown[0]['voxels']:,} voxels, {panel[1]} thread(s)")
        axes.set_ylabel("peer's time / ours")
        axes.legend(fontsize=8)
    _save(figure, target)


def draw_growth(rows: Rows, target: Path) -> None:
    """Our time against the number of voxels on logarithmic axes, one line per case, with a line of slope one."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for op, threads in dict.fromkeys((row["op"], row["threads"]) for row in rows):
        line = [row for row in rows if (row["op"], row["threads"]) == (op, threads)]
        sizes, times = [row["voxels"] for row in line], [row["ms"]["pc3d"] for row in line]
        axes.loglog(sizes, times, marker="o", label=f"{op}, {threads} thread(s)")
        axes.loglog(sizes, [times[0] * size / sizes[0] for size in sizes], color="grey", linewidth=0.6)
    axes.set_xlabel("voxels")
    axes.set_ylabel("ms (grey: linear)")
    axes.legend(fontsize=8)
    _save(figure, target)


def _save(figure: Figure, target: Path) -> None:
    with atomic_write(target) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
