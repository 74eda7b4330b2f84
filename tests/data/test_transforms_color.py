from __future__ import annotations

import pytest
import torch
from clouds import random_points, seeded

from pc3d import Points
from pc3d.data.transforms import ChromaticAutoContrast, ChromaticJitter, ChromaticTranslation, NormalizeColor


def gray(clouds: int, points: int = 1, value: float = 128.0) -> Points:
    total = clouds * points
    return Points(torch.rand(total, 3), torch.arange(0, total + 1, points), {"color": torch.full((total, 3), value)})


def test_full_auto_contrast_stretches_every_channel_to_the_range() -> None:
    points = random_points((300, 200))
    result = ChromaticAutoContrast(p=1, blend=1.0)(points)
    for before, after in zip(points, result, strict=True):
        color, stretched = before.get("color"), after.get("color")
        torch.testing.assert_close(stretched.amin(0), torch.zeros(3), atol=1e-3, rtol=0)
        torch.testing.assert_close(stretched.amax(0), torch.full((3,), 255.0))
        expected = (color - color.amin(0)) / (color.amax(0) - color.amin(0)) * 255
        torch.testing.assert_close(stretched, expected, atol=1e-2, rtol=0)


def test_auto_contrast_blends_with_a_random_share() -> None:
    points = random_points((50,) * 400)
    color = points.get("color")
    full = ChromaticAutoContrast(p=1, blend=1.0)(points).get("color")
    mixed = ChromaticAutoContrast(p=1)(points, seeded()).get("color")
    share = ((mixed - color) / (full - color)).view(400, -1).median(1).values
    thirds = torch.histc(share, 3, 0, 1) / 400
    torch.testing.assert_close(thirds, torch.full((3,), 1 / 3), atol=0.08, rtol=0)


def test_auto_contrast_of_one_color_changes_nothing() -> None:
    result = ChromaticAutoContrast(p=1)(gray(1, 10))
    assert torch.equal(result.get("color"), torch.full((10, 3), 128.0))


def test_auto_contrast_happens_with_probability_p() -> None:
    points = random_points((5,) * 1000)
    changed = ChromaticAutoContrast(p=0.2)(points, seeded()).get("color") != points.get("color")
    assert changed.view(1000, -1).any(1).float().mean() == pytest.approx(0.2, abs=0.04)


def test_translation_is_one_uniform_shift_per_channel_and_cloud() -> None:
    shift = ChromaticTranslation(p=1, ratio=0.1)(gray(1000, 4), seeded()).get("color") - 128
    per_cloud = shift.view(1000, 4, 3)
    torch.testing.assert_close(per_cloud, per_cloud[:, :1].expand_as(per_cloud))
    drawn = per_cloud[:, 0]
    assert drawn.abs().max() <= 25.5
    thirds = torch.histc(drawn, 3, -25.5, 25.5) / drawn.numel()
    torch.testing.assert_close(thirds, torch.full((3,), 1 / 3), atol=0.04, rtol=0)
    correlation = torch.corrcoef(drawn.T)
    assert (correlation - torch.eye(3)).abs().max() < 0.1


def test_jitter_is_normal_noise_per_point() -> None:
    noise = ChromaticJitter(p=1, std=0.05)(gray(1, 20_000), seeded()).get("color") - 128
    assert noise.mean() == pytest.approx(0, abs=0.2)
    assert noise.std() == pytest.approx(255 * 0.05, rel=0.02)


@pytest.mark.parametrize("transform", [ChromaticTranslation(p=1, ratio=0.5), ChromaticJitter(p=1, std=0.5)])
def test_colors_stay_in_range(transform: ChromaticTranslation | ChromaticJitter) -> None:
    color = transform(random_points((300,) * 20), seeded()).get("color")
    assert color.min() == 0
    assert color.max() == 255


def test_color_steps_change_nothing_else() -> None:
    points = random_points()
    result = ChromaticJitter(p=1)(ChromaticTranslation(p=1)(points))
    assert torch.equal(result.coord, points.coord)
    assert torch.equal(result.get("normal"), points.get("normal"))


def test_normalize_color() -> None:
    points = Points(torch.zeros(3, 3), attrs={"color": torch.tensor([0.0, 127.5, 255.0])[:, None].repeat(1, 3)})
    assert NormalizeColor()(points).get("color")[:, 0].tolist() == [0.0, 0.5, 1.0]
    assert NormalizeColor("signed")(points).get("color")[:, 0].tolist() == [-1.0, 0.0, 1.0]


def test_normalize_color_takes_bytes() -> None:
    points = Points(torch.zeros(2, 3), attrs={"color": torch.tensor([[0, 51, 255]] * 2, dtype=torch.uint8)})
    torch.testing.assert_close(NormalizeColor()(points).get("color")[0], torch.tensor([0.0, 0.2, 1.0]))
