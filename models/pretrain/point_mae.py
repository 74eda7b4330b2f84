"""Point-MAE: masked autoencoders for point clouds (Pang et al. 2022, arXiv 2203.06604).

Most patches of a cloud are hidden. The backbone encodes those that are left; a light decoder, told where the hidden
ones are, makes their points from one shared mask token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.losses.patches import PatchDistance, check_patch_distance, patch_distance
from pc3d.nn.patches import Patches, block_mask, select_patches
from pc3d.nn.vit import PatchBackbone, PatchTokens, position_mlp, transformer_blocks
from pc3d.points import Points
from pc3d.tasks.pretraining import PretrainingMethod, PretrainingOutput


class PointMAE(PretrainingMethod[PatchBackbone]):
    """Masked autoencoding of patches; the defaults are the published network.

    Args:
        depth: blocks of the decoder; ``num_heads`` of their attention; ``mlp_ratio`` of their MLP; ``drop_path``, rate
            of the last one.
        mask_ratio: share of the patches that are hidden.
        masking: ``random`` patches, or a ``block`` of those next to each other.
        distance: between made and true points, see :func:`~pc3d.losses.patches.patch_distance`.
        embed_hidden: also embed the patches that are then hidden, as published: they count in the batch norm. False is
            faster.
    """

    backbone_class = PatchBackbone

    def __init__(
        self,
        depth: int = 4,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        mask_ratio: float = 0.6,
        masking: Literal["random", "block"] = "random",
        distance: PatchDistance = "cdl2",
        embed_hidden: bool = True,
    ) -> None:
        super().__init__()
        if masking not in ("random", "block"):
            raise InputError(f"PointMAE.masking: '{masking}' is neither random nor block")
        self.sizes = depth, num_heads, mlp_ratio, drop_path
        self.mask_ratio, self.masking, self.embed_hidden = mask_ratio, masking, embed_hidden
        check_patch_distance("PointMAE.distance", distance)
        self.distance = distance

    def build(self, backbone: PatchBackbone) -> None:
        channels = backbone.channels
        if not 0 < self.hidden_patches(backbone.patch_count) < backbone.patch_count:
            raise InputError(f"PointMAE.mask_ratio: {self.mask_ratio} of {backbone.patch_count} patches is none or all")
        self.mask_token = nn.Parameter(torch.empty(1, 1, channels))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.pos_embed = position_mlp(channels)
        self.blocks = transformer_blocks(channels, *self.sizes)
        self.norm = nn.LayerNorm(channels)
        self.blocks.apply(_initialise)
        self.to_points = nn.Linear(channels, 3 * backbone.patch_points)

    def hidden_patches(self, patches: int) -> int:
        """How many of so many patches are hidden."""
        return int(self.mask_ratio * patches)

    def forward(
        self, backbone: PatchBackbone, points: Points, step: int = 0, hidden: Tensor | None = None
    ) -> PretrainingOutput:
        """See :class:`PretrainingMethod`; ``hidden`` (B, G) bool replaces the drawn mask."""
        patches = backbone.group(points)
        hidden = self.draw_mask(patches.centres) if hidden is None else hidden
        made = self.rebuild(self.encode(backbone, patches, hidden), patches.centres, hidden)
        wanted = select_patches(patches.feat[..., :3], hidden)
        loss = patch_distance(made.flatten(0, 1), wanted.flatten(0, 1), self.distance)
        return PretrainingOutput({"reconstruction": loss}, _panels(patches, hidden, made.detach()))

    def draw_mask(self, centres: Tensor) -> Tensor:
        """``(B, G)`` bool, True where a patch is hidden; equally many in every cloud."""
        batch, patches, _ = centres.shape
        count = self.hidden_patches(patches)
        if self.masking == "block":
            sizes = torch.full((batch,), count, device=centres.device)
            return block_mask(centres, torch.randint(patches, (batch,), device=centres.device), sizes)
        return torch.rand(batch, patches, device=centres.device).argsort(1).argsort(1) < count

    def encode(self, backbone: PatchBackbone, patches: Patches, hidden: Tensor) -> Tensor:
        """``(B, V, C)`` encoded visible patches."""
        if self.embed_hidden:
            visible = backbone.embed(patches).select(~hidden)
        else:
            visible = backbone.embed(patches.select(~hidden))
        return backbone.norm(backbone.encode(visible).feat)

    def rebuild(self, visible: Tensor, centres: Tensor, hidden: Tensor) -> Tensor:
        """``(B, M, S, 3)`` points of the hidden patches, relative to their centres."""
        position = self.pos_embed(centres)
        places = [select_patches(position, ~hidden), select_patches(position, hidden)]
        asked = self.mask_token.expand(len(visible), places[1].shape[1], -1).to(visible.dtype)
        tokens = PatchTokens(torch.cat([visible, asked], 1), torch.cat(places, 1), centres)
        for block in self.blocks:
            tokens = block(tokens)
        feat = self.norm(tokens.feat[:, -asked.shape[1] :])
        return self.to_points(feat).unflatten(-1, (-1, 3))


def _panels(patches: Patches, hidden: Tensor, made: Tensor) -> dict[str, Tensor]:
    """What is visible, that and the hidden patches as they were made, and the truth."""
    centres, truth = patches.centres[:, :, None], patches.feat[..., :3]
    visible = select_patches(truth + centres, ~hidden)
    filled = torch.cat([visible, made.float() + select_patches(centres, hidden)], 1)
    panels = {"visible": visible, "reconstruction": filled, "truth": truth + centres}
    return {title: points.flatten(1, 2) for title, points in panels.items()}


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
