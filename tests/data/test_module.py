"""The data module: batches, order, repeat, resuming, padding, weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from pc3d.data.cache import CloudCache
from pc3d.data.dataset import PointDataset, Split
from pc3d.data.module import CloudSamples, PointDataModule
from pc3d.data.pipeline import Pipeline
from pc3d.data.sampler import CloudSampler, Draw
from pc3d.data.transforms import CenterShift, RandomJitter, RandomRotate
from pc3d.errors import InputError
from pc3d.points import Points


class Blobs(PointDataset):
    """Small random clouds of two classes; cloud i of a split has ``20 + i`` points."""

    def __init__(self, train: int = 7, val: int = 3, poison: int | None = None) -> None:
        self.sizes: dict[Split, int] = {"train": train, "val": val, "test": val}
        self.poison = poison
        self.class_names = ["low", "high"]
        self.loads = 0

    def size(self, split: Split) -> int:
        return self.sizes[split]

    def name(self, split: Split, index: int) -> str:
        return f"{split}{index}"

    def fingerprint(self, split: Split, index: int) -> str:
        return f"Blobs {split} {index} {self.poison}"

    def load(self, split: Split, index: int) -> Points:
        self.loads += 1
        generator = torch.Generator().manual_seed(index + 100 * len(split))
        coord = torch.rand(20 + index, 3, generator=generator) * 4
        color = torch.rand(20 + index, 3, generator=generator) * 255
        if split == "train" and index == self.poison:
            color[3, 1] = float("nan")
        segment = (coord[:, 2] > 2).long()
        return Points(coord, attrs={"color": color, "segment": segment}, meta=[{"name": self.name(split, index)}])


def make(tmp_path: Path, dataset: PointDataset | None = None, **options: object) -> PointDataModule:
    pipeline = Pipeline(0.01, ["color", "coord"], augment=[RandomRotate([-1, 1]), RandomJitter(0.01, 0.05)])
    settings = {"batch_size": 2, "seed": 3, "cache": str(tmp_path / "cache"), **options}
    return PointDataModule(dataset or Blobs(), pipeline, **settings)


class Recorder(pl.LightningModule):
    """A linear model that notes the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.seen: list[tuple[int, tuple[str, ...], float]] = []

    def training_step(self, batch: Points, batch_idx: int) -> torch.Tensor:
        names = tuple(meta["name"] for meta in batch.meta)
        self.seen.append((batch_idx, names, float(batch.coord.double().sum())))
        return nn.functional.cross_entropy(self.layer(batch.attrs["feat"] / 100), batch.attrs["segment"])

    def validation_step(self, batch: Points, batch_idx: int) -> None:
        self.layer(batch.attrs["feat"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def train(
    model: Recorder, data: PointDataModule, epochs: int, resume: Path | None = None, **options: object
) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if "callbacks" not in options:
        quiet["enable_checkpointing"] = False
    trainer = pl.Trainer(max_epochs=epochs, num_sanity_val_steps=0, **quiet, **options)
    trainer.fit(model, data, ckpt_path=None if resume is None else str(resume))
    return trainer


def new_model() -> Recorder:
    torch.manual_seed(0)
    return Recorder()


def assert_same_end(whole: Recorder, resumed: Recorder) -> None:
    assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (0, 2), (2, 1)])
def test_a_run_resumed_at_any_step_ends_with_the_same_weights(tmp_path: Path, workers: int, accumulate: int) -> None:
    options = {"accumulate_grad_batches": accumulate}
    saver = ModelCheckpoint(tmp_path / "every", save_top_k=-1, every_n_train_steps=1)
    whole = new_model()
    train(whole, make(tmp_path, num_workers=workers), 2, callbacks=[saver], **options)
    assert len(whole.seen) == 6  # 7 clouds in batches of 2, the last one dropped
    checkpoints = sorted((tmp_path / "every").iterdir())
    assert len(checkpoints) == 6 // accumulate + (accumulate == 2)
    for checkpoint in checkpoints if workers == 0 else checkpoints[1:4:2]:
        resumed = new_model()
        train(resumed, make(tmp_path, num_workers=workers), 2, resume=checkpoint, **options)
        assert_same_end(whole, resumed)


def test_a_checkpoint_saved_after_a_validation_within_the_epoch_resumes_exactly(tmp_path: Path) -> None:
    options = {"val_check_interval": 2}
    saver = ModelCheckpoint(tmp_path / "val", save_top_k=-1, filename="{step}")
    whole = new_model()
    train(whole, make(tmp_path, Blobs(train=10)), 2, callbacks=[saver], **options)
    checkpoints = sorted((tmp_path / "val").iterdir())
    assert len(checkpoints) == 4
    for checkpoint in checkpoints:
        resumed = new_model()
        train(resumed, make(tmp_path, Blobs(train=10)), 2, resume=checkpoint, **options)
        assert_same_end(whole, resumed)


def test_a_step_that_failed_is_done_again_after_resuming(tmp_path: Path) -> None:
    whole, broken = new_model(), new_model()
    train(whole, make(tmp_path), 2)
    step = broken.training_step

    def fail_once(batch: Points, batch_idx: int) -> torch.Tensor:
        loss = step(batch, batch_idx)
        if len(broken.seen) == 5:
            raise RuntimeError("power cut")
        return loss

    broken.training_step = fail_once
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, make(tmp_path), 2, callbacks=[OnExceptionCheckpoint(tmp_path, "cut")])
    resumed = new_model()
    train(resumed, make(tmp_path), 2, resume=tmp_path / "cut.ckpt")
    assert len(resumed.seen) == 2
    assert_same_end(whole, resumed)


def test_resuming_with_another_batch_size_warns(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    train(new_model(), make(tmp_path), 1, callbacks=[saver])
    with pytest.warns(UserWarning, match=r"other data settings \(batch_size 2 -> 3\)"):
        train(new_model(), make(tmp_path, batch_size=3), 1, resume=tmp_path / "step=1.ckpt")


def test_overfitting_one_batch_works(tmp_path: Path) -> None:
    model = new_model()
    train(model, make(tmp_path), 3, overfit_batches=1)
    assert len({names for _, names, _ in model.seen}) == 1


# Training batches ----------------------------------------------------------------------------------------------------


def batches(data: PointDataModule, epoch: int = 0) -> list[Points]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("mix3d", [0.0, 0.5])
def test_workers_change_nothing_and_epochs_change_everything(tmp_path: Path, mix3d: float) -> None:
    alone = batches(make(tmp_path, mix3d=mix3d, repeat=2), epoch=1)
    helped = batches(make(tmp_path, mix3d=mix3d, repeat=2, num_workers=2), epoch=1)
    later = batches(make(tmp_path, mix3d=mix3d, repeat=2), epoch=2)
    assert len(alone) == len(helped) == len(later) == 7
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.attrs["feat"], b.attrs["feat"])
        assert torch.equal(a.offsets, b.offsets)
        assert a.meta == b.meta
    assert not any(
        a.coord.shape == b.coord.shape and torch.equal(a.coord, b.coord) for a, b in zip(alone, later, strict=True)
    )
    if mix3d:
        assert {len(batch) for batch in alone} == {1, 2}


def test_persistent_workers_follow_the_epoch(tmp_path: Path) -> None:
    loader = make(tmp_path, num_workers=1).train_dataloader()
    loader.sampler.set_epoch(0)
    first = [batch.coord for batch in loader]
    loader.sampler.set_epoch(1)
    second = [batch.coord for batch in loader]
    fresh = [batch.coord for batch in batches(make(tmp_path), epoch=1)]
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(second, fresh, strict=True))


def test_the_same_cloud_is_augmented_anew_in_every_pass(tmp_path: Path) -> None:
    data = make(tmp_path, Blobs(train=1), batch_size=1, repeat=3)
    coords = [batch.coord.sum().item() for batch in batches(data)]
    assert len(set(coords)) == 3


def test_a_set_smaller_than_the_batch_is_not_dropped(tmp_path: Path) -> None:
    assert [len(batch) for batch in batches(make(tmp_path, Blobs(train=2), batch_size=5))] == [2]
    assert [len(batch) for batch in batches(make(tmp_path, Blobs(train=7), batch_size=5))] == [5]


def test_seed_everything_is_the_default_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert make(tmp_path, seed=None).seed == 17
    assert make(tmp_path, seed=4).seed == 4


# Evaluation batches --------------------------------------------------------------------------------------------------


def test_validation_keeps_the_source_and_test_gives_raw_clouds(tmp_path: Path) -> None:
    data = make(tmp_path)
    validation = list(data.val_dataloader())
    assert len(validation) == 3
    assert validation[0].source is not None
    assert "segment" in validation[0].source.attrs
    assert len(validation[0].source_rows()) == 20
    [raw], *_ = list(data.test_dataloader())
    assert torch.equal(raw.coord, Blobs().load("test", 0).coord)
    assert "feat" not in raw.attrs


def test_validation_batches_pack_sources(tmp_path: Path) -> None:
    batch = next(iter(make(tmp_path, val_batch_size=3).val_dataloader()))
    assert len(batch) == len(batch.source) == 3
    assert len(batch.source_rows()) == 20 + 21 + 22


def test_evaluation_over_devices_counts_every_cloud_once(tmp_path: Path) -> None:
    data = make(tmp_path)
    samples = CloudSamples(data.dataset, data.pipeline, "val")
    padded = [samples[draw][1] for rank in (0, 1) for draw in CloudSampler(samples, False, rank=rank, world_size=2)]
    counted = [points.meta[0]["name"] for points in padded if (points.attrs["segment"] >= 0).any()]
    assert len(padded) == 4
    assert sorted(counted) == ["val0", "val1", "val2"]
    assert sum(points.meta[0].get("padding", False) for points in padded) == 1
    assert all((points.source.attrs["segment"] == -1).all() for points in padded if points.meta[0].get("padding"))


def test_training_without_a_validation_split(tmp_path: Path) -> None:
    data = make(tmp_path, Blobs(val=0))
    model = new_model()
    train(model, data, 1)
    assert len(model.seen) == 3
    with pytest.raises(InputError, match="the test split has no clouds"):
        data.test_dataloader()


def test_files_of_different_make_share_a_batch(tmp_path: Path) -> None:
    class Mixed(Blobs):
        def load(self, split: Split, index: int) -> Points:
            cloud = super().load(split, index)
            return cloud.with_attrs(echo=torch.ones(cloud.num_points)) if index % 2 else cloud

    data = make(tmp_path, Mixed(), batch_size=7, val_batch_size=3)
    assert "echo" not in next(iter(data.train_dataloader())).attrs
    assert "echo" not in next(iter(data.val_dataloader())).source.attrs


# Preparation and statistics ------------------------------------------------------------------------------------------


def test_the_cache_is_filled_before_training_and_used_afterwards(tmp_path: Path) -> None:
    dataset = Blobs()
    train(new_model(), make(tmp_path, dataset), 2)
    assert dataset.loads == 10  # 7 + 3, each once
    again = Blobs()
    train(new_model(), make(tmp_path, again), 1)
    assert again.loads == 0


def test_prepare_steps_are_part_of_the_key(tmp_path: Path) -> None:
    plain = Pipeline(0.1, ["coord"])
    moved = Pipeline(0.1, ["coord"], prepare=[CenterShift(apply_z=True)])
    dataset, cache = Blobs(), CloudCache(tmp_path)
    coords = [CloudSamples(dataset, p, "train", 0, cache).cloud(0).coord for p in (plain, moved, plain, moved)]
    assert dataset.loads == 2
    assert torch.equal(coords[1], coords[3])
    assert not torch.equal(coords[0], coords[1])
    assert coords[1][:, 2].min() == 0


def test_without_a_cache_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PC3D_CACHE_DIR", str(tmp_path / "cache"))
    assert len(batches(make(tmp_path, cache=False))) == 3
    assert not (tmp_path / "cache").exists()


def test_class_counts_are_taken_once(tmp_path: Path) -> None:
    data = make(tmp_path)
    segments = [Blobs().load("train", i).get("segment") for i in range(7)]
    expected = [[int((s == 0).sum()), int((s == 1).sum()), 0] for s in segments]
    assert data.cloud_counts().tolist() == expected
    assert data.class_counts().tolist() == [sum(row[k] for row in expected) for k in (0, 1)]
    assert data.class_counts("clouds").tolist() == [7, 7]
    again = Blobs()
    assert make(tmp_path, again).cloud_counts().tolist() == expected
    assert again.loads == 0
    assert make(tmp_path, cache=False).cloud_counts().tolist() == expected


class Uneven(Blobs):
    """Cloud 0 alone holds class 1; clouds 1 and up show one place."""

    def load(self, split: Split, index: int) -> Points:
        cloud = super().load(split, index)
        return cloud.with_attrs(segment=torch.full((cloud.num_points,), int(index == 0)))

    def group(self, split: Split, index: int) -> str:
        return "alone" if index == 0 else "together"


@pytest.mark.parametrize(
    ("balance", "share"), [("classes", 1 / 2), ("scenes", 1 / 2), ("points", 20 / 63), (None, 1 / 3)]
)
def test_balanced_draws(tmp_path: Path, balance: str | None, share: float) -> None:
    data = make(tmp_path, Uneven(train=3), balance=balance, repeat=100)
    sampler = data.train_dataloader().sampler
    drawn = [draw.cloud for draw in sampler]
    assert len(drawn) == 300
    assert drawn.count(0) == pytest.approx(300 * share, abs=20)
    assert drawn.count(1) == pytest.approx(drawn.count(2), abs=25)
    assert data.train_dataloader().state_dict()["balanced"] is (balance is not None)


def test_balance_needs_labels(tmp_path: Path) -> None:
    class Unlabelled(Blobs):
        def load(self, split: Split, index: int) -> Points:
            cloud = super().load(split, index)
            return cloud.with_attrs(segment=torch.full((cloud.num_points,), -1))

    with pytest.raises(InputError, match="no training cloud has labels"):
        make(tmp_path, Unlabelled(), balance="classes").train_dataloader()
    with pytest.raises(InputError, match=r"data\.balance: 'class' is none of"):
        make(tmp_path, balance="class")


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_features_name_the_cloud_in_one_line(tmp_path: Path, workers: int) -> None:
    data = make(tmp_path, Blobs(poison=4), num_workers=workers)
    with pytest.raises(InputError) as caught:
        list(data.train_dataloader())
    assert str(caught.value) == "train4: feature column 1 has non-finite values"


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"repeat": 0}, {"mix3d": 1.5}, {"num_workers": -1}])
def test_options_out_of_range(tmp_path: Path, option: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"data.{next(iter(option))}: {next(iter(option.values()))}"):
        make(tmp_path, **option)


def test_samples_by_number_are_of_the_first_epoch(tmp_path: Path) -> None:
    data = make(tmp_path)
    samples = data.samples("train")
    assert torch.equal(samples[2][1].coord, samples[Draw(2)][1].coord)
