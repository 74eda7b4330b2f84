"""Few-shot episodes: n classes, k clouds each to learn from, others of the same classes to test on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pc3d.data.dataset import PointDataset, Split, check_split
from pc3d.data.sampler import generator_of
from pc3d.datasets.objects import whole_cloud
from pc3d.datasets.pickles import read_pickle
from pc3d.errors import InputError
from pc3d.points import Points

FOLDS = 10


class Episode(PointDataset):
    """One fold of an n-way k-shot protocol: its classes are numbered 0 .. n - 1; the test clouds are validated on, too.

    Published results are the mean and the deviation over ten folds: ``pc3d fewshot``.
    """

    def __init__(self, way: int, shot: int, fold: int) -> None:
        if way < 2 or shot < 1 or fold < 0:
            raise InputError(f"few-shot: way {way} must be at least 2, shot {shot} at least 1, fold {fold} at least 0")
        self.way, self.shot, self.fold = way, shot, fold
        self.class_names = [f"class {i}" for i in range(way)]


class FewShot(Episode):
    """Episodes drawn from any data set of classified clouds, each a function of (seed, way, shot, fold).

    Args:
        dataset: what they are drawn from: support from its training clouds, queries from its test clouds.
        way: classes.
        shot: training clouds per class.
        fold: number of the episode; 0 to 9 in the usual protocol.
        queries: test clouds per class.
        seed: of the draw.
    """

    def __init__(
        self, dataset: PointDataset, way: int = 5, shot: int = 10, fold: int = 0, queries: int = 20, seed: int = 0
    ) -> None:
        super().__init__(way, shot, fold)
        if queries < 1:
            raise InputError(f"FewShot.queries: {queries} must be at least 1")
        self.dataset, self.queries, self.seed = dataset, queries, seed
        self.root = dataset.root
        self._clouds: dict[Split, list[tuple[int, int]]] | None = None

    def relocate(self, root: str | Path) -> None:
        self.dataset.relocate(root)
        self.root, self._clouds = self.dataset.root, None

    def size(self, split: Split) -> int:
        check_split(split)
        return len(self._episode()[split])

    def name(self, split: Split, index: int) -> str:
        return self.dataset.name(*self._source(split, index))

    def fingerprint(self, split: Split, index: int) -> str:
        _, label = self._episode()[split][index]
        return f"FewShot 1 {label} {self.dataset.fingerprint(*self._source(split, index))}"

    def load(self, split: Split, index: int) -> Points:
        cloud = self.dataset.load(*self._source(split, index))
        return cloud.with_attrs(segment=torch.full((cloud.num_points,), self._episode()[split][index][1]))

    def _source(self, split: Split, index: int) -> tuple[Split, int]:
        """Split and number of a cloud in the data set it comes from."""
        return "train" if split == "train" else "test", self._episode()[split][index][0]

    def _episode(self) -> dict[Split, list[tuple[int, int]]]:
        """Number in the source, and class, of every cloud."""
        if self._clouds is None:
            train, test = self._members("train"), self._members("test")
            usable = [c for c in sorted(train) if len(train[c]) >= self.shot and len(test.get(c, ())) >= self.queries]
            if len(usable) < self.way:
                raise InputError(
                    f"{self.dataset.root}: {len(usable)} classes have {self.shot} training and {self.queries} test "
                    f"clouds; {self.way}-way episodes need {self.way}"
                )
            generator = generator_of(self.seed, "episode", self.way, self.shot, self.fold)
            classes = [usable[i] for i in torch.randperm(len(usable), generator=generator)[: self.way]]
            drawn = {
                name: [
                    (members[c][i], label)
                    for label, c in enumerate(classes)
                    for i in torch.randperm(len(members[c]), generator=generator)[:count].tolist()
                ]
                for name, members, count in (("train", train, self.shot), ("test", test, self.queries))
            }
            self._clouds = {"train": drawn["train"], "val": drawn["test"], "test": drawn["test"]}
        return self._clouds

    def _members(self, split: Split) -> dict[int, list[int]]:
        """Clouds of each class."""
        indices = range(self.dataset.size(split))

        def classes() -> list[int]:
            return [self.dataset.cloud_class(split, index) for index in indices]

        keys = [self.dataset.fingerprint(split, index) for index in indices] if self.cache is not None else []
        found = classes() if self.cache is None else self.cache.value(("classes of clouds", keys), classes)
        members: dict[int, list[int]] = {}
        for index, label in enumerate(found):
            members.setdefault(label, []).append(index)
        return members


class ModelNetFewShot(Episode):
    """The published episodes of ModelNet40: ``<way>way_<shot>shot/<fold>.pkl`` (Sharma and Kaul, NeurIPS 2020).

    A file holds a dict of ``train`` and ``test``, lists of (points, class, ...) with rows ``x y z`` or
    ``x y z nx ny nz``; nothing in it is run. Attributes: ``segment``, and ``normal`` of six columns.

    Args:
        root: folder with ``5way_10shot`` and the like.
        way, shot, fold: see :class:`FewShot`.
    """

    def __init__(self, root: str | None = None, way: int = 5, shot: int = 10, fold: int = 0) -> None:
        super().__init__(way, shot, fold)
        self.root = None if root is None else Path(root)
        self._content: dict[str, list[Any]] | None = None

    def relocate(self, root: str | Path) -> None:
        super().relocate(root)
        self._content = None

    @property
    def path(self) -> Path:
        if self.root is None:
            raise InputError("ModelNetFewShot.root is not set: the folder of 5way_10shot/0.pkl (--data.root DIR)")
        return self.root / f"{self.way}way_{self.shot}shot" / f"{self.fold}.pkl"

    def size(self, split: Split) -> int:
        check_split(split)
        return len(self._entries(split))

    def name(self, split: Split, index: int) -> str:
        return f"{self.fold}_{'train' if split == 'train' else 'test'}_{index:04d}"

    def fingerprint(self, split: Split, index: int) -> str:
        status = self.path.stat()
        return f"ModelNetFewShot 1 {self.path} {status.st_size} {status.st_mtime_ns} {split == 'train'} {index}"

    def load(self, split: Split, index: int) -> Points:
        rows, label = self._entries(split)[index]
        if rows.ndim != 2 or rows.shape[1] not in (3, 6) or rows.dtype.kind != "f":
            raise InputError(
                f"{self.path}: cloud {index} is {rows.shape} {rows.dtype}, expected (N, 3) or (N, 6) floats"
            )
        normal = {"normal": rows[:, 3:].astype(np.float32)} if rows.shape[1] == 6 else {}
        return whole_cloud(rows[:, :3], label, self.path, self.name(split, index), **normal)

    def _entries(self, split: Split) -> list[Any]:
        """Points and class of every cloud."""
        if self._content is None:
            content = read_pickle(self.path)
            try:
                parts = {name: [(np.asarray(e[0]), int(e[1])) for e in content[name]] for name in ("train", "test")}
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise InputError(f"{self.path}: holds no 'train' and 'test' lists of (points, class)") from error
            numbers = {label: i for i, label in enumerate(sorted({label for _, label in parts["train"]}))}
            if len(numbers) != self.way or {label for _, label in parts["test"]} - set(numbers):
                raise InputError(f"{self.path}: has {len(numbers)} classes to learn, not {self.way}, or others to test")
            self._content = {name: [(rows, numbers[label]) for rows, label in part] for name, part in parts.items()}
        return self._content["train" if split == "train" else "test"]
