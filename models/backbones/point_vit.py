"""The plain transformer over patches of Point-BERT (arXiv 2111.14819) and Point-MAE (arXiv 2203.06604).

Patches around farthest points become tokens; a class token joins them; all see each other in every block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn import FeatureInfo
from pc3d.nn.adaptable import Adaptable
from pc3d.nn.patch_decoders import LevelDecoder, PatchDecoder
from pc3d.nn.patches import MiniPointNet, Patches, check_patch_sizes, group_patches
from pc3d.nn.vit import PatchBackbone, PatchTokens, position_mlp, transformer_blocks
from pc3d.points import Points


class PointViT(Adaptable, PatchBackbone):
    """Encoder of Point-MAE with a class token, or with its part segmentation decoder or Point-BERT's.

    Clouds need at least as many points as there are patches, and as a patch has; they may differ in size.

    Args:
        in_channels: width of ``points.attrs["feat"]``, whose first three columns are the coordinates.
        channels: width of a token, C.
        depth: blocks; ``num_heads`` of their attention; ``mlp_ratio`` of their MLP.
        patches: of a cloud, G; ``patch_points``: points of a patch, S.
        encoder_channels: width that the patch encoder makes before a linear layer to C (Point-BERT: 256); None: C.
        drop_path: rate of the last block; rises linearly from 0.
        stages: blocks, counted from 0, whose output :meth:`forward_features` returns and the decoder reads.
        decoder: widths of two layers on tokens interpolated to the points and of two behind the joined features of
            point and cloud (published: 1536, 1024, 512, 256); None: a cloud's class token beside the largest of its
            patch tokens, ``(B, 2 C)``. With a decoder there is no class token.
        levels: points of two clouds between patches and points, which Point-BERT's decoder goes through (published:
            512, 256); it reads three stages, and there is a class token. Not together with ``decoder``.
        categories: one-hot categories ``points.attrs["category"]`` that the decoder sees.
        ignore_origin: published sampling, which never takes points within 0.0316 of the origin.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        patches: int = 64,
        patch_points: int = 32,
        encoder_channels: int | None = None,
        drop_path: float = 0.1,
        stages: Sequence[int] = (3, 7, 11),
        decoder: Sequence[int] | None = None,
        categories: int = 0,
        ignore_origin: bool = False,
        levels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.make_adaptable(channels)
        if in_channels < 3:
            raise InputError(f"PointViT.in_channels: {in_channels}; the coordinates come first, they alone are 3")
        check_patch_sizes("PointViT", patches, patch_points)
        if not stages or list(stages) != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < depth:
            raise InputError(f"PointViT.stages: {list(stages)} must rise within the {depth} blocks, 0..{depth - 1}")
        if categories and decoder is None and levels is None:
            raise InputError("PointViT.categories: only a decoder makes use of them")
        if levels is not None and (decoder is not None or len(stages) != 3):
            raise InputError("PointViT.levels: belongs to a decoder of its own, which reads three stages")
        self.in_channels, self.stages = in_channels, tuple(stages)
        self.patch_count, self.patch_points, self.ignore_origin = patches, patch_points, ignore_origin
        self.encoder = MiniPointNet(in_channels, encoder_channels or channels)
        self.reduce_dim = nn.Linear(encoder_channels, channels) if encoder_channels else nn.Identity()
        self.pos_embed = position_mlp(channels)
        self.blocks = transformer_blocks(channels, depth, num_heads, mlp_ratio, drop_path)
        self.norm = nn.LayerNorm(channels)
        self.feature_info = [FeatureInfo(f"block{i}", channels, patch_points // 2) for i in stages]
        self.apply(_initialise)
        self.cls_token: nn.Parameter | None = None
        self.cls_pos: nn.Parameter | None = None
        self.decoder: PatchDecoder | LevelDecoder | None = None
        if decoder is None:
            self.cls_token, self.cls_pos = (nn.Parameter(torch.empty(1, 1, channels)) for _ in range(2))
            for token in (self.cls_token, self.cls_pos):
                nn.init.trunc_normal_(token, std=0.02)
        else:
            self.decoder = PatchDecoder(channels, len(stages), decoder, categories)
        if levels is not None:
            self.decoder = LevelDecoder(channels, levels, categories, ignore_origin)
        self.task_layers = () if self.decoder is None else ("decoder",)
        self.out_channels = 2 * channels if self.decoder is None else self.decoder.out_channels

    def run(self, points: Points) -> Tensor:
        tokens = self.tokens(points)
        if self.decoder is None:
            tokens = self.encode(tokens)  # a prompt may have joined the special ones
            feat = self.norm(tokens.feat)
            return torch.cat([feat[:, 0], feat[:, tokens.special :].amax(1)], -1)
        return self.decoder(points, tokens.centres, self._stage_features(tokens))

    def forward_features(self, points: Points) -> Mapping[str, Points]:
        tokens = self.tokens(points)
        offsets = torch.arange(len(points) + 1, device=points.offsets.device) * self.patch_count
        stages = zip(self.feature_info, self._stage_features(tokens), strict=True)
        return OrderedDict(
            (info.name, Points(tokens.centres.flatten(0, 1), offsets, {"feat": feat.flatten(0, 1)}, points.meta))
            for info, feat in stages
        )

    def tokens(self, points: Points) -> PatchTokens:
        """Tokens before the first block."""
        return self.with_class_token(self.embed(self.group(points)))

    def group(self, points: Points) -> Patches:
        self.check_input(points)
        return group_patches(points, self.patch_count, self.patch_points, self.ignore_origin)

    def embed(self, patches: Patches) -> PatchTokens:
        feat, position = self.reduce_dim(self.encoder(patches.feat)), self.pos_embed(patches.centres)
        return PatchTokens(feat, position, patches.centres)

    def with_class_token(self, tokens: PatchTokens) -> PatchTokens:
        if self.cls_token is None or self.cls_pos is None:
            return tokens
        feat, position = (
            torch.cat([own.expand(len(values), -1, -1).to(values.dtype), values], 1)
            for own, values in ((self.cls_token, tokens.feat), (self.cls_pos, tokens.position))
        )
        return PatchTokens(feat, position, tokens.centres, special=1)

    def encode(self, tokens: PatchTokens) -> PatchTokens:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def _stage_features(self, tokens: PatchTokens) -> list[Tensor]:
        """``(B, G, C)`` of each stage, through the norm that all share."""
        found = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in self.stages:
                found.append(self.norm(tokens.patches))
        return found


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
