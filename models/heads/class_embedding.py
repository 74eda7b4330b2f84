"""Classes as vectors of their names: the head of language-guided joint training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.points import Points
from pc3d.tasks.heads import SegmentationHead


class ClassEmbeddingHead(SegmentationHead):
    """``exp(logit_scale) * cos(proj(x), e_k)`` with one fixed vector ``e_k`` per class.

    Wu et al. 2024, "Point Prompt Training" (arXiv 2308.09718, section 4.2); there the vectors are CLIP's of the class
    names, and they come with the checkpoint (:func:`pc3d.models.convert.import_ppt`). Neither they nor the scale are
    trained.

    Args:
        in_channels: width of the features.
        num_classes: K.
        embedding_channels: width of the vectors, 512 for CLIP ViT-B/16.
    """

    class_embedding: Tensor
    logit_scale: Tensor

    def __init__(self, in_channels: int, num_classes: int, embedding_channels: int = 512) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        self.proj = nn.Linear(in_channels, embedding_channels)
        vectors = torch.nn.init.normal_(torch.empty(num_classes, embedding_channels))
        self.register_buffer("class_embedding", F.normalize(vectors))
        self.register_buffer("logit_scale", torch.tensor(math.log(100)))

    def forward(self, features: Tensor, points: Points) -> Tensor:
        direction = F.normalize(self.proj(features))
        return self.logit_scale.exp() * direction @ self.class_embedding.T.to(direction.dtype)
