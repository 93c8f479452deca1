"""Skips non-finite steps on all ranks together, without making the host wait for the device.

guard = StepGuard(model, cfg.max_bad_steps, say=log.text)
for step in ...:
    loss.backward(); norm = clip_grad_norm_(...)
    guard.settle()                                   # what the step before this one came to
    lr = lr_at(step - guard.skipped)                 # the schedule does not advance on skipped steps
    optimizer.found_inf = guard.check(loss, norm, f"step {step}, samples {first}..{last}")
    optimizer.step()                                 # fused optimizers read the flag on the device
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class NonFinite(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class StepGuard:
    """Decides for each step whether it counts.

    A step is bad when the loss of any rank, or the gradient norm, is not finite. The flag is made and reduced on the device; the
    host reads it one step later (`settle`), when it has long been computed. BatchNorm statistics of a bad step are put back.
    """

    def __init__(self, model: nn.Module, max_bad_steps: int = 20, skipped: int = 0, say: Callable[[str], None] = print):
        self.stats = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
        self.good_stats = [b.clone() for b in self.stats]
        self.device = next(model.parameters()).device
        self.host_flag = torch.zeros((), pin_memory=self.device.type == "cuda")
        self.read = torch.cuda.Event() if self.device.type == "cuda" else None
        self.pending: str | None = None
        self.max_bad_steps, self.skipped, self.in_row, self.say = max_bad_steps, skipped, 0, say

    @torch.no_grad()
    def check(self, loss: Tensor, grad_norm: Tensor, where: str) -> Tensor:
        """Return the flag (float32 scalar on the device, 1 = skip, equal on all ranks). `where` names the step in the log."""
        flag = (~(torch.isfinite(loss) & torch.isfinite(grad_norm))).float().to(self.device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        for now, before in zip(self.stats, self.good_stats):
            torch.where(flag > 0, before, now, out=now)
        if self.stats:
            torch._foreach_copy_(self.good_stats, self.stats)
        self.host_flag.copy_(flag, non_blocking=True)
        if self.read is not None:
            self.read.record()
        self.pending = where
        return flag

    def settle(self) -> None:
        """Read the last flag, count and report a bad step. Raises NonFinite after too many in a row."""
        if self.pending is None:
            return
        if self.read is not None:
            self.read.synchronize()
        where, self.pending = self.pending, None
        if not self.host_flag.item():
            self.in_row = 0
            return
        self.skipped, self.in_row = self.skipped + 1, self.in_row + 1
        self.say(f"non-finite loss or gradient at {where}: update skipped on all ranks ({self.skipped} so far)")
        if self.in_row >= self.max_bad_steps:
            raise NonFinite(
                f"{self.in_row} steps in a row had a non-finite loss or gradient (last: {where}). Lower lr, set amp to bf16 "
                "or off, or look at these samples; the last checkpoint is untouched."
            )
