"""PointGST: Liang et al., "Parameter-Efficient Fine-Tuning in Spectral Domain for Point Cloud Learning", TPAMI 2025.

arXiv 2410.08114. A bottleneck beside each MLP whose patch tokens are mixed in the eigenbasis of a graph over patches:
all of them, and groups along a Morton curve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.nn.backbone import Backbone
from pc3d.nn.vit import PatchTokens, TransformerBlock
from pc3d.peft.adaptation import Adaptation
from pc3d.peft.patch_transformer import NetworkPart, PatchTransformer, patch_transformer
from pc3d.points import Points

_SMALLEST = 1e-6  # distances of coincident centres are raised to it, in units of the largest one
_CELLS = 100  # Morton cells per unit of length
_BITS = 16

Transform = Literal["U", "UT"]


class PointGST(Adaptation):
    """A spectral adapter beside every MLP, exactly the frozen model at the start; class token and position train too.

    Eigenvectors have no sign of their own, and the adapter is not odd: ``signs`` fixes them, else they are as the
    solver gives them, which may differ between CPU and GPU.

    Args:
        rank: width of the adapters.
        local: patches per group along the Morton curve; a divisor of the number of patches.
        transform: what comes first, ``U`` (published) or the Fourier transform ``UT``; its transpose comes last.
        published_distances: distances as the original computes them: those of more than 25 patches carry rounding
            noise on the diagonal, and the smallest distance of the whole batch scales every graph, so that a result
            depends on the batch. False: exact, per cloud.
        signs: make the entry of largest magnitude of each eigenvector positive.
    """

    def __init__(
        self,
        rank: int = 36,
        local: int = 32,
        transform: Transform = "U",
        published_distances: bool = False,
        signs: bool = False,
    ) -> None:
        for option, value in (("rank", rank), ("local", local)):
            if value < 1:
                raise InputError(f"PointGST.{option}: {value} must be at least 1")
        if transform not in ("U", "UT"):
            raise InputError(f"PointGST.transform: '{transform}' must be U or UT")
        self.rank, self.local, self.transform = rank, local, transform
        self.published_distances, self.signs = published_distances, signs

    def insert(self, backbone: Backbone, name: str) -> None:
        network = patch_transformer(backbone, "PointGST")
        if network.patch_count % self.local:
            raise InputError(
                f"PointGST.local: {self.local} does not divide the {network.patch_count} patches of the network"
            )
        network.adapters[name] = PointGSTPart(name, self, network)


class PointGSTPart(NetworkPart):
    passes_by = (TransformerBlock,)

    def __init__(self, adapter: str, config: PointGST, network: PatchTransformer) -> None:
        super().__init__(adapter, network, network.out_channels)
        self.config = config
        self.blocks = nn.ModuleList(
            SpectralAdapter(network.channels, config.rank, config.transform) for _ in network.blocks
        )

    def forward(self, block: PatchTransformer, run: Any, tokens: Points) -> Tensor:
        x = self.tokens(block, tokens)
        feat = block.norm(self.encode(block, x, self.bases(x.centres)))
        return torch.cat([feat[:, 0], feat[:, x.special :].amax(1)], -1)

    def bases(self, centres: Tensor) -> Bases:
        """Of ``(B, G, 3)`` centres; once per batch, for all blocks."""
        config = self.config
        order = morton_order(centres)
        groups = centres.gather(1, order[..., None].expand(-1, -1, 3)).view(-1, config.local, 3)
        own, local = (eigenbasis(laplacian(c, config.published_distances), config.signs)[1] for c in (centres, groups))
        return Bases(own, local.view(len(centres), -1, config.local, config.local), order, order.argsort(1))

    def encode(self, network: PatchTransformer, tokens: PatchTokens, bases: Bases) -> Tensor:
        """``(B, T, C)`` behind the last block, before the last norm."""
        x = tokens.feat
        for layer, adapter in zip(network.blocks, self.blocks, strict=True):
            assert isinstance(layer, TransformerBlock)
            x = x + tokens.position
            x = x + layer.drop_path(layer.attn(layer.norm1(x)))
            x = x + layer.drop_path(layer.mlp(layer.norm2(x))) + adapter(x, bases)
        return x


@dataclass(frozen=True)
class Bases:
    """Eigenbases of the graphs over patches.

    Attributes:
        whole: ``(B, G, G)``, columns are eigenvectors.
        local: ``(B, G / l, l, l)`` of the groups along the curve.
        order, inverse: ``(B, G)`` int64 patches along the curve, and the place of each on it.
    """

    whole: Tensor
    local: Tensor
    order: Tensor
    inverse: Tensor


class SpectralAdapter(nn.Module):
    """Down, mixing in the eigenbases by one layer shared by both, up; zero at the start."""

    def __init__(self, channels: int, rank: int, transform: Transform) -> None:
        super().__init__()
        self.transform = transform
        self.down, self.up, self.mix = nn.Linear(channels, rank), nn.Linear(rank, channels), nn.Linear(rank, rank)
        self.norm_whole, self.norm_local = nn.LayerNorm(rank), nn.LayerNorm(rank)
        nn.init.xavier_uniform_(self.down.weight)
        for layer in (self.up, self.mix):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, bases: Bases) -> Tensor:
        """``(B, T, C)``; the last G tokens are the patches'."""
        low, count = self.down(x), bases.order.shape[1]
        patches = low[:, -count:]
        whole = self._mixed(patches, bases.whole, self.norm_whole)
        order, inverse = (rows[..., None].expand_as(patches) for rows in (bases.order, bases.inverse))
        groups = patches.gather(1, order).view(*bases.local.shape[:3], -1)
        local = self._mixed(groups, bases.local, self.norm_local).view_as(patches).gather(1, inverse)
        low = F.silu(low)
        return self.up(torch.cat([low[:, :-count], low[:, -count:] + whole + local], 1))

    def _mixed(self, x: Tensor, basis: Tensor, norm: nn.LayerNorm) -> Tensor:
        basis = basis.to(x.dtype)
        first, last = (basis, basis.mT) if self.transform == "U" else (basis.mT, basis)
        coefficients = first @ x
        return last @ (coefficients + F.silu(self.mix(norm(coefficients))))


def laplacian(centres: Tensor, published_distances: bool = False) -> Tensor:
    """``(B, n, n)`` float32 normalised Laplacian of the full graph with weights ``min(D) / D`` and self loops of 1.

    Args:
        centres: ``(B, n, 3)``.
        published_distances: see :class:`PointGST`; coincident centres are then an error, as in the original.

    Raises:
        InputError: with ``published_distances``, if the centres of a cloud coincide.
    """
    eye = torch.eye(centres.shape[1], device=centres.device)
    if published_distances:
        distance = torch.cdist(centres.float(), centres.float())
        off_diagonal = distance[eye.expand_as(distance) == 0]
        if bool((off_diagonal == 0).any()):
            raise InputError("PointGST: centres of a cloud coincide; published_distances has no graph for them")
        ratio = distance / distance[distance > 0].min() if len(off_diagonal) else distance
    else:
        distance = (centres.double()[:, :, None] - centres.double()[:, None]).norm(dim=-1)
        largest = distance.amax((1, 2), keepdim=True)
        distance = distance.clamp(min=_SMALLEST * largest.clamp(min=torch.finfo(torch.float32).tiny))
        smallest = distance.masked_fill(eye.bool(), torch.inf).amin((1, 2), keepdim=True)
        ratio = (distance / smallest * (1 - eye)).float()
    weight = 1 / (ratio + eye)
    scale = (weight.sum(-1) + 1e-6).rsqrt()
    return eye - scale[:, :, None] * weight * scale[:, None]


def eigenbasis(matrix: Tensor, signs: bool = False) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues ``(B, n)`` and eigenvectors ``(B, n, n)``, as columns, of symmetric matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    if signs:
        largest = vectors.abs().argmax(1, keepdim=True)
        vectors = vectors * vectors.gather(1, largest).sign()
    return values, vectors


def morton_keys(coord: Tensor) -> Tensor:
    """``(..., n)`` int64 keys: bits of y, x and z, y first, of ``trunc(100 * coord)`` as 16-bit two's complement."""
    cells = (coord * _CELLS).trunc().long() & (2**_BITS - 1)
    shifts = 3 * torch.arange(_BITS, device=coord.device)
    bits = (cells[..., None] >> torch.arange(_BITS, device=coord.device)) & 1
    x, y, z = (bits[..., axis, :] for axis in range(3))
    return ((y << (shifts + 2)) | (x << (shifts + 1)) | (z << shifts)).sum(-1)


def morton_order(centres: Tensor) -> Tensor:
    """``(B, G)`` int64 centres along the curve; equal keys in the order they came."""
    return morton_keys(centres).argsort(dim=1, stable=True)
