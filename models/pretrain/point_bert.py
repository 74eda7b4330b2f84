"""Point-BERT: masked point modelling with a discrete tokenizer of patches (Yu et al. 2022, arXiv 2111.14819).

First a variational autoencoder learns to say each patch with one of 8,192 words (:class:`DiscreteVAE`). Then the
backbone learns to say the words of patches it does not see, in whole clouds and in mixtures of two, while a momentum
encoder and a queue of earlier clouds make it tell clouds apart (:class:`PointBERT`).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.losses.patches import patch_distance
from pc3d.nn import Backbone, FeatureInfo
from pc3d.nn.edge_conv import EdgeConv
from pc3d.nn.patches import MiniPointNet, Patches, block_mask, check_patch_sizes, group_patches
from pc3d.nn.vit import PatchBackbone
from pc3d.points import Points
from pc3d.tasks.pretraining import PretrainingMethod, PretrainingOutput

# The tokenizer -------------------------------------------------------------------------------------------------------


class DiscreteVAE(Backbone):
    """Patches to words and back; the defaults are the published network.

    As a backbone it gives the largest patch feature of a cloud.

    Args:
        in_channels: width of ``points.attrs["feat"]``, whose first three columns are the coordinates.
        channels: width of a patch's feature.
        words: in the codebook; ``word_channels``, width of each.
        decoder_channels: width of what the decoder sees of a patch.
        patches: of a cloud, G; ``patch_points``, points of a patch, S, a multiple of 4.
        ignore_origin: published sampling, which never takes points within 0.0316 of the origin.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 256,
        words: int = 8192,
        word_channels: int = 256,
        decoder_channels: int = 256,
        patches: int = 64,
        patch_points: int = 32,
        ignore_origin: bool = False,
    ) -> None:
        super().__init__()
        check_patch_sizes("DiscreteVAE", patches, patch_points)
        if patch_points % 4:
            raise InputError(f"DiscreteVAE.patch_points: {patch_points} is no multiple of 4")
        self.in_channels, self.out_channels = in_channels, channels
        self.patch_count, self.patch_points, self.ignore_origin = patches, patch_points, ignore_origin
        self.feature_info = [FeatureInfo("patches", channels, patch_points // 2)]
        self.encoder = MiniPointNet(in_channels, channels)
        self.dgcnn_1 = CentreGraphNet(channels, words)
        self.codebook = nn.Parameter(torch.randn(words, word_channels))
        self.dgcnn_2 = CentreGraphNet(word_channels, decoder_channels)
        self.decoder = PatchFolding(decoder_channels, patch_points)

    def forward(self, points: Points) -> Tensor:
        return self.encoder(self.group(points).feat).amax(1)

    def forward_features(self, points: Points) -> Mapping[str, Points]:
        patches = self.group(points)
        offsets = torch.arange(len(points) + 1, device=points.offsets.device) * self.patch_count
        feat = self.encoder(patches.feat).flatten(0, 1)
        return OrderedDict(patches=Points(patches.centres.flatten(0, 1), offsets, {"feat": feat}, points.meta))

    def group(self, points: Points) -> Patches:
        self.check_input(points)
        return group_patches(points, self.patch_count, self.patch_points, self.ignore_origin)

    def logits(self, patches: Patches, graph: Tensor) -> Tensor:
        """``(B, G, words)``."""
        return self.dgcnn_1(self.encoder(patches.feat), graph)

    def words(self, patches: Patches) -> Tensor:
        """``(B, G)`` int64, the likeliest word of each patch."""
        return self.logits(patches, centre_graph(patches.centres)).argmax(-1)

    def decode(self, code: Tensor, graph: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, G, S / 4, 3)`` coarse and ``(B, G, S, 3)`` fine points from ``(B, G, word_channels)``."""
        return self.decoder(self.dgcnn_2(code, graph))


def gumbel_weights(logits: Tensor, temperature: float, hard: bool, noise: Tensor | None = None) -> Tensor:
    """Weights of the words: softmax of ``(logits + noise) / temperature`` (Jang et al. 2017, arXiv 1611.01144).

    ``hard`` gives all weight to one word, with the gradient of the soft ones; ``noise`` is drawn unless given.
    """
    noise = -torch.empty_like(logits).exponential_().log() if noise is None else noise
    soft = ((logits + noise) / temperature).softmax(-1)
    if not hard:
        return soft
    one = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft)
    return one - soft.detach() + soft


def centre_graph(centres: Tensor, neighbours: int = 4) -> Tensor:
    """``(B, G, k)`` int64 nearest centres of each centre, itself first."""
    distance = (centres[:, :, None] - centres[:, None]).square().sum(-1)
    return distance.argsort(dim=-1, stable=True)[..., :neighbours]


class CentreGraphNet(nn.Module):
    """Four edge layers on the fixed graph of the centres, their outputs joined."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        widths = (128, 256, 512, 512, 1024)
        self.input_trans = nn.Linear(in_channels, widths[0])
        self.layers = nn.ModuleList(EdgeConv(a, b) for a, b in itertools.pairwise(widths))
        self.last = nn.Linear(sum(widths[1:]), channels, bias=False)
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, feat: Tensor, graph: Tensor) -> Tensor:
        """``(B, G, channels)``."""
        feat, found = self.input_trans(feat), []
        for layer in self.layers:
            feat = layer(feat, graph)
            found.append(feat)
        joined = self.norm(self.last(torch.cat(found, -1)).transpose(1, 2))
        return F.leaky_relu(joined, 0.2).transpose(1, 2)


class PatchFolding(nn.Module):
    """Coarse points of a patch from its feature, and four around each (PCN, Yuan et al. 2018, arXiv 1808.00671)."""

    seeds: Tensor

    def __init__(self, channels: int, points: int, hidden: int = 512) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 3 * points // 4)
        )
        self.final_conv = nn.Sequential(
            nn.Linear(channels + 5, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, 3),
        )
        grid = torch.tensor([[-0.05, -0.05], [0.05, -0.05], [-0.05, 0.05], [0.05, 0.05]])
        self.register_buffer("seeds", grid, persistent=False)

    def forward(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, G, S / 4, 3)`` and ``(B, G, S, 3)`` from ``(B, G, C)``."""
        coarse = self.mlp(feat).unflatten(-1, (-1, 3))
        anchors = coarse.repeat_interleave(4, 2)
        seeds = self.seeds.to(feat.dtype).repeat(coarse.shape[2], 1).expand(*anchors.shape[:3], 2)
        whole = feat[:, :, None].expand(-1, -1, anchors.shape[2], -1)
        moved = self.final_conv(torch.cat([whole, seeds, anchors], -1).flatten(0, 2))
        return coarse, anchors + moved.view_as(anchors)


class DiscreteVAETraining(PretrainingMethod[DiscreteVAE]):
    """First stage: reconstruction through the words, which are to be used equally often.

    Args:
        temperature: of the choice of words, first and last; falls by a cosine over ``temperature_steps``.
        kl_weight: last weight of the term on the use of words; 0 for ``kl_start`` steps, then rises by a cosine over
            ``kl_steps``.
    """

    backbone_class = DiscreteVAE

    def __init__(
        self,
        temperature: Sequence[float] = (1.0, 0.0625),
        temperature_steps: int = 100_000,
        kl_weight: float = 0.1,
        kl_start: int = 10_000,
        kl_steps: int = 100_000,
    ) -> None:
        super().__init__()
        if len(temperature) != 2 or min(temperature) <= 0:
            raise InputError(f"DiscreteVAETraining.temperature: {list(temperature)} must be two positive values")
        if min(temperature_steps, kl_steps) < 1 or kl_start < 0:
            raise InputError(
                f"DiscreteVAETraining: temperature_steps {temperature_steps} and kl_steps {kl_steps} must be at least "
                f"1, kl_start {kl_start} at least 0"
            )
        self.temperatures, self.temperature_steps = tuple(temperature), temperature_steps
        self.kl_weight, self.kl_start, self.kl_steps = kl_weight, kl_start, kl_steps

    def temperature(self, step: int) -> float:
        """Of the choice of words after ``step`` steps."""
        first, last = self.temperatures
        return last + (first - last) * (1 - _rise(step, self.temperature_steps))

    def weight(self, step: int) -> float:
        """Of the term on the use of words after ``step`` steps."""
        return self.kl_weight * _rise(step - self.kl_start, self.kl_steps)

    def forward(self, backbone: DiscreteVAE, points: Points, step: int = 0) -> PretrainingOutput:
        patches = backbone.group(points)
        graph = centre_graph(patches.centres)
        logits = backbone.logits(patches, graph)
        weights = gumbel_weights(logits, self.temperature(step), hard=not self.training)
        coarse, fine = backbone.decode(weights @ backbone.codebook, graph)
        wanted = patches.feat[..., :3]
        made = sum(patch_distance(points.flatten(0, 1), wanted.flatten(0, 1), "cdl1") for points in (coarse, fine))
        assert isinstance(made, Tensor)
        losses = {"reconstruction": made, "words": self.weight(step) * unequal_use(logits)}
        sets = {"coarse": coarse.detach().float(), "reconstruction": fine.detach().float(), "truth": wanted}
        centres = patches.centres[:, :, None]
        return PretrainingOutput(losses, {title: (own + centres).flatten(1, 2) for title, own in sets.items()})


def unequal_use(logits: Tensor) -> Tensor:
    """KL divergence of the mean choice of words in a cloud from an equal one, mean over clouds."""
    use = logits.float().softmax(-1).mean(1)
    return (-math.log(use.shape[-1]) - use.clamp(min=1e-38).log()).mean(-1).mean()


def _rise(step: int, steps: int) -> float:
    """From 0 to 1 by half a cosine."""
    return (1 - math.cos(math.pi * min(max(step / steps, 0.0), 1.0))) / 2


# Masked point modelling ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskingDraws:
    """What is drawn for a batch.

    Attributes:
        hidden: ``(3, B, G)`` bool: patches hidden from the query, in the mixture, and from the key.
        share: ``(B,)`` chance of a patch of the mixture to be the cloud's own.
        own: ``(B, G)`` bool: those that are; the others come from the cloud as far from the end of the batch.
    """

    hidden: Tensor
    share: Tensor
    own: Tensor


class MaskedHeads(nn.Module):
    """Mask token, words of patches, and a feature of the cloud from the class token."""

    def __init__(self, channels: int, words: int, contrast_channels: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, channels))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.lm_head = nn.Linear(channels, words)
        self.cls_head = nn.Sequential(
            nn.Linear(channels, contrast_channels), nn.GELU(), nn.Linear(contrast_channels, contrast_channels)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class PointBERT(PretrainingMethod[PatchBackbone]):
    """Second stage: words of hidden patches, and clouds told apart. Weights of the first: ``--init_from``.

    Args:
        tokenizer: the first stage's backbone; is not trained.
        contrast_channels: width of the feature that tells clouds apart; ``queue``, earlier ones kept;
            ``temperature`` of their softmax; ``momentum`` of the encoder that makes them.
        mask_ratio: least and largest share of the patches hidden, drawn per cloud.
        masking: a ``block`` of patches next to each other, or ``random`` ones, with one share per batch.
        replace_ratio: share of the visible patches whose token is that of another patch; their words are asked for too.
        contrast: also tell whole clouds apart (published code: off), not mixtures only.
        batch_statistics: the tokenizer normalises by the batch in training, as published; False: as it was trained.
    """

    backbone_class = PatchBackbone
    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        tokenizer: DiscreteVAE,
        contrast_channels: int = 512,
        queue: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.999,
        mask_ratio: Sequence[float] = (0.25, 0.45),
        masking: Literal["block", "random"] = "block",
        replace_ratio: float = 0.0,
        contrast: bool = False,
        batch_statistics: bool = True,
    ) -> None:
        super().__init__()
        if len(mask_ratio) != 2 or not 0 < mask_ratio[0] <= mask_ratio[1] < 1:
            raise InputError(f"PointBERT.mask_ratio: {list(mask_ratio)} must be two rising shares between 0 and 1")
        if masking not in ("block", "random"):
            raise InputError(f"PointBERT.masking: '{masking}' is neither block nor random")
        if queue < 1 or temperature <= 0 or not 0 <= momentum <= 1 or not 0 <= replace_ratio <= 1:
            raise InputError(
                f"PointBERT: queue {queue} and temperature {temperature} must be positive, momentum {momentum} and "
                f"replace_ratio {replace_ratio} shares"
            )
        self.tokenizer = tokenizer.requires_grad_(False)
        self.contrast_channels, self.temperature, self.momentum = contrast_channels, temperature, momentum
        self.mask_ratio, self.masking, self.replace_ratio = tuple(mask_ratio), masking, replace_ratio
        self.contrast, self.batch_statistics = contrast, batch_statistics
        self.register_buffer("queue", F.normalize(torch.randn(contrast_channels, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    def build(self, backbone: PatchBackbone) -> None:
        sizes = (backbone.patch_count, backbone.patch_points, backbone.in_channels)
        own = (self.tokenizer.patch_count, self.tokenizer.patch_points, self.tokenizer.in_channels)
        if sizes != own:
            raise InputError(f"PointBERT: patches, points and channels {sizes} of the backbone, {own} of the tokenizer")
        if getattr(backbone, "cls_token", None) is None:
            raise InputError("PointBERT: the backbone has no class token")
        self.heads = MaskedHeads(backbone.channels, len(self.tokenizer.codebook), self.contrast_channels)
        self.key_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.key_heads = copy.deepcopy(self.heads).requires_grad_(False)

    def start(self, backbone: PatchBackbone) -> None:
        self._follow(backbone, 0.0)

    def initial_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A tokenizer's encoder begins the backbone's too."""
        if "backbone.codebook" not in state:
            return dict(state)
        own = {name: value for name, value in state.items() if name.startswith("backbone.encoder.")}
        words = {name.replace("backbone.", "method.tokenizer.", 1): value for name, value in state.items()}
        return own | words

    def train(self, mode: bool = True) -> PointBERT:
        super().train(mode)
        if not self.batch_statistics:
            self.tokenizer.eval()
        return self

    def forward(
        self, backbone: PatchBackbone, points: Points, step: int = 0, draws: MaskingDraws | None = None
    ) -> PretrainingOutput:
        """See :class:`PretrainingMethod`; ``draws`` replaces what is drawn."""
        patches = backbone.group(points)
        draws = self.draw(patches.centres) if draws is None else draws
        with torch.no_grad():
            words = self.tokenizer.words(patches)
        mixed, mixed_words = mix(patches, draws.own), torch.where(draws.own, words, words.flip(0))
        queue = self.queue.clone()  # changes before the backward pass
        query, losses = self._ask(backbone, patches, draws.hidden[0], words)
        mixture, mixed_losses = self._ask(backbone, mixed, draws.hidden[1], mixed_words)
        with torch.no_grad():
            if self.training:
                self._follow(backbone, self.momentum)
            key = self._look(self.key_backbone, self.key_heads, patches, draws.hidden[2])[0]
        terms = {
            "words": losses,
            "mixed_words": mixed_losses,
            "mixture": self._mixture_loss(mixture, key, queue, draws.share),
        }
        if self.contrast:
            others = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1) / self.temperature
            terms["contrast"] = F.cross_entropy(others, torch.zeros_like(words[:, 0]))
        if self.training:
            self._enqueue(key)
        return PretrainingOutput(terms)

    def features(self, backbone: PatchBackbone, points: Points) -> Tensor:
        tokens = backbone.encode(backbone.with_class_token(backbone.embed(backbone.group(points))))
        return self.heads.cls_head(backbone.norm(tokens.feat[:, 0]))

    def draw(self, centres: Tensor) -> MaskingDraws:
        device = centres.device
        hidden = torch.stack([self.draw_mask(centres) for _ in range(3)])
        share = torch.rand(len(centres), device=device)
        return MaskingDraws(hidden, share, torch.rand(centres.shape[:2], device=device) < share[:, None])

    def draw_mask(self, centres: Tensor) -> Tensor:
        """``(B, G)`` bool, True where a patch is hidden."""
        batch, patches, _ = centres.shape
        low, high = self.mask_ratio
        if self.masking == "random":
            ratio = low + (high - low) * torch.rand((), device=centres.device)
            return torch.rand(batch, patches, device=centres.device) < ratio
        sizes = ((low + (high - low) * torch.rand(batch, device=centres.device)) * patches).long()
        return block_mask(centres, torch.randint(patches, (batch,), device=centres.device), sizes)

    def _ask(self, backbone: PatchBackbone, patches: Patches, hidden: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, D)`` unit features of the clouds, and the loss of the words asked for."""
        whole, feat, asked = self._look(backbone, self.heads, patches, hidden)
        if not bool(asked.any()):
            return whole, feat.sum() * 0
        return whole, F.cross_entropy(self.heads.lm_head(feat[asked]).float(), words[asked])

    def _look(
        self, backbone: PatchBackbone, heads: MaskedHeads, patches: Patches, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features ``(B, D)`` of the clouds, encoded patches ``(B, G, C)``, and whose words are asked for."""
        tokens = backbone.embed(patches)
        feat, asked = torch.where(hidden[..., None], heads.mask_token.to(tokens.feat.dtype), tokens.feat), hidden
        if self.replace_ratio:
            swapped = ~hidden & (torch.rand_like(hidden, dtype=torch.float32) < self.replace_ratio)
            other = tokens.feat.flatten(0, 1)[torch.randperm(hidden.numel(), device=hidden.device)]
            feat, asked = torch.where(swapped[..., None], other.view_as(feat), feat), hidden | swapped
        tokens = backbone.with_class_token(replace(tokens, feat=feat))
        encoded = backbone.norm(backbone.encode(tokens).feat)
        return F.normalize(heads.cls_head(encoded[:, 0]), dim=1), encoded[:, tokens.special :], asked

    def _mixture_loss(self, mixture: Tensor, key: Tensor, queue: Tensor, share: Tensor) -> Tensor:
        """Each mixture is as near to its two clouds as it has of them."""
        logits = torch.cat([mixture @ key.T, mixture @ queue], 1).float() / self.temperature
        own = torch.arange(len(key), device=key.device)
        each = [F.cross_entropy(logits, rows, reduction="none") for rows in (own, own.flip(0))]
        return (share * each[0] + (1 - share) * each[1]).mean()

    @torch.no_grad()
    def _follow(self, backbone: PatchBackbone, momentum: float) -> None:
        """The key network's parameters move towards the query's; its batch statistics stay its own, as published."""
        for key, query in ((self.key_backbone, backbone), (self.key_heads, self.heads)):
            for old, new in zip(key.parameters(), query.parameters(), strict=True):
                old.lerp_(new.to(old.dtype), 1 - momentum)

    @torch.no_grad()
    def _enqueue(self, key: Tensor) -> None:
        """Put the keys of all processes in the place of the oldest."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered = [torch.empty_like(key) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(gathered, key.contiguous())
            key = torch.cat(gathered)
        size = self.queue.shape[1]
        key = key[-size:].to(self.queue.dtype)
        self.queue[:, (int(self.queue_ptr) + torch.arange(len(key), device=key.device)) % size] = key.T
        self.queue_ptr[0] = (int(self.queue_ptr) + len(key)) % size


def mix(patches: Patches, own: Tensor) -> Patches:
    """Patches of a cloud where ``own`` (B, G), of the cloud as far from the end of the batch elsewhere."""
    parts = []
    for values in (patches.centres, patches.rows, patches.feat):
        keep = own.view(*own.shape, *[1] * (values.ndim - 2))
        parts.append(torch.where(keep, values, values.flip(0)))
    return Patches(*parts)
