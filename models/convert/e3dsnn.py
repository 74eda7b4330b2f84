"""Published E-3DSNN weights (spconv) for :class:`~pc3d.models.E3DSNN`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pc3d.models.backbones.e3dsnn import E3DSNN
from pc3d.models.convert.kernels import KernelLayout
from pc3d.models.convert.state_dict import load_with_head


def import_e3dsnn(checkpoint: Mapping[str, Any], network: E3DSNN, head: nn.Module | None = None) -> None:
    """Load a published state of a classifier or segmenter.

    Args:
        checkpoint: the state, or a mapping with the state under ``"state_dict"``; keys may begin with ``module.`` and
            ``backbone.``.
        network: of the checkpoint's widths and depths, with a fixed threshold.
        head: :class:`~pc3d.tasks.heads.LinearHead`; gets the published last convolution. None leaves it out.

    Raises:
        InputError: if names are missing or left over, or shapes differ; lists them, and nothing has been loaded then.
    """
    state = dict(checkpoint.get("state_dict", checkpoint))
    for name, value in state.items():
        if name.endswith("final.weight") and value.ndim == 5:
            # spconv applies a pointwise kernel as the plain (Cin, Cout) matrix in its memory.
            state[name] = value.reshape(value.shape[-1], value.shape[0]).T
    load_with_head(state, network, head, KernelLayout.KRSC, [], [(r"^final\.", "head.linear.")])
