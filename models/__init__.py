"""Models, one architecture per file (``backbones/``, ``heads/``); importers of published weights in ``convert/``."""

from pc3d.models.backbones.sparse_unet import SparseUNet

__all__ = ["SparseUNet"]
