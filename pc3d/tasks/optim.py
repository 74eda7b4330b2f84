"""Optimizers with parameter groups by name, and the learning-rate schedules of the published recipes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from pc3d.errors import InputError


@dataclass
class ParameterGroup:
    """Parameters whose name matches ``pattern`` get their own settings; None keeps the optimizer's.

    Args:
        pattern: regular expression searched in the parameter's name (``block`` finds ``backbone.enc.0.block1.weight``).
        lr: learning rate of the group.
        weight_decay: weight decay of the group.
    """

    pattern: str
    lr: float | None = None
    weight_decay: float | None = None


@dataclass
class OptimizerConfig:
    """The optimizer and its parameter groups.

    Args:
        name: ``adamw``, ``adam`` (its decay is part of the gradient) or ``sgd`` (with momentum, Nesterov by default).
        lr: learning rate of the parameters in no group.
        weight_decay: applied to all parameters, biases and norms included, as the published recipes do.
        groups: the first group whose pattern is found in a parameter's name takes it.
        betas: of AdamW and Adam, default (0.9, 0.999).
        momentum: of SGD, default 0.9.
        nesterov: of SGD, default True.

    Raises:
        InputError: for a negative rate, or an option which this optimizer does not have.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 2e-3
    weight_decay: float = 5e-3
    groups: list[ParameterGroup] = field(default_factory=list)
    betas: tuple[float, float] | None = None
    momentum: float | None = None
    nesterov: bool | None = None

    def __post_init__(self) -> None:
        _refuse_foreign_options(
            self, "optimizer", {"adamw": {"betas"}, "adam": {"betas"}, "sgd": {"momentum", "nesterov"}}
        )
        rates = {"lr": self.lr, "weight_decay": self.weight_decay}
        for group in self.groups:
            rates |= {f"groups[{group.pattern}].{key}": getattr(group, key) for key in ("lr", "weight_decay")}
        for key, value in rates.items():
            if value is not None and value < 0:
                raise InputError(f"optimizer.{key} is {value}: it must not be negative")


@dataclass
class ScheduleConfig:
    """The learning rate over the optimizer steps t = 0..T-1 of the whole run (T is taken from the trainer).

    Args:
        name: ``onecycle`` (torch's, cosine), ``poly`` (``(1 - t / (T + 1)) ** power``), ``cosine``, ``multistep``,
            ``constant``, or ``epoch_cosine``: one rate per epoch, as Point-BERT and its successors have it. Of E epochs
            the one numbered e has ``min_lr + (lr - min_lr) f(max(e - 1, 0))`` with ``f(n) = n / W`` for n < W warm-up
            epochs, ``(1 + cos(pi n / E)) / 2`` after them.
        pct_start: onecycle: fraction of T with a rising rate, default 0.05.
        div_factor: onecycle: peak / first rate, default 10.
        final_div_factor: onecycle: first / last rate, default 1000.
        max_lr: onecycle: peak per parameter group (ungrouped parameters first), default the groups' own rates.
        power: poly: exponent, default 0.9.
        min_factor: cosine: last rate as a fraction of the peak, default 0.
        milestones: multistep: fractions of T at which the rate is multiplied by ``gamma``, default 0.6 and 0.8.
        gamma: multistep: default 0.1.
        min_lr: epoch_cosine: first and last rate of every parameter group, default 0.
        warmup: all but onecycle: fraction of T with a linearly rising rate before the schedule takes over, default 0;
            epoch_cosine: fraction of the epochs.

    Raises:
        InputError: for a value out of range, or an option which this schedule does not have.
    """

    name: Literal["onecycle", "poly", "cosine", "multistep", "constant", "epoch_cosine"] = "onecycle"
    pct_start: float | None = None
    div_factor: float | None = None
    final_div_factor: float | None = None
    max_lr: list[float] | None = None
    power: float | None = None
    min_factor: float | None = None
    milestones: list[float] | None = None
    gamma: float | None = None
    min_lr: float | None = None
    warmup: float | None = None

    def __post_init__(self) -> None:
        options = {
            "onecycle": {"pct_start", "div_factor", "final_div_factor", "max_lr"},
            "poly": {"power", "warmup"},
            "cosine": {"min_factor", "warmup"},
            "multistep": {"milestones", "gamma", "warmup"},
            "constant": {"warmup"},
            "epoch_cosine": {"min_lr", "warmup"},
        }
        _refuse_foreign_options(self, "schedule", options)
        fractions = {"pct_start": self.pct_start, "warmup": self.warmup, "min_factor": self.min_factor}
        fractions |= {f"milestones[{i}]": value for i, value in enumerate(self.milestones or [])}
        for key, value in fractions.items():
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"schedule.{key} is {value}: it is a fraction, between 0 and 1")
        if self.min_lr is not None and self.min_lr < 0:
            raise InputError(f"schedule.min_lr is {self.min_lr}: it must not be negative")
        if self.milestones is not None and sorted(self.milestones) != list(self.milestones):
            raise InputError(f"schedule.milestones {self.milestones} must rise")


def _refuse_foreign_options(config: Any, label: str, options: dict[str, set[str]]) -> None:
    """No option is silently ignored: one that belongs to another optimizer or schedule is an error."""
    if config.name not in options:
        raise InputError(f"{label}.name '{config.name}' is unknown (known: {', '.join(options)})")
    special = set().union(*options.values())
    for item in fields(config):
        if item.name in special - options[config.name] and getattr(config, item.name) is not None:
            have = ", ".join(sorted(options[config.name]))
            raise InputError(f"{label} '{config.name}' has no option '{item.name}' (it has: {have})")


def build_optimizer(config: OptimizerConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """The optimizer over named parameters; frozen ones (``requires_grad`` False) are left out.

    Parameter group 0 holds the parameters in no group, group ``i`` those of ``config.groups[i - 1]``.

    Raises:
        InputError: if a pattern matches no parameter name, or nothing is left to train.
    """
    named = list(parameters)
    members: list[list[nn.Parameter]] = [[] for _ in range(1 + len(config.groups))]
    matched = [any(re.search(group.pattern, name) for name, _ in named) for group in config.groups]
    for group, found in zip(config.groups, matched, strict=True):
        if not found:
            raise InputError(
                f"optimizer.groups: no parameter name contains '{group.pattern}' (names: {_examples(named)})"
            )
    for name, parameter in named:
        if parameter.requires_grad:
            hits = (i for i, group in enumerate(config.groups, 1) if re.search(group.pattern, name))
            members[next(hits, 0)].append(parameter)
    if not any(members):
        raise InputError("every parameter is frozen: nothing to train (freeze)")
    groups: list[dict[str, Any]] = [{"params": members[0], "name": "rest"}]
    for group, params in zip(config.groups, members[1:], strict=True):
        own = {key: getattr(group, key) for key in ("lr", "weight_decay") if getattr(group, key) is not None}
        groups.append({"params": params, "name": group.pattern, **own})
    if config.name != "sgd":
        adam = AdamW if config.name == "adamw" else Adam
        return adam(groups, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas or (0.9, 0.999))
    momentum = 0.9 if config.momentum is None else config.momentum
    nesterov = momentum > 0 if config.nesterov is None else config.nesterov
    return SGD(groups, lr=config.lr, weight_decay=config.weight_decay, momentum=momentum, nesterov=nesterov)


def _examples(named: list[tuple[str, nn.Parameter]]) -> str:
    step = max(1, len(named) // 3)
    return ", ".join(name for name, _ in named[::step][:4]) + ", ..."


def build_schedule(
    config: ScheduleConfig, optimizer: Optimizer, total_steps: int, epochs: int | None = None
) -> LRScheduler:
    """The scheduler to be stepped once after each of the ``total_steps`` optimizer steps of so many ``epochs``.

    Raises:
        InputError: if ``max_lr`` does not have one value per parameter group, or ``epochs`` must be known and are not.
    """
    if config.name == "epoch_cosine":
        if epochs is None or epochs < 1:
            raise InputError("schedule 'epoch_cosine' needs the number of epochs: set trainer.max_epochs")
        peaks = [group["lr"] for group in optimizer.param_groups]
        return LambdaLR(optimizer, [partial(_epoch_cosine, config, total_steps / epochs, epochs, lr) for lr in peaks])
    if config.name != "onecycle":
        return LambdaLR(optimizer, partial(rate_factor, config, total_steps))
    peaks = [group["lr"] for group in optimizer.param_groups] if config.max_lr is None else config.max_lr
    if len(peaks) != len(optimizer.param_groups):
        names = ", ".join(group["name"] for group in optimizer.param_groups)
        raise InputError(f"schedule.max_lr has {len(peaks)} values for {len(optimizer.param_groups)} groups ({names})")
    total_steps = max(total_steps, 2)  # torch divides by total_steps - 1, and by the length of the rise
    rise = 0.05 if config.pct_start is None else config.pct_start
    return OneCycleLR(
        optimizer,
        max_lr=list(peaks),
        total_steps=total_steps,
        pct_start=rise if rise * total_steps != 1 else rise * (1 + 1e-6),
        div_factor=config.div_factor or 10.0,
        final_div_factor=config.final_div_factor or 1000.0,
        cycle_momentum=True,
    )


def rate_factor(config: ScheduleConfig, total_steps: int, step: int) -> float:
    """Learning rate at optimizer step ``step`` over the configured one: a schedule that counts steps alone."""
    warmup = round((config.warmup or 0.0) * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    # Clamped: torch asks once more after the last step, and a resumed run may be longer than planned.
    t, total = min(step - warmup, total_steps - warmup), max(total_steps - warmup, 1)
    return _FACTORS[config.name](config, t, total)


def _epoch_cosine(config: ScheduleConfig, epoch_steps: float, epochs: int, lr: float, step: int) -> float:
    """Learning rate of the epoch that ``step`` belongs to, over the configured one."""
    floor, warmup = config.min_lr or 0.0, round((config.warmup or 0.0) * epochs)
    n = max(int((step + 0.5) / epoch_steps) - 1, 0)  # the published loop steps its scheduler behind an epoch
    rise = n / warmup if n < warmup else (1 + math.cos(math.pi * min(n / epochs, 1))) / 2
    return (floor + (lr - floor) * rise) / lr if lr else 0.0


def _poly(config: ScheduleConfig, t: int, total: int) -> float:
    return (1 - t / (total + 1)) ** (0.9 if config.power is None else config.power)


def _cosine(config: ScheduleConfig, t: int, total: int) -> float:
    floor = config.min_factor or 0.0
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t / total))


def _multistep(config: ScheduleConfig, t: int, total: int) -> float:
    milestones = (0.6, 0.8) if config.milestones is None else config.milestones
    passed = sum(t >= round(fraction * total) for fraction in milestones)
    return (0.1 if config.gamma is None else config.gamma) ** passed


def _constant(config: ScheduleConfig, t: int, total: int) -> float:
    return 1.0


_FACTORS: dict[str, Callable[[ScheduleConfig, int, int], float]] = {
    "poly": _poly,
    "cosine": _cosine,
    "multistep": _multistep,
    "constant": _constant,
}


def freeze_parameters(module: nn.Module, patterns: Iterable[str]) -> list[nn.Module]:
    """Switch off the gradient of every parameter whose name matches one of the regular expressions.

    Returns:
        The modules that this left no trainable parameter, to be kept in eval mode (so that batch statistics do not
        move); what was frozen before, for an adapter, is left as it is.

    Raises:
        InputError: if a pattern matches no parameter name.
    """
    named, frozen = list(module.named_parameters()), set()
    for pattern in patterns:
        hits = [parameter for name, parameter in named if re.search(pattern, name)]
        if not hits:
            raise InputError(f"freeze: no parameter name contains '{pattern}' (names: {_examples(named)})")
        for parameter in hits:
            parameter.requires_grad_(False)
            frozen.add(id(parameter))
    whole = [m for m in module.modules() if not any(p.requires_grad for p in m.parameters())]
    return [m for m in whole if any(id(p) in frozen for p in m.parameters())]
