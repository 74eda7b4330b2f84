"""Point-PQAE: reconstruction of one view of an object from another (arXiv 2509.01250).

Two crops of an object are normalised and turned independently of each other. Queries made of where the patches of one
view lie, and of where its crop lies seen from the other's, look at the encoded patches of the other view; a decoder
makes the points of the patches from what they found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.losses.patches import PatchDistance, check_patch_distance, patch_distance
from pc3d.nn.patches import Patches
from pc3d.nn.vit import PatchBackbone, PatchTokens, transformer_blocks
from pc3d.points import Points
from pc3d.tasks.pretraining import PretrainingMethod, PretrainingOutput


@dataclass(frozen=True)
class ViewDraws:
    """What is drawn for the two views.

    Attributes:
        rates: two shares of the points to keep, one for all clouds.
        centers: ``(2, B)`` int64, the point around which each crop lies, counted in its cloud.
        angles: ``(2, B)`` radians.
    """

    rates: tuple[float, float]
    centers: Tensor
    angles: Tensor


class PointPQAE(PretrainingMethod[PatchBackbone]):
    """Cross reconstruction of two views; the defaults are the published network. Clouds must be of one size.

    Args:
        depth: blocks of the decoder; ``num_heads`` of all attention; ``mlp_ratio`` of their MLP; ``drop_path``, rate of
            the last one.
        min_rate: least share of the points that a view keeps; with 1 views are whole clouds, centred and not scaled.
        rotate: turn each view about the y axis.
        relative_position: tell the queries where the other crop lies.
        distance: between made and true points, see :func:`~pc3d.losses.patches.patch_distance`.
        joint: encode both views as one batch: faster, and batch norm sees both at once.
        linear_init: ``published`` draws the weights of linear layers, those of the backbone too, around 0.02;
            ``zero-mean`` leaves each its usual ones.
    """

    backbone_class = PatchBackbone

    def __init__(
        self,
        depth: int = 4,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        min_rate: float = 0.6,
        rotate: bool = True,
        relative_position: bool = True,
        distance: PatchDistance = "cdl2",
        joint: bool = False,
        linear_init: Literal["published", "zero-mean"] = "published",
    ) -> None:
        super().__init__()
        if not 0 < min_rate <= 1:
            raise InputError(f"PointPQAE.min_rate: {min_rate} must lie above 0 and up to 1")
        if linear_init not in ("published", "zero-mean"):
            raise InputError(f"PointPQAE.linear_init: '{linear_init}' is neither published nor zero-mean")
        self.sizes = depth, num_heads, mlp_ratio, drop_path
        self.min_rate, self.rotate, self.relative_position = min_rate, rotate, relative_position
        self.joint, self.linear_init = joint, linear_init
        check_patch_distance("PointPQAE.distance", distance)
        self.distance = distance

    def build(self, backbone: PatchBackbone) -> None:
        if backbone.channels % 12:
            raise InputError(f"PointPQAE: the backbone's channels {backbone.channels} do not divide by 12")
        if backbone.in_channels != 3:
            raise InputError(f"PointPQAE: views have coordinates only, the backbone takes {backbone.in_channels}")
        self.attention = CrossAttention(backbone.channels, self.sizes[1])
        self.blocks = transformer_blocks(backbone.channels, *self.sizes)
        self.norm = nn.LayerNorm(backbone.channels)
        self.to_points = nn.Linear(backbone.channels, 3 * backbone.patch_points)
        if self.linear_init == "published":
            inside = {id(module) for module in backbone.encoder.modules()}  # convolutions, as published
            _initialise([module for module in backbone.modules() if id(module) not in inside])
            _initialise(list(self.modules()))

    def forward(
        self, backbone: PatchBackbone, points: Points, step: int = 0, draws: ViewDraws | None = None
    ) -> PretrainingOutput:
        """See :class:`PretrainingMethod`; ``draws`` replaces what is drawn."""
        draws = self.draw(points) if draws is None else draws
        views, delta = self.views(points, draws)
        patches = [backbone.group(view) for view in views]
        encoded = self.encode(backbone, patches)
        queries = [self.query(own.centres, sign * delta) for own, sign in zip(patches, (1, -1), strict=True)]
        made = self.rebuild(torch.cat(queries), torch.cat(encoded[::-1])).chunk(2)
        losses = {
            f"view{i}": patch_distance(own.flatten(0, 1), true.feat.flatten(0, 1), self.distance)
            for i, (own, true) in enumerate(zip(made, patches, strict=True), 1)
        }
        filled = made[0].detach().float() + patches[0].centres[:, :, None]
        return PretrainingOutput(
            losses,
            {
                "other view": views[1].coord.unflatten(0, (len(points), -1)),
                "reconstruction": filled.flatten(1, 2),
                "truth": views[0].coord.unflatten(0, (len(points), -1)),
            },
        )

    def draw(self, points: Points) -> ViewDraws:
        """Drawn on the CPU, so that every device sees the same views."""
        batch, count = len(points), points.num_points // max(len(points), 1)
        crops = [(self._rate(), torch.randint(count, (batch,))) for _ in range(2)]
        angles = 2 * math.pi * torch.rand(2, batch) if self.rotate else torch.zeros(2, batch)
        return ViewDraws((crops[0][0], crops[1][0]), torch.stack([center for _, center in crops]), angles)

    def _rate(self) -> float:
        return self.min_rate + (1 - self.min_rate) * float(torch.rand((), dtype=torch.float64))

    def views(self, points: Points, draws: ViewDraws) -> tuple[list[Points], Tensor]:
        """The two views, and ``(B, 3)`` from the middle of the first crop to that of the second.

        Raises:
            InputError: if clouds differ in size.
        """
        if not bool((points.counts == points.counts[0]).all()):
            raise InputError(
                f"{points.describe()}: PointPQAE wants clouds of one size, here are {points.counts.unique().tolist()} "
                "points; add pc3d.data.transforms.FixedPoints"
            )
        coord = points.coord.unflatten(0, (len(points), -1))
        views, middles = [], []
        for rate, center, angle in zip(draws.rates, draws.centers, draws.angles, strict=True):
            view, middle = self._view(coord, int(coord.shape[1] * rate), center.to(coord.device), angle)
            offsets = torch.arange(len(view) + 1, device=coord.device) * view.shape[1]
            flat = view.flatten(0, 1)
            views.append(Points(flat, offsets, {"feat": flat}, points.meta))
            middles.append(middle)
        return views, middles[1] - middles[0]

    def _view(self, coord: Tensor, keep: int, center: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, keep, 3)`` points nearest to the centre, nearest first, in their own frame; middle of their box."""
        first = coord[torch.arange(len(coord), device=coord.device), center]
        rows = (coord - first[:, None]).square().sum(-1).argsort(dim=1, stable=True)[:, :keep]
        kept = coord.gather(1, rows[..., None].expand(-1, -1, 3))
        low, high = kept.aminmax(dim=1, keepdim=True)
        if self.min_rate < 1:
            scaled = 2 * (kept - low) / (high - low + 1e-6) - 1
            view = torch.where(high > low, scaled, 0.0)  # a flat crop lies in the middle of its box
        else:
            view = kept - (low + high) / 2
        cos, sin = (f(angle.double()).to(view)[:, None] for f in (torch.cos, torch.sin))
        x, y, z = view.unbind(-1)  # no matrix product: autocast would make it half precision
        return torch.stack([x * cos - z * sin, y, x * sin + z * cos], -1), ((low + high) / 2)[:, 0]

    def encode(self, backbone: PatchBackbone, patches: list[Patches]) -> list[Tensor]:
        """``(B, G, C)`` encoded patches of each view; the class token takes part, and is left out."""
        if self.joint:
            both = Patches(
                *(torch.cat([getattr(own, name) for own in patches]) for name in ("centres", "rows", "feat"))
            )
            return list(self._encode(backbone, both).chunk(2))
        return [self._encode(backbone, own) for own in patches]

    def _encode(self, backbone: PatchBackbone, patches: Patches) -> Tensor:
        tokens = backbone.encode(backbone.with_class_token(backbone.embed(patches)))
        return backbone.norm(tokens.feat)[:, tokens.special :]

    def query(self, centres: Tensor, delta: Tensor) -> Tensor:
        """``(B, G, C)`` sines and cosines of the patches' places and of the way to the other crop."""
        delta = delta if self.relative_position else torch.zeros_like(delta)
        place = torch.cat([centres, delta[:, None].expand_as(centres)], -1)
        count = self.norm.normalized_shape[0] // 12
        waves = 10000.0 ** (-torch.arange(count, device=place.device, dtype=place.dtype) / count)
        phase = place[..., None] * waves
        return torch.cat([phase.sin(), phase.cos()], -1).flatten(2)

    def rebuild(self, query: Tensor, source: Tensor) -> Tensor:
        """``(B, G, S, 3)`` points of the patches that the queries name, relative to their centres."""
        found = self.attention(query.to(source.dtype), source)
        tokens = PatchTokens(found, torch.zeros_like(found), found[..., :3])
        for block in self.blocks:
            tokens = block(tokens)
        return self.to_points(self.norm(tokens.feat)).unflatten(-1, (-1, 3))


class CrossAttention(nn.Module):
    """Queries look at tokens; nothing around it: no norm, no residual."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(channels, 2 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, query: Tensor, source: Tensor) -> Tensor:
        """``(B, G, C)`` from ``(B, G, C)`` and ``(B, T, C)``."""
        q = self.q(query).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(source).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _initialise(modules: list[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.02, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
