"""``pc3d test``: score a checkpoint on the test clouds of its config, or of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pc3d.cli.parser import PRESETS, Parser
from pc3d.cli.runs import Run, free_folder, run_of
from pc3d.errors import InputError

EXAMPLES = """\
  pc3d test --ckpt runs/demo/checkpoints/best.ckpt
  pc3d test --ckpt runs/demo/checkpoints/best.ckpt --tta scannet
  pc3d test --ckpt best.ckpt --save runs/area5 --data.dataset.init_args.test_area 5    (then: pc3d evaluate)
  pc3d test --ckpt best.ckpt --save submission --data.test_split test   (ScanNet, SemanticKITTI: as the server takes it)
  pc3d test --ckpt best.ckpt --config configs/lidarhd/semseg-spunet.yaml --data.root my_tiles

Every test cloud of a scene is cut into fragments of one point per cell; the class probabilities of all fragments and
of all passes of test-time augmentation are summed on the original points. Objects are tested whole. Any key of the
config can be overridden, as with --data.root above."""


def main(arguments: list[str]) -> int:
    parser = Parser("test", "Score a checkpoint on the test clouds: per-class table, figures and pictures.", EXAMPLES)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint (.ckpt) or export (.safetensors)")
    parser.add_argument("--config", metavar="FILE", help="experiment; default: the config.yaml of the checkpoint's run")
    parser.add_argument("--tta", choices=["none", *PRESETS], help="test-time augmentation; default: as the config says")
    parser.add_argument("--save", metavar="DIR", help="keep the prediction for every cloud, as its benchmark takes it")
    parser.add_argument("--run_dir", metavar="DIR", help="where results go; default: test/ in the checkpoint's run")
    options, overrides = parser.parse_with_overrides(arguments)

    from pc3d.cli.experiment import trained_experiment
    from pc3d.tasks.callbacks import SavePredictions

    path = Path(options.ckpt)
    if options.tta is not None:
        overrides += ["--model.test_augmentations", "null" if options.tta == "none" else options.tta]

    def plan(config: Any) -> Run:
        return Run(free_folder(Path(options.run_dir) if options.run_dir else (run_of(path) or path.parent) / "test"))

    experiment = trained_experiment(path, options.config, overrides, plan, "pc3d test")
    model, data = experiment.model, experiment.datamodule
    if options.save is not None:
        if Path(options.save).is_file():
            raise InputError(f"--save {options.save}: is a file; name a folder")
        experiment.trainer.callbacks.append(SavePredictions(options.save))  # type: ignore[attr-defined]
    try:
        experiment.trainer.test(model, datamodule=data, verbose=False)
    except Exception:
        experiment.run.discard()
        raise
    folder, counts = experiment.run.folder, model.confusion("test")
    if counts is not None and not counts.any():
        print(
            "no test cloud has labels: the scores above mean nothing (data.test_split: val tests the validation clouds)"
        )
    print(f"figures: {folder}/summary.json, pictures: {folder}/pictures")
    if options.save is not None:
        print(f"predictions: {options.save}")
    return 0
