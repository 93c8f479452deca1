"""Exponential moving average of the trained weights."""

import copy

import torch
from torch import Tensor, nn


def make_ema(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode for the averages; frozen parameters are shared with it, not copied."""
    memo = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, memo).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float = 0.999, skip: Tensor | None = None) -> None:
    """ema = decay * ema + (1 - decay) * model for trained parameters; buffers (batch-norm statistics) are copied.

    skip: scalar on the device, 1 where the step did not count: then the averages stay as they are. The host does not wait for it.
    """
    trained = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    averages, weights = [e for e, _ in trained], [p for _, p in trained]
    if skip is None:
        torch._foreach_lerp_(averages, weights, 1 - decay)
    else:
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, (1 - decay) * (1 - skip))
        torch._foreach_add_(averages, change)
    for e, b in zip(ema.buffers(), model.buffers()):
        e.copy_(b)
