"""The pull-push loss against its definition, written out."""

from __future__ import annotations

import torch
from torch import Tensor

from pc3d.losses.discriminative import discriminative_loss, offset_loss


def by_hand(embedding: Tensor, group: Tensor, cloud: Tensor, pull: float, push: float, shrink: float) -> Tensor:
    clouds = []
    for scene in cloud[group >= 0].unique():
        inside = (cloud == scene) & (group >= 0)
        means, pulls = [], []
        for g in group[inside].unique():
            rows = embedding[group == g]
            means.append(rows.mean(0))
            pulls.append(((rows - means[-1]).norm(dim=1) - pull).clamp(min=0).square().mean())
        pushes = [
            (push - (a - b).norm()).clamp(min=0).square()
            for i, a in enumerate(means)
            for j, b in enumerate(means)
            if i != j
        ]
        size = torch.stack([m.norm() for m in means]).mean()
        clouds.append(torch.stack(pulls).mean() + (torch.stack(pushes).mean() if pushes else 0) + shrink * size)
    return torch.stack(clouds).mean()


def test_equals_the_definition():
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(60, 5, generator=generator, requires_grad=True)
    cloud = torch.arange(60) // 20
    group = torch.randint(-1, 4, (60,), generator=generator)
    group = torch.where(
        (group >= 0) & (cloud < 2), group + 10 * cloud, torch.where(group >= 0, 30, -1)
    )  # third: one group
    value = discriminative_loss(embedding, group, cloud, 0.5, 4.0, 0.01)
    expected = by_hand(embedding, group, cloud, 0.5, 4.0, 0.01)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, embedding)[0] for v in (value, expected)))


def test_nothing_to_do_is_zero_with_a_gradient():
    embedding = torch.randn(4, 3, requires_grad=True)
    value = discriminative_loss(embedding, torch.full((4,), -1), torch.zeros(4).long(), 0.5, 1.5)
    value = value + offset_loss(embedding[:0], embedding[:0])
    value.backward()
    assert value == 0
    assert embedding.grad is not None
    assert not embedding.grad.any()


def test_offsets():
    target = torch.tensor([[1.0, 0, 0], [0, 2.0, 0]])
    assert offset_loss(target, target) == 0
    assert offset_loss(-target, target) == (2 + 4) / 2 + 2
