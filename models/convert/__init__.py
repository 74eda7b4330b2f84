"""Published weights of other code bases to and from the models of this package."""

from pc3d.models.convert.kernels import KernelLayout
from pc3d.models.convert.sparse_unet import export_sparse_unet, import_sparse_unet

__all__ = ["KernelLayout", "export_sparse_unet", "import_sparse_unet"]
