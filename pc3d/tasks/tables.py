"""Tables of scores for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from pc3d.metrics import SegmentationScores


def score_table(scores: SegmentationScores, class_names: Sequence[str], title: str) -> Table:
    """A table of one row per class and a line of means."""
    table = Table(title=f"{title}: mIoU {scores.miou:.3f}", title_justify="left", show_footer=True)
    table.add_column("class", footer="mean")
    table.add_column("IoU", footer=f"{scores.miou:.3f}", justify="right")
    table.add_column("accuracy", footer=f"{scores.macc:.3f} (all points {scores.all_acc:.3f})", justify="right")
    table.add_column("points", footer=f"{int(scores.confusion.sum()):,}", justify="right")
    table.add_column("predicted", justify="right")
    truth, predicted = scores.confusion.sum(1).tolist(), scores.confusion.sum(0).tolist()
    for i, name in enumerate(class_names):
        if truth[i] or predicted[i]:
            table.add_row(
                escape(name), f"{scores.iou[i]:.3f}", f"{scores.acc[i]:.3f}", f"{truth[i]:,}", f"{predicted[i]:,}"
            )
        else:
            table.add_row(escape(name), "absent", "", "0", "0")
    return table


def value_table(
    title: str, names: Sequence[str], counts: Tensor, columns: dict[str, Tensor], means: dict[str, float]
) -> Table:
    """A table of one row per class that has clouds, and a line of means.

    Args:
        counts: ``(K,)`` clouds per class.
        columns: heading -> ``(K,)`` values.
        means: heading -> what stands below.
    """
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("class", footer="mean")
    table.add_column("clouds", footer=f"{int(counts.sum()):,}", justify="right")
    for heading in columns:
        table.add_column(heading, footer=f"{means[heading]:.4g}", justify="right")
    for i, name in enumerate(names):
        if counts[i]:
            table.add_row(escape(name), f"{int(counts[i]):,}", *(f"{column[i]:.4g}" for column in columns.values()))
    return table
