"""Adapters that are a few numbers per channel, or none at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from pc3d.errors import InputError
from pc3d.nn.backbone import Backbone
from pc3d.peft.adaptation import Adaptation, places
from pc3d.peft.weights import Difference, Scale, Shift, adapt_weight
from pc3d.sparse import SparseConvolution

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, SparseConvolution)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class LinearProbe(Adaptation):
    """Nothing of the backbone trains: only what follows it."""

    mergeable = True

    def insert(self, backbone: Backbone, name: str) -> None:
        pass


class BitFit(Adaptation):
    """Biases train: Ben Zaken et al., "BitFit", ACL 2022 (arXiv 2106.10199).

    What trains is the difference from the pre-trained bias, so weight decay pulls towards the pre-trained model.

    Args:
        targets: regular expressions on names of layers and norms; None: all of them inside the backbone's blocks.
    """

    mergeable = True

    def __init__(self, targets: Sequence[str] | None = None) -> None:
        self.targets = targets

    def insert(self, backbone: Backbone, name: str) -> None:
        found = places(backbone, (*_LAYERS, *_NORMS), self.targets, "BitFit")
        _train_differences(backbone, name, "BitFit", [layer for _, layer in found], ("bias",))


class NormTuning(Adaptation):
    """Weights and biases of norms train (running statistics do not), as differences from what they were.

    Args:
        targets: regular expressions on names of norms; None: all of them inside the backbone's blocks.
    """

    mergeable = True

    def __init__(self, targets: Sequence[str] | None = None) -> None:
        self.targets = targets

    def insert(self, backbone: Backbone, name: str) -> None:
        found = places(backbone, _NORMS, self.targets, "NormTuning")
        _train_differences(backbone, name, "NormTuning", [norm for _, norm in found], ("weight", "bias"))


class ScaleShift(Adaptation):
    """``gamma * y + beta`` after every layer: Lian et al., "SSF", NeurIPS 2022 (arXiv 2210.08823).

    Starts as the identity. Layers without a bias get one when the adapter is merged.

    Args:
        targets: regular expressions on names of layers and norms; None: all of them inside the backbone's blocks.
    """

    mergeable = True

    def __init__(self, targets: Sequence[str] | None = None) -> None:
        self.targets = targets

    def insert(self, backbone: Backbone, name: str) -> None:
        for _, layer in places(backbone, (*_LAYERS, *_NORMS), self.targets, "ScaleShift"):
            if layer.weight is None:
                continue
            scale = Scale(name, layer)
            adapt_weight(layer, "weight", scale)
            adapt_weight(layer, "bias", Shift(name, scale))


def _train_differences(
    backbone: Backbone, name: str, who: str, layers: Sequence[nn.Module], tensors: Sequence[str]
) -> None:
    """Let these tensors of the layers, where they have them, train as differences from what they are.

    Raises:
        InputError: if none has any.
    """
    found = [(layer, tensor) for layer in layers for tensor in tensors if layer._parameters.get(tensor) is not None]
    if not found:
        raise InputError(
            f"peft: {who} finds no {' or '.join(tensors)} in {len(layers)} layers of {type(backbone).__name__}; "
            "name others with targets"
        )
    for layer, tensor in found:
        adapt_weight(layer, tensor, Difference(name, cast(nn.Parameter, layer._parameters[tensor])))
