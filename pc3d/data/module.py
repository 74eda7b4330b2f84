"""``PointDataModule``: a dataset and a pipeline become train, validation and test loaders."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pc3d.data.cache import CloudCache
from pc3d.data.collate import Collate
from pc3d.data.dataset import IGNORE, SPLITS, PointDataset, Split
from pc3d.data.pipeline import Pipeline
from pc3d.data.sampler import Balance, CloudSampler, Draw, class_balance, generator_of, scene_balance
from pc3d.data.transforms import Transform
from pc3d.errors import InputError
from pc3d.losses.weighting import Unit
from pc3d.points import Points

Sample = tuple[Draw, Points]

_MOST_REDRAWS = 100  # of a sample without boxes, where nearly all are
_SPLITS_OF: dict[TrainerFn | None, tuple[Split, ...]] = {
    TrainerFn.FITTING: ("train", "val"),
    TrainerFn.VALIDATING: ("val",),
    TrainerFn.TESTING: ("test",),
}


class PointDataModule(pl.LightningDataModule):
    """Loaders of a dataset seen through a pipeline.

    Batches: *train* a ``Points`` after ``pipeline.train`` (and Mix3D); *val* a ``Points`` after ``pipeline.evaluate``,
    with its ``source``; *test* a list of one raw cloud, for the task to cut into fragments and vote on.

    Everything random is a function of (seed, epoch, place in the epoch): the number of workers changes nothing, and a
    run resumed from any checkpoint goes on with the very batch that would have come next.

    Args:
        dataset: the clouds.
        pipeline: what happens to them.
        root: folder of the dataset's files; overrides the dataset's own.
        batch_size: clouds per training batch and device.
        val_batch_size: clouds per validation batch and device.
        num_workers: loader processes per device; 0 loads in the training process.
        repeat: passes over the training clouds per epoch, each in a new order.
        redraw_empty: replace training samples that show no box of a class, after augmentation, by other random ones.
        balance: how often each training cloud is drawn, in as many draws per epoch: None all alike; ``classes`` as if
            a class were chosen at random, then one of its points and the cloud it is in; ``points`` by its number of
            points, for crops to come from everywhere alike; ``scenes`` as if a scene were chosen, then a scan of it.
        mix3d: probability that the clouds of a training batch are merged in pairs (Nekrasov et al., Mix3D, 3DV 2021).
        seed: of order and augmentation; None takes ``seed_everything``'s.
        test_split: the clouds that are tested: ``val`` where the labels of the test clouds are not public.
        cache: keep prepared clouds on disk: True (default folder, see :class:`~pc3d.data.cache.CloudCache`), a folder,
            or False.
    """

    def __init__(
        self,
        dataset: PointDataset,
        pipeline: Pipeline,
        root: str | None = None,
        batch_size: int = 4,
        val_batch_size: int = 1,
        num_workers: int = 0,
        repeat: int = 1,
        redraw_empty: bool = False,
        balance: Balance | None = None,
        mix3d: float = 0.0,
        seed: int | None = None,
        test_split: Split = "test",
        cache: bool | str = True,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("repeat", repeat, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise InputError(f"data.{name}: {value} must be at least {least}")
        if balance not in (None, *get_args(Balance)):
            raise InputError(f"data.balance: '{balance}' is none of {', '.join(get_args(Balance))}")
        if test_split not in SPLITS:
            raise InputError(f"data.test_split: '{test_split}' is none of {', '.join(SPLITS)}")
        if not 0 <= mix3d <= 1:
            raise InputError(f"data.mix3d: {mix3d} is not a probability (0..1)")
        self.dataset = dataset
        self.pipeline = pipeline
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.repeat = repeat
        self.redraw_empty = redraw_empty
        self.balance = balance
        self.mix3d = mix3d
        self.test_split = test_split
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        if root is not None:
            dataset.relocate(root)
        self.cache = CloudCache(CloudCache.default_folder() if cache is True else cache) if cache else None
        dataset.cache = self.cache

    @property
    def class_names(self) -> list[str]:
        return self.dataset.class_names

    @property
    def num_classes(self) -> int:
        return self.dataset.num_classes

    @property
    def categories(self) -> dict[str, list[int]] | None:
        """Of a part segmentation, name of each category -> its classes; else None."""
        return self.dataset.categories

    @property
    def in_channels(self) -> int:
        """Width of ``feat``."""
        return self.pipeline.in_channels

    # Preparation -----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fill the cache before the first epoch, so that a bad file ends the run now and not in its middle."""
        stage = self.trainer.state.fn if self.trainer else None
        for split in _SPLITS_OF.get(stage, ()):
            if self.cache is not None and self.size(split):
                self._fill_cache(self.samples(split))

    def _fill_cache(self, samples: CloudSamples) -> None:
        missing = [index for index in range(len(samples)) if not samples.is_cached(index)]
        if not missing:
            return
        workers = min(self.num_workers, len(missing))
        loader = CloudLoader(_Building(samples), sampler=missing, batch_size=None, num_workers=workers)
        for _ in track(loader, f"Preparing {samples.split} clouds", len(missing)):
            pass

    # Loaders ---------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> CloudLoader:
        collate = TrainCollate(Collate(self.mix3d, self.pipeline.grid_size), self.seed)
        return self._loader("train", self.batch_size, collate, shuffle=True, repeat=self.repeat)

    def val_dataloader(self) -> CloudLoader | list[CloudLoader]:
        if not self.size("val"):
            return []  # training without validation
        return self._loader("val", self.val_batch_size, cat_samples)

    def test_dataloader(self) -> CloudLoader:
        return self._loader("test", 1, list_samples)

    def size(self, split: Split) -> int:
        """Clouds of a split; those of ``test_split`` are the test clouds."""
        return self.dataset.size(self.stored_split(split))

    def stored_split(self, split: Split) -> Split:
        """The split of the data set that the clouds of ours are."""
        return self.test_split if split == "test" else split

    def samples(self, split: Split) -> CloudSamples:
        """The clouds of a split, each as its loader would give it.

        Raises:
            InputError: if the split has no clouds.
        """
        stored, redraw = self.stored_split(split), self.redraw_empty and split == "train"
        samples = CloudSamples(self.dataset, self.pipeline, split, self.seed, self.cache, stored, redraw)
        if not len(samples):
            kind = type(self.dataset).__name__
            raise InputError(f"{kind}: the {samples.stored} split has no clouds (root: {self.dataset.root})")
        return samples

    def evaluated(
        self, stored: Split, clouds: Iterable[int], augmentation: Sequence[Transform] = ()
    ) -> Iterator[Points]:
        """Clouds of a stored split by their numbers, as validation would see them, ``val_batch_size`` at a time.

        Args:
            augmentation: steps after the pipeline's ``prepare``; what they draw belongs to the cloud.
        """
        samples = CloudSamples(self.dataset, self.pipeline, "val", self.seed, self.cache, stored)
        samples.augmentation = augmentation
        numbers = list(clouds)
        workers = min(self.num_workers, len(numbers))
        loader = CloudLoader(
            samples, sampler=numbers, batch_size=self.val_batch_size, collate_fn=cat_samples, num_workers=workers
        )
        return iter(loader)

    def some_training_clouds(self, count: int) -> Iterator[Points]:
        """So many training clouds, evenly from all of them, as validation would see them.

        Raises:
            InputError: if there are fewer.
        """
        total = self.dataset.size("train")
        if not 0 < count <= total:
            raise InputError(f"{type(self.dataset).__name__}: {count} training clouds are asked for, there are {total}")
        return self.evaluated("train", (i * total // count for i in range(count)))

    def _loader(
        self,
        split: Split,
        batch_size: int,
        collate: Callable[[list[Sample]], Any],
        shuffle: bool = False,
        repeat: int = 1,
    ) -> CloudLoader:
        samples = self.samples(split)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        weights = self._train_weights() if shuffle else None
        sampler = CloudSampler(samples, shuffle, self.seed, repeat, rank, world_size, weights)
        return CloudLoader(
            samples,
            sampler=sampler,
            batch_size=batch_size,
            drop_last=shuffle and len(sampler) > batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            batches_done=self._train_batches_done if shuffle else None,
        )

    def _train_batches_done(self) -> int:
        """Batches of the current epoch that training has behind it: more than 0 only after resuming within an epoch."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0

    # Class statistics ------------------------------------------------------------------------------------------------

    def cloud_counts(self) -> Tensor:
        """``(C, K + 1)`` int64 points of every training cloud: of each class, and of none (kept in the cache)."""
        samples = self.samples("train")

        def count() -> list[list[int]]:
            segments = (samples.cloud(index).get("segment") for index in range(len(samples)))
            classes = (torch.where(segment == IGNORE, self.num_classes, segment) for segment in segments)
            return [each.bincount(minlength=self.num_classes + 1).tolist() for each in classes]

        if self.cache is None:
            return torch.tensor(count())
        keys = [samples.key(index) for index in range(len(samples))]
        return torch.tensor(self.cache.value(("class counts of clouds", self.class_names, keys), count))

    def class_counts(self, unit: Unit = "points") -> Tensor:
        """``(K,)`` int64 labelled points per class over the training clouds, or clouds that have some."""
        counts = self.cloud_counts()[:, :-1]
        return (counts if unit == "points" else counts > 0).sum(0)

    def _train_weights(self) -> Tensor | None:
        """``(C,)`` shares of the training clouds in the draws, None for all alike."""
        if self.balance is None:
            return None
        if self.balance == "scenes":
            return scene_balance([self.dataset.group("train", i) for i in range(self.dataset.size("train"))])
        counts = self.cloud_counts()
        return class_balance(counts[:, :-1]) if self.balance == "classes" else counts.sum(1).double()


class CloudSamples(Dataset[Sample]):
    """The clouds of a split behind a pipeline, addressed by :class:`Draw` (or by number: epoch 0).

    Args:
        split: what is made of the clouds: training samples, validation samples, or raw clouds to test.
        stored: the split of the data set that they are; the same by default.
        redraw_empty: of training samples, replace those without a box of a class by others.
    """

    def __init__(
        self,
        dataset: PointDataset,
        pipeline: Pipeline,
        split: Split,
        seed: int = 0,
        cache: CloudCache | None = None,
        stored: Split | None = None,
        redraw_empty: bool = False,
    ) -> None:
        self.dataset = dataset
        self.redraw_empty = redraw_empty
        self.split = split
        self.stored = split if stored is None else stored
        self.seed = seed
        self.cache = cache
        self.augmentation: Sequence[Transform] = ()  # of validation samples
        # What is deterministic is done once and kept; test clouds stay raw.
        self.prepare = [] if split == "test" else list(pipeline.prepare)
        self.pipeline = dataclasses.replace(pipeline, prepare=[])

    def __len__(self) -> int:
        return self.dataset.size(self.stored)

    def __getitem__(self, draw: Draw | int) -> Sample:
        if isinstance(draw, int):
            draw = Draw(draw)
        cloud = self._view(self.cloud(draw.cloud), draw)
        return draw, _without_labels(cloud) if draw.padding else cloud

    def _view(self, cloud: Points, draw: Draw) -> Points:
        if self.split == "test":
            return cloud
        if self.split == "val":
            generator = generator_of(self.seed, "select", draw.cloud)
            return _checked(self.pipeline.evaluate(cloud, self.augmentation, generator))
        generator = generator_of(self.seed, "augment", draw.epoch, draw.position)
        sample = self.pipeline.train(cloud, generator)
        for _ in range(_MOST_REDRAWS if self.redraw_empty else 0):
            if set(sample.meta[0].get("box_names", ())) & set(self.dataset.class_names):
                break
            other = int(torch.randint(len(self), (1,), generator=generator))
            sample = self.pipeline.train(self.cloud(other), generator)
        return _checked(sample)

    def cloud(self, index: int) -> Points:
        """The prepared cloud, from the cache if there is one."""
        if self.cache is None:
            return self._prepared(index)
        return self.cache.cloud(self.key(index), lambda: self._prepared(index))

    def _prepared(self, index: int) -> Points:
        cloud = self.dataset.load(self.stored, index)
        for transform in self.prepare:
            cloud = transform(cloud)
        return cloud

    def is_cached(self, index: int) -> bool:
        return self.cache is not None and self.cache.has(*self.key(index))

    def key(self, index: int) -> tuple[Any, ...]:
        """What the prepared cloud depends on."""
        prepare = [transform.to_config() for transform in self.prepare]
        return "cloud", self.dataset.fingerprint(self.stored, index), prepare


class _Building(Dataset[int]):
    """Puts clouds into the cache; hands out nothing but their numbers."""

    def __init__(self, samples: CloudSamples) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> int:
        self.samples.cloud(index)
        return index


def _checked(points: Points) -> Points:
    bad = ~points.get("feat").isfinite().all(0)
    if bad.any():
        columns = ", ".join(map(str, bad.nonzero().flatten().tolist()))
        raise InputError(f"{points.describe()}: feature column {columns} has non-finite values")
    return points


def _without_labels(points: Points) -> Points:
    """A copy that counts for nothing in a metric; ``meta["padding"]`` tells writers of results to leave it out."""
    source = None if points.source is None else _without_labels(points.source)
    attrs = {
        name: torch.full_like(value, IGNORE) if name == "segment" else value for name, value in points.attrs.items()
    }
    return points.replace(attrs=attrs, source=source, meta=[{**entry, "padding": True} for entry in points.meta])


# Batches -------------------------------------------------------------------------------------------------------------


def list_samples(samples: list[Sample]) -> list[Points]:
    """The clouds of a test batch, unpacked."""
    return [points for _, points in samples]


def cat_samples(samples: list[Sample]) -> Points:
    """The clouds of a validation batch, packed with their sources."""
    return Points.cat(common_attrs(list_samples(samples)))


def common_attrs(clouds: list[Points]) -> list[Points]:
    """The clouds with only the attributes that all of them have: files of different make can share a batch."""
    names = set.intersection(*(set(cloud.attrs) for cloud in clouds))
    sources = [cloud.source for cloud in clouds if cloud.source is not None]
    kept: list[Points | None] = [*common_attrs(sources)] if len(sources) == len(clouds) else [None] * len(clouds)
    return [
        cloud.replace(attrs={name: cloud.attrs[name] for name in cloud.attrs if name in names}, source=source)
        for cloud, source in zip(clouds, kept, strict=True)
    ]


@dataclasses.dataclass
class TrainCollate:
    """Packs a training batch, with Mix3D. Its draws belong to the batch, whichever process collates it."""

    collate: Collate
    seed: int

    def __call__(self, samples: list[Sample]) -> Points:
        first = samples[0][0]
        generator = generator_of(self.seed, "collate", first.epoch, first.position)
        return self.collate(common_attrs(list_samples(samples)), generator)


class CloudLoader(DataLoader[Any]):
    """A loader that can start in the middle of an epoch.

    Args:
        batches_done: number of batches of the epoch to leave out, asked when the first batch is wanted; None = 0.
            Lightning restores its counters, then asks for a batch: so the loader needs no state of its own, and
            whatever kind of checkpoint the run comes from, it continues after the last completed step.
        kwargs: of ``DataLoader``.
    """

    def __init__(self, *args: Any, batches_done: Callable[[], int] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches_done = batches_done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if isinstance(self.sampler, CloudSampler):
            done = self.batches_done() if self.batches_done else 0
            self.sampler.skip = done * (self.batch_size or 1)
        try:
            yield from super().__iter__()
        except InputError as error:
            raise InputError(_last_line(error)) from None

    def state_dict(self) -> dict[str, Any]:
        """What the order of batches depends on; kept in checkpoints to compare at a resume."""
        length = len(self.sampler) if isinstance(self.sampler, Sized) else None
        seed, weights = getattr(self.sampler, "seed", None), getattr(self.sampler, "weights", None)
        return {"batch_size": self.batch_size, "samples": length, "seed": seed, "balanced": weights is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = self.state_dict()
        changed = [f"{name} {value} -> {now.get(name)}" for name, value in state.items() if now.get(name) != value]
        if changed:
            warnings.warn(
                f"resuming with other data settings ({', '.join(changed)}): batches will differ", stacklevel=2
            )


def _last_line(error: InputError) -> str:
    """The message itself: a worker process wraps it in its traceback."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__qualname__}: ")
