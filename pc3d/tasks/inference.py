"""From a raw cloud to class probabilities on every one of its points."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import Compose, Transform
from pc3d.errors import InputError
from pc3d.points import Points
from pc3d.tasks.checkpoint import MismatchError, feature_channels, text_table

if TYPE_CHECKING:
    from pc3d.tasks.segmentation import SemanticSegmentation

PredictMode = Literal["vote", "fast"]


def predict_cloud(
    task: SemanticSegmentation,
    pipeline: Pipeline,
    points: Points,
    augmentations: Sequence[Sequence[Transform]] | None = None,
    mode: PredictMode = "vote",
    fragments_per_pass: int = 1,
    tile: float | None = None,
    overlap: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Class probabilities of every point of one raw cloud.

    ``vote`` is the published protocol: for every augmentation the cloud is cut into fragments of one point per cell,
    and the softmax probabilities of all forward passes are summed per point. Fragments are made one after the other,
    and forgotten. ``fast`` is one forward pass over the first point of each cell, whose probabilities all points of
    the cell share. Without a grid every pass is such a single one, over what ``pipeline.select`` leaves, or over all.

    Args:
        task: the model; used in eval mode, on the device where it is.
        pipeline: how a raw cloud becomes the model's input.
        points: one raw cloud, on any device; no labels needed.
        augmentations: transforms of each voting pass, default one pass without any.
        mode: ``vote`` or ``fast``.
        fragments_per_pass: fragments packed into one forward pass.
        tile: edge in metres of square tiles (x, y) predicted one after the other, for clouds larger than memory.
        overlap: metres of context around a tile, whose own predictions are thrown away; default a tenth of ``tile``.
        generator: source of the augmentations' random numbers.

    Returns:
        ``(N, K)`` float32 on the task's device (with ``tile``: on the cloud's); rows sum to 1, except those of points
        which ``pipeline.prepare`` removes: they are zero (see :func:`labels_of`).

    Raises:
        InputError: for an empty cloud, coordinates that are not finite, missing fields, or options that contradict.
    """
    check_cloud(points)
    if mode == "fast" and augmentations is not None:
        raise InputError("test-time augmentation needs mode 'vote': mode 'fast' is a single pass")
    if overlap is not None and tile is None:
        raise InputError(f"overlap {overlap} without tile: give the edge of the tiles too")
    if mode == "fast":
        predict = partial(_single, task, pipeline)
    elif pipeline.grid_size is None:
        predict = partial(_singles, task, pipeline, passes=augmentations or [[]], generator=generator)
    else:
        passes = [[]] if augmentations is None else augmentations
        predict = partial(_vote, task, pipeline, passes=passes, per_pass=fragments_per_pass, generator=generator)
    training = task.training
    task.eval()
    try:
        with torch.no_grad():
            votes = predict(points) if tile is None else _tiled(predict, points, tile, overlap)
    except InputError as error:
        raise _explained(error, pipeline, points) from error
    finally:
        task.train(training)
    return votes / votes.sum(1, keepdim=True).clamp(min=torch.finfo(votes.dtype).tiny)


def labels_of(probabilities: Tensor) -> Tensor:
    """``(N,)`` int64 most probable class of ``(N, K)`` probabilities; -1 where a row is zero (no prediction)."""
    best, labels = probabilities.max(1)
    return torch.where(best > 0, labels, -1)


def original_rows(sampled: Points) -> tuple[Points, Tensor]:
    """The clouds before any grid sampling, and for each of their points the row of ``sampled`` that stands for it."""
    rows, source = sampled.source_rows(), sampled.source
    assert source is not None
    while source.source is not None:  # sampled more than once, e.g. 0.025 m in ``prepare`` and 0.05 m for the model
        rows, source = rows[source.source_rows()], source.source
    return source, rows


def check_cloud(points: Points) -> None:
    """Raises InputError unless ``points`` is one cloud with at least one point and finite coordinates."""
    if len(points) != 1:
        raise InputError(f"{points.describe()}: prediction takes one cloud at a time, got {len(points)}")
    if points.num_points == 0:
        raise InputError(f"{points.describe()}: holds no points")
    bad = ~points.coord.isfinite().all(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise InputError(
            f"{points.describe()}: field 'coord' holds {int(bad.sum())} non-finite points (first: {first})"
        )


def _singles(
    task: SemanticSegmentation,
    pipeline: Pipeline,
    points: Points,
    passes: Sequence[Sequence[Transform]],
    generator: torch.Generator | None,
) -> Tensor:
    return torch.stack([_single(task, pipeline, points, augmentation, generator) for augmentation in passes]).sum(0)


def _single(
    task: SemanticSegmentation,
    pipeline: Pipeline,
    points: Points,
    augmentation: Sequence[Transform] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    sampled = pipeline.evaluate(_indexed(points), augmentation, generator)
    source, rows = original_rows(sampled)
    votes = torch.zeros(points.num_points, len(task.class_names), device=task.device)
    votes[source.get("index").to(task.device)] = _probabilities(task, sampled)[rows.to(task.device)]
    return votes


def _vote(
    task: SemanticSegmentation,
    pipeline: Pipeline,
    points: Points,
    passes: Sequence[Sequence[Transform]],
    per_pass: int,
    generator: torch.Generator | None,
) -> Tensor:
    votes = torch.zeros(points.num_points, len(task.class_names), device=task.device)
    prepared = pipeline.prepare_vote(points)
    for augmentation in passes:
        fragments = pipeline.fragments(prepared, augmentation, generator)
        while group := list(islice(fragments, per_pass)):
            probabilities = _probabilities(task, Points.cat(group)).split([part.num_points for part in group])
            for fragment, part in zip(group, probabilities, strict=True):
                votes[fragment.get("index").to(task.device)] += part  # rows are unique inside one fragment
    if prepared.source is not None:
        source, rows = original_rows(prepared)
        votes[source.get("index").to(task.device)] = votes[prepared.get("index")[rows].to(task.device)]
    return votes


def _probabilities(task: SemanticSegmentation, sampled: Points) -> Tensor:
    return task.probabilities(sampled.replace(source=None).to(task.device))


def _indexed(points: Points) -> Points:
    return points.with_attrs(index=torch.arange(points.num_points, device=points.device))


def _tiled(predict: partial[Tensor], points: Points, tile: float, overlap: float | None) -> Tensor:
    margin = tile / 10 if overlap is None else overlap
    if tile <= 0 or margin < 0:
        raise InputError(
            f"tile is {tile} m with an overlap of {margin} m: give an edge above 0 and an overlap of 0 or more"
        )
    parts = ((rows, inner, predict(points.select(rows))) for rows, inner in _tiles(points.coord[:, :2], tile, margin))
    result: Tensor | None = None
    for rows, inner, part in parts:
        if result is None:
            result = part.new_zeros(points.num_points, part.shape[1], device=points.device)
        result[rows[inner]] = part.to(result.device)[inner]
    assert result is not None
    return result


def _tiles(xy: Tensor, tile: float, margin: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of each occupied tile and its margin, and which of these rows lie in the tile itself."""
    place = (xy - xy.amin(0)) / tile
    cell = place.floor().long()
    for corner in cell.unique(dim=0):
        low, high = corner - margin / tile, corner + 1 + margin / tile
        rows = ((place >= low) & (place < high)).all(1).nonzero()[:, 0]
        yield rows, (cell[rows] == corner).all(1)


def _explained(error: InputError, pipeline: Pipeline, points: Points) -> InputError:
    """An error about a field of the checkpoint's features, with a table of the fields expected and found."""
    if not any(f"field '{name}'" in str(error) for name in pipeline.features):
        return error
    with contextlib.suppress(InputError):  # fields made by ``prepare`` count as found
        points = Compose(pipeline.prepare)(points)
    found = {name: str(points.get(name)[0].numel()) for name in ["coord", *points.attrs]}
    channels = feature_channels(pipeline.features)
    names = dict.fromkeys([*pipeline.features, *found])
    rows = [(name, str(channels.get(name, "-")), found.get(name, "missing")) for name in names]
    return MismatchError(str(error), text_table("Channels per field", ("field", "checkpoint", "this cloud"), rows))
