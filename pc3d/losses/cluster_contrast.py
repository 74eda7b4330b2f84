"""Clustering-based supervised representation learning: contrast points of latent sub-classes while training.

Feng et al., "Clustering based Point Cloud Representation Learning for 3D Analysis", ICCV 2023 (arXiv 2307.14605).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.losses.base import FeatureLoss

_CHECK_EVERY = 10
_MOST_PASSES = 1001
_BASE_TEMPERATURE = 2.0


class ClusterContrast(FeatureLoss):
    """Contrast of point embeddings with centres, other points and stored points of their sub-class.

    Of every batch some points per class (``anchors`` in all) are projected to a unit sphere and assigned in equal
    shares to the ``clusters`` centres of their class (:func:`balanced_assignment`). An anchor is pulled to its centre,
    to anchors and to stored anchors of the same sub-class, and pushed from all others; half of the three terms' sum is
    the loss. Afterwards the centres follow by a slow average and the anchors enter the memory. Costs nothing at test
    time.

    Args:
        clusters: centres per class (paper: 40).
        class_clusters: class -> number of centres, for classes that use fewer.
        projection: widths of the projection head (Linear, BN, ReLU each); empty contrasts the features themselves.
        anchors: points per step, all classes together.
        memory: stored anchors per sub-class.
        memory_step: of them replaced per step, at most.
        temperature: of the contrast.
        momentum: of the centres.
        exponent, tolerance: sharpness and accuracy of the assignment.
        as_released: repeat the errors of the released code, for comparison. Memory rows mix the channels of several
            anchors, sub-class 0 is never stored, a full memory overwrites its last rows, and random start values count
            as points; the anchors of a class of ``class_clusters`` all go to its first centre (the assignment divides
            by zero). By default the memory holds true embeddings, the oldest go first, and empty rows are left out.
        loss_weight: factor on the result.
        ignore_index: class value of points that do not count.

    Buffers (after :meth:`build`): ``centers`` (classes, clusters, D), ``memory`` (classes * clusters, memory, D), both
    of unit length, ``memory_next`` (classes * clusters,) int64 next row to write, ``memory_count`` rows filled.
    """

    centers: Tensor
    memory: Tensor
    memory_next: Tensor
    memory_count: Tensor
    cluster_counts: Tensor

    def __init__(
        self,
        clusters: int = 40,
        class_clusters: Mapping[int, int] | None = None,
        projection: Sequence[int] = (256, 128, 64),
        anchors: int = 100,
        memory: int = 50,
        memory_step: int = 10,
        temperature: float = 0.1,
        momentum: float = 0.9999,
        exponent: float = 25.0,
        tolerance: float = 0.1,
        as_released: bool = False,
        loss_weight: float = 1.0,
        ignore_index: int = -1,
    ) -> None:
        super().__init__(loss_weight, ignore_index)
        for name, value in {
            "clusters": clusters,
            "anchors": anchors,
            "memory": memory,
            "memory_step": memory_step,
        }.items():
            if value < 1:
                raise InputError(f"ClusterContrast.{name} is {value}: it must be at least 1")
        self.clusters = clusters
        self.class_clusters = {int(label): count for label, count in (class_clusters or {}).items()}
        self.widths = tuple(projection)
        self.anchors = anchors
        self.memory_rows = memory
        self.memory_step = min(memory_step, memory)
        self.temperature = temperature
        self.momentum = momentum
        self.exponent = exponent
        self.tolerance = tolerance
        self.as_released = as_released

    def build(self, in_channels: int, num_classes: int) -> None:
        for label, count in self.class_clusters.items():
            if not (0 <= label < num_classes and 1 <= count <= self.clusters):
                raise InputError(
                    f"ClusterContrast.class_clusters: {{{label}: {count}}} needs a class of 0..{num_classes - 1} and "
                    f"1..{self.clusters} centres"
                )
        widths = [in_channels, *self.widths]
        steps = [
            module for a, b in itertools.pairwise(widths) for module in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())
        ]
        self.proj = nn.Sequential(*steps)
        subclasses, width = num_classes * self.clusters, widths[-1]
        counts = [self.class_clusters.get(label, self.clusters) for label in range(num_classes)]
        self.register_buffer("cluster_counts", torch.tensor(counts), persistent=False)
        self.register_buffer("centers", F.normalize(torch.randn(num_classes, self.clusters, width), dim=-1))
        self.register_buffer("memory", F.normalize(torch.randn(subclasses, self.memory_rows, width), dim=-1))
        self.register_buffer("memory_next", torch.zeros(subclasses, dtype=torch.int64))
        filled = self.memory_rows if self.as_released else 0
        self.register_buffer("memory_count", torch.full((subclasses,), filled, dtype=torch.int64))

    def compute(self, features: Tensor, target: Tensor, prediction: Tensor) -> Tensor:
        embedding = self.proj(features)
        with torch.autocast(features.device.type, enabled=False):
            rows = select_anchors(target, prediction, self.anchors, len(self.centers), self.ignore_index)
            anchors = F.normalize(embedding.float()[rows], dim=1)
            subclass = self.assign(anchors.detach(), target[rows])
            # A batch without labels still has to reach every parameter (and every process its collectives).
            loss = self.contrast(anchors, subclass) if len(rows) else embedding.float().sum() * 0
            if self.training:
                self._update(anchors.detach(), subclass)
        return loss

    @torch.no_grad()
    def assign(self, anchors: Tensor, target: Tensor) -> Tensor:
        """``(A,)`` sub-class ``class * clusters + cluster`` of ``(A, D)`` unit anchors of classes ``target``.

        All classes are solved at once, padded to the largest.
        """
        if not len(anchors):
            return target.new_zeros(0)
        classes, group, sizes = target.unique(return_inverse=True, return_counts=True)
        order = group.argsort(stable=True)
        slot = torch.empty_like(order)
        slot[order] = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[group[order]]
        padded = anchors.new_zeros(len(classes), int(sizes.max()), anchors.shape[1], dtype=torch.float64)
        padded[group, slot] = anchors.double()
        scores = padded @ self.centers[classes].double().transpose(1, 2)
        used = torch.arange(self.clusters, device=target.device) < self.cluster_counts[classes][:, None]
        log_share = scores.masked_fill(~used[:, None], -torch.inf).log_softmax(-1)
        labels = balanced_assignment(log_share, sizes, self.cluster_counts[classes], self.exponent, self.tolerance)
        if self.as_released:
            labels = labels.masked_fill((self.cluster_counts[classes] < self.clusters)[:, None], 0)
        return target * self.clusters + labels[group, slot]

    def contrast(self, anchors: Tensor, subclass: Tensor) -> Tensor:
        """Half the sum of :meth:`terms`, the published total."""
        return torch.stack(list(self.terms(anchors, subclass).values())).sum() / 2

    def terms(self, anchors: Tensor, subclass: Tensor) -> dict[str, Tensor]:
        """The three contrasts ``memory``, ``point`` and ``center`` of ``(A, D)`` anchors with sub-classes ``(A,)``."""
        used = torch.arange(self.clusters, device=anchors.device) < self.cluster_counts[:, None]
        present = torch.zeros(len(self.centers), dtype=torch.bool, device=anchors.device)
        present[subclass // self.clusters] = True
        centers = (used & present[:, None]).flatten().nonzero()[:, 0]
        filled = torch.arange(self.memory_rows, device=anchors.device) < self.memory_count[:, None]
        stored, row = (filled & used.flatten()[:, None]).nonzero(as_tuple=True)
        own = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
        return {
            "memory": self._contrast(anchors, self.memory[stored, row], subclass[:, None] == stored),
            "point": self._contrast(anchors, anchors, (subclass[:, None] == subclass) & ~own),
            "center": self._contrast(anchors, self.centers.flatten(0, 1)[centers], subclass[:, None] == centers),
        }

    def _contrast(self, anchors: Tensor, candidates: Tensor, positive: Tensor) -> Tensor:
        """Mean over the anchors with a positive of the mean over its positives of ``-log(e^l / (e^l + negatives))``.

        All candidates but the positives are negatives: with the points that includes, as published, the anchor itself.
        """
        scores = anchors @ candidates.T / self.temperature
        lowest = torch.finfo(scores.dtype).min  # not -inf, whose logsumexp has no gradient
        negatives = scores.masked_fill(positive, lowest).logsumexp(1) if scores.shape[1] else scores.sum(1)
        anchor, candidate = positive.nonzero(as_tuple=True)
        losses = F.softplus(negatives[anchor] - scores[anchor, candidate])
        counts = positive.sum(1)
        per_anchor = losses.new_zeros(len(anchors)).index_add(0, anchor, losses) / counts.clamp(min=1)
        scale = self.temperature / _BASE_TEMPERATURE
        return scale * per_anchor.sum() / (counts > 0).sum().clamp(min=1)

    # State -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _update(self, anchors: Tensor, subclass: Tensor) -> None:
        """Move the centres to the batch means and store anchors; every process does the same with all anchors."""
        anchors, subclass = _gather(anchors, subclass)
        self.centers.copy_(self.moved_centers(anchors, subclass))
        if len(subclass):
            store = self._store_published if self.as_released else self._store
            store(anchors, subclass)

    def batch_centers(self, anchors: Tensor, subclass: Tensor) -> Tensor:
        """``(classes, clusters, D)`` mean of the anchors of every sub-class, 0 where there is none."""
        flat = self.centers.new_zeros(self.memory.shape[0], anchors.shape[1]).index_add_(0, subclass, anchors)
        counts = torch.bincount(subclass, minlength=len(flat)).clamp(min=1)
        return (flat / counts[:, None]).view_as(self.centers)

    def moved_centers(self, anchors: Tensor, subclass: Tensor) -> Tensor:
        """The centres after one step of the average, of unit length."""
        mean = self.batch_centers(anchors, subclass)
        return F.normalize(self.momentum * self.centers + (1 - self.momentum) * mean, dim=-1)

    def _store(self, anchors: Tensor, subclass: Tensor) -> None:
        """Anchors in a random order into the ring of their sub-class, ``memory_step`` of each at most."""
        shuffled = torch.randperm(len(subclass), device="cpu").to(subclass.device)
        order = shuffled[subclass[shuffled].argsort(stable=True)]
        subclass, anchors = subclass[order], anchors[order]
        counts = torch.bincount(subclass, minlength=len(self.memory))
        rank = torch.arange(len(subclass), device=subclass.device) - (counts.cumsum(0) - counts)[subclass]
        kept = rank < self.memory_step
        subclass, anchors, rank = subclass[kept], anchors[kept], rank[kept]
        self.memory[subclass, (self.memory_next[subclass] + rank) % self.memory_rows] = anchors
        written = counts.clamp(max=self.memory_step)
        self.memory_next.copy_((self.memory_next + written) % self.memory_rows)
        self.memory_count.copy_((self.memory_count + written).clamp(max=self.memory_rows))

    def _store_published(self, anchors: Tensor, subclass: Tensor) -> None:
        """The released code's update: the anchor matrix is reread in another shape, not transposed."""
        scrambled = anchors.reshape(anchors.shape[1], len(anchors))
        for label in subclass.unique().tolist():
            count = int((subclass == label).sum())
            taken = min(count, self.memory_step)
            if label == 0:
                continue
            values = F.normalize(scrambled[:, torch.randperm(count)[:taken].to(anchors.device)].T, dim=1)
            start = int(self.memory_next[label])
            if start + taken >= self.memory_rows:
                self.memory[label, -taken:] = values
                self.memory_next[label] = 0
            else:
                self.memory[label, start : start + taken] = values
                self.memory_next[label] = (start + 1) % self.memory_rows


def select_anchors(target: Tensor, prediction: Tensor, budget: int, num_classes: int, ignore_index: int = -1) -> Tensor:
    """Rows of the points to contrast: the same number per class present, half of them wrongly predicted if there are.

    Args:
        target, prediction: ``(N,)`` int64 classes.
        budget: points of all classes together.

    Returns:
        ``(A,)`` int64 rows: classes ascending, in each the wrongly predicted points first. Which ones is random where a
        class has more than its share.
    """
    rows = (target != ignore_index).nonzero()[:, 0]
    target, right = target[rows], (target == prediction)[rows]
    group = 2 * target + right
    counts = torch.bincount(group, minlength=2 * num_classes).view(-1, 2)
    share = budget // max(1, int((counts.sum(1) > 0).sum()))
    hard, easy = counts.unbind(1)
    many_hard, many_easy = hard >= share / 2, easy >= share / 2
    keep_hard = torch.where(many_easy & many_hard, share // 2, torch.where(many_hard, share - easy, hard))
    keep_easy = torch.where(many_easy & many_hard, share - share // 2, torch.where(many_easy, share - hard, easy))
    keep = torch.stack([keep_hard, keep_easy], 1).flatten()
    shuffled = torch.randperm(len(rows), device="cpu").to(rows.device)
    order = shuffled[group[shuffled].argsort(stable=True)]
    flat = counts.flatten()
    rank = torch.arange(len(rows), device=rows.device) - (flat.cumsum(0) - flat)[group[order]]
    kept = order[rank < keep[group[order]]].sort().values
    return rows[kept[group[kept].argsort(stable=True)]]


def balanced_assignment(
    log_share: Tensor, sizes: Tensor, clusters: Tensor, exponent: float = 25.0, tolerance: float = 0.1
) -> Tensor:
    """Assign points to clusters in equal shares: Sinkhorn-Knopp on ``share ** exponent``, in the log domain.

    Rows and columns are scaled in turn until every point's scale changes by less than ``tolerance`` (summed over the
    points of a problem; looked at after passes 1, 11, 21, ...), each problem on its own.

    Args:
        log_share: ``(P, M, K)`` float64 log of each point's soft share of each cluster, for P problems.
        sizes: ``(P,)`` number of points of each problem, the first ones of M.
        clusters: ``(P,)`` number of clusters, the first ones of K.

    Returns:
        ``(P, M)`` int64 cluster of each point, the lowest of equals; meaningless beyond ``sizes``.
    """
    problems, points, width = log_share.shape
    no_point = torch.arange(points, device=sizes.device) >= sizes[:, None]
    no_cluster = torch.arange(width, device=sizes.device) >= clusters[:, None]
    weights = (exponent * log_share).masked_fill(no_point[:, :, None] | no_cluster[:, None], -torch.inf)
    log_k, log_m = clusters.double().log()[:, None], sizes.double().log()[:, None]
    rows = weights.new_zeros(problems, width)
    columns = (-log_m).expand(problems, points)
    running = torch.ones(problems, 1, dtype=torch.bool, device=sizes.device)
    for step in range(_MOST_PASSES):
        new_rows = (-log_k - (weights + columns[:, :, None]).logsumexp(1)).masked_fill(no_cluster, -torch.inf)
        new_columns = (-log_m - (weights + new_rows[:, None]).logsumexp(2)).masked_fill(no_point, -torch.inf)
        change = (columns - new_columns).masked_fill(no_point, 0).exp().sub(1).abs().sum(1, keepdim=True)
        rows, columns = torch.where(running, new_rows, rows), torch.where(running, new_columns, columns)
        if step % _CHECK_EVERY == 0:
            running = running & (change > tolerance)
            if not running.any():
                break
    return (weights + rows[:, None]).argmax(2)


def _gather(anchors: Tensor, subclass: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors of all processes, in the order of their ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return anchors, subclass
    count = torch.tensor([len(subclass)], device=subclass.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    most = int(torch.stack(counts).max())
    padded = torch.cat([anchors, anchors.new_zeros(most - len(anchors), anchors.shape[1])])
    labels = torch.cat([subclass, subclass.new_zeros(most - len(subclass))])
    all_anchors = [torch.empty_like(padded) for _ in counts]
    all_labels = [torch.empty_like(labels) for _ in counts]
    dist.all_gather(all_anchors, padded)
    dist.all_gather(all_labels, labels)
    ends = [int(n) for n in counts]
    parts = [(a[:n], s[:n]) for a, s, n in zip(all_anchors, all_labels, ends, strict=True)]
    return torch.cat([a for a, _ in parts]), torch.cat([s for _, s in parts])
