"""Networks on maps from above, between a backbone and a head that detects objects."""

from pc3d.models.necks.cascade_ded import CascadeDED

__all__ = ["CascadeDED"]
