"""Data: samples are pure functions of (seed, position), whatever the workers, the world size or the restarts."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

from common import data


def test_rng_is_pure_and_streams_differ():
    draw = lambda *key: tuple(data.rng(*key).integers(0, 2**63, 4))
    keys = [(0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0), (0, 0, 1), (0, 2**32), (2**32, 0), (0, 1, 0), (0, -1)]
    before = torch.get_rng_state()
    assert len({draw(*key) for key in keys}) == len(keys)
    assert [draw(*key) for key in keys] == [draw(*key) for key in keys]
    assert torch.equal(torch.get_rng_state(), before)


def test_every_epoch_is_another_permutation():
    epochs = [[data.epoch_item(3, p, 50) for p in range(e * 50, e * 50 + 50)] for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [data.epoch_item(4, p, 50) for p in range(50)] != epochs[0]
    assert data.epoch_item(3, 7, 1) == 0  # a dataset of one sample


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_positions_cover_the_global_batch_for_any_world_size(accumulation):
    for step in (0, 5):
        for world in (1, 2, 4):
            ranks = [data.positions(step, 24, rank, world, accumulation) for rank in range(world)]
            for micro in range(accumulation):  # each micro-batch too holds the same samples
                size = 24 // accumulation
                together = [p for rank in ranks for p in rank[micro]]
                assert together == list(range(step * 24 + micro * size, step * 24 + (micro + 1) * size))
    for world, batch in ((5, 24), (32, 24)):
        with pytest.raises(ValueError, match="does not divide"):
            data.positions(0, batch, 0, world, 1)


def read(key, attempt):
    """Samples of different cost, so that workers finish out of order."""
    position = key[0] if isinstance(key, tuple) else key
    time.sleep(0.02 * (position % 3))
    noise = data.rng(7, position, attempt)
    if position % 10 == 4 and attempt == 0:
        raise ValueError(f"frame_{position}.png: corrupt")
    return {"image": noise.integers(0, 256, (4, 5, 3), dtype=np.uint8), "x": np.float32(noise.normal()), "name": f"s{position}"}


def test_batches_are_bit_identical_for_any_workers_and_prefetch():
    batches = [data.positions(step, 4, 0, 1)[0] for step in range(6)]
    runs = []
    for workers, prefetch in ((0, 2), (1, 1), (3, 4)):
        before = torch.get_rng_state()
        runs.append(list(data.loader(data.Guarded(read), (b for b in batches), workers, prefetch=prefetch)))
        assert torch.equal(torch.get_rng_state(), before)
    for run in runs:
        assert [batch["position"].tolist() for batch in run] == batches
        for batch, first in zip(run, runs[0]):
            assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (4, 4, 5, 3)
            assert torch.equal(batch["image"], first["image"]) and torch.equal(batch["x"], first["x"])
            assert batch["name"] == first["name"] and batch["bad"] == first["bad"]
    assert [batch["bad"] for batch in runs[0]][1] == ["frame_4.png: corrupt"]
    resumed = list(data.loader(data.Guarded(read), batches[3:], 1))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(resumed, runs[0][3:], strict=True))


def test_keys_may_carry_the_step():
    batch = next(data.loader(data.Guarded(lambda key, attempt: {"step": key[1]}), [[(8, 3), (9, 3)]], 0))
    assert batch["position"].tolist() == [8, 9] and batch["step"].tolist() == [3, 3]


def test_unequal_shapes_name_the_entry():
    with pytest.raises(ValueError, match="cannot batch 'a'"):
        data.stack([{"a": np.zeros(2)}, {"a": np.zeros(3)}])


def test_sample_that_never_reads_fails_with_its_reasons():
    def broken(key, attempt):
        raise KeyError("intrinsics") if attempt else OSError("no_such.png: missing")

    with pytest.raises(RuntimeError, match=r"sample 5: 3 attempts failed: no_such\.png: missing; KeyError: 'intrinsics'$"):
        data.Guarded(broken, max_tries=3)[5]


def test_bad_samples_are_named_once_and_limited():
    said = []
    bad = data.BadSamples(0.05, said.append)
    bad.add(["a.png: corrupt", "a.png: corrupt", "b.png: missing"], 9)
    bad.add(["a.png: corrupt"], 90)
    assert len(said) == 2 and "a.png" in said[0] and "b.png" in said[1]
    bad.add(["c.png: corrupt"], 1)  # 5 of 100: at the limit
    with pytest.raises(RuntimeError, match=r"6 of 101 samples .* 0\.05; the last: d\.png: empty"):
        bad.add(["d.png: empty"], 1)
    with pytest.raises(RuntimeError, match="101 of 101"):
        data.BadSamples(0.99).add(["x: y"] * 101, 101)
    data.BadSamples(0.0).add([], 1000)
    assert bad.total() == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_fails_says_so_itself(workers):
    def broken(key, attempt):
        raise OSError("no_such.png: missing")

    with pytest.raises(RuntimeError, match=r"sample 0: 10 attempts failed: no_such\.png: missing") as error:
        next(data.loader(data.Guarded(broken), [[0]], workers))
    assert "killed" not in str(error.value)


def die(key, attempt):
    if key == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"x": np.zeros(3)}


def test_killed_worker_ends_with_a_clear_message():
    """Also where it dies while the trainer is busy with something else."""
    seen = 0
    with pytest.raises(RuntimeError, match=r"(?s)^a data worker was killed .*lower `workers` \(now 2\)"):
        for _ in data.loader(data.Guarded(die), ([p] for p in range(100)), 2):
            seen += 1
            time.sleep(0.1)
    assert seen <= 6


def test_stop_signal_to_the_process_group_leaves_the_workers_alone():
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, lambda *_: None)

            def storm():  # as torchrun sends it, but at every moment of the workers' start
                for _ in range(500):
                    os.killpg(0, signal.SIGTERM)
                    time.sleep(0.001)

            threading.Thread(target=storm, daemon=True).start()
            status = 7 if sum(1 for _ in data.loader(data.Guarded(read), ([p] for p in range(30)), 2)) == 30 else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
