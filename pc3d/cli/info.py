"""``pc3d info``: what a checkpoint is and needs; without one, what is installed here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pc3d.cli.parser import Parser

EXAMPLES = """\
  pc3d info                                        (for bug reports)
  pc3d info runs/demo/checkpoints/best.ckpt
  pc3d info model.safetensors"""

_OPTIONAL = (
    "open3d", "laspy", "lazrs", "pye57", "scikit-image", "h5py", "matplotlib", "tensorboard", "scikit-learn",
    "triton", "spconv", "spconv-cu120", "mamba-ssm", "causal-conv1d", "torch-scatter", "flash-attn",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = Parser("info", "What a checkpoint is and needs; without one, what is installed here.", EXAMPLES)
    parser.add_argument("ckpt", nargs="?", metavar="FILE", help="checkpoint (.ckpt) or export (.safetensors)")
    parser.add_argument("--trust", action="store_true", help="run code inside the checkpoint (your own file only)")
    options = parser.parse_args(arguments)
    rows = _installation() if options.ckpt is None else _checkpoint(options.ckpt, options.trust)
    for name, value in rows:
        print(f"{name + ':':<20}{value}")
    return 0


def _installation() -> Iterator[tuple[str, Any]]:
    from pc3d.ops.backend import cpu_kernels
    from pc3d.tasks.record import environment

    yield from ((name, value) for name, value in environment().items() if name != "command")
    kernels = cpu_kernels()
    yield "C++ kernels", "missing" if kernels is None else ", ".join(kernels.conv_isas())
    found = []
    for name in _OPTIONAL:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    yield "optional", ", ".join(found)


def _checkpoint(path: str, trust: bool) -> Iterator[tuple[str, Any]]:
    from pc3d.tasks.checkpoint import card_of, read_checkpoint

    checkpoint = read_checkpoint(path, trust)
    card, state = card_of(checkpoint, path), checkpoint["state_dict"]
    task = card["task"]
    codes: dict[int, list[int]] = {}
    for code, number in sorted((card["label_map"] or {}).items()):
        codes.setdefault(number, []).append(code)
    yield "task", _name(task)
    yield "backbone", _name(task["init_args"]["backbone"])
    if task["init_args"].get("peft"):
        yield "adapter", _name(task["init_args"]["peft"])
    yield "weights", f"{sum(value.numel() for value in state.values()):,} values ({card['weights']})"
    yield "features", ", ".join(f"{each['name']} ({each['channels']})" for each in card["features"])
    yield "grid size", "none" if card["grid_size"] is None else f"{card['grid_size']:g} m"
    for number, name in enumerate(card["class_names"]):
        own = codes.get(number)
        yield f"class {number}", name + (f" (codes in files: {', '.join(map(str, own))})" if own else "")
    yield from ((name, f"{value:.4g}") for name, value in card["metrics"].items() if name.count("/") < 2)
    yield "made with", ", ".join(f"{name} {number}" for name, number in card["versions"].items())


def _name(config: dict[str, Any]) -> str:
    return str(config["class_path"]).rpartition(".")[2]
