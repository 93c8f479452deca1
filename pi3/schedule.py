"""Optimizer groups and one-cycle schedule as pure functions of the step."""

import math

from torch import nn

FINAL_DIVISOR = 1e5  # the rate falls to 1/100000 of its start: OneCycle's div 1000 times final_div 100


def lr_at(step: int, total_steps: int, lr: float) -> float:
    """Learning rate in force during optimizer step `step` (0-based): a cosine from `lr` to lr / 1e5, without warm-up."""
    lo = lr / FINAL_DIVISOR
    return lo + (lr - lo) * (1 + math.cos(math.pi * min(1.0, (step + 1) / total_steps))) / 2


def beta1_at(step: int, total_steps: int, lo: float = 0.85, hi: float = 0.95) -> float:
    """AdamW's first beta during step `step`, cycled against the learning rate (cycle_momentum), as the published runs did."""
    return lo + (hi - lo) * (1 - math.cos(math.pi * min(1.0, (step + 1) / total_steps))) / 2


def parameter_groups(model: nn.Module, lr: float, encoder_lr: float, weight_decay: float) -> list[dict]:
    """Groups of the parameters that train: encoder and the rest, each without (vectors and biases) and with weight decay.

    `base_lr` is what `lr_at` starts from. Empty groups are left out.
    """
    groups = []
    for inside, rate in ((True, encoder_lr), (False, lr)):
        trained = [(k, p) for k, p in model.named_parameters() if p.requires_grad and k.startswith("encoder.") == inside]
        for decays in (False, True):
            chosen = [p for k, p in trained if (p.ndim > 1 and not k.endswith(".bias")) == decays]
            if chosen:
                groups.append({"params": chosen, "lr": rate, "base_lr": rate, "weight_decay": weight_decay * decays})
    return groups
