"""Optimizer, learning-rate schedule and moving average, from the `optimizer` and `lr_scheduler` sections of a config."""

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from moge.arithmetic import arithmetic

SCHEDULES = {  # kind: parameters it needs, and those it may have
    "LambdaLR": (("lr_lambda",), ()),
    "StepLR": (("step_size",), ("gamma",)),
    "MultiStepLR": (("milestones",), ("gamma",)),
    "ExponentialLR": (("gamma",), ()),
    "ConstantLR": ((), ("factor", "total_iters")),
    "LinearLR": ((), ("start_factor", "end_factor", "total_iters")),
    "CosineAnnealingLR": (("T_max",), ("eta_min",)),
    "SequentialLR": (("schedulers", "milestones"), ()),
}


def build_optimizer(model: nn.Module, config: dict) -> torch.optim.Optimizer:
    """Optimizer from {"type": name in torch.optim, "params": [{"params": {"include": [glob], "exclude": [glob]}, "lr": ...},
    ...]}.

    A parameter belongs to the group of which some include and no exclude pattern matches its full name (`*` crosses dots).
    ValueError for one that requires a gradient and is in no group or in two, for a group without any, and for options that the
    optimizer does not have; parameters that require no gradient are left out.
    """
    kind = getattr(torch.optim, str(config["type"]), None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ValueError(f"optimizer type {config['type']!r} is not in torch.optim")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    owner: dict[str, int] = {}
    groups = []
    options = {k: v for k, v in config.items() if k not in ("type", "params")}
    for i, group in enumerate(config["params"]):
        patterns = {"include": ["*"], "exclude": [], **group.get("params", {"params": None})}
        sound = len(patterns) == 2 and all(isinstance(v, list) for v in patterns.values())
        if not sound or not isinstance(group.get("lr", options.get("lr")), int | float):
            needs = "params {include, exclude}, lists of patterns, and lr, a number"
            raise ValueError(f"optimizer group {i} needs {needs}; it is {dict(group)}")
        include, exclude = patterns["include"], patterns["exclude"]
        names = [
            name
            for name in named
            if any(fnmatchcase(name, g) for g in include) and not any(fnmatchcase(name, g) for g in exclude)
        ]
        for name in names:
            if owner.setdefault(name, i) != i:
                raise ValueError(f"parameter {name} is in the optimizer groups {owner[name]} and {i}")
        groups.append({**group, "params": [named[name] for name in names]})
    missing = [name for name in named if name not in owner]
    if missing:
        raise ValueError(f"{len(missing)} parameters are in no optimizer group, the first is {missing[0]}")
    if empty := [i for i, group in enumerate(groups) if not group["params"]]:
        raise ValueError(f"optimizer group {empty[0]} has no parameters: its patterns are {config['params'][empty[0]]['params']}")
    try:
        optimizer = kind(groups, **options)
    except TypeError as error:
        raise ValueError(f"optimizer {config['type']}: {error}") from None
    if unknown := {key for group in config["params"] for key in group} - {"params", *optimizer.defaults}:
        raise ValueError(f"optimizer {config['type']} has no option '{min(unknown)}', but {', '.join(optimizer.defaults)}")
    return optimizer


def lr_factors(config: dict | None, step: int, groups: int) -> list[float]:
    """Factor on each parameter group's base learning rate for the optimizer step number `step` (0-based), a pure function.

    config: {"type", "params"} named as in torch.optim.lr_scheduler (SCHEDULES): LambdaLR (lr_lambda: an expression in `epoch`,
    which is the step, or a list with one per group), StepLR, MultiStepLR, ExponentialLR, ConstantLR, LinearLR, CosineAnnealingLR
    (eta_min 0), SequentialLR (schedulers, milestones; each scheduler counts from its own start). None: 1.
    """
    if config is None:
        return [1.0] * groups
    kind, p = config["type"], config.get("params", {})
    if kind == "SequentialLR":
        milestones = [0, *p["milestones"]]
        if len(milestones) != len(p["schedulers"]):
            raise ValueError(
                f"SequentialLR with {len(p['schedulers'])} schedulers needs one milestone fewer, not {len(p['milestones'])}"
            )
        i = max(i for i, start in enumerate(milestones) if step >= start)
        return lr_factors(p["schedulers"][i], step - milestones[i], groups)
    if kind == "LambdaLR":
        expressions = p["lr_lambda"] if isinstance(p["lr_lambda"], list) else [p["lr_lambda"]] * groups
        if len(expressions) != groups:
            raise ValueError(f"LambdaLR has {len(expressions)} expressions for {groups} parameter groups")
        return [float(arithmetic(str(e), epoch=step)) for e in expressions]
    if kind == "StepLR":
        factor = p.get("gamma", 0.1) ** (step // p["step_size"])
    elif kind == "MultiStepLR":
        factor = p.get("gamma", 0.1) ** sum(step >= m for m in p["milestones"])
    elif kind == "ExponentialLR":
        factor = p["gamma"] ** step
    elif kind == "ConstantLR":
        factor = p.get("factor", 1 / 3) if step < p.get("total_iters", 5) else 1.0
    elif kind == "LinearLR":
        start, end, n = p.get("start_factor", 1 / 3), p.get("end_factor", 1.0), p.get("total_iters", 5)
        factor = start + (end - start) * min(step, n) / n
    elif kind == "CosineAnnealingLR" and not p.get("eta_min"):
        factor = (1 + math.cos(math.pi * step / p["T_max"])) / 2
    else:
        raise ValueError(f"lr_scheduler {kind!r} with {sorted(p)}: {', '.join(SCHEDULES)}; CosineAnnealingLR with eta_min 0")
    return [factor] * groups


def check_schedule(config: dict | None, groups: int) -> None:
    """ValueError for a schedule with a misspelt or missing parameter or a wrong value, also in the later parts of a sequence."""
    if config is None:
        return
    kind, given = config.get("type"), config.get("params") or {}
    needed, others = SCHEDULES.get(kind, ((), given))
    if wrong := sorted(given.keys() - {*needed, *others} | {*needed} - given.keys()):
        raise ValueError(f"lr_scheduler {kind}: '{wrong[0]}' is unknown or missing; it takes {', '.join(needed + others)}")
    try:
        lr_factors(config, 0, groups)
    except (KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"lr_scheduler {kind} with {given}: {type(error).__name__} {error}") from None
    for part in given.get("schedulers", ()):
        check_schedule(part, groups)


def set_lr(optimizer: torch.optim.Optimizer, config: dict | None, step: int) -> list[float]:
    """Set every group's learning rate for optimizer step `step`; the base rate is kept in the group as `initial_lr`. Returns
    the rates.
    """
    for group, factor in zip(optimizer.param_groups, lr_factors(config, step, len(optimizer.param_groups))):
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return [group["lr"] for group in optimizer.param_groups]


def set_trained(optimizer: torch.optim.Optimizer, config: dict | None, step: int) -> bool:
    """Let gradients flow only to groups whose rate is not 0 at this step (`skip_zero_lr_backward`); True where that is a change."""
    changed = False
    for group, factor in zip(optimizer.param_groups, lr_factors(config, step, len(optimizer.param_groups))):
        for p in group["params"]:
            changed |= p.requires_grad != (factor != 0)
            p.requires_grad_(factor != 0)
    return changed


@torch.no_grad()
def update_ema(
    average: Sequence[Tensor], current: Iterable[Tensor], updates: int, decay: float = 0.999, skip: Tensor | None = None
) -> int:
    """average = decay * average + (1 - decay) * current, in place; the first update copies. Returns updates + 1.

    The number of updates so far belongs into the checkpoint: a resumed average must not be overwritten. skip: scalar on the
    device, 1 where the step did not count: then the averages stay as they are, and the host does not wait to know.
    """
    current = list(current)
    if skip is not None:
        change = torch._foreach_sub(current, list(average))
        torch._foreach_mul_(change, (1 - skip) * (1 - decay if updates else 1))
        torch._foreach_add_(list(average), change)
    elif updates == 0:
        torch._foreach_copy_(list(average), current)
    else:
        torch._foreach_lerp_(list(average), current, 1 - decay)
    return updates + 1
