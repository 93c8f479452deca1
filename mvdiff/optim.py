"""Which parameters train and how: selection, groups, learning rate, moving average; pure functions of the step."""

import math

import torch
from torch import Tensor, nn

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def select_trainable(unet: nn.Module, suffixes: list[str] | None = None, freeze_unused: bool = True) -> dict[str, nn.Parameter]:
    """Set requires_grad and return the parameters that train, by name.

    `suffixes` None: all. Otherwise those of the modules whose dotted name ends with one of the suffixes (["joint_mid"]: the
    cross-domain layers and their norms); ValueError for a suffix that no name ends with. `freeze_unused` leaves out attn2.to_q,
    attn2.to_k and norm2: with a single image token their gradient is exactly zero, and DistributedDataParallel would wait for it.
    """
    names = [name for name, _ in unet.named_modules()]
    for suffix in suffixes or []:
        if not any(name.endswith(suffix) for name in names):
            raise ValueError(f"trainable_modules {suffix!r}: no module of the UNet has a name that ends so")
    chosen = {name for name in names if suffixes is None or name.endswith(tuple(suffixes))}
    trained = {}
    for name, parameter in unet.named_parameters():
        parents = name.split(".")
        wanted = suffixes is None or any(".".join(parents[:i]) in chosen for i in range(1, len(parents)))
        unused = ".transformer_blocks." in name and any(part in name for part in (".attn2.to_q.", ".attn2.to_k.", ".norm2."))
        parameter.requires_grad_(wanted and not (unused and freeze_unused))
        if parameter.requires_grad:
            trained[name] = parameter
    return trained


def parameter_groups(trained: dict[str, nn.Parameter], lr: float, camera_embedding_lr_mult: float = 1.0) -> list[dict]:
    """Optimizer groups: the camera and domain embedding with its own rate, all others; "base_lr" holds each one's rate."""
    groups = []
    for camera, rate in ((False, lr), (True, lr * camera_embedding_lr_mult)):
        params = [p for name, p in trained.items() if ("class_embedding" in name) == camera]
        if params:
            groups.append({"params": params, "lr": rate, "base_lr": rate})
    return groups


def lr_factor(schedule: str, step: int, warmup: int, total: int, default_lr: float = 1e-3) -> float:
    """What the learning rate is multiplied by at the optimizer's step 0, 1, 2, ...; with warm-up the first step has rate 0.

    `schedule`: constant, constant_with_warmup, linear, cosine, cosine_with_restarts (one cycle) or polynomial (power 1, down
    to 1e-7: an absolute rate, hence `default_lr`, the optimizer's default rate: 1e-3 where rates are given per group only).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"lr_scheduler {schedule!r} is unknown")
    if schedule == "constant":
        return 1.0
    if step < warmup:
        return step / max(1, warmup)
    if schedule == "constant_with_warmup":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return max(0.0, 1 - progress)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule == "cosine_with_restarts":
        return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (progress % 1.0)))
    end = 1e-7
    return end / default_lr if step > total else ((default_lr - end) * (1 - progress) + end) / default_lr


def ema_decay(
    update: int,
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_ema_warmup: bool = False,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
) -> float:
    """Decay of update 1, 2, ...: (1 + s) / (10 + s) with s = update - update_after_step - 1, at most `decay`; 0 while s <= 0.
    With `use_ema_warmup` 1 - (1 + s / inv_gamma)^-power."""
    s = max(0, update - update_after_step - 1)
    if s <= 0:
        return 0.0
    value = 1 - (1 + s / inv_gamma) ** -power if use_ema_warmup else (1 + s) / (10 + s)
    return max(min_decay, min(decay, value))


@torch.no_grad()
def ema_update(shadows: list[Tensor], parameters: list[Tensor], decay: float, skip: Tensor | None = None) -> None:
    """shadow += (1 - decay) * (parameter - shadow), in place; nothing where `skip` () is 1: a step that does not count. Frozen
    parameters need no shadow."""
    torch._foreach_lerp_(shadows, parameters, 1 - decay if skip is None else [(1 - decay) * (1 - skip)] * len(shadows))
