"""torch.distributed in small: start and end, reductions of flags and sums, seeds, stop signals, and a watch on hangs.

Everything works in one process without torchrun as well. Small tensors are reduced where they lie: on the CPU through gloo, so
that a flag of the host needs no wait for the GPU, on CUDA through NCCL.
"""

import atexit
import faulthandler
import gc
import hashlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as td

_place = {"step": -1, "phase": "start", "time": None, "store": None}  # the last mark of `at`, and where the ranks publish theirs


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def init(timeout_s: float = 7200) -> torch.device:
    """Join torchrun's process group, if there is one; return this process's device.

    timeout_s limits collectives and the time between two `at`; evaluations keep the default, as one sample may take a CPU an hour.
    """
    cuda, local, wait = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0)), timedelta(seconds=timeout_s)
    device = torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's default on the newest GPUs; `deterministic` demands it
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not td.is_initialized():
        store, number, world = next(td.rendezvous("env://", timeout=wait))
        store = _place["store"] = _own_store(store, number, world, time.monotonic() + timeout_s)
        own_gpu = cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count()  # NCCL wants one GPU per rank
        wait += timedelta(seconds=15)  # after the watch, which knows step and phase
        backend = "cpu:gloo,cuda:nccl" if own_gpu else "gloo"
        td.init_process_group(backend, store=store, rank=number, world_size=world, timeout=wait)
    threading.Thread(target=_watch, args=(timeout_s,), daemon=True).start()
    atexit.register(_place.update, store=None)  # a thread inside the store would abort the end of the interpreter
    return device


def _own_store(store: td.Store, number: int, world: int, deadline: float) -> td.Store:
    """The part of torchrun's store that is this attempt's alone.

    After a restart the store still holds the addresses of the dead. So each process leaves a token of its own, and the part is
    named by all tokens together: it counts once every rank has read the same ones.
    """
    store.set(f"token/{number}", uuid.uuid4().hex)
    mine = None
    while time.monotonic() < deadline:
        name = hashlib.sha256(b"".join(store.multi_get([f"token/{i}" for i in range(world)]))).hexdigest()
        if store.add(name, int(name != mine)) == world:
            return td.PrefixStore(name, store)
        mine = name
        time.sleep(0.02)
    raise TimeoutError(f"rank {number}: not all of {world} ranks have started")


def shutdown() -> None:
    """Leave the process group. Let go of DDP before: as the group's last owner it would wait for a thread that waits for the GIL."""
    gc.collect()
    _place.update(time=None, store=None)
    if td.is_initialized():
        td.destroy_process_group()


def at(step: int, phase: str) -> None:
    """Mark progress, at every phase of a step. A process without a new mark for timeout_s ends with rank, step and phase."""
    _place.update(step=step, phase=phase, time=time.monotonic())


def _where() -> str:
    return f"rank {rank()} (host {socket.gethostname()}, pid {os.getpid()}) at step {_place['step']} in phase '{_place['phase']}'"


def _watch(timeout_s: float) -> None:
    """Publish this rank's place; end the process when it stands still, naming every rank's place: one of them is the cause."""
    while True:
        time.sleep(min(5.0, timeout_s / 10))
        store, idle = _place["store"], time.monotonic() - (_place["time"] or time.monotonic())
        if idle > timeout_s:
            faulthandler.dump_traceback_later(10, exit=True)  # should the store not answer
            print(f"TimeoutError: {_where()}: no progress for {idle:.0f} s", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
            for key in [f"place/{number}" for number in range(world_size())] if store else []:
                seen, text = store.get(key).decode().split(" ", 1) if store.check([key]) else (time.time(), f"{key} unknown")
                print(f"  seen {time.time() - float(seen):.0f} s ago: {text}", file=sys.stderr, flush=True)
            os._exit(1)
        if store and td.is_initialized():
            store.set(f"place/{rank()}", f"{time.time()} {_where()}, no progress for {idle:.0f} s")


def _reduce(tensor: torch.Tensor, op=td.ReduceOp.SUM) -> torch.Tensor:
    """All-reduce in place; a failure names rank, step and phase."""
    if world_size() > 1:
        try:
            td.all_reduce(tensor, op)
        except RuntimeError as error:
            raise RuntimeError(f"{_where()}: another rank has failed or hangs: {error}") from error
    return tensor


def any_rank(flag: bool) -> bool:
    """True on every rank when flag is true on one."""
    return bool(_reduce(torch.tensor(float(flag))))


def all_sum(values: dict) -> dict[str, float]:
    """Sum each number or 0-d tensor over ranks, in float64 and in one collective. Every rank passes the same keys."""
    device = next((v.device for v in values.values() if isinstance(v, torch.Tensor)), "cpu")
    rows = [torch.as_tensor(v, dtype=torch.float64, device=device).detach().reshape(()) for _, v in sorted(values.items())]
    return dict(zip(sorted(values), _reduce(torch.stack(rows).cpu()).tolist())) if rows else {}


def all_mean(values: dict) -> dict[str, float]:
    """Mean of each entry over ranks."""
    return {key: total / world_size() for key, total in all_sum(values).items()}


def gather(value) -> list:
    """The plain Python value of every rank, in rank order."""
    values = [value] * world_size()
    if world_size() > 1:
        td.all_gather_object(values, value)
    return values


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give all ranks rank 0's buffers. Batch statistics differ by rank between two forward passes of DDP; saved are rank 0's."""
    for buffer in module.buffers() if world_size() > 1 else ():
        td.broadcast(buffer, 0)


def checksum(tensors) -> torch.Tensor:
    """int64 checksum, shape (), of the bits of many tensors in order. Reads each value once and does not wait for the device."""
    total = 0
    for flat in (t.detach().reshape(-1) for t in tensors):
        words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        total = total * 1000003 + words.sum(dtype=torch.int64)  # wraps around
    return torch.as_tensor(total)


def check_drift(parameters, step: int) -> None:
    """RuntimeError on every rank where the parameters are not the same, bit for bit, on all: one pass over them, one reduction."""
    total = checksum(parameters)
    high, low = _reduce(torch.stack([total, -total]), td.ReduceOp.MAX)  # max(-x) is -min(x)
    if high != -low:
        raise RuntimeError(f"the ranks' parameters differ at step {step}: nothing saved; the last checkpoint is good")


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's generators for one step (dropout, diffusion noise) by the arguments alone: a resumed step draws the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank, 1]).generate_state(1, np.uint64)[0]))


def autocast_dtype(amp, device: torch.device) -> torch.dtype | None:
    """dtype for torch.autocast, None for none. amp: bf16 | fp16 | on | off; on is bf16 where the device has it, else fp16."""
    amp = {True: "on", "1": "on", False: "off", "0": "off"}.get(amp, amp)
    if amp not in ("bf16", "fp16", "on", "off"):
        raise ValueError(f"amp must be bf16, fp16, on or off, not {amp!r}")
    cpu = torch.device(device).type != "cuda"
    use = "fp16" if not cpu and (amp == "fp16" or not torch.cuda.is_bf16_supported(including_emulation=False)) else "bf16"
    if amp in ("bf16", "fp16") and amp != use and is_main():
        print(f"amp: {use} instead of {amp} on {device}", flush=True)
    return None if amp == "off" else {"bf16": torch.bfloat16, "fp16": torch.float16}[use]


class StopSignal:
    """Notes SIGTERM and SIGUSR1; `agreed`, asked once per step, gives all ranks the same answer."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.received = True

    def agreed(self) -> bool:
        return any_rank(self.received)
