"""Pictures of results: confusion matrices, and input | truth | prediction panels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write
from pc3d.points import Points
from pc3d.viz.colors import (
    LABEL_FIELDS,
    RIGHT,
    UNLABELLED,
    WRONG,
    Palette,
    distinct_palette,
    label_colors,
    point_colors,
)
from pc3d.viz.render import choose_view, rasterize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_COUNTS = 25  # classes; beyond this the numbers in the cells cannot be read


def save_confusion_matrix(path: str | Path, confusion: Tensor | NDArray, class_names: Sequence[str]) -> Path:
    """Write a confusion matrix as a picture: rows are the truth, coloured by their share, with the number of points.

    Args:
        confusion: ``(K, K)`` counts, ``confusion[truth, prediction]``. Rows without points stay empty.

    Raises:
        InputError: if the names do not fit, matplotlib is missing or the file cannot be written.
    """
    counts = np.asarray(confusion).astype(np.int64)
    num_classes = len(counts)
    if counts.shape != (num_classes, num_classes) or len(class_names) != num_classes:
        raise InputError(f"{path}: confusion matrix of shape {counts.shape} for {len(class_names)} class names")
    totals = counts.sum(1, keepdims=True)
    share = counts / np.maximum(totals, 1)
    side = 2.6 + 0.62 * num_classes
    figure = _figure(side + 0.9, side, path)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(num_classes), class_names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(
        range(num_classes), [f"{name}  ({_short(n)})" for name, n in zip(class_names, totals[:, 0], strict=True)]
    )
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth (number of points)")
    axes.set_xticks(np.arange(num_classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if num_classes <= _MOST_COUNTS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            percent = f"{100 * share[row, column]:.1f} %" if share[row, column] >= 0.0005 else "< 0.1 %"
            ink = "white" if share[row, column] > 0.55 else "#20303c"
            text = f"{percent}\n{_short(counts[row, column])}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    axes.set_title(f"{100 * accuracy:.1f} % of {_short(counts.sum())} points right", fontsize=11, loc="left")
    return _save(figure, path)


def save_heat_map(
    path: str | Path, rows: Mapping[str, Sequence[float]], columns: Sequence[str], title: str, label: str
) -> Path:
    """Write shares as a table of colours, with the percentages in it.

    Args:
        rows: name -> a share for each of the ``columns``.
        label: what the shares are.

    Raises:
        InputError: if matplotlib is missing or the file cannot be written.
    """
    shares = np.array(list(rows.values()), np.float64).reshape(len(rows), len(columns))
    figure = _figure(3.2 + 0.85 * len(columns), 1.6 + 0.34 * len(rows), path)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (row, column), share in np.ndenumerate(shares):
        ink = "white" if share > 0.55 else "#20303c"
        axes.text(column, row, f"{100 * share:.1f}", ha="center", va="center", fontsize=8, color=ink)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
    axes.set_title(title, fontsize=11, loc="left")
    return _save(figure, path)


def save_class_histogram(path: str | Path, counts: Mapping[str, Sequence[int]], class_names: Sequence[str]) -> Path:
    """Write the share of every class as bars, one colour per split; a logarithmic axis, so that rare classes show.

    Args:
        counts: split -> ``(K,)`` points per class.

    Raises:
        InputError: if matplotlib is missing or the file cannot be written.
    """
    splits = {name: np.asarray(values, np.float64) for name, values in counts.items() if sum(values)}
    figure = _figure(8, 1.6 + 0.26 * len(class_names), path)
    axes = figure.add_subplot()
    height = 0.8 / max(len(splits), 1)
    for i, (name, values) in enumerate(splits.items()):
        places = np.arange(len(class_names)) + (i - (len(splits) - 1) / 2) * height
        label = f"{name} ({_short(values.sum())} points)"
        axes.barh(places, np.maximum(100 * values / values.sum(), 1e-4), height, label=label)
    axes.set_yticks(range(len(class_names)), class_names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=1e-3)
    axes.set_xlabel("percent of the labelled points")
    axes.grid(axis="x", alpha=0.3)
    if splits:
        axes.legend(frameon=False)
    return _save(figure, path)


def save_picture_grid(
    path: str | Path, rows: Sequence[Sequence[tuple[str, Points]]], palette: Palette | None = None
) -> Path:
    """Write clouds as a grid of pictures, those with labels (``segment``) coloured by them, each from its own view.

    Args:
        rows: (title, cloud) of every picture.

    Raises:
        InputError: if matplotlib is missing or the file cannot be written.
    """
    columns = max((len(row) for row in rows), default=1)
    figure = _figure(4.2 * columns, 3.6 * max(len(rows), 1) + 0.4, path)
    for i, row in enumerate(rows):
        for j, (title, cloud) in enumerate(row):
            axes = figure.add_subplot(len(rows), columns, i * columns + j + 1)
            colors = point_colors(cloud, "label" if j or "color" not in cloud else "auto", palette)
            axes.imshow(rasterize(cloud, (560, 460), choose_view(cloud, aspect=1.2)).paint(colors))
            axes.set_title(f"{title}, {_short(cloud.num_points)} points", fontsize=10)
            axes.set_axis_off()
    return _save(figure, path)


def save_bird_eye_view(
    path: str | Path,
    points: Points,
    boxes: Sequence[Sequence[float]],
    names: Sequence[str] | None = None,
    truth: Sequence[Sequence[float]] = (),
) -> Path:
    """Write one LiDAR cloud from above with oriented boxes; a line marks their front.

    Args:
        boxes: ``x, y, z, dx, dy, dz, heading`` of each box; red.
        names: a label per box.
        truth: true boxes, below the others; green.

    Raises:
        InputError: if matplotlib is missing or the file cannot be written.
    """
    from pc3d.ops.boxes import box_corners

    coord = points.coord.cpu().numpy()
    figure = _figure(9, 7, path)
    axes = figure.add_subplot()
    axes.scatter(coord[:, 0], coord[:, 1], s=0.3, c=coord[:, 2], cmap="viridis", linewidths=0)
    for kind, color, width in ((truth, "#2ca02c", 2.6), (boxes, "#d62728", 1.4)):
        corners = box_corners(torch.tensor(kind, dtype=torch.float64).reshape(-1, 7)).numpy()[:, :4, :2]
        for i, corner in enumerate(corners):
            axes.plot(*corner[[0, 1, 2, 3, 0]].T, color=color, linewidth=width)
            axes.plot(*corner[[0, 1]].T, color="#1f3a93", linewidth=width + 0.8)
            if kind is boxes and names is not None:
                axes.annotate(str(names[i]), corner.max(0), fontsize=8, color=color)
    axes.set_aspect("equal")
    axes.set_xlabel("x in metres")
    axes.set_ylabel("y in metres")
    true = f", {len(truth)} true ones in green" if truth else ""
    axes.set_title(f"{points.describe().rsplit('/', 1)[-1]}   {len(boxes)} boxes{true}", fontsize=11, loc="left")
    return _save(figure, path)


def save_maps(
    path: str | Path,
    panels: Sequence[tuple[str, str, NDArray]],
    extent: tuple[float, float, float, float],
    boxes: NDArray,
    title: str,
) -> Path:
    """Write maps side by side, seen from above.

    Args:
        panels: name, unit and ``(H, W)`` values of each; row 0 is the lowest y, NaN stays white.
        extent: lowest and highest x, lowest and highest y, metres.
        boxes: ``(F, 4)`` lowest x, y and highest x, y of rectangles to outline.

    Raises:
        InputError: if matplotlib is missing or the file cannot be written.
    """
    from matplotlib.patches import Rectangle

    left, right, bottom, top = extent
    aspect = min(max((top - bottom) / (right - left), 0.25), 4)
    width = 6.0 if aspect < 1.5 else 4.0
    figure = _figure(width * len(panels), width * 0.85 * aspect + 1.2, path)
    for number, (name, unit, values) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, (1, 99)) if len(finite) else (0, 1)
        image = axes.imshow(
            values,
            origin="lower",
            extent=(0, right - left, 0, top - bottom),
            cmap="terrain" if name == "height" else "magma",
            vmin=low,
            vmax=max(high, low + 1e-6),
            interpolation="nearest",
        )
        for x, y, x_end, y_end in boxes:
            place = (x - left, y - bottom)
            axes.add_patch(Rectangle(place, x_end - x, y_end - y, fill=False, edgecolor="#20303c", linewidth=0.4))
        axes.set_title(name, fontsize=13)
        axes.set_xlabel(f"metres from x = {left:,.0f}")
        axes.set_ylabel(f"metres from y = {bottom:,.0f}" if number == 0 else "")
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        bar.set_label(unit)
        bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=11, color="#56626c", x=0.012, ha="left")
    return _save(figure, path)


def save_triptych(
    path: str | Path,
    points: Points,
    truth: Tensor | NDArray | None,
    prediction: Tensor | NDArray,
    palette: Palette | None = None,
    class_names: Sequence[str] | None = None,
    instances: Mapping[str, Tensor | NDArray] | None = None,
) -> Path:
    """Write one cloud as input | truth | prediction | wrong points, seen from one camera, with a legend of its classes.

    Args:
        points: the cloud; the input panel shows its colour, strength or height.
        truth: ``(N,)`` class ids, negative where unlabelled; None leaves out the truth and the wrong points.
        prediction: ``(N,)`` class ids.
        instances: more panels, title -> ``(N,)`` instances, each in a colour of its own; negative ones are grey.

    Raises:
        InputError: if matplotlib is missing or the file cannot be written.
    """
    predicted = np.asarray(prediction).astype(np.int64)
    actual = None if truth is None else np.asarray(truth).astype(np.int64)
    highest = max(int(predicted.max(initial=0)), -1 if actual is None else int(actual.max(initial=0)))
    names = list(class_names or []) or [str(i) for i in range(highest + 1)]
    colors = list(palette or distinct_palette(len(names)))
    input_colors = point_colors(points.without_attrs(*LABEL_FIELDS), "auto")
    panels = [("input", input_colors), ("prediction", label_colors(predicted, colors))]
    if actual is not None:
        panels.insert(1, ("truth", label_colors(actual, colors)))
        panels.append(_errors(actual, predicted))
    panels += [(title, label_colors(labels)) for title, labels in (instances or {}).items()]
    present = [predicted] if actual is None else [predicted, actual]
    return _draw_panels(path, points, panels, np.unique(np.concatenate(present)), names, colors)


def save_titled_cloud(path: str | Path, points: Points, title: str, right: bool = True) -> Path:
    """Write one cloud with a title, red where it is not ``right``.

    Raises:
        InputError: as :func:`save_triptych`.
    """
    colors = point_colors(points.without_attrs(*LABEL_FIELDS, "instance"), "auto")
    picture = _crop([rasterize(points, (720, 640), choose_view(points, aspect=1.125)).paint(colors)])[0]
    figure = _figure(5.2, 5.2 * picture.shape[0] / picture.shape[1] + 0.8, path)
    axes = figure.add_subplot()
    axes.imshow(picture)
    axes.set_axis_off()
    axes.set_title(title, fontsize=13, color="#20303c" if right else "#c0392b")
    return _save(figure, path)


def save_point_sets(path: str | Path, panels: Mapping[str, Tensor | Points], title: str) -> Path:
    """Write point sets side by side, seen from one camera and coloured by height.

    Args:
        panels: title -> ``(N, 3)`` points, or a cloud, lit where it has normals.

    Raises:
        InputError: as :func:`save_triptych`.
    """
    clouds = {name: each if isinstance(each, Points) else Points(each) for name, each in panels.items()}
    sets = {name: cloud.detach().cpu() for name, cloud in clouds.items()}
    everything = Points(torch.cat([cloud.coord for cloud in sets.values()]))
    colors, view = point_colors(everything, "height"), choose_view(everything, aspect=1.15)
    figure, start = _figure(4.6 * len(sets), 4.6, path), 0
    for i, (name, points) in enumerate(sets.items()):
        own = slice(start, start + points.num_points)
        visible = None if view.visible is None else view.visible[own]
        raster = rasterize(points, (760, 660), replace(view, visible=visible))
        axes = figure.add_subplot(1, len(sets), i + 1)
        axes.imshow(raster.paint(colors[own]))
        axes.set_title(f"{name}, {_short(points.num_points)} points", fontsize=13)
        axes.set_axis_off()
        start += points.num_points
    figure.suptitle(title.rsplit("/", 1)[-1], fontsize=12, color="#56626c", x=0.012, ha="left")
    return _save(figure, path)


def save_label_panels(
    path: str | Path,
    points: Points,
    panels: Mapping[str, Tensor | NDArray],
    palette: Palette | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write one cloud several times side by side, coloured by other labels each, with a legend.

    Args:
        points: the cloud.
        panels: title -> ``(N,)`` class ids, negative where unlabelled.

    Raises:
        InputError: as :func:`save_triptych`.
    """
    labels = {title: np.asarray(values).astype(np.int64) for title, values in panels.items()}
    present = np.unique(np.concatenate(list(labels.values())))
    names = list(class_names or []) or [str(i) for i in range(int(present.max(initial=-1)) + 1)]
    colors = list(palette or distinct_palette(len(names)))
    drawn = [(title, label_colors(values, colors)) for title, values in labels.items()]
    return _draw_panels(path, points, drawn, present, names, colors)


def _draw_panels(
    path: str | Path,
    points: Points,
    panels: list[tuple[str, NDArray]],
    present: NDArray,
    names: Sequence[str],
    colors: Palette,
) -> Path:
    raster = rasterize(points, (920, 800), choose_view(points, aspect=1.15))
    pictures = _crop([raster.paint(color) for _, color in panels])
    height, width, _ = pictures[0].shape
    figure = _figure(5.2 * len(panels), 5.2 * height / width + 1.5, path)
    for i, ((title, _), picture) in enumerate(zip(panels, pictures, strict=True)):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.imshow(picture)
        axes.set_title(title, fontsize=14)
        axes.set_axis_off()
    figure.suptitle(
        f"{points.describe().rsplit('/', 1)[-1]}   {_short(points.num_points)} points",
        fontsize=12,
        color="#56626c",
        x=0.012,
        ha="left",
    )
    _legend(figure, present, names, colors)
    return _save(figure, path)


def _crop(pictures: list[NDArray]) -> list[NDArray]:
    """The pictures without the empty lines above and below what they show (one camera: the same for all)."""
    used = np.flatnonzero(np.any([(picture < 255).any((1, 2)) for picture in pictures], axis=0))
    if len(used) == 0:
        return pictures
    top, bottom = max(int(used[0]) - 8, 0), int(used[-1]) + 9
    return [picture[top:bottom] for picture in pictures]


def _errors(truth: NDArray, prediction: NDArray) -> tuple[str, NDArray]:
    labelled = truth >= 0
    wrong = labelled & (truth != prediction)
    table = np.array([RIGHT, WRONG, UNLABELLED], np.uint8)
    percent = 100 * wrong.sum() / max(labelled.sum(), 1)
    return f"wrong points ({percent:.1f} %)", table[np.where(labelled, wrong.astype(int), 2)]


def _legend(figure: Figure, ids: NDArray, names: Sequence[str], colors: Palette) -> None:
    from matplotlib.patches import Patch

    entries = [(names[i] if i < len(names) else str(i), label_colors(np.array([i]), colors)[0]) for i in ids if i >= 0]
    if (ids < 0).any():
        entries.append(("unlabelled", np.array(UNLABELLED)))
    handles = [Patch(color=tuple(color / 255), label=name) for name, color in entries]
    fitting = max(int(figure.get_figwidth() / 1.7), 1)
    columns = math.ceil(len(handles) / math.ceil(len(handles) / fitting)) if handles else 1
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=12)


def _short(count: Any) -> str:
    """A count in at most five characters: 950, 12.3k, 4.56M."""
    number = int(count)
    if number < 10_000:
        return str(number)
    return f"{number / 1e3:.3g}k" if number < 999_500 else f"{number / 1e6:.3g}M"


def _figure(width: float, height: float, path: str | Path) -> Figure:
    """An empty figure; no pyplot, so no display, no global state, and it works in any thread."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise InputError(f"{path}: pictures with text need matplotlib: pip install pc3d[plots]") from error
    figure = Figure(
        figsize=(width, height), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), facecolor="white"
    )
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png")
    return path
