"""Palettes and what clouds are coloured by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pc3d.errors import InputError
from pc3d.points import Points
from pc3d.viz.colors import UNLABELLED, color_modes, distinct_palette, label_colors, point_colors, scalar_colors


def cloud(**attrs: torch.Tensor) -> Points:
    return Points(torch.rand(4, 3), attrs=attrs, meta=[{"name": "cloud"}])


@pytest.mark.parametrize("count", [1, 12, 20, 60])
def test_palette_colours_are_distinct(count: int) -> None:
    palette = distinct_palette(count)
    assert len(set(palette)) == count
    assert palette == distinct_palette(60)[:count]
    assert all(0 <= value <= 255 for color in palette for value in color)


def test_labels_take_their_palette_and_grey_where_unlabelled() -> None:
    colors = label_colors(torch.tensor([1, 0, -1, 3]), [(1, 2, 3), (4, 5, 6)])
    assert colors[:3].tolist() == [[4, 5, 6], [1, 2, 3], list(UNLABELLED)]
    assert colors[3].tolist() == list(distinct_palette(4)[3])
    assert label_colors(np.zeros(0, np.int64)).shape == (0, 3)


def test_scalars_rise_in_lightness_and_ignore_outliers() -> None:
    colors = scalar_colors(np.append(np.linspace(0, 1, 200), [1e9, np.nan])).astype(int)
    assert (np.diff(colors[:195].sum(1)) >= 0).all()
    assert (colors[-2] == colors[199]).all()
    assert colors[-1].tolist() == list(UNLABELLED)
    assert len(np.unique(scalar_colors(np.full(5, 3.0)), axis=0)) == 1


def test_auto_shows_colours_unless_they_are_blank() -> None:
    color, label, intensity = torch.rand(4, 3) * 255, torch.arange(4), torch.rand(4, 1)
    assert (point_colors(cloud(color=color, segment=label)) == color.round().numpy()).all()
    blank = cloud(color=torch.zeros(4, 3), classification=label)
    assert (point_colors(blank) == label_colors(label)).all()
    assert (point_colors(cloud(intensity=intensity)) == scalar_colors(intensity)).all()


def test_modes_name_what_there_is() -> None:
    points = cloud(color=torch.zeros(4, 3), classification=torch.arange(4), nir=torch.rand(4, 1))
    assert color_modes(points) == ["label", "rgb", "height", "nir"]
    for mode in color_modes(points):
        assert point_colors(points, mode).shape == (4, 3)
    with pytest.raises(InputError, match=r"cloud: no 'heat' to colour by \(choose from: label, rgb, height, nir\)"):
        point_colors(points, "heat")
