"""``pc3d export``: clouds to other formats, coloured by label; checkpoints to safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pc3d.cli.parser import Parser
from pc3d.errors import InputError

if TYPE_CHECKING:
    from pc3d.points import Points

_CHECKPOINTS = (".ckpt", ".pth", ".pt", ".safetensors")
EXAMPLES = """\
  pc3d export labelled.laz labelled.ply --color label
  pc3d export scan.pcd scan.las
  pc3d export labelled.ply 000000.label
  pc3d export runs/demo/checkpoints/best.ckpt model.safetensors
  pc3d export runs/demo/checkpoints/best.ckpt adapter.safetensors --adapter
  pc3d export adapter.safetensors model.safetensors --base pretrained.safetensors

A checkpoint becomes weights (.safetensors) and a readable card (.json), which every command
takes in place of the .ckpt."""


def main(arguments: list[str]) -> int:
    parser = Parser("export", "Convert a cloud to another format, or a checkpoint to safetensors.", EXAMPLES)
    parser.add_argument("input", metavar="INPUT", help="a cloud of any readable format, or a checkpoint")
    parser.add_argument("output", metavar="OUT", help=".ply .pcd .las .laz .npy .npz .bin .txt .label, or .safetensors")
    parser.add_argument("--color", default="auto", help="label, rgb, height or a field; default: label if there is one")
    parser.add_argument("--label_field", metavar="NAME", help="field that holds the labels")
    parser.add_argument("--ckpt", metavar="FILE", help="take class colours and label codes from this checkpoint")
    parser.add_argument("--adapter", action="store_true", help="checkpoint with model.peft: leave the frozen base out")
    parser.add_argument("--base", metavar="FILE", help="adapter without its base: join it with these weights")
    parser.add_argument("--encoding", help="PLY: ascii, binary_big_endian; PCD: ascii, binary_compressed")
    options = parser.parse_args(arguments)
    source, target = Path(options.input), Path(options.output)
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: is the input; choose another output, inputs are never overwritten")
    is_checkpoint = source.suffix.lower() in _CHECKPOINTS
    for name in ("color", "label_field", "ckpt", "encoding") if is_checkpoint else ("adapter", "base"):
        if getattr(options, name) != parser.get_default(name):
            raise InputError(f"--{name}: is for {'clouds' if is_checkpoint else 'checkpoints'}, {source} is none")
    if is_checkpoint:
        written = export_checkpoint(source, target, options.adapter, options.base)
    else:
        written = [export_cloud(source, target, options)]
    print("wrote " + " and ".join(map(str, written)))
    return 0


def export_checkpoint(source: Path, target: Path, adapter: bool, base: str | None) -> list[Path]:
    """Export a checkpoint: whole, its adapter without the base, or an adapter joined with its base."""
    from pc3d.tasks import read_checkpoint, save_export
    from pc3d.tasks.checkpoint import adapter_checkpoint, card_of, join_base

    if target.suffix != ".safetensors":
        raise InputError(f"{target}: a checkpoint is exported as .safetensors")
    if adapter and base is not None:
        raise InputError("--adapter takes the base out, --base puts it in: give one of them")
    if adapter:
        return list(save_export(target, adapter_checkpoint(source)))
    checkpoint = read_checkpoint(source) if base is None else join_base(source, base)
    card_of(checkpoint, source)
    return list(save_export(target, checkpoint))


def export_cloud(source: Path, target: Path, options: Any) -> Path:
    """Write a cloud in another format with its labels as colours, or its labels alone (``.label``)."""
    import torch

    from pc3d.io import WRITABLE, read, write, write_labels
    from pc3d.viz.colors import label_field, point_colors

    suffix = target.suffix.lower()
    if suffix not in (*WRITABLE, ".label"):
        raise InputError(f"{target}: cannot write '{suffix}' (writable: {' '.join(WRITABLE)} .label)")
    points = read(source)
    field = options.label_field or label_field(points)
    if suffix == ".label":
        if field is None:
            raise InputError(f"{source}: has no label field to export; name it with --label_field")
        return write_labels(target, points.get(field).reshape(-1))
    if options.color != "auto" or field is not None or options.ckpt is not None:
        points_to_color, palette = class_numbers(points, field, options.ckpt)
        mode = "label" if options.color == "auto" else options.color
        points = points.with_attrs(color=torch.from_numpy(point_colors(points_to_color, mode, palette)).float())
    return write(target, points, encoding=options.encoding)


def class_numbers(points: Points, field: str | None, ckpt: str | None) -> tuple[Points, Any]:
    """The cloud with the class numbers of ``field`` as ``segment``, and the palette of a checkpoint.

    Without a checkpoint the codes themselves are coloured.
    """
    import torch

    if field is None:
        if ckpt is not None:
            raise InputError(f"{points.describe()}: has no labels to colour by {ckpt}; name their field: --label_field")
        return points, None
    codes = points.get(field).reshape(-1).long()
    if ckpt is None:
        return points.with_attrs(segment=codes), None
    from pc3d.tasks.checkpoint import card_of, read_checkpoint

    card = card_of(read_checkpoint(ckpt), ckpt)
    if card["label_map"] is not None:
        values, inverse = codes.unique(return_inverse=True)
        codes = torch.tensor([card["label_map"].get(int(code), -1) for code in values], dtype=torch.int64)[inverse]
    return points.with_attrs(segment=codes), card["palette"]
