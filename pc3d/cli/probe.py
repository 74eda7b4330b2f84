"""``pc3d probe``: how well a linear classifier does on the features of a pre-trained backbone, which is not trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pc3d.cli.parser import Parser, split_overrides
from pc3d.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from pc3d.data.dataset import Split
    from pc3d.data.module import PointDataModule
    from pc3d.tasks import Pretraining

EXAMPLES = """\
  pc3d probe --ckpt pretrained.ckpt --config configs/modelnet40/cls-point-mae.yaml -- --data.root DIR
  pc3d probe --ckpt runs/synthetic_shapes-pretrain-point-mae-tiny/checkpoints/last.ckpt \\
      --config configs/synthetic_shapes/cls-pretrained-tiny.yaml

A linear support vector machine is fitted to the training clouds of the config's data, one feature vector each, and
scored on its test clouds. Clouds are prepared as for evaluation, without augmentation. What follows -- overrides the
config, as in pc3d train. Needs scikit-learn."""


def main(arguments: list[str]) -> int:
    parser = Parser("probe", "Score a pre-training: a linear SVM on features of whole clouds.", EXAMPLES)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint of a pre-training")
    parser.add_argument("--config", required=True, metavar="FILE", help="classification whose data is used")
    parser.add_argument("--C", type=float, default=0.01, metavar="C", help="inverse regularisation (default 0.01)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1")
    own, overrides = split_overrides(arguments)
    options = parser.parse_args(own)
    if not 0 < options.C < math.inf:
        raise InputError(f"--C {options.C} must be positive")
    try:
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise InputError("pc3d probe needs scikit-learn: pip install 'pc3d[baseline]'") from error
    import torch

    from pc3d.cli.experiment import Experiment
    from pc3d.cli.predict import choose_device
    from pc3d.cli.runs import Run
    from pc3d.tasks import Pretraining, load_task

    words = ["--config", options.config, *overrides]
    data = Experiment(words, lambda _: Run(Path(options.ckpt).parent), "pc3d probe").datamodule
    task, _, _ = load_task(options.ckpt)
    if not isinstance(task, Pretraining):
        raise InputError(f"{options.ckpt}: holds a {type(task).__name__}, not a Pretraining")
    if data.in_channels != task.backbone.in_channels:
        raise InputError(
            f"{options.config}: makes {data.in_channels} channels, the backbone takes {task.backbone.in_channels}"
        )
    task.to(choose_device(options.device, torch))
    splits: tuple[Split, Split] = ("train", "test")
    sets = {split: features(task, data, split) for split in splits}
    if len(classes := set(sets["train"][1].tolist())) < 2:
        raise InputError(f"{options.config}: the training clouds are of {len(classes)} class; a classifier needs two")
    machine = LinearSVC(C=options.C, random_state=0).fit(*sets["train"])
    for split, (values, labels) in sets.items():
        print(f"linear SVM, {split}: OA {machine.score(values, labels):.4f} on {len(labels)} clouds")
    return 0


def features(task: Pretraining, data: PointDataModule, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """``(n, F)`` float32 features and ``(n,)`` int64 classes of a split's clouds that have one.

    Raises:
        InputError: if there are none.
    """
    import torch

    from pc3d.tasks.classification import cloud_labels

    count = data.dataset.size(split)
    found, labels = [], []
    for batch in data.evaluated(split, range(count)):
        batch = batch.replace(source=None)
        with torch.no_grad():
            found.append(task(batch.to(task.device)).float().cpu())
        labels.append(cloud_labels(batch))
    if not any(bool((some >= 0).any()) for some in labels):
        raise InputError(f"data: has no {split} clouds with a class")
    known = torch.cat(labels) >= 0
    return torch.cat(found)[known].numpy(), torch.cat(labels)[known].numpy()
