"""Parameter-efficient fine-tuning: attach an adapter to a frozen backbone, train it, take it off again."""

from __future__ import annotations

import abc
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import nn

from pc3d.config import Configurable
from pc3d.errors import InputError
from pc3d.nn.adaptable import Adaptable, AdapterPart, BlockAdapter
from pc3d.nn.backbone import Backbone, PointNetwork
from pc3d.peft.weights import is_adapted, lies_on_another, restore_weight
from pc3d.points import Points

_NAME = re.compile(r"[A-Za-z_]\w*")
AnyModule = TypeVar("AnyModule", bound=nn.Module)
Place = TypeVar("Place")


class Adaptation(Configurable, abc.ABC):
    """A way to adapt a backbone: what it inserts where.

    Attributes:
        mergeable: whether the result can be written into the weights of the backbone, see :func:`merge`.
    """

    mergeable: bool = False

    @abc.abstractmethod
    def insert(self, backbone: Backbone, name: str) -> None:
        """Put new parts called ``name`` into a backbone whose parameters are frozen; only theirs will train.

        Raises:
            InputError: if the backbone has no place for them; nothing has been inserted then.
        """


@dataclass(frozen=True)
class Attached:
    """An adapter in a backbone: what it was made from, and its names in the state dict, task layers included."""

    method: Adaptation
    added: frozenset[str]


def attached(backbone: PointNetwork) -> dict[str, Attached]:
    """The adapters of a backbone, by name, in the order they were attached."""
    return backbone.__dict__.setdefault("_attached", {})


def attach(backbone: Backbone, method: Adaptation, name: str = "default") -> Attached:
    """Freeze a backbone, adapters it has already included, and insert a new one, which trains.

    The running statistics of the backbone's own norms never change from here on, in training mode neither: the adapter
    and the untouched backbone together are the adapted model. Its drop path stays on in training, unless nothing of
    the backbone trains. Layers of the backbone that no pre-training brings (its
    ``task_layers``) train as they are, belong to the adapter's file, and stay trained when it is taken off.

    Raises:
        InputError: if the name is taken or no identifier, the method finds no place in this backbone or one that
            another adapter passes by, or its task layers have learned with another adapter.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"peft: adapter name '{name}' must be letters, digits and _")
    if name in attached(backbone):
        raise InputError(f"peft: this {type(backbone).__name__} has an adapter '{name}' already")
    if backbone.task_layers and attached(backbone):
        raise InputError(
            f"peft: '{backbone.task_layers[0]}' of this {type(backbone).__name__} trains with its adapter "
            f"'{next(iter(attached(backbone)))}': it takes no second one (pc3d.peft.Combined joins several)"
        )
    before, trained = set(backbone.state_dict()), [p for p in backbone.parameters() if p.requires_grad]
    backbone.requires_grad_(False)
    for layer in backbone.task_layers:
        backbone.get_submodule(layer).requires_grad_(True)
    try:
        method.insert(backbone, name)
        _check_reached(backbone)
    except InputError:
        _remove(backbone, name, keep=False)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    task = tuple(f"{layer}." for layer in backbone.task_layers)
    added = frozenset(key for key in backbone.state_dict() if key not in before or key.startswith(task))
    found = attached(backbone)[name] = Attached(method, added)
    backbone.kept_in_eval = _fixed(backbone)
    for module in backbone.kept_in_eval:
        module.eval()
    return found


def _check_reached(backbone: Backbone) -> None:
    """Raise an InputError if a part stands where another one passes by."""
    for outer in backbone.modules():
        for part in outer.adapters.values() if isinstance(outer, Adaptable) else ():
            passed = cast(BlockAdapter, part).passes_by
            for place, module in outer.named_modules():
                if module is not outer and isinstance(module, passed) and len(cast(Adaptable, module).adapters):
                    who = type(part).__name__.removesuffix("Part")
                    raise InputError(
                        f"peft: an adapter around '{place}' would do nothing: {who} runs the layers inside by itself; "
                        "adapters of weights (LoRA, BitFit, ...) go with it"
                    )


def _fixed(backbone: Backbone) -> list[nn.Module]:
    """Modules to keep in eval mode: norms of the base; all of it if nothing in it trains."""
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        return list(backbone.children())
    learning = _learning(backbone)
    norms = (m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    return [norm for norm in norms if id(norm) not in learning]


def _learning(backbone: PointNetwork) -> set[int]:
    """Identities of the modules that belong to adapters or are task layers."""
    roots = [*parts_of(backbone), *(backbone.get_submodule(layer) for layer in backbone.task_layers)]
    return {id(module) for root in roots for module in root.modules()}


def parts_of(backbone: nn.Module, name: str | None = None) -> list[AdapterPart]:
    """The outermost parts of one adapter, or of all."""
    parts = [m for m in backbone.modules() if isinstance(m, AdapterPart)]
    return [part for part in parts if name is None or part.adapter == name]


def detach(backbone: Backbone, name: str = "default") -> None:
    """Take an adapter out: what is left is bit for bit what was there before, but for task layers.

    The backbone stays frozen; ``backbone.requires_grad_()`` thaws it.
    """
    _known(backbone, name)
    _remove(backbone, name, keep=False)
    _forget(backbone, name)


def prepare(backbone: PointNetwork, clouds: Callable[[int], Iterable[Points]]) -> None:
    """Let adapters look at training clouds before the first step, with the pre-trained weights in place.

    Args:
        clouds: so many training clouds, evenly from all of them, in batches and as the backbone gets them; asked by
            the adapters that want some (:class:`~pc3d.peft.PointPEFT`).
    """
    for module in backbone.modules():
        if isinstance(module, Adaptable):
            for part in module.adapters.values():
                assert isinstance(part, BlockAdapter)
                part.prepare(module, clouds)


def merge(backbone: Backbone, name: str = "default") -> None:
    """Write an adapter into the weights of the backbone, and take it out: same outputs, no cost.

    It is written also while it does not act (:func:`use`).

    Raises:
        InputError: if the adapter computes something that no weight can hold, or was attached on top of another one;
            nothing has been merged then.
    """
    method = _known(backbone, name).method
    if not method.mergeable:
        raise InputError(f"peft: {type(method).__name__} is not linear in the weights: it cannot be merged")
    if any(is_adapted(module) and lies_on_another(module, name) for module in backbone.modules()):
        raise InputError(f"peft: adapter '{name}' lies on another one: merge that one first")
    _remove(backbone, name, keep=True)
    _forget(backbone, name)


def use(backbone: Backbone, *names: str) -> None:
    """Let these adapters act, and no others; no name: the backbone as it was."""
    for name in names:
        _known(backbone, name)
    for part in parts_of(backbone):
        part.active = part.adapter in names


@contextlib.contextmanager
def disabled(backbone: Backbone) -> Iterator[None]:
    """Inside, the backbone gives what it gave before anything was attached."""
    parts = parts_of(backbone)
    before = [part.active for part in parts]
    use(backbone)
    try:
        yield
    finally:
        for part, active in zip(parts, before, strict=True):
            part.active = active


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: those that train, and all."""

    tunable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.tunable / max(self.total, 1)
        return f"{self.tunable:,} of {self.total:,} parameters train ({share:.2f} %)"


def count_parameters(module: nn.Module) -> ParameterCounts:
    parameters = list(module.parameters())
    return ParameterCounts(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def places(
    backbone: Backbone, kind: type[AnyModule] | tuple[type[AnyModule], ...], patterns: Sequence[str] | None, who: str
) -> list[tuple[str, AnyModule]]:
    """Modules of a kind as :func:`choose` takes them."""
    every = [(name, module) for name, module in base_modules(backbone) if isinstance(module, kind)]
    return choose(backbone, every, patterns, who)


def base_modules(backbone: Backbone) -> list[tuple[str, nn.Module]]:
    """Modules by name, without those of adapters and task layers."""
    learning = _learning(backbone)
    return [(name, module) for name, module in backbone.named_modules() if id(module) not in learning]


def choose(
    backbone: Backbone, every: Sequence[tuple[str, Place]], patterns: Sequence[str] | None, who: str
) -> list[tuple[str, Place]]:
    """Modules of the backbone whose name matches a pattern; without patterns those inside blocks.

    Raises:
        InputError: if there are none, a pattern matches none (names what there is), or is no regular expression.
    """
    if patterns is None:
        blocks = {
            id(m) for b in backbone.modules() if b is not backbone and isinstance(b, Adaptable) for m in b.modules()
        }
        chosen = [(name, module) for name, module in every if id(module) in blocks]
        what = "inside its blocks; name some with targets"
    else:
        check_patterns(f"{who}.targets", patterns)
        unused = [p for p in patterns if not any(re.search(p, name) for name, _ in every)]
        chosen = [(name, module) for name, module in every if any(re.search(p, name) for p in patterns)]
        what = f"that '{unused[0]}' matches" if unused else ""
        chosen = [] if unused else chosen
    if not chosen:
        some = ", ".join(name for name, _ in every[:: max(1, len(every) // 4)][:4]) or "none"
        raise InputError(f"peft: {who} finds no layer in {type(backbone).__name__} {what} (it has: {some})")
    return chosen


def check_rate(option: str, value: float) -> None:
    """Raise an InputError that names the option if a dropout is no probability."""
    if not 0 <= value <= 1:
        raise InputError(f"{option}: {value} is no probability")


def check_patterns(who: str, patterns: Iterable[str]) -> None:
    """Raise an InputError that names what is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{who}: '{pattern}' is no regular expression: {error}") from error


def _known(backbone: Backbone, name: str) -> Attached:
    if name not in attached(backbone):
        there = ", ".join(attached(backbone)) or "none"
        raise InputError(f"peft: this {type(backbone).__name__} has no adapter '{name}' (it has: {there})")
    return attached(backbone)[name]


def _remove(backbone: Backbone, name: str, keep: bool) -> None:
    for module in list(backbone.modules()):
        if isinstance(module, Adaptable) and name in module.adapters:
            part = module.adapters[name]
            assert isinstance(part, BlockAdapter)
            part.remove(module)
            del module.adapters[name]
        if is_adapted(module):
            restore_weight(module, name, keep)


def _forget(backbone: Backbone, name: str) -> None:
    del attached(backbone)[name]
    if not attached(backbone):
        backbone.kept_in_eval = ()
