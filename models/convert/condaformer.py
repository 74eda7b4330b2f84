"""Published ConDaFormer weights for :class:`~pc3d.models.ConDaFormer`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pc3d.models.backbones.condaformer import ConDaFormer
from pc3d.models.convert.kernels import KernelLayout
from pc3d.models.convert.state_dict import load_with_head

_HEAD = [(r"^final\.3\.", "head.linear."), (r"^final\.([01])\.", r"head.hidden.0.\1.")]


def import_condaformer(checkpoint: Mapping[str, Any], network: ConDaFormer, head: nn.Module | None = None) -> None:
    """Load a published state.

    Args:
        checkpoint: the state, or a mapping with the state under ``"state_dict"``; keys may begin with ``module.`` and
            ``backbone.``.
        network: of the checkpoint's widths, depths, window and bin size.
        head: :class:`~pc3d.models.heads.MLPHead` with one hidden layer with bias, as wide as the features; None leaves
            the published one out.

    Raises:
        InputError: if names are missing or left over, or shapes differ; lists them, and nothing has been loaded then.
    """
    state = checkpoint.get("state_dict", checkpoint)
    numbered = [(rf"^{name}{s + 1}\.", f"{name}.{s}.") for name in ("pool", "block", "unpool") for s in range(99)]
    stored = {name: depthwise_kernel(name, value) for name, value in state.items()}
    load_with_head(stored, network, head, KernelLayout.KRSC, numbered, _HEAD)


def depthwise_kernel(name: str, value: Tensor) -> Tensor:
    """``(27, C)`` from the stored ``(C, 3, 3, 3, 1)`` if the name is that of a depth-wise kernel, else as it is."""
    if not re.search(r"attn\.conv_3(_post)?\.0\.weight$", name):
        return value
    return value.flatten(1).T
