"""An exponential moving average of the weights, kept beside the trained ones."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import callbacks
from torch import Tensor

from pc3d.errors import InputError

if not hasattr(callbacks, "WeightAveraging"):
    raise InputError("model.ema_decay needs pytorch-lightning >= 2.5.3: pip install -U pytorch-lightning")


class EmaWeights(callbacks.WeightAveraging):
    """Averages weights and buffers after every optimizer step.

    Validation, tests and the ``state_dict`` of checkpoints use the average. The trained weights travel in the
    checkpoint too, so a resumed run continues exactly. The decay of update ``n`` is ``min(decay, (1 + n) / (10 + n))``:
    an early average does not hang on to the initial weights.

    Args:
        decay: share of the old average kept per step.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=True, avg_fn=self._average)
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":  # left over from the training: it would put the trained weights back into a loaded average
            self._average_model = None

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average_model is not None and not self._average_model.n_averaged:
            # Copied before ``on_fit_start``, in which methods of pre-training and adapters get ready.
            self._average_model.module.load_state_dict(pl_module.state_dict())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _average(self, average: Tensor, current: Tensor, updates: Any) -> Tensor:
        if not average.is_floating_point():
            return current
        decay = min(self.decay, (1 + float(updates)) / (10 + float(updates)))
        return average + (current - average) * (1 - decay)
