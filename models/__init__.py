"""Models, one architecture per file: ``backbones/``, ``heads/``, ``pretrain/``.

Importers of published weights are in ``convert/``.
"""

from pc3d.models.backbones.condaformer import ConDaFormer
from pc3d.models.backbones.e3dsnn import E3DSNN, E3DSNNDetector
from pc3d.models.backbones.gridformer import GridFormer, GridFormerDecoder
from pc3d.models.backbones.litept import LitePT
from pc3d.models.backbones.pcm import PointCloudMamba
from pc3d.models.backbones.pct import PCT
from pc3d.models.backbones.point_ssm import PointSSM
from pc3d.models.backbones.point_vit import PointViT
from pc3d.models.backbones.pointpillars import PointPillars
from pc3d.models.backbones.pointsp import PointSP
from pc3d.models.backbones.ptv3 import PTv3
from pc3d.models.backbones.scatterformer import ScatterFormer
from pc3d.models.backbones.second import SECOND
from pc3d.models.backbones.sonata import Sonata
from pc3d.models.backbones.sparse_unet import SparseUNet
from pc3d.models.backbones.stored import StoredLogits
from pc3d.models.backbones.utonia import Utonia
from pc3d.models.height_map import HeightMapNet

__all__ = [
    "E3DSNN",
    "PCT",
    "SECOND",
    "ConDaFormer",
    "E3DSNNDetector",
    "GridFormer",
    "GridFormerDecoder",
    "HeightMapNet",
    "LitePT",
    "PTv3",
    "PointCloudMamba",
    "PointPillars",
    "PointSP",
    "PointSSM",
    "PointViT",
    "ScatterFormer",
    "Sonata",
    "SparseUNet",
    "StoredLogits",
    "Utonia",
]
