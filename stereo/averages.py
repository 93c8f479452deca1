"""Means of what a run logs, over the steps between two log lines."""

import torch
from torch import Tensor

from common import dist


class Averages:
    """Means of losses and metrics over the micro-batches of the steps since the last log line, and over the ranks.

    Sums stay on the device; values that are not finite are left out.
    """

    def __init__(self):
        self.names: list[str] = []
        self.sums = torch.zeros(0, 2, dtype=torch.float64)  # per name: sum and count

    def add(self, logs: dict[str, Tensor]) -> None:
        """Take the values of a micro-batch, scalars on one device; the names of a window are the same on all ranks."""
        values = torch.stack([value.double() for value in logs.values()])
        known = values.isfinite()
        pairs = torch.stack([torch.where(known, values, 0.0), known.double()], 1)
        self.sums = self.sums + pairs if self.names == list(logs) else pairs
        self.names = list(logs)

    def state(self) -> list[dict]:
        """The sums of each rank, for a checkpoint. Every rank takes part."""
        return dist.gather(dict(zip(self.names, self.sums.tolist())))

    def load(self, ranks: list[dict], device: torch.device) -> None:
        """Take a state up again; with another number of ranks one takes it all."""
        mine = ranks[dist.rank()] if len(ranks) == dist.world_size() else {}
        if len(ranks) != dist.world_size() and dist.is_main() and ranks:
            mine = {name: torch.tensor([part[name] for part in ranks], dtype=torch.float64).sum(0).tolist() for name in ranks[0]}
        self.names = list(mine)
        self.sums = torch.tensor(list(mine.values()), dtype=torch.float64, device=device).view(-1, 2)

    def take(self) -> dict[str, float]:
        """The means so far, NaN where no value was finite; starts anew. Every rank takes part."""
        pairs = dict(zip(self.names, self.sums.tolist()))
        total = dist.all_sum({f"{name} {i}": pair[i] for name, pair in pairs.items() for i in (0, 1)})
        self.__init__()
        return {name: total[f"{name} 0"] / (total[f"{name} 1"] or float("nan")) for name in pairs}
