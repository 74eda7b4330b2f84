"""IDPT: Zha et al., "Instance-aware Dynamic Prompt Tuning for Pre-trained Point Cloud Models", ICCV 2023.

arXiv 2304.07221. A small network reads the patch tokens of a cloud before one late block and makes one more token.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.nn.adaptable import BlockAdapter
from pc3d.nn.backbone import Backbone
from pc3d.nn.patch_decoders import PatchDecoder
from pc3d.nn.vit import PatchTokens, TransformerBlock
from pc3d.peft.adaptation import Adaptation
from pc3d.peft.blocks import insert_tokens
from pc3d.peft.patch_transformer import NetworkPart, PatchTransformer, patch_transformer
from pc3d.points import Points

_EDGE_LAYERS = {"dgcnn": 3, "dgcnn_light2": 2, "dgcnn_light": 1, "mlp": 0}
_FEATURES = {"all": 3, "promptcls": 2, "pointcls": 2, "promptonly": 1}

PromptNetworkName = Literal["dgcnn", "dgcnn_light", "dgcnn_light2", "mlp", "transformer"]
FeatureName = Literal["all", "promptcls", "pointcls", "promptonly"]


class IDPT(Adaptation):
    """One prompt per cloud, inserted behind the class token before block ``layer``, which all later blocks see.

    Starts with a new token, so not as the frozen model. The class token, its position and the prompt's train.

    Args:
        layer: block, counted from 0, before which the prompt is made and inserted.
        prompt_network: ``dgcnn`` (published), or one of the smaller ones.
        feature: of a cloud: class token, prompt and largest patch token (``all``), or some of them.
        neighbours: k of the graph in feature space, the token itself included; at most the patches there are.
        train_prompt_position: False is published: the name rule of the original misses it, and it stays random.
    """

    def __init__(
        self,
        layer: int = 11,
        prompt_network: PromptNetworkName = "dgcnn",
        feature: FeatureName = "all",
        neighbours: int = 20,
        train_prompt_position: bool = True,
    ) -> None:
        _check_prompt_network("IDPT", prompt_network, neighbours)
        if feature not in _FEATURES:
            raise InputError(f"IDPT.feature: '{feature}' is none of {', '.join(_FEATURES)}")
        self.layer, self.prompt_network, self.feature = layer, prompt_network, feature
        self.neighbours, self.train_prompt_position = neighbours, train_prompt_position

    def insert(self, backbone: Backbone, name: str) -> None:
        network = patch_transformer(backbone, "IDPT")
        if not 0 <= self.layer < len(network.blocks):
            raise InputError(f"IDPT.layer: {self.layer}; the network has blocks 0..{len(network.blocks) - 1}")
        network.adapters[name] = IDPTPart(name, self, network)


class IDPTPart(NetworkPart):
    def __init__(self, adapter: str, config: IDPT, network: PatchTransformer) -> None:
        channels = network.channels
        super().__init__(adapter, network, _FEATURES[config.feature] * channels)
        self.layer, self.feature = config.layer, config.feature
        self.prompt = prompt_network(network, config.prompt_network, config.neighbours)
        self.prompt_pos = nn.Parameter(torch.empty(1, 1, channels), requires_grad=config.train_prompt_position)
        nn.init.trunc_normal_(self.prompt_pos, std=0.02)

    def forward(self, block: PatchTransformer, run: Any, tokens: Points) -> Tensor:
        x = self.tokens(block, tokens)
        for i, layer in enumerate(block.blocks):
            if i == self.layer:
                x = insert_tokens(x, self.prompt(x), self.prompt_pos)
            x = layer(x)
        feat = block.norm(x.feat)
        own, prompt, patches = feat[:, 0], feat[:, 1], feat[:, x.special :].amax(1)
        parts = {
            "all": [own, prompt, patches],
            "promptcls": [own, prompt],
            "pointcls": [own, patches],
            "promptonly": [prompt],
        }
        return torch.cat(parts[self.feature], -1)


class IDPTSegmentation(Adaptation):
    """IDPT of the part segmentation: a new prompt before each stage that the decoder reads, dropped behind it.

    The decoder sees the prompts, before and behind their blocks, in place of a cloud's largest and mean token. For a
    network with Point-MAE's decoder and no class token.

    Args:
        prompt_network, neighbours: see :class:`IDPT`.
    """

    def __init__(self, prompt_network: PromptNetworkName = "mlp", neighbours: int = 20) -> None:
        _check_prompt_network("IDPTSegmentation", prompt_network, neighbours)
        self.prompt_network, self.neighbours = prompt_network, neighbours

    def insert(self, backbone: Backbone, name: str) -> None:
        if not isinstance(getattr(backbone, "decoder", None), PatchDecoder):
            raise InputError(
                f"peft: IDPTSegmentation wants PointViT with Point-MAE's decoder, not this {type(backbone).__name__}"
            )
        network = cast(DecodingTransformer, backbone)
        network.adapters[name] = IDPTSegmentationPart(name, self, network)


class DecodingTransformer(PatchTransformer, Protocol):
    decoder: PatchDecoder
    stages: tuple[int, ...]


class IDPTSegmentationPart(BlockAdapter):
    def __init__(self, adapter: str, config: IDPTSegmentation, network: DecodingTransformer) -> None:
        super().__init__(adapter)
        self.stages = network.stages
        self.prompts = nn.ModuleList(
            prompt_network(network, config.prompt_network, config.neighbours) for _ in network.stages
        )
        self.prompt_pos = nn.Parameter(torch.empty(1, 1, network.channels))
        nn.init.trunc_normal_(self.prompt_pos, std=0.02)

    def forward(self, block: DecodingTransformer, run: Any, tokens: Points) -> Tensor:
        x = block.tokens(tokens)
        prompts = iter(self.prompts)
        found = []
        for i, layer in enumerate(block.blocks):
            if i not in self.stages:
                x = layer(x)
                continue
            prompt = next(prompts)(x)
            feat = layer(insert_tokens(x, prompt, self.prompt_pos)).feat
            found.append(block.norm(torch.cat([prompt, feat], 1)))
            x = dataclasses.replace(x, feat=feat[:, 1:])
        whole = torch.cat([feat[:, row] for row in (0, 1) for feat in found], -1)
        return block.decoder(tokens, x.centres, [feat[:, 2:] for feat in found], whole)


def prompt_network(network: PatchTransformer, name: PromptNetworkName, neighbours: int) -> nn.Module:
    """A new network that makes a prompt ``(B, 1, C)`` of tokens."""
    if name != "transformer":
        return GraphPrompt(network.channels, _EDGE_LAYERS[name], neighbours)
    block = network.blocks[0]
    assert isinstance(block, TransformerBlock)
    return TransformerPrompt(network.channels, block.attn.num_heads)


def _check_prompt_network(who: str, name: str, neighbours: int) -> None:
    if name not in (*_EDGE_LAYERS, "transformer"):
        raise InputError(f"{who}.prompt_network: '{name}' is none of {', '.join(_EDGE_LAYERS)}, transformer")
    if neighbours < 1:
        raise InputError(f"{who}.neighbours: {neighbours} must be at least 1")


class GraphPrompt(nn.Module):
    """Edge convolutions over neighbours in feature space (DGCNN, arXiv 1801.07829), joined, the maximum over patches.

    Without edge layers, one layer on each token.
    """

    def __init__(self, channels: int, edge_layers: int, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.edges = nn.ModuleList(EdgeLayer(channels) for _ in range(edge_layers))
        self.fuse = nn.Linear(max(edge_layers, 1) * channels, channels, bias=False)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, tokens: PatchTokens) -> Tensor:
        """``(B, 1, C)``."""
        x, found = tokens.patches, []
        for edge in self.edges:
            x = edge(x, nearest_features(x, min(self.neighbours, x.shape[1])))
            found.append(x)
        joined = self.fuse(torch.cat(found or [x], -1))
        joined = self.norm(joined.flatten(0, 1)).view_as(joined)
        return F.leaky_relu(joined, 0.2).amax(1, keepdim=True)


class EdgeLayer(nn.Module):
    """``max_j LeakyReLU(BN(W [x_j - x_i, x_i]))`` over the neighbours j of each token i."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, channels, bias=False)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor, near: Tensor) -> Tensor:
        """``(B, G, C)`` from ``(B, G, C)`` tokens and ``(B, G, k)`` int64 neighbours."""
        # W [x_j - x_i, x_i] = W1 x_j + (W2 - W1) x_i: two products per token instead of one per edge.
        of_other, of_self = self.linear.weight.split(x.shape[-1], 1)
        cloud = torch.arange(len(x), device=x.device)[:, None, None]
        edge = F.linear(x, of_other)[cloud, near] + F.linear(x, of_self - of_other)[:, :, None]
        return F.leaky_relu(self.norm(edge.flatten(0, 2)).view_as(edge), 0.2).amax(2)


def nearest_features(x: Tensor, k: int) -> Tensor:
    """``(B, G, k)`` int64 nearest tokens of each, itself included, in any order; by float32 distances."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.float()
        square = x.square().sum(-1)
        return (2 * x @ x.transpose(1, 2) - square[:, :, None] - square[:, None]).topk(k, -1).indices


class TransformerPrompt(nn.Module):
    """A block over the patches with their positions, the maximum over them."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.block = TransformerBlock(channels, num_heads, 4.0, 0.0)

    def forward(self, tokens: PatchTokens) -> Tensor:
        """``(B, 1, C)``."""
        patches = PatchTokens(tokens.patches, tokens.position[:, tokens.special :], tokens.centres)
        return self.block(patches).feat.amax(1, keepdim=True)
