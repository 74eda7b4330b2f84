"""The task under the real trainer: what it learns, counts and logs, and how an interrupted run ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny import ALLOW, CLASSES, TinyBackbone, TinyData, cloud, pipeline, real_data, tiny_task, trainer
from torch import Tensor

from pc3d import InputError, Points
from pc3d.losses import CrossEntropy, Lovasz
from pc3d.models import SparseUNet
from pc3d.tasks import (
    OptimizerConfig,
    ParameterGroup,
    ScheduleConfig,
    SegmentationHead,
    SemanticSegmentation,
    load_task,
    predict_cloud,
    read_checkpoint,
)

FAST = OptimizerConfig(lr=0.03)


class Recorder(pl.Callback):
    """Keeps what was logged at every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_it_learns_and_logs(tmp_path: Path) -> None:
    task = tiny_task(optimizer=FAST, criteria=[CrossEntropy(), Lovasz(loss_weight=0.5)])
    recorder = Recorder()
    run = trainer(tmp_path, max_epochs=25, callbacks=[recorder], log_every_n_steps=1)
    run.fit(task, TinyData())
    first, last = recorder.steps[0], recorder.steps[-1]
    assert last["train/loss"] < first["train/loss"]
    assert last["train/loss"] == pytest.approx(
        last["train/loss_0_CrossEntropy"] + last["train/loss_1_Lovasz"], rel=1e-5
    )
    assert max(step["lr"] for step in recorder.steps) == pytest.approx(0.03, rel=0.05)
    assert recorder.steps[-1]["lr"] < 1e-5
    assert run.callback_metrics["val/mIoU"] > 0.75
    run.test(task, TinyData(), verbose=False)
    assert run.callback_metrics["test/mIoU"] > 0.75
    names = {"mIoU", "mIoU_present", "mAcc", "allAcc", *(f"IoU/{name}" for name in CLASSES)}
    assert {f"test/{name}" for name in names} <= set(run.callback_metrics)


def iou(confusion: Tensor) -> Tensor:
    hits = confusion.diag()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def confusion_of(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    confusion = torch.zeros(3, 3)
    for prediction, truth in pairs:
        for p, t in zip(prediction.tolist(), truth.tolist(), strict=True):
            if t >= 0:
                confusion[t, p] += 1
    return confusion


def test_scores_count_original_points(tmp_path: Path) -> None:
    task = tiny_task(optimizer=FAST)
    run = trainer(tmp_path, max_epochs=6)
    run.fit(task, TinyData())
    clouds = [cloud(i) for i in (10, 11)]
    fast = confusion_of([(predict_cloud(task, pipeline(), c, mode="fast").argmax(1), c.get("segment")) for c in clouds])
    (values,) = run.validate(task, TinyData(), verbose=False)
    assert torch.equal(task.scores["val"].confusion, fast.long())
    assert int(fast.sum()) == 2 * (200 - 12)  # every labelled point of both clouds, though cells hold several
    assert values["val/mIoU"] == pytest.approx(iou(fast).mean().item())
    assert values["val/IoU/wall"] == pytest.approx(iou(fast)[1].item())
    (values,) = run.test(task, TinyData(), verbose=False)
    clouds = [cloud(i) for i in (20, 21)]
    votes = confusion_of([(predict_cloud(task, pipeline(), c).argmax(1), c.get("segment")) for c in clouds])
    assert torch.equal(task.scores["test"].confusion, votes.long())
    assert values["test/allAcc"] == pytest.approx((votes.trace() / votes.sum()).item())


def test_groups_and_schedule_reach_the_optimizer(tmp_path: Path) -> None:
    groups = [ParameterGroup("block", lr=1e-3)]
    task = tiny_task(
        optimizer=OptimizerConfig("sgd", lr=0.1, groups=groups), schedule=ScheduleConfig("poly", power=1.0)
    )
    recorder = Recorder()
    trainer(tmp_path, max_epochs=3, callbacks=[recorder]).fit(task, TinyData())
    assert [step["lr"] for step in recorder.steps] == pytest.approx([0.1 * (1 - t / 7) for t in range(6)])
    assert [step["lr/block"] for step in recorder.steps] == pytest.approx([1e-3 * (1 - t / 7) for t in range(6)])


def test_schedule_follows_optimizer_steps_under_accumulation(tmp_path: Path) -> None:
    task = tiny_task(optimizer=OptimizerConfig(lr=0.1), schedule=ScheduleConfig("poly", power=1.0))
    recorder = Recorder()
    trainer(tmp_path, max_epochs=3, callbacks=[recorder], accumulate_grad_batches=2).fit(task, TinyData())
    assert [step["lr"] for step in recorder.steps] == pytest.approx([0.1 * (1 - t // 2 / 4) for t in range(6)])


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}])
def test_trainer_options(tmp_path: Path, options: dict[str, Any]) -> None:
    task = tiny_task(optimizer=FAST)
    run = trainer(tmp_path, **options)
    run.fit(task, TinyData())
    run.test(task, TinyData(), verbose=False)
    assert torch.isfinite(run.callback_metrics["test/mIoU"])


def test_frozen_parts_stay_as_they_are(tmp_path: Path) -> None:
    task = tiny_task(freeze=[r"backbone\.stem"], optimizer=FAST)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer(tmp_path).fit(task, TinyData())
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"backbone.block.weight", "backbone.block.bias", "head.linear.weight", "head.linear.bias"}
    task.train()
    assert task.training
    assert task.backbone.block.training
    assert not any(module.training for module in task.backbone.stem.modules())


@pytest.mark.parametrize(("momentum", "seen", "frozen"), [(0.4, 0, False), (0.01, 500, False), (0.01, 0, True)])
def test_settled_batch_norms_are_no_cause_for_a_warning(
    tmp_path: Path, momentum: float, seen: int, frozen: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """Six steps: enough with a momentum of 0.4, after 500 steps before, or where the norms do not train."""
    task = tiny_task(freeze=[r"backbone\.stem"] if frozen else None)
    task.backbone.stem[1].momentum = momentum
    task.backbone.stem[1].num_batches_tracked.fill_(seen)
    trainer(tmp_path, max_epochs=3).fit(task, TinyData())
    assert not [str(w.message) for w in recwarn if "running statistics" in str(w.message)]


def test_batch_norms_that_will_not_settle_are_named(tmp_path: Path) -> None:
    task = tiny_task()
    task.backbone.stem[1].momentum = 0.01
    with pytest.warns(
        UserWarning, match=r"after 6 steps 94% of the running statistics of backbone\.stem\.1 \(momentum 0"
    ):
        trainer(tmp_path, max_epochs=3).fit(task, TinyData())


class HeightHead(SegmentationHead):
    """Uses the points besides the features."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width + 1, 3)

    def forward(self, features: Tensor, points: Points) -> Tensor:
        return self.layer(torch.cat([features, points.coord[:, 2:]], 1))


def test_own_head(tmp_path: Path) -> None:
    task = tiny_task(head=HeightHead())
    run = trainer(tmp_path)
    run.fit(task, TinyData())
    run.save_checkpoint(tmp_path / "head.ckpt")
    loaded, lines, _ = load_task(tmp_path / "head.ckpt", allow=(*ALLOW, "test_segmentation."))
    assert isinstance(loaded.head, HeightHead)
    task.eval()
    assert torch.equal(predict_cloud(loaded, lines, cloud(1)), predict_cloud(task, lines, cloud(1)))


def test_settings_that_do_not_fit_the_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model.class_names \['a', 'b'\] are not those of the data: \['floor'"):
        trainer(tmp_path).fit(SemanticSegmentation(TinyBackbone(), ["a", "b"]), TinyData())
    with pytest.raises(InputError, match=r"takes 4 channels, data.pipeline.features \['coord', 'color'\] make 6"):
        trainer(tmp_path).fit(SemanticSegmentation(TinyBackbone(4), CLASSES), TinyData())
    with pytest.raises(InputError, match=r"set trainer.max_epochs or trainer.max_steps"):
        trainer(tmp_path, max_epochs=-1).fit(tiny_task(), TinyData())
    with pytest.raises(InputError, match="class_names is empty"):
        SemanticSegmentation(TinyBackbone(), [])
    with pytest.raises(InputError, match="ema_decay is 1"):
        tiny_task(ema_decay=1)


# Interrupted runs ----------------------------------------------------------------------------------------------------


class Crash(pl.Callback):
    """Ends the run as a killed process would, before batch ``step`` of the run is trained."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.step:
            raise KeyboardInterrupt


def make_task(backbone: str, **options: Any) -> SemanticSegmentation:
    if backbone == "tiny":
        return tiny_task(optimizer=FAST, **options)
    pl.seed_everything(3, verbose=False)
    net = SparseUNet(6, base_channels=4, channels=[4, 6, 6, 4], layers=[1, 1, 1, 1])
    return SemanticSegmentation(net, CLASSES, optimizer=FAST, **options)


def final_state(
    folder: Path, backbone: str, resume: Path | None = None, crash: int = -1, **options: Any
) -> dict[str, Any]:
    keep = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    extra = {key: options.pop(key) for key in ("accumulate_grad_batches", "max_epochs") if key in options}
    workers = options.pop("num_workers", 0)
    task = make_task(backbone, **options)
    data = real_data(num_workers=workers)
    if resume is not None:  # neither the initial weights nor the state of torch's generator may matter
        torch.manual_seed(999)
        for parameter in task.parameters():
            torch.nn.init.normal_(parameter)
    run = trainer(folder, callbacks=[keep, Crash(crash)], **{"max_epochs": 3, **extra})
    try:
        run.fit(task, data, ckpt_path=None if resume is None else str(resume))
    except (KeyboardInterrupt, SystemExit):
        return {}
    run.save_checkpoint(folder / "end.ckpt")
    return read_checkpoint(folder / "end.ckpt")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Final checkpoints of runs without interruption, each trained once."""
    known: dict[str, dict[str, Any]] = {}

    def get(backbone: str, **options: Any) -> dict[str, Any]:
        key = f"{backbone} {options}"
        if key not in known:
            known[key] = final_state(tmp_path_factory.mktemp("whole"), backbone, **options)
        return known[key]

    return get


def assert_same(first: Any, second: Any, where: str = "") -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(first, Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


@pytest.mark.parametrize(
    ("backbone", "step", "options"),
    [
        ("tiny", 4, {}),
        ("tiny", 3, {}),  # the last batch of an epoch
        ("tiny", 4, {"ema_decay": 0.9}),
        ("tiny", 2, {"accumulate_grad_batches": 2}),
        pytest.param("tiny", 5, {"num_workers": 1, "max_epochs": 2}, marks=pytest.mark.slow),
        ("sparse", 4, {}),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_as_an_unbroken_one(
    tmp_path: Path, unbroken: Callable[..., dict[str, Any]], backbone: str, step: int, options: dict[str, Any]
) -> None:
    whole = unbroken(backbone, **options)
    broken = final_state(
        tmp_path / "broken", backbone, crash=step * options.get("accumulate_grad_batches", 1), **options
    )
    assert broken == {}
    last = max((tmp_path / "broken").glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert last.stem == f"step={step}"
    resumed = final_state(tmp_path / "resumed", backbone, resume=last, **options)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state"):
        assert_same(whole.get(part), resumed.get(part), part)
    assert resumed["global_step"] == whole["global_step"]


def test_the_seed_decides(tmp_path: Path, unbroken: Callable[..., dict[str, Any]]) -> None:
    first = unbroken("tiny")["state_dict"]
    again = final_state(tmp_path / "b", "tiny")["state_dict"]
    assert_same(first, again)
    task = tiny_task(optimizer=FAST)
    task.seed = 8
    run = trainer(tmp_path, max_epochs=3)
    run.fit(task, real_data())
    assert not torch.equal(task.state_dict()["backbone.block.weight"], first["backbone.block.weight"])


# Moving average ------------------------------------------------------------------------------------------------------


def test_the_average_is_what_is_validated_saved_and_tested(tmp_path: Path) -> None:
    class Averages(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []
            self.validated: list[Tensor] = []

        def on_train_batch_end(self, trainer: pl.Trainer, task: pl.LightningModule, *args: Any) -> None:
            self.seen.append(task.backbone.block.weight.detach().clone())

        def on_validation_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, *args: Any) -> None:
            if not trainer.sanity_checking:
                self.validated.append(task.backbone.block.weight.detach().clone())

    task, watch = tiny_task(optimizer=FAST, ema_decay=0.95), Averages()
    keep = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    run = trainer(tmp_path, max_epochs=4, callbacks=[watch, keep])
    run.fit(task, TinyData())
    average = watch.seen[0]
    for n, weight in enumerate(watch.seen[1:], start=1):
        decay = min(0.95, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(task.backbone.block.weight.detach(), average)
    torch.testing.assert_close(watch.validated[-1], average)
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    torch.testing.assert_close(checkpoint["state_dict"]["backbone.block.weight"], average)
    assert torch.equal(checkpoint["current_model_state"]["backbone.block.weight"], watch.seen[-1])
    assert checkpoint["pc3d_card"]["weights"] == "ema"
    loaded, lines, _ = load_task(tmp_path / "last.ckpt", allow=ALLOW)
    assert torch.equal(predict_cloud(loaded, lines, cloud(0)), predict_cloud(task, lines, cloud(0)))
    for evaluate in (run.test, run.validate):  # the trainer of the training, and its callback, are still there
        torch.nn.init.zeros_(task.backbone.block.weight)
        evaluate(task, TinyData(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
        torch.testing.assert_close(task.backbone.block.weight.detach(), average)
        torch.testing.assert_close(watch.validated[-1], average)
