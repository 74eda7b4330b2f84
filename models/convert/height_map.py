"""Published weights of LidarScout for :class:`~pc3d.models.HeightMapNet`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pc3d.errors import InputError
from pc3d.models.convert.state_dict import load_fitting, published_state, renamed
from pc3d.models.convert.torchscript import is_torchscript, torchscript_state
from pc3d.models.height_map import HeightMapNet
from pc3d.tasks import read_checkpoint

_NAMES = [
    (r"^regressor\.", ""),
    (r"^hm_encoders\.", "encoders."),
    (r"^hm_merger\.", "merge."),
    (r"^hm_rgb_merger\.", "mix."),
    (r"^decoders\.0\.", "decoder."),
    (r"^residual\.", "refine."),
]


def import_height_map(checkpoint: Mapping[str, Any], network: HeightMapNet) -> None:
    """Load published weights of the model without colour.

    Args:
        checkpoint: the state, or a mapping with the state under ``"state_dict"``.
        network: to be filled.

    Raises:
        InputError: if names are missing or left over, or shapes differ; lists them, and nothing has been loaded then.
    """
    stored = {renamed(name, _NAMES): value for name, value in published_state(checkpoint).items()}
    load_fitting(network, stored, "HeightMapNet")


def load_height_map(path: str | Path) -> HeightMapNet:
    """The network with the weights of the published TorchScript file, or of a state dict, in eval mode on the CPU.

    Nothing in the file is run; of a TorchScript file only the tensors are read.

    Raises:
        InputError: if the file is missing, damaged, or does not fit.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    checkpoint = torchscript_state(path) if is_torchscript(path) else read_checkpoint(path)
    network = HeightMapNet()
    try:
        import_height_map(checkpoint, network)
    except InputError as error:
        raise InputError(str(error).replace("checkpoint:", f"{path}:", 1)) from None
    return network.eval()
