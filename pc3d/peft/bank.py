"""Features of training clouds, from which the most similar to a query are retrieved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.points import Points


class FeatureBank(nn.Module):
    """One feature and one identity of each of N training clouds; buffers, so a checkpoint brings them along.

    Args:
        size: clouds, N.
        channels: width of a feature, C.
        half: keep features as float16.
    """

    features: Tensor
    ids: Tensor

    def __init__(self, size: int, channels: int, half: bool = True) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(size, channels, dtype=torch.float16 if half else torch.float32))
        self.register_buffer("ids", torch.zeros(size, dtype=torch.int64))
        self.known_filled = False

    def __len__(self) -> int:
        return len(self.ids)

    def fill(self, features: Tensor, ids: Tensor | None = None) -> None:
        """Take ``(N, C)`` features as they are and, if known, the ``(N,)`` int64 identities of their clouds.

        Raises:
            InputError: if there are not N features of C channels, or two clouds have one identity.
        """
        if features.shape != self.features.shape:
            raise InputError(
                f"bank: {tuple(features.shape)} features do not fill one of {tuple(self.features.shape)} "
                "(clouds, channels); set bank_size to the number of clouds"
            )
        if ids is not None and len(ids[ids != 0].unique()) < int((ids != 0).sum()):
            raise InputError("bank: several training clouds share a name, so none can leave itself out")
        self.features.copy_(features)
        self.ids.copy_(torch.zeros_like(self.ids) if ids is None else ids)
        self.known_filled = False

    def build(self, batches: Iterable[Points], describe: Callable[[Points], Tensor]) -> None:
        """Fill with the features that ``describe`` gives, ``(B, C)`` per batch, scaled to length 1."""
        features, ids = [], []
        for batch in batches:
            batch = batch.to(self.ids.device)
            features.append(F.normalize(describe(batch).float(), dim=1))
            ids.append(cloud_ids(batch))
        self.fill(torch.cat(features), torch.cat(ids))

    def retrieve(self, query: Tensor, count: int, leave_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The most similar features by their scalar product with the query, scaled to length 1.

        Args:
            query: ``(B, C)``.
            count: K, of each query.
            leave_out: ``(B,)`` identity that each query must not find, 0 for none.

        Returns:
            ``(B, K, C)`` features and ``(B, K)`` similarities, falling, in float32.

        Raises:
            InputError: if nothing has been stored yet.
        """
        if not self.known_filled:
            self.known_filled = bool(self.features.any())
        if not self.known_filled:
            raise InputError(
                "the adapter's bank of training clouds is empty: a training fills it (pc3d train, pc3d.peft.prepare)"
            )
        features = self.features.float()
        with torch.autocast(query.device.type, enabled=False):
            similarity = F.normalize(query.float(), dim=1) @ features.T
        if leave_out is not None:
            own = (self.ids == leave_out[:, None]) & (leave_out[:, None] != 0)
            similarity = similarity.masked_fill(own, -torch.inf)
        best, rows = similarity.topk(count, dim=1)
        return features[rows], best


def cloud_ids(points: Points) -> Tensor:
    """``(B,)`` int64, a hash of each cloud's ``name``; 0 if it has none."""
    names = [str(entry.get("name", "")) for entry in points.meta]
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() if name else bytes(8) for name in names)
    ids = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.tensor(ids, dtype=torch.int64, device=points.device)
