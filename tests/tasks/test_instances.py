"""Instance segmentation: it learns, freezes, scores, resumes and is rebuilt from its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny import ALLOW, CLASSES, TinyBackbone, TinyData, cloud, trainer

from pc3d import InputError, Points
from pc3d.cli import main
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import CenterShift, GraphSegments, NormalizeColor
from pc3d.metrics import Instances
from pc3d.models.heads import OffsetClustering, SegmentFusion
from pc3d.tasks import InstanceSegmentation, OptimizerConfig, load_task, predict_cloud
from pc3d.viz.colors import label_colors


def lines() -> Pipeline:
    prepare = [CenterShift(), GraphSegments(min_size=5, color_weight=1.0)]
    return Pipeline(0.25, ["coord", "color"], prepare=prepare, finish=[NormalizeColor()])


def labelled(seed: int) -> Points:
    points = cloud(seed)
    return points.with_attrs(instance=(points.coord[:, 0] > 1).long())


class Scenes(TinyData):
    def __init__(self) -> None:
        super().__init__()
        self.pipeline = lines()

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        samples = [self.pipeline.train(labelled(i), torch.Generator().manual_seed(i)) for i in range(4)]
        return torch.utils.data.DataLoader(samples, batch_size=2, collate_fn=Points.cat)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        samples = [self.pipeline.evaluate(labelled(i)) for i in (10, 11)]
        return torch.utils.data.DataLoader(samples, batch_size=2, collate_fn=Points.cat)

    def test_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader([labelled(i) for i in (20, 21)], batch_size=1, collate_fn=list)


def task(kind: str = "fusion", **options: object) -> InstanceSegmentation:
    torch.manual_seed(7)
    heads = {
        "fusion": lambda: SegmentFusion(channels=16, depth=2, num_heads=2, min_points=3),
        "offsets": lambda: OffsetClustering(radius=0.3, min_points=3),
    }
    options = {"optimizer": OptimizerConfig(lr=0.03), "min_instance_points": 10, "stuff": ["floor"], **options}
    return InstanceSegmentation(TinyBackbone(), CLASSES, heads[kind](), **options)


@pytest.mark.parametrize("kind", ["fusion", "offsets"])
def test_it_learns_and_scores(tmp_path: Path, kind: str) -> None:
    model = task(kind)
    run = trainer(tmp_path, max_epochs=25)
    run.fit(model, Scenes())
    run.test(model, Scenes(), verbose=False)
    logged = run.callback_metrics
    assert logged["test/mIoU"] > 0.45
    names = {"AP", "AP50", "AP25", "mPrec", "mRec", "mCov", "mWCov", "part_errors", "broken_instances"}
    assert {f"test/{name}" for name in names} <= set(logged)
    assert ("test/mIoU_voting" in logged) == (kind == "fusion")


def test_frozen_backbone_stays_and_resume_is_exact(tmp_path: Path) -> None:
    frozen = {"freeze": ["^backbone", "^head"]}
    whole, resumed = task(**frozen), task(**frozen)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[saving]).fit(whole, Scenes())
    trainer(tmp_path).fit(resumed, Scenes(), ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        if name.startswith(("backbone.", "head.")):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(
        whole.state_dict()["instance_head.fusion.tokenizer.proj.weight"],
        before["instance_head.fusion.tokenizer.proj.weight"],
    )
    loaded, pipeline, _ = load_task(tmp_path / "epoch=1.ckpt", allow=ALLOW)
    assert isinstance(loaded, InstanceSegmentation)
    points = labelled(30)
    assert torch.equal(predict_cloud(loaded, pipeline, points), predict_cloud(whole.eval(), lines(), points))
    classes, (found,) = loaded.predict_instances(pipeline.evaluate(points))
    assert classes.shape == (points.num_points,)
    assert (classes[found.rows] == torch.repeat_interleave(found.classes, found.sizes)).all()
    instance = loaded.cloud_instances(pipeline, points)
    assert torch.equal(instance, found.labels(points.num_points))


def test_pictures_show_instances_in_the_colours_of_the_true_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicted 7 is most of true 1, predicted 3 a smaller part of it, 5 nothing true, 4 true 0."""
    shown: dict[str, torch.Tensor] = {}
    monkeypatch.setattr("pc3d.viz.figures._draw_panels", lambda path, points, panels, *rest: shown.update(panels))
    truth = torch.tensor([0, 0, 1, 1, 1, 1, -1, -1, 1])
    found = torch.tensor([4, 4, 7, 7, 7, 3, 5, -1, -1])
    segment = torch.tensor([2, 2, 2, 2, 2, 2, 0, 0, -1])
    cloud = Points(torch.rand(9, 3), attrs={"segment": segment, "instance": torch.where(truth == 1, 7 << 16, truth)})
    instances = Instances.of(found, torch.full((8,), 2), torch.ones(8))
    outputs = {"points": cloud, "prediction": segment.clamp(min=0), "instances": [instances]}
    ((drawn, prediction),) = task().predictions(outputs)
    task().save_picture(tmp_path / "picture.png", drawn, prediction.cpu())
    colors = {title: label_colors(values) for title, values in {"true": truth, "named": found}.items()}
    assert (shown["true instances"][:8] == colors["true"][:8]).all()
    assert (shown["true instances"][8] == label_colors(torch.tensor([-1]))[0]).all()  # unlabelled
    expected = label_colors(torch.tensor([0, 0, 1, 1, 1, 2, 3, -1, -1]))
    assert (shown["instances"] == expected).all()


def test_unknown_stuff_is_refused() -> None:
    with pytest.raises(InputError, match="ceiling unknown"):
        task(stuff=["ceiling"])


@pytest.mark.slow
@pytest.mark.parametrize(("learnt", "tested", "touching"), [("learn0", "learn25", True), ("learn25", "learn0", False)])
def test_boxes_of_a_real_scene_after_learning_another(
    tmp_path: Path, data_dir: Path, learnt: str, tested: str, touching: bool
) -> None:
    """Two boxes in each: where one lies on the other, the components of the graph are one object, fusion parts them."""
    for folder, name in (("learn", learnt), ("test", tested)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.pcd").symlink_to(data_dir / "mosd_rgbd_instances" / "learn" / f"{name}.pcd")
    config = Path(__file__).parents[2] / "configs" / "mosd" / "insseg-fusion-spunet-small.yaml"
    run = tmp_path / "run"
    assert main(["train", "--config", str(config), "--data.root", str(tmp_path), "--run_dir", str(run)]) == 0
    scores = json.loads((run / "summary.json").read_text())
    assert scores["test/mIoU"] > 0.97
    assert scores["test/AP50"] == 1
    assert scores["test/AP50_baseline"] == (0.5 if touching else 1)
