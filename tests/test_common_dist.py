"""torch.distributed helpers, with real processes under torchrun (two gloo ranks) and without it."""

import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from common import dist


def write_script(tmp_path, script: str) -> None:
    """A script with the modules imported and `out`, a folder."""
    head = """
        import os, signal, sys, time
        from pathlib import Path
        import torch
        from common import dist
        from common.data import BadSamples
        from common.log import Logger
        torch.set_num_threads(1)
        out = Path(sys.argv[1])
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(head) + textwrap.dedent(script))


def environment(root) -> dict:
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(root, tmp_path, script: str, *options) -> subprocess.CompletedProcess:
    """Run a script on two ranks."""
    write_script(tmp_path, script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options]
    command += [str(tmp_path / "script.py"), str(tmp_path)]
    return subprocess.run(command, env=environment(root), capture_output=True, text=True, timeout=120)


def test_without_torchrun():
    assert dist.init().type in ("cpu", "cuda") and (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    dist.at(0, "test"), dist.any_rank(False)
    assert dist.any_rank(True) is True and dist.any_rank(False) is False
    assert dist.all_sum({"b": 2, "a": torch.tensor(1.5)}) == {"a": 1.5, "b": 2.0} and dist.all_sum({}) == {}
    assert dist.gather({"x": 1}) == [{"x": 1}]
    dist.check_drift([torch.tensor([float("nan"), 1.0])], 0)
    dist.shutdown()


def test_step_seeds_are_pure_and_distinct():
    seeds = []
    for key in [(0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 1), (2**40, 0)]:
        dist.seed_step(*key)
        seeds.append(torch.initial_seed())
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**64 for seed in seeds) and any(seed >> 60 for seed in seeds)
    dist.seed_step(3, 4, 1)
    first = torch.rand(3)
    torch.rand(7)
    dist.seed_step(3, 4, 1)
    assert torch.equal(first, torch.rand(3))
    dist.seed_step(3, 5, 1)
    assert not torch.equal(first, torch.rand(3))


def test_autocast_dtype_on_the_cpu(capsys):
    cpu = torch.device("cpu")
    assert dist.autocast_dtype("off", cpu) is None and dist.autocast_dtype(False, cpu) is None
    assert dist.autocast_dtype("on", cpu) is dist.autocast_dtype("bf16", cpu) is dist.autocast_dtype("1", cpu) is torch.bfloat16
    assert capsys.readouterr().out == ""
    assert dist.autocast_dtype("fp16", cpu) is torch.bfloat16 and "bf16 instead of fp16" in capsys.readouterr().out
    with pytest.raises(ValueError, match="amp must be"):
        dist.autocast_dtype("fp8", cpu)


def test_checksum_sees_any_bit_and_the_order():
    tensors = [torch.randn(5), torch.randn(2, 3).bfloat16(), torch.arange(4), torch.tensor([True, False]), torch.zeros(0)]
    base = dist.checksum(tensors)
    assert base.shape == () and base.dtype == torch.int64 and torch.equal(base, dist.checksum([t.clone() for t in tensors]))
    assert base != dist.checksum(tensors[::-1])
    for i, tensor in enumerate(tensors[:4]):
        changed = [t.clone() for t in tensors]
        changed[i].view(torch.uint8).view(-1)[0] ^= 1
        assert dist.checksum(changed) != base, tensor.dtype


def test_two_ranks_reduce_and_agree_to_stop(root, tmp_path):
    """Rank 1 signals itself at steps of its own; both ranks must stop at the same step, and a second signal does no harm."""
    run = torchrun(
        root,
        tmp_path,
        """
        assert dist.init(60) == torch.device("cpu")
        rank = dist.rank()
        assert dist.world_size() == 2 and dist.is_main() == (rank == 0)
        assert dist.any_rank(rank == 1) and dist.any_rank(True) and not dist.any_rank(False)
        sums = dist.all_sum({("b", "a")[rank]: rank, ("a", "b")[rank]: torch.tensor(10.0 + rank)})
        assert sums == {"a": 10.0 + 1, "b": 0 + 11.0}, sums
        assert dist.all_mean({"x": rank}) == {"x": 0.5}
        assert dist.all_sum({"big": 2.0**53 + 2 * rank}) == {"big": 2.0**54 + 2}
        assert dist.gather([rank] * rank) == [[], [1]]
        norm = torch.nn.BatchNorm1d(2)
        norm.running_mean.fill_(rank + 3)
        dist.broadcast_buffers(norm)
        assert norm.running_mean.tolist() == [3, 3]
        bad = BadSamples(1.0, Logger(out / "run").warn)
        bad.add([f"{rank}.png"] * (1 + rank), 4)
        assert bad.total() == 3
        model = torch.nn.Linear(30, 30)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.weight), torch.nn.init.zeros_(model.bias)
        dist.check_drift(model.parameters(), 6)
        with torch.no_grad():
            model.weight[3, 4] += rank * 1e-6
        try:
            dist.check_drift(model.parameters(), 7)
            raise AssertionError
        except RuntimeError as error:
            assert "differ at step 7" in str(error)
        dist.at(0, "signals"), dist.any_rank(False)
        stop = dist.StopSignal()
        for step in range(1000):
            if rank == 1 and step in (17, 18):
                os.kill(os.getpid(), signal.SIGUSR1 if step == 17 else signal.SIGTERM)
            if stop.agreed():
                break
            time.sleep(0.001 * rank)
        (out / f"stopped_{rank}").write_text(str(step))
        dist.at(0, "saving"), dist.any_rank(False)
        dist.shutdown()
        """,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    log = (tmp_path / "run" / "log.txt").read_text()  # every rank's bad samples, each once
    assert log.count("rank 0: WARNING: bad sample replaced: 0.png") == log.count("rank 1: WARNING: bad sample replaced: 1.png") == 1
    assert (tmp_path / "stopped_0").read_text() == (tmp_path / "stopped_1").read_text() == "17"


def test_a_hanging_rank_ends_the_run_with_rank_step_and_phase(root, tmp_path):
    """Rank 1 sleeps in its data at step 3 while rank 0 waits for it in a collective: both places are named, and soon."""
    start = time.monotonic()
    run = torchrun(
        root,
        tmp_path,
        """
        dist.init(3)
        for step in range(100):
            dist.at(step, "data")
            if dist.rank() == 1 and step == 3:
                time.sleep(1000)
            dist.at(step, "backward")
            dist.any_rank(False)
        """,
    )
    assert run.returncode != 0 and time.monotonic() - start < 60
    assert "TimeoutError: rank " in run.stderr and "no progress for" in run.stderr
    for place in ("rank 0 (host ", ") at step 3 in phase 'backward'", "rank 1 (host ", ") at step 3 in phase 'data'"):
        assert place in run.stderr, run.stderr[-3000:]


def test_a_frozen_rank_is_told_by_its_last_mark(root, tmp_path):
    """A frozen process cannot speak: the other names it from what it published last. Two processes without a launcher."""
    script = """
        dist.init(3)
        for step in range(100):
            dist.at(step, "forward")
            if dist.rank() == 1 and step == 2:
                time.sleep(1)  # the watch publishes
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.any_rank(False)
    """
    write_script(tmp_path, script)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {**environment(root), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    start = lambda rank: subprocess.Popen(command, env={**address, "RANK": rank}, stderr=subprocess.PIPE, text=True)
    processes = [start("0"), start("1")]
    try:
        error = processes[0].communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1 and "TimeoutError: rank 0 " in error
    assert any("rank 1" in line and "at step 2 in phase 'forward'" in line for line in error.splitlines()), error[-3000:]


def test_a_dead_rank_ends_the_other_with_a_message(root, tmp_path):
    run = torchrun(
        root,
        tmp_path,
        """
        dist.init(30)
        for step in range(5):
            dist.at(step, "forward")
            if dist.rank() == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                dist.any_rank(False)
            except RuntimeError as error:
                (out / "told").write_text(str(error))
                raise
        """,
    )
    assert run.returncode != 0
    told = (tmp_path / "told").read_text()
    assert "rank 0" in told and "at step 2 in phase 'forward': another rank has failed" in told


def test_restart_after_a_dead_rank_starts_clean(root, tmp_path):
    """torchrun --max-restarts 1: the second attempt meets no marks of the first."""
    run = torchrun(
        root,
        tmp_path,
        """
        dist.init(30)
        if dist.rank() == 1 and not (out / "died").exists():
            (out / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        for step in range(3):
            dist.at(step, "forward")
            assert dist.any_rank(True)
        (out / f"finished_{dist.rank()}").touch()
        dist.shutdown()
        """,
        "--max-restarts",
        "1",
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "finished_0").exists() and (tmp_path / "finished_1").exists()
