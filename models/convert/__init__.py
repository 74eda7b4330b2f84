"""Published weights of other code bases to and from the models of this package."""

from pc3d.models.convert.condaformer import import_condaformer
from pc3d.models.convert.e3dsnn import import_e3dsnn
from pc3d.models.convert.gridformer import import_gridformer
from pc3d.models.convert.height_map import import_height_map, load_height_map
from pc3d.models.convert.kernels import KernelLayout
from pc3d.models.convert.openpcdet import import_openpcdet
from pc3d.models.convert.pcm import import_point_cloud_mamba
from pc3d.models.convert.pct import import_pct
from pc3d.models.convert.point_ssm import import_point_ssm
from pc3d.models.convert.point_vit import import_point_vit
from pc3d.models.convert.pointcept import export_pointcept, import_pointcept
from pc3d.models.convert.ppt import import_ppt
from pc3d.models.convert.pretraining import import_pretraining
from pc3d.models.convert.scatterformer import import_scatterformer
from pc3d.models.convert.sparse_unet import export_sparse_unet, import_sparse_unet
from pc3d.models.convert.state_dict import convert_state_dict

__all__ = [
    "KernelLayout",
    "convert_state_dict",
    "export_pointcept",
    "export_sparse_unet",
    "import_condaformer",
    "import_e3dsnn",
    "import_gridformer",
    "import_height_map",
    "import_openpcdet",
    "import_pct",
    "import_point_cloud_mamba",
    "import_point_ssm",
    "import_point_vit",
    "import_pointcept",
    "import_ppt",
    "import_pretraining",
    "import_scatterformer",
    "import_sparse_unet",
    "load_height_map",
]
