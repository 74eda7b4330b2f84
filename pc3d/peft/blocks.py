"""Adapters that stand around blocks: bottlenecks and prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn.adaptable import Adaptable, BlockAdapter
from pc3d.nn.backbone import Backbone
from pc3d.nn.mlp import MLP
from pc3d.nn.vit import PatchTokens, TransformerBlock
from pc3d.peft.adaptation import Adaptation, base_modules, check_rate, choose, places
from pc3d.voxels import Voxels


class Bottleneck(Adaptation):
    """``scale * (W2 GELU(W1 x))`` added to what an MLP or a block gives; ``W2 = 0`` at the start.

    Args:
        rank: width between the two layers.
        place: ``mlp`` parallel to each MLP (Chen et al., "AdaptFormer", arXiv 2205.13535); ``block`` behind each block
            (Houlsby et al., arXiv 1902.00751), which networks without MLPs have too.
        scale: constant factor.
        dropout: rate between the two layers.
        targets: regular expressions on names of MLPs or blocks; None: all of them.
    """

    def __init__(
        self,
        rank: int = 64,
        place: Literal["mlp", "block"] = "mlp",
        scale: float = 1.0,
        dropout: float = 0.0,
        targets: Sequence[str] | None = None,
    ) -> None:
        if rank < 1:
            raise InputError(f"Bottleneck.rank: {rank} must be at least 1")
        if place not in ("mlp", "block"):
            raise InputError(f"Bottleneck.place: '{place}' must be mlp or block")
        check_rate("Bottleneck.dropout", dropout)
        self.rank, self.place, self.scale, self.dropout, self.targets = rank, place, scale, dropout, targets

    def insert(self, backbone: Backbone, name: str) -> None:
        every: list[tuple[str, Adaptable]] = [(n, m) for n, m in base_modules(backbone) if isinstance(m, Adaptable)]
        chosen = choose(backbone, every, self.targets or ["."], "Bottleneck")
        found = [module for _, module in chosen if isinstance(module, MLP) == (self.place == "mlp")]
        if not found:
            raise InputError(f"peft: {type(backbone).__name__} has no {self.place} for a Bottleneck; try another place")
        for module in found:
            module.adapters[name] = BottleneckPart(name, self, module.channels)


class BottleneckPart(BlockAdapter):
    def __init__(self, adapter: str, config: Bottleneck, channels: int) -> None:
        super().__init__(adapter)
        self.parallel, self.scale = config.place == "mlp", config.scale
        self.down, self.up = nn.Linear(channels, config.rank), nn.Linear(config.rank, channels)
        self.act, self.dropout = nn.GELU(), nn.Dropout(config.dropout)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, block: Any, run: Callable[[Any], Any], tokens: Any) -> Any:
        given = run(tokens)
        feat = _feat(tokens if self.parallel else given)
        return _with_feat(given, _feat(given) + self.scale * self.up(self.dropout(self.act(self.down(feat)))))


class Prompts(Adaptation):
    """Learned tokens in every block, dropped behind it: Jia et al., "Visual Prompt Tuning" (VPT, arXiv 2203.12119).

    They change what the other tokens see from the start: the frozen model is not reproduced at initialisation.

    Args:
        count: tokens per block, each with a position of its own.
        shallow: the first block gets them only, and they stay.
    """

    def __init__(self, count: int = 10, shallow: bool = False) -> None:
        if count < 1:
            raise InputError(f"Prompts.count: {count} must be at least 1")
        self.count, self.shallow = count, shallow

    def insert(self, backbone: Backbone, name: str) -> None:
        if not any(isinstance(m, TransformerBlock) for m in backbone.modules()):
            raise InputError(
                f"peft: prompts need blocks that see all tokens of a cloud, as PointViT has; "
                f"{type(backbone).__name__} has none"
            )
        blocks = [block for _, block in places(backbone, TransformerBlock, ["."], "Prompts")]
        for block in blocks[:1] if self.shallow else blocks:
            block.adapters[name] = PromptPart(name, self, block.channels)


class PromptPart(BlockAdapter):
    def __init__(self, adapter: str, config: Prompts, channels: int) -> None:
        super().__init__(adapter)
        self.stay = config.shallow
        self.prompt, self.position = (nn.Parameter(torch.empty(1, config.count, channels)) for _ in range(2))
        for values in (self.prompt, self.position):
            nn.init.trunc_normal_(values, std=0.02)

    def forward(self, block: Any, run: Callable[[Any], Any], tokens: PatchTokens) -> PatchTokens:
        count, special = self.prompt.shape[1], tokens.special
        given = run(insert_tokens(tokens, self.prompt, self.position))
        if self.stay:
            return given
        kept = torch.cat([given.feat[:, :special], given.feat[:, special + count :]], 1)
        return dataclasses.replace(tokens, feat=kept)


def insert_tokens(tokens: PatchTokens, feat: Tensor, position: Tensor) -> PatchTokens:
    """More special tokens behind those that are there: ``(B or 1, n, C)``."""
    put = [
        torch.cat([values[:, : tokens.special], new.expand(len(values), -1, -1).to(values.dtype),
                   values[:, tokens.special :]], 1)
        for values, new in ((tokens.feat, feat), (tokens.position, position))
    ]  # fmt: skip
    return dataclasses.replace(tokens, feat=put[0], position=put[1], special=tokens.special + feat.shape[1])


def _feat(tokens: Any) -> Tensor:
    return tokens if isinstance(tokens, Tensor) else tokens.feat


def _with_feat(tokens: Any, feat: Tensor) -> Any:
    if isinstance(tokens, Tensor):
        return feat
    return tokens.with_feat(feat) if isinstance(tokens, Voxels) else dataclasses.replace(tokens, feat=feat)


class Combined(Adaptation):
    """Several adaptations under one name.

    Args:
        parts: inserted in this order.
    """

    def __init__(self, parts: list[Adaptation]) -> None:
        if not parts:
            raise InputError("Combined.parts: name at least one adaptation")
        self.parts = parts
        self.mergeable = all(part.mergeable for part in parts)

    def insert(self, backbone: Backbone, name: str) -> None:
        for part in self.parts:
            part.insert(backbone, name)
