"""Pull-push loss of instance embeddings, and the loss of offsets to instance centres."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def discriminative_loss(
    embedding: Tensor, group: Tensor, cloud: Tensor, pull_margin: float, push_margin: float, shrink: float = 1e-3
) -> Tensor:
    """Rows of one group come together, mean embeddings of groups of one cloud move apart.

    De Brabandere et al., "Semantic instance segmentation with a discriminative loss", 2017 (arXiv 1708.02551): the mean
    over groups of ``mean max(0, |f - mu| - pull)^2``, the mean over pairs of groups of ``max(0, push - |mu - mu'|)^2``,
    and ``shrink`` times the mean ``|mu|``; clouds count alike.

    Args:
        embedding: ``(M, E)``.
        group: ``(M,)`` int64 numbers 0, 1, ..., -1 for rows without a group.
        cloud: ``(M,)`` int64 cloud of each row; a group lies in one cloud.

    Returns:
        Scalar; 0 with zero gradient if no row has a group.
    """
    embedding, group, cloud = (t[group >= 0] for t in (embedding.float(), group, cloud))
    if not len(group):
        return embedding.sum() * 0
    names, group = group.unique(return_inverse=True)
    counts = torch.bincount(group)
    center = embedding.new_zeros(len(names), embedding.shape[1]).index_add(0, group, embedding) / counts[:, None]
    home = torch.zeros_like(names).scatter(0, group, cloud)
    _, home, groups_of = home.unique(return_inverse=True, return_counts=True)
    share = 1 / (groups_of[home] * len(groups_of))  # of each group in a mean over clouds of means over groups
    far = _length(embedding - center[group]) - pull_margin
    pull = (far.clamp(min=0).square() * (share / counts)[group]).sum()
    a, b = ((home[:, None] == home) & ~torch.eye(len(names), dtype=torch.bool, device=home.device)).nonzero().unbind(1)
    near = (push_margin - _length(center[a] - center[b])).clamp(min=0).square()
    push = (near * share[a] / (groups_of[home[a]] - 1)).sum()
    return pull + push + shrink * (_length(center) * share).sum()


def _length(rows: Tensor) -> Tensor:
    return (rows.square().sum(1) + 1e-12).sqrt()


def offset_loss(offset: Tensor, target: Tensor) -> Tensor:
    """Mean L1 distance and mean ``1 - cosine`` between ``(M, 3)`` predicted and true offsets, added; 0 for M = 0."""
    if not len(offset):
        return offset.sum() * 0
    offset, target = offset.float(), target.float()
    return (offset - target).abs().sum(1).mean() + (1 - F.cosine_similarity(offset, target, dim=1)).mean()
