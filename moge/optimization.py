"""Optimizer, learning-rate schedule and moving average, from the `optimizer` and `lr_scheduler` sections of a config."""

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from moge.arithmetic import arithmetic


def build_optimizer(model: nn.Module, config: dict) -> torch.optim.Optimizer:
    """Optimizer from {"type": name in torch.optim, "params": [{"params": {"include": [glob], "exclude": [glob]}, "lr": ...},
    ...]}.

    A parameter belongs to the group of which some include and no exclude pattern matches its full name (`*` crosses dots).
    ValueError for one that requires a gradient and is in no group or in two; parameters that require none are left out.
    """
    kind = getattr(torch.optim, str(config["type"]), None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ValueError(f"optimizer type {config['type']!r} is not in torch.optim")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    owner: dict[str, int] = {}
    groups = []
    for i, group in enumerate(config["params"]):
        include, exclude = group["params"].get("include", ["*"]), group["params"].get("exclude", [])
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
    options = {k: v for k, v in config.items() if k not in ("type", "params")}
    return kind(groups, **options)


def lr_factors(config: dict | None, step: int, groups: int) -> list[float]:
    """Factor on each parameter group's base learning rate for the optimizer step number `step` (0-based), a pure function.

    config: {"type", "params"} named as in torch.optim.lr_scheduler: LambdaLR (lr_lambda: an expression in `epoch`, which is the
    step, or a list with one per group), StepLR, MultiStepLR, ExponentialLR, ConstantLR, LinearLR, CosineAnnealingLR (eta_min
    0), SequentialLR (schedulers, milestones; each scheduler counts from its own start). None: 1.
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
        raise ValueError(
            f"lr_scheduler {kind!r} with {sorted(p)}: LambdaLR, StepLR, MultiStepLR, ExponentialLR, ConstantLR, LinearLR, "
            "CosineAnnealingLR with eta_min 0, or SequentialLR of these"
        )
    return [factor] * groups


def set_lr(optimizer: torch.optim.Optimizer, config: dict | None, step: int) -> list[float]:
    """Set every group's learning rate for optimizer step `step`; the base rate is kept in the group as `initial_lr`. Returns
    the rates.
    """
    for group, factor in zip(optimizer.param_groups, lr_factors(config, step, len(optimizer.param_groups))):
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return [group["lr"] for group in optimizer.param_groups]


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
