"""Samples addressed by position: everything about sample p of a run is a pure function of (seed, p).

So a resumed run, another number of workers or another world size sees the same samples, with no loader state to save.
"""

import multiprocessing.context
import multiprocessing.popen_fork
import os
import signal
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from common import dist


def rng(seed: int, position: int, *stream: int) -> np.random.Generator:
    """A generator that is a pure function of its arguments; `stream` tells independent uses at one position apart."""
    words = [word for v in (seed, position, *stream) for word in (v & 0xFFFFFFFF, v >> 32 & 0xFFFFFFFF)]  # 64 bits of each
    return np.random.default_rng(words)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return rng(seed, epoch, n).permutation(n)


def epoch_item(seed: int, position: int, n: int) -> int:
    """Item of a dataset of n at a position: every epoch is a permutation of its own."""
    return int(_permutation(seed, position // n, n)[position % n])


def positions(step: int, global_batch: int, rank: int, world: int, accumulation: int = 1) -> list[list[int]]:
    """This rank's positions of a step, one list per micro-batch; all ranks together take [step * G, (step + 1) * G)."""
    per, rest = divmod(global_batch, world * accumulation)
    if rest or not per:
        raise ValueError(f"global batch {global_batch} does not divide into {world} ranks x {accumulation} micro-batches")
    starts = [step * global_batch + (micro * world + rank) * per for micro in range(accumulation)]
    return [list(range(start, start + per)) for start in starts]


class Guarded:
    """Dataset over read(key, attempt) -> dict of arrays, where `read` chooses another item, deterministically, for each attempt.

    A sample that cannot be read is replaced by the next attempt's. The result gains "position" and "bad", the reasons of the
    failed attempts. RuntimeError when all of `max_tries` fail.
    """

    def __init__(self, read, max_tries: int = 10):
        self.read, self.max_tries = read, max_tries

    def __getitem__(self, key) -> dict:
        bad, last = [], None
        for attempt in range(self.max_tries):
            try:
                position = key[0] if isinstance(key, tuple) else key
                return {**self.read(key, attempt), "position": position, "bad": bad}
            except Exception as error:  # broken files raise anything; what is a bug fails everywhere and ends the run
                bad.append((str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}")[:500])
                last = error
        raise RuntimeError(f"sample {key}: {self.max_tries} attempts failed: {'; '.join(dict.fromkeys(bad))}") from last


class BadSamples:
    """Counts this rank's samples that could not be read, names each once, and stops the run above a fraction."""

    def __init__(self, max_fraction: float = 0.01, say=print):
        self.max_fraction, self.say, self.seen, self.bad, self.named = max_fraction, say, 0, 0, []

    def add(self, bad: list[str], samples: int) -> None:
        """Take the "bad" of a batch of so many samples. RuntimeError above the fraction, once 100 samples were seen."""
        self.seen, self.bad = self.seen + samples, self.bad + len(bad)
        for reason in dict.fromkeys(bad):
            if reason not in self.named:
                self.named.append(reason)
                self.say(f"WARNING: bad sample replaced: {reason}")
        if self.seen >= 100 and self.bad > self.max_fraction * self.seen:
            limit = f"max_bad_fraction is {self.max_fraction:g}"
            raise RuntimeError(f"{self.bad} of {self.seen} samples were unreadable, {limit}; the last: {self.named[-1]}")

    def total(self) -> int:
        """How many there were on all ranks, all of which must call this."""
        return int(dist.all_sum({"bad": self.bad})["bad"])


def stack(samples: list[dict]) -> dict:
    """Collate: arrays and numbers become tensors with a leading batch axis (uint8 stays), all else a list; "bad" is joined."""
    out = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(first, (np.ndarray, np.generic, int, float)):
            if len(shapes := {np.shape(v) for v in values}) > 1:
                raise ValueError(f"cannot batch '{key}' of shapes {sorted(shapes)}")
            values = torch.from_numpy(np.stack(values))
        out[key] = values if key != "bad" else [reason for reasons in values for reason in reasons]
    return out


class _Popen(multiprocessing.popen_fork.Popen):
    terminate = multiprocessing.popen_fork.Popen.kill


class _Worker(multiprocessing.context.ForkProcess):
    """Forked, so that datasets need not be picklable; ended by SIGKILL, as it ignores a SIGTERM."""

    _Popen = staticmethod(_Popen)


class _Context(multiprocessing.context.ForkContext):
    Process = _Worker


def _start_worker(_):
    """One thread each, and a session of its own: a stop signal to the group or to all processes is the trainer's business."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def loader(dataset, batches, workers: int, collate=None, prefetch: int = 2, pin: bool | None = None):
    """Yield collated batches in exactly the order of `batches`, an iterable of lists of keys of `dataset`.

    RuntimeError with a remedy, within seconds, when a worker is killed.
    """
    options = {"num_workers": workers, "worker_init_fn": _start_worker, "prefetch_factor": prefetch if workers else None}
    options["pin_memory"] = torch.cuda.is_available() if pin is None else pin
    options["multiprocessing_context"] = _Context() if workers else None
    options["generator"] = torch.Generator()  # DataLoader draws from it: leave the global one alone
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        iterator = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=collate or stack, **options))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises wherever the trainer is, not here
        yield from iterator
    except (RuntimeError, OSError, EOFError) as error:  # by the moment: found dead, or gone while a tensor was fetched from it
        if not workers or "in DataLoader worker process" in str(error):  # raised by the dataset
            raise
        advice = f"the memory or /dev/shm may be full: lower `workers` (now {workers}). The same command resumes"
        raise RuntimeError(f"a data worker was killed ({error}); {advice}") from error
