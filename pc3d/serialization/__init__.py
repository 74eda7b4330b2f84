"""Points as sequences: orders along space-filling curves, and how they carry over to pooled levels."""

from pc3d.ops.serialize import CURVES, MAX_DEPTH, Curve, grid_depth
from pc3d.serialization.orders import Order, Pooling, Serialization, serialize, serialize_points

__all__ = [
    "CURVES",
    "MAX_DEPTH",
    "Curve",
    "Order",
    "Pooling",
    "Serialization",
    "grid_depth",
    "serialize",
    "serialize_points",
]
