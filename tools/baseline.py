"""The classical baseline: local eigen-features and gradient boosting, on the data and splits of a training config.

    python tools/baseline.py --config configs/lidarhd/semseg-spunet.yaml --data.root my_tiles

What a deep model has to beat before it is worth its training time. Features of each point: shape of its neighbourhood
at several sizes (Weinmann et al., "Semantic point cloud interpretation based on optimal neighborhoods, relevant
features and efficient classifiers", ISPRS 2015), height over the lowest point around it at several radii, and the
attributes of the file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.pop(0)  # tools/: its profile.py would hide the standard library's
sys.path.append(str(Path(__file__).resolve().parent.parent))  # without an installed pc3d, the one beside

from pc3d import InputError, Points
from pc3d.cli import errors
from pc3d.data.module import PointDataModule
from pc3d.metrics import SegmentationMetrics, SegmentationScores

NEIGHBOURS = (10, 30, 90)
GROUND_RADII = (2.0, 5.0, 10.0)  # metres
ATTRIBUTES = ("intensity", "strength", "return_number", "number_of_returns", "color")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="training config; its 'data' section is used")
    parser.add_argument(
        "--attributes", nargs="*", help=f"attributes to use; default those of {list(ATTRIBUTES)} in all files"
    )
    parser.add_argument("--iterations", type=int, default=200, help="boosting iterations (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    options, overrides = parser.parse_known_args(argv)
    data = load_data(options.config, overrides)
    train = list(raw_clouds(data, "train"))
    test = list(raw_clouds(data, "test"))
    names = options.attributes if options.attributes is not None else common_attributes([*train, *test])
    scores = evaluate(train, test, names, data.num_classes, options.iterations, options.seed)
    print_scores(scores, data.class_names)
    return 0


def load_data(config: str, overrides: Sequence[str]) -> PointDataModule:
    """The data module of a training config, with ``--data.*`` overrides."""
    import yaml
    from jsonargparse import ArgumentParser

    try:
        section = yaml.safe_load(Path(config).read_text())["data"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{config}: no readable config with a 'data' section ({error})") from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PointDataModule, "data")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"data": section}, file)
        file.flush()
        arguments = parser.parse_args(["--config", file.name, *overrides])
    return parser.instantiate(arguments).data


def raw_clouds(data: PointDataModule, split: str) -> list[Points]:
    """The clouds of a split as they are in their files, labels mapped to classes."""
    stored = data.stored_split(split)
    return [data.dataset.load(stored, index) for index in range(data.dataset.size(stored))]


def common_attributes(clouds: Sequence[Points]) -> list[str]:
    return [name for name in ATTRIBUTES if all(name in cloud for cloud in clouds)]


def evaluate(
    train: Sequence[Points], test: Sequence[Points], attributes: Sequence[str], classes: int, iterations: int, seed: int
) -> SegmentationScores:
    """Fit on the labelled points of ``train``, score on those of ``test``."""
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError as error:
        raise InputError("the baseline needs scikit-learn: pip install 'pc3d[baseline]'") from error
    features = [point_features(cloud, attributes) for cloud in track([*train, *test], "features")]
    labels = [cloud.get("segment").numpy() for cloud in train]
    rows, target = np.concatenate(features[: len(train)]), np.concatenate(labels)
    model = HistGradientBoostingClassifier(max_iter=iterations, random_state=seed)
    model.fit(rows[target >= 0], target[target >= 0])
    metrics = SegmentationMetrics(classes)
    for cloud, values in zip(test, features[len(train) :], strict=True):
        metrics.update(torch.from_numpy(model.predict(values)), cloud.get("segment"))
    return metrics.compute()


def point_features(cloud: Points, attributes: Sequence[str]) -> np.ndarray:
    """``(N, F)`` features of the points of one cloud."""
    coord = cloud.coord.double().numpy()
    columns = [eigen_features(coord), heights(coord)]
    columns += [cloud.get(name).float().reshape(len(coord), -1).numpy() for name in attributes]
    return np.concatenate(columns, axis=1)


def eigen_features(coord: np.ndarray) -> np.ndarray:
    """``(N, 11 * scales)``: shape of the nearest points of each point, by the eigenvalues of their covariance."""
    from scipy.spatial import cKDTree

    distances, neighbours = cKDTree(coord).query(coord, k=min(max(NEIGHBOURS), len(coord)))
    columns = []
    for k in NEIGHBOURS:
        around = coord[neighbours[:, :k]]
        centred = around - around.mean(1, keepdims=True)
        values, vectors = np.linalg.eigh(np.einsum("nki,nkj->nij", centred, centred) / k)
        low, mid, high = np.maximum(values, 1e-9).T
        total = low + mid + high
        shares = np.stack([low, mid, high]) / total
        columns += [
            (high - mid) / high,  # linearity
            (mid - low) / high,  # planarity
            low / high,  # sphericity
            (low * mid * high) ** (1 / 3),  # omnivariance
            -(shares * np.log(shares)).sum(0),  # eigenentropy
            low / total,  # change of curvature
            1 - np.abs(vectors[:, 2, 0]),  # verticality
            total,
            np.ptp(around[:, :, 2], axis=1),
            coord[:, 2] - around[:, :, 2].min(1),
            distances[:, :k].max(1),
        ]
    return np.stack(columns, axis=1)


def heights(coord: np.ndarray) -> np.ndarray:
    """``(N, radii)``: metres over the lowest point of the 1 m columns within each of ``GROUND_RADII``."""
    from scipy.ndimage import minimum_filter

    column = np.floor(coord[:, :2] - coord[:, :2].min(0)).astype(np.int64)
    lowest = np.full(column.max(0) + 1, np.inf)
    np.minimum.at(lowest, tuple(column.T), coord[:, 2])
    grounds = [minimum_filter(lowest, size=int(2 * radius) + 1, mode="nearest") for radius in GROUND_RADII]
    return np.stack([coord[:, 2] - ground[tuple(column.T)] for ground in grounds], axis=1)


def print_scores(scores: SegmentationScores, class_names: Sequence[str]) -> None:
    table = Table("class", "IoU", min_width=44)
    table.title = f"mIoU {scores.miou:.3f}   mAcc {scores.macc:.3f}   OA {scores.all_acc:.3f}"
    for name, iou in zip(class_names, scores.iou.tolist(), strict=True):
        table.add_row(name, f"{iou:.3f}")
    Console().print(table)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except Exception as error:
        message = errors.explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from error
