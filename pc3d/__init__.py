"""pc3d: a PyTorch Lightning framework for 3D point-cloud deep learning, on CPU and GPU."""

from pc3d.errors import InputError
from pc3d.points import Points
from pc3d.voxels import Voxels

__version__ = "0.1.0"
__all__ = ["InputError", "Points", "Voxels", "__version__"]
