"""Checkpoints of the real trainer: read without pickle, rebuilt from the file alone, refused when not safe."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny import ALLOW, CLASSES, TinyBackbone, TinyData, cloud, pipeline, tiny_task, trainer

from pc3d import InputError
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import RandomScale
from pc3d.losses import ClusterContrast, CrossEntropy
from pc3d.tasks import (
    MismatchError,
    OptimizerConfig,
    SemanticSegmentation,
    card_mismatch_table,
    init_weights,
    load_task,
    predict_cloud,
    read_checkpoint,
    save_export,
)
from pc3d.tasks.checkpoint import CARD


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SemanticSegmentation, Path]:
    """A trained task and its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    task = tiny_task(
        criteria=[CrossEntropy(weight=[1.0, 2.0, 3.0])],
        optimizer=OptimizerConfig(lr=0.05),
        test_augmentations=[[RandomScale([0.9, 0.9])]],
    )
    fit = trainer(folder)
    fit.fit(task, TinyData())
    fit.save_checkpoint(folder / "last.ckpt")
    return task.eval(), folder / "last.ckpt"


def assert_plain(value: object) -> None:
    assert type(value) in (dict, list, str, int, float, bool, type(None)), value
    if isinstance(value, dict):
        for key, item in value.items():
            assert type(key) in (str, int)
            assert_plain(item)
    if isinstance(value, list):
        for item in value:
            assert_plain(item)


def test_the_card_says_what_the_checkpoint_is(run: tuple[SemanticSegmentation, Path]) -> None:
    checkpoint = torch.load(run[1], weights_only=True)
    card = checkpoint[CARD]
    assert_plain(card)
    assert card["class_names"] == CLASSES
    assert card["label_map"] == {11: 0, 12: 1, 40: 2, 0: -1}
    assert card["palette"] == [[200, 200, 200], [90, 90, 200], [200, 30, 30]]
    assert card["features"] == [{"name": "coord", "channels": 3}, {"name": "color", "channels": 3}]
    assert (card["in_channels"], card["grid_size"], card["ignore_index"], card["seed"]) == (6, 0.25, -1, 7)
    assert card["pipeline"] == pipeline().to_config()
    arguments = card["task"]["init_args"]
    assert arguments["backbone"] == {"class_path": "tiny.TinyBackbone", "init_args": {"in_channels": 6, "width": 8}}
    assert arguments["criteria"][0]["init_args"]["weight"] == [1.0, 2.0, 3.0]
    assert card["training"]["optimizer"]["lr"] == 0.05
    assert card["versions"]["torch"] == torch.__version__
    assert 0 <= card["metrics"]["val/mIoU"] <= 1
    assert card["weights"] == "trained"
    assert json.loads(json.dumps(card))["features"] == card["features"]


@pytest.mark.parametrize("exported", [False, True])
def test_a_task_is_rebuilt_from_the_file_alone(
    run: tuple[SemanticSegmentation, Path], tmp_path: Path, exported
) -> None:
    task, path = run
    if exported:
        path, card_path = save_export(tmp_path / "model.safetensors", read_checkpoint(path))
        assert card_path == tmp_path / "model.json"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    loaded, lines, card = load_task(path, allow=ALLOW)
    points = cloud(30)
    assert torch.equal(predict_cloud(loaded, lines, points), predict_cloud(task, pipeline(), points))
    assert not loaded.training
    assert loaded.palette == [(200, 200, 200), (90, 90, 200), (200, 30, 30)]
    assert loaded.label_map == card["label_map"] == {11: 0, 12: 1, 40: 2, 0: -1}
    assert isinstance(loaded.augmentations[0][0], RandomScale)


def test_a_loaded_task_can_be_tested_and_saved_again(run: tuple[SemanticSegmentation, Path], tmp_path: Path) -> None:
    loaded, _, card = load_task(run[1], allow=ALLOW)
    tester = trainer(tmp_path)
    tester.test(loaded, dataloaders=TinyData().test_dataloader(), verbose=False)
    tester.save_checkpoint(tmp_path / "again.ckpt")
    again = read_checkpoint(tmp_path / "again.ckpt")[CARD]
    assert "test/mIoU" in again["metrics"]
    for name in set(card) - {"metrics", "training"}:
        assert again[name] == card[name], name


def test_foreign_classes_of_a_card_are_not_imported(run: tuple[SemanticSegmentation, Path]) -> None:
    with pytest.raises(InputError, match=r"class_path 'tiny.TinyBackbone' is not one of this package"):
        load_task(run[1])


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "evil"))
    path = tmp_path / "stranger.ckpt"
    content = {"state_dict": {"head.weight": torch.zeros(1)}, "extra": Evil()}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": {}, "extra": Evil()}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(InputError, match=r"stranger.ckpt: holds Python code \((posix|nt).mkdir\).*--trust") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()
    if kind == "zip":
        assert "head.weight" in read_checkpoint(path, trust=True)["state_dict"]
        assert (tmp_path / "evil").exists()


def test_files_that_are_no_checkpoints(run: tuple[SemanticSegmentation, Path], tmp_path: Path) -> None:
    def refused(name: str, content: bytes | None, message: str) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            load_task(tmp_path / name, allow=ALLOW)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)

    whole = run[1].read_bytes()
    refused("missing.ckpt", None, "no such checkpoint file")
    for keep in (0, 1, 100, len(whole) // 2, len(whole) - 10):
        refused("cut.ckpt", whole[:keep], "not a readable checkpoint")
    refused("text.ckpt", b"hello\nworld\n", "not a readable checkpoint")
    refused("junk.ckpt", bytes(range(256)) * 9, "not a readable checkpoint")
    refused("lonely.safetensors", b"x", "its card lonely.json is missing")
    (tmp_path / "bad.json").write_text("{}")
    refused("bad.safetensors", b"not tensors", "not a readable export")

    def saved(value: object) -> bytes:
        torch.save(value, tmp_path / "value.bin")
        return (tmp_path / "value.bin").read_bytes()

    refused("list.ckpt", saved([1, 2]), "holds a list")
    refused("empty.ckpt", saved({"epoch": 3}), r"has no 'state_dict' \(it has: epoch\)")
    refused("rows.ckpt", saved({"state_dict": [1]}), "its 'state_dict' is a list")
    refused("number.ckpt", saved({"model_state": {"epoch": 3}}), "'epoch' among its weights is a int")
    refused("bare.ckpt", saved({"weight": torch.zeros(2)}), "has no pc3d card")
    checkpoint = read_checkpoint(run[1])
    refused("newer.ckpt", saved({**checkpoint, CARD: {**checkpoint[CARD], "format": 99}}), "card format 99")
    state = {name: value for name, value in checkpoint["state_dict"].items() if "block" not in name}
    refused(
        "part.ckpt",
        saved({**checkpoint, "state_dict": state}),
        r"2 tensors differ, 'backbone.block.weight' is missing in the file, .8, 8. in the model",
    )
    without = {key: value for key, value in checkpoint[CARD].items() if key != "pipeline"}
    refused("hole.ckpt", saved({**checkpoint, CARD: without}), "card has no 'pipeline'")


def test_mismatch_table(run: tuple[SemanticSegmentation, Path]) -> None:
    card = read_checkpoint(run[1])[CARD]
    assert card_mismatch_table(card, class_names=CLASSES, in_channels=6, grid_size=0.25) is None
    table = card_mismatch_table(card, class_names=["tree"], in_channels=6, grid_size=0.05)
    assert table is not None
    for text in ("class_names", "3: floor, wall, chair", "1: tree", "grid_size", "0.25", "0.05"):
        assert text in table
    assert "in_channels" not in table


def test_a_checkpoint_of_other_data_is_refused_with_a_table(
    run: tuple[SemanticSegmentation, Path], tmp_path: Path
) -> None:
    data = TinyData()
    data.pipeline = Pipeline(0.5, ["coord", "color"])
    with pytest.raises(MismatchError, match=r"grid_size 0.25 \(here: 0.5\)") as caught:
        trainer(tmp_path).test(tiny_task(), data, ckpt_path=str(run[1]))
    assert "grid_size" in caught.value.table


def test_init_weights_takes_what_fits_and_says_so(run: tuple[SemanticSegmentation, Path], tmp_path: Path) -> None:
    trained = run[0].state_dict()
    torch.manual_seed(1)
    other = SemanticSegmentation(TinyBackbone(), ["tree", "ground"], criteria=[CrossEntropy(weight=[5.0, 6.0])])
    before = other.head.linear.weight.clone()
    report = init_weights(other, run[1])
    assert torch.equal(other.backbone.block.weight, trained["backbone.block.weight"])
    assert torch.equal(other.head.linear.weight, before)
    assert other.criteria[0].weight.tolist() == [5.0, 6.0]
    text = str(report)
    assert f"{len(report.loaded)} of {len(report.loaded) + 2} tensors" in text
    assert "head.linear.weight (3, 8) (here (2, 8))" in text
    assert "class_names differ: 3: floor, wall, chair (here 2: tree, ground)" in text
    with pytest.raises(InputError, match=r"last.ckpt: does not fit.*head.linear.weight"):
        init_weights(other, run[1], strict=True)
    assert not init_weights(tiny_task(), run[1], strict=True).missing


def test_init_weights_from_bare_and_prefixed_files(run: tuple[SemanticSegmentation, Path], tmp_path: Path) -> None:
    trained = run[0].backbone.state_dict()
    torch.save({f"module.backbone.{name}": value for name, value in trained.items()}, tmp_path / "ddp.pth")
    torch.save(trained, tmp_path / "backbone.pth")
    for name in ("ddp.pth", "backbone.pth"):
        task = tiny_task()
        report = init_weights(task, tmp_path / name)
        assert len(report.loaded) == len(trained)
        assert torch.equal(task.backbone.block.weight, trained["block.weight"])
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other.pth: does not fit the model: .* 0 of \d+ tensors"):
        init_weights(tiny_task(), tmp_path / "other.pth")


def test_an_export_that_fails_leaves_the_old_one(run: tuple[SemanticSegmentation, Path], tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    save_export(target, read_checkpoint(run[1]))
    old = target.read_bytes(), (tmp_path / "model.json").read_bytes()
    with pytest.raises(InputError, match="no pc3d card"):
        save_export(target, {"state_dict": {}})
    assert (target.read_bytes(), (tmp_path / "model.json").read_bytes()) == old


def test_a_model_that_cannot_be_described_fails_before_training(tmp_path: Path) -> None:
    class Odd(TinyBackbone):
        def __init__(self, activation: object = torch.relu) -> None:
            super().__init__()

    task = SemanticSegmentation(Odd(), CLASSES)
    with pytest.raises(InputError, match="card cannot describe this model"):
        trainer(tmp_path).fit(task, TinyData())


def test_feature_losses_train_and_resume_but_are_not_exported(tmp_path: Path) -> None:
    def task() -> SemanticSegmentation:
        losses = [ClusterContrast(clusters=4, projection=(8,), memory=5)]
        return tiny_task(feature_criteria=losses)

    path = tmp_path / "epoch=1.ckpt"
    whole, resumed = task(), task()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[saving]).fit(whole, TinyData())
    trainer(tmp_path).fit(resumed, TinyData(), ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert resumed.feature_criteria[0].memory_count.any()
    weights, card_path = save_export(tmp_path / "model.safetensors", read_checkpoint(path))
    assert not [name for name in read_checkpoint(weights)["state_dict"] if "feature_criteria" in name]
    assert json.loads(card_path.read_text())["task"]["init_args"]["feature_criteria"] is None
    loaded, _, _ = load_task(weights, allow=ALLOW)
    points = cloud(30)
    assert torch.equal(predict_cloud(loaded, pipeline(), points), predict_cloud(resumed.eval(), pipeline(), points))
