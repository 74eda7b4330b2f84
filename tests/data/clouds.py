"""Small random clouds for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from pc3d import Points


def random_points(counts: Sequence[int] = (500,), seed: int = 0) -> Points:
    """Clouds in a 4 x 3 x 2 m box off the origin, with every common attribute and a unique ``id`` per point."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    return Points(
        torch.rand(total, 3, generator=generator) * torch.tensor([4.0, 3.0, 2.0]) + torch.tensor([10.0, -5.0, 1.0]),
        torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]),
        {
            "color": torch.rand(total, 3, generator=generator) * 200 + 20,
            "normal": F.normalize(torch.randn(total, 3, generator=generator), dim=1),
            "segment": torch.randint(-1, 5, (total,), generator=generator),
            "id": torch.arange(total),
        },
        [{"name": f"cloud{i}", "origin": (100.0, 0.0, 0.0)} for i in range(len(counts))],
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
