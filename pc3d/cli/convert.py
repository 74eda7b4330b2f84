"""``pc3d convert``: published checkpoints to the format of this package, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from pc3d.cli.parser import Parser
from pc3d.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pc3d.models.convert import KernelLayout
    from pc3d.nn import PointNetwork
    from pc3d.nn.serialized import SerializedUNet
    from pc3d.tasks import PointTask

EXAMPLES = """\
  pc3d convert model_best.pth ptv3.safetensors --config my_ptv3.yaml
  pc3d convert encoder.pth encoder.safetensors --config my_sonata.yaml
  pc3d convert ptv3.safetensors back.pth

The config says what the file is a checkpoint of: backbone, classes and pipeline. It may be a training config; no data
is read. Names and shapes must fit exactly, and what does not is listed. The result works like any export: with predict
and test, and as --init_from of a training. Of a jointly trained file (PPT) the head of the backbone's pdnorm_default
(or norm_default) is kept. Files of adapters need the config's model.peft; of Point-PEFT, also the pre-training it was
tuned from (--base) and its bank (--bank). To .pth, a checkpoint of this package gets the published names back."""


def main(arguments: list[str]) -> int:
    parser = Parser(
        "convert",
        "Convert checkpoints of Pointcept, OpenPCDet, Sonata, LitePT, ConDaFormer, E-3DSNN, Point-MAE, PCT and others.",
        EXAMPLES,
    )
    parser.add_argument("input", metavar="INPUT", help="a published .pth; or a checkpoint of this package to go back")
    parser.add_argument("output", metavar="OUT", help=".safetensors, or .pth to go back")
    parser.add_argument("--config", metavar="FILE", help="experiment whose model the published file holds")
    parser.add_argument("--base", metavar="FILE", help="of an adapter: the published pre-training it was tuned from")
    parser.add_argument("--bank", metavar="FILE", help="of Point-PEFT: its features of training clouds, one per column")
    parser.add_argument("--layout", metavar="NAME", help="how kernels are stored: krsc, rsck, ...; default: detect")
    parser.add_argument("--trust", action="store_true", help="run code inside the file (your own file only)")
    options, overrides = parser.parse_with_overrides(arguments)
    source, target = Path(options.input), Path(options.output)
    if target.suffix == ".pth":
        for name in ("config", "base", "bank"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name}: of no use on the way back to {target}")
        written = [to_published(source, target, options)]
    elif target.suffix == ".safetensors":
        written = from_published(source, target, options, overrides)
    else:
        raise InputError(f"{target}: the output is .safetensors, or .pth to get published names back")
    print("wrote " + " and ".join(map(str, written)))
    return 0


def from_published(source: Path, target: Path, options: Any, overrides: list[str]) -> list[Path]:
    """Weights and card of a published file, for the model of a config."""
    if options.config is None:
        raise InputError(f"{source}: --config is needed: it says what model the file holds")
    from pc3d.cli.experiment import Experiment
    from pc3d.cli.runs import Run
    from pc3d.tasks import read_checkpoint, save_export
    from pc3d.tasks.checkpoint import CARD, make_card

    checkpoint = read_checkpoint(source, options.trust)
    words = ["--config", options.config, *overrides]
    experiment = Experiment(words, lambda config: Run(target.parent), program="pc3d convert")
    task, data = experiment.model, experiment.datamodule
    task.pipeline, task.palette, task.label_map = data.pipeline, data.dataset.palette, data.dataset.label_map
    if options.base is not None:
        _load(read_checkpoint(options.base, options.trust)["state_dict"], task, Path(options.base), options.layout)
    layout, with_head = _load(checkpoint["state_dict"], task, source, options.layout, options.base is not None)
    if options.bank is not None:
        _fill_bank(task, Path(options.bank))
    print(f"{source}: {type(task.backbone).__name__}{f', kernels {layout.name}' if layout else ''}")
    if not with_head:
        print("the file has no head: its classes start anew (train with --init_from before you predict)")
    return list(save_export(target, {"state_dict": task.state_dict(), CARD: make_card(task)}))


def to_published(source: Path, target: Path, options: Any) -> Path:
    """The published state of a checkpoint of this package, in a file of plain tensors."""
    import torch

    from pc3d.io.atomic import atomic_write
    from pc3d.models import SparseUNet
    from pc3d.models.convert import KernelLayout, export_pointcept, export_sparse_unet
    from pc3d.tasks import load_task

    task, _, _ = load_task(source, options.trust)
    head, layout = _linear_head(task), _layout(options.layout) or KernelLayout.KRSC
    if isinstance(task.backbone, SparseUNet):
        state = export_sparse_unet(task.backbone, head, layout)
    elif _is_pointcept(task.backbone):
        state = export_pointcept(task.backbone, head, layout)
    else:
        raise InputError(f"{source}: {type(task.backbone).__name__} cannot be written with its published names")
    with atomic_write(target) as temporary:
        torch.save({"state_dict": state}, temporary)
    return target


# First words of the names of heads in published files.
_HEADS = (
    "seg_head.", "final.", "classifier.", "decoder.final.", "cls_head_finetune.", "convs3.", "convs3_cls.", "linear3.",
    "model.linear3.", "dense_head.",
)  # fmt: skip


def _load(
    state: dict[str, Tensor], task: PointTask, source: Path, layout_name: str | None, onto_base: bool = False
) -> tuple[KernelLayout | None, bool]:
    """Fill the task's backbone and, if the file has one, its head; the layout of kernels, and whether it had one.

    ``onto_base``: the backbone holds what the file was tuned from.
    """
    from pc3d.tasks import Pretraining, Reconstruction

    names = [name.removeprefix("module.").removeprefix("backbone.") for name in state]
    layout, with_head = _layout(layout_name), any(name.startswith(_HEADS) for name in names)
    try:
        if any(name.startswith("embedding_table.") for name in names):
            return _load_ppt(state, task, source, layout), True
        layout = _import(state, task, source, with_head, layout, onto_base)
    except InputError as error:
        raise InputError(str(error).replace("checkpoint:", f"{source}:", 1)) from None
    return layout, with_head or isinstance(task, (Pretraining, Reconstruction))  # which have no head of their own


def _import(
    state: dict[str, Tensor],
    task: PointTask,
    source: Path,
    with_head: bool,
    layout: KernelLayout | None,
    onto_base: bool,
) -> KernelLayout | None:
    from pc3d import models
    from pc3d.models import convert
    from pc3d.tasks import Detection, Pretraining, Reconstruction

    backbone: Any = task.backbone  # importers say what does not fit
    head: Any = task.head if with_head else None
    if isinstance(task, Pretraining):
        convert.import_pretraining(state, backbone, task.method)
    elif isinstance(task, Reconstruction) and isinstance(task.decoder, models.GridFormerDecoder):
        convert.import_gridformer(state, backbone, task.decoder)
    elif isinstance(backbone, models.PointViT):
        convert.import_point_vit(state, backbone, head, onto_base)
    elif isinstance(backbone, models.ConDaFormer):
        convert.import_condaformer(state, backbone, head)
    elif isinstance(backbone, models.E3DSNN):
        convert.import_e3dsnn(state, backbone, head)
    elif isinstance(backbone, models.PCT):
        convert.import_pct(state, backbone, head)
    elif isinstance(backbone, models.ScatterFormer):
        convert.import_scatterformer(state, backbone, head)
    elif isinstance(task, Detection):
        return convert.import_openpcdet(state, backbone, head, layout, refine=task.refine if with_head else None)
    elif isinstance(backbone, models.PointSSM):
        convert.import_point_ssm(state, backbone, _linear_head(task) if with_head else None)
    elif isinstance(backbone, models.SparseUNet):
        return convert.import_sparse_unet(state, backbone, _linear_head(task) if with_head else None, layout)
    elif _is_pointcept(backbone):
        return convert.import_pointcept(state, backbone, _linear_head(task) if with_head else None, layout)
    else:
        raise InputError(f"{source}: there is no importer for {type(backbone).__name__} on the command line")
    return None


def _fill_bank(task: PointTask, path: Path) -> None:
    """Give the adapter a published bank, a ``(C, N)`` tensor."""
    import torch

    from pc3d.peft.adaptation import parts_of
    from pc3d.peft.point_peft import PointPEFTPart

    banks = [part.bank for part in parts_of(task.backbone) if isinstance(part, PointPEFTPart)]
    if not banks:
        raise InputError(f"{path}: only Point-PEFT has a bank; set model.peft to pc3d.peft.PointPEFT")
    try:
        columns = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises OSError, RuntimeError, EOFError, UnpicklingError, ... for damaged files
        raise InputError(f"{path}: not a readable bank ({str(error).splitlines()[0]})") from error
    if not isinstance(columns, torch.Tensor) or columns.ndim != 2:
        raise InputError(f"{path}: a bank is one tensor, a feature per column")
    try:
        banks[0].fill(columns.T)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _load_ppt(state: dict[str, Tensor], task: PointTask, source: Path, layout: KernelLayout | None) -> KernelLayout:
    """Fill a jointly trained backbone and the head of its default dataset."""
    from pc3d.models import PTv3, SparseUNet
    from pc3d.models.convert import import_ppt
    from pc3d.models.heads import ClassEmbeddingHead

    if not isinstance(task.backbone, (PTv3, SparseUNet)):
        raise InputError(f"{source}: jointly trained; model.backbone must be PTv3 or SparseUNet")
    head = task.head if isinstance(task.head, ClassEmbeddingHead) else _linear_head(task)
    return import_ppt(state, task.backbone, head, layout=layout)


def _is_pointcept(backbone: PointNetwork) -> TypeGuard[SerializedUNet]:
    from pc3d.nn.serialized import SerializedUNet

    return isinstance(backbone, SerializedUNet)


def _linear_head(task: PointTask) -> nn.Linear:
    from pc3d.tasks.heads import LinearHead

    if not isinstance(task.head, LinearHead):
        raise InputError(
            f"model.head: published files end in a linear layer, the config asks for {type(task.head).__name__}"
        )
    return task.head.linear


def _layout(name: str | None) -> KernelLayout | None:
    from pc3d.models.convert import KernelLayout

    if name is None:
        return None
    if name.upper() not in KernelLayout.__members__:
        raise InputError(
            f"--layout {name}: not one of {', '.join(member.lower() for member in KernelLayout.__members__)}"
        )
    return KernelLayout[name.upper()]
