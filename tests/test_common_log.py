"""Log: every value is written once, resumed runs leave no double lines, and a folder belongs to one run at a time."""

import json
import os
import resource
import signal
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import config, io, log
from common.log import Averages, Logger, Progress, due


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_scalars_and_images_read_back_by_tensorboard(tmp_path):
    logger = Logger(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    for step in (1, 2, 3):
        logger.scalars(step, {"loss/total": 1 / 3 / step, "val/aj": step})
    logger.image(3, "val/tracks", picture)
    logger.close()
    assert lines(tmp_path) == [{"step": s, "loss/total": 1 / 3 / s, "val/aj": s} for s in (1, 2, 3)]
    events = board(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(s, float(np.float32(1 / 3 / s))) for s in (1, 2, 3)]
    (tmp_path / "tb.png").write_bytes(events.Images("val/tracks")[0].encoded_image_string)
    assert (io.read_image(tmp_path / "tb.png") == picture).all()
    assert (io.read_image(tmp_path / "vis" / "step_00000003" / "val_tracks.png") == picture).all()


def test_resumed_run_drops_what_comes_after(tmp_path):
    first = Logger(tmp_path)
    for step in range(2, 12, 2):
        first.scalars(step, {"loss": step})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "lo')  # killed while writing
    second = Logger(tmp_path)  # from the checkpoint of step 5
    for step in (6, 8):
        second.scalars(step, {"loss": -step})
    second.scalars(8, {"val": 1})
    second.close()
    want = [(2, 2), (4, 4), (6, -6), (8, -8)]
    assert [(row["step"], row["loss"]) for row in lines(tmp_path) if "loss" in row] == want
    assert lines(tmp_path)[-1] == {"step": 8, "val": 1}
    assert [(e.step, e.value) for e in board(tmp_path).Scalars("loss")] == want


def test_other_ranks_write_nothing(tmp_path):
    logger = Logger(tmp_path / "run", {"a": 1}, main=False)
    logger.scalars(1, {"loss": 1})
    logger.text("x")
    logger.image(1, "x", np.zeros((2, 2, 3), np.uint8))
    logger.close()
    assert not (tmp_path / "run").exists()


def test_text_goes_to_stdout_and_file(tmp_path, capsys):
    logger = Logger(tmp_path)
    logger.text("hello")
    assert "hello\n" in capsys.readouterr().out
    assert (tmp_path / "log.txt").read_text().splitlines()[0].endswith(" hello")


def test_changed_config_is_printed_on_resume(tmp_path, capsys):
    def run(cfg):
        child, _ = in_child(lambda writer: Logger(tmp_path, cfg))  # a process of its own, as a run is
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return (tmp_path / "log.txt").read_text() if (tmp_path / "log.txt").exists() else ""

    assert run({"lr": 0.1, "model": {"width": 3}}) == ""
    assert run({"lr": 0.1, "model": {"width": 3}}) == ""
    text = run({"lr": 0.2, "model": {"width": 4}})
    assert "config changed: lr: 0.1 -> 0.2" in text and "config changed: model.width: 3 -> 4" in text
    assert len(text.splitlines()) == 2
    assert config.read(tmp_path / "config.yaml") == {"lr": 0.2, "model": {"width": 4}}


def test_full_disk_ends_the_log_not_the_run(tmp_path):
    def run(writer):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        logger = Logger(tmp_path)
        logger.scalars(1, {"loss": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))  # also for stdout, where that is a file
        for step in range(2, 30):
            logger.scalars(step, {"loss": step})
            logger.image(step, "x", np.zeros((50, 50, 3), np.uint8))
            logger.text("x" * 100)
        logger.close()
        os.write(writer, b"reported" if logger.failed else b"unnoticed")

    child, says = in_child(run)
    assert os.read(says, 100) == b"reported"
    os.waitpid(child, 0)


def in_child(work) -> tuple[int, int]:
    """Start work() in a forked process; return (pid, read end of a pipe that work may write to)."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            work(writer)
            status = 0
        except SystemExit as end:
            os.write(writer, str(end.code).encode())
        finally:
            os._exit(status)
    os.close(writer)
    return child, reader


def test_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path):
    def hold(writer):
        log.lock(tmp_path)
        os.write(writer, b"locked")
        if not os.fork():  # a data worker outlives its trainer for a while: it must not hold the lock
            time.sleep(20)
        time.sleep(20)

    first, first_says = in_child(hold)
    assert os.read(first_says, 100) == b"locked"
    second, second_says = in_child(hold)
    message = os.read(second_says, 1000).decode()
    assert os.waitpid(second, 0)[1] != 0
    assert f"pid {first}" in message and os.uname().nodename in message and str(tmp_path) in message and "in use" in message
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    third, third_says = in_child(hold)  # the file is stale now
    assert os.read(third_says, 1000) == b"locked" and f"pid {third}" in (tmp_path / "lock").read_text()
    os.kill(third, signal.SIGKILL)
    os.waitpid(third, 0)


def test_logger_with_a_config_takes_the_lock(tmp_path):
    def hold(writer):
        Logger(tmp_path, {"a": 1})
        os.write(writer, b"locked")
        time.sleep(20)

    first, says = in_child(hold)
    assert os.read(says, 100) == b"locked"
    second, says = in_child(hold)
    assert f"pid {first}" in os.read(says, 1000).decode()
    os.waitpid(second, 0)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)


def test_progress_lines_carry_all_figures(tmp_path, capsys):
    progress = Progress(1000, 100, Logger(tmp_path))
    for _ in range(10):
        time.sleep(0.01)
        progress.waited(0.005)
    scalars = progress.update(110, loss=0.25, lr=1e-4, samples=4)
    assert 0.01 <= scalars["time/step"] < 0.1 and scalars["time/data"] == pytest.approx(0.005)
    assert scalars["time/samples_per_s"] == pytest.approx(4 / scalars["time/step"]) and 0.01 < scalars["mem/peak_gb"] < 100
    line = capsys.readouterr().out
    for text in ("step 110/1000", "loss 0.25", "lr 0.0001", "samples/s", "data ", "%", "mem ", "GB", "left 00:"):
        assert text in line
    assert progress.update(111, loss=0.25, lr=1e-4, samples=4)["time/data"] == 0
    progress.close()


def test_progress_is_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = Progress(10, 4, Logger(tmp_path))
    progress.update(6, loss=0.5, lr=0.1, samples=2)
    progress.close()
    assert "6/10" in capsys.readouterr().err and not (tmp_path / "log.txt").exists()


def test_averages_leave_out_what_is_not_finite_and_go_on_after_a_stop():
    first, second, other = Averages(), Averages(), Averages()
    first.add({"loss": torch.tensor([1.0, 4.0, torch.nan]), "epe": torch.tensor(2.0)})
    first.add({"loss": torch.tensor([torch.inf]), "rare": torch.tensor(torch.nan)})
    second.load(first.state(), torch.device("cpu"))
    second.add({"loss": torch.tensor([4.0]), "epe": torch.tensor(0.0)})
    assert second.take() == {"loss": 3.0, "epe": 1.0} and second.take() == {}
    other.load([*first.state(), {"loss": [7.0, 1.0], "more": [1.0, 2.0]}], torch.device("cpu"))  # of two ranks
    assert other.take() == {"loss": 4.0, "epe": 2.0, "more": 0.5}


def test_due_is_every_so_many_steps_or_never():
    assert [step for step in range(1, 8) if due(step, 3)] == [3, 6] and not due(6, 0) and not due(6, None)


def test_names_in_the_lock_follow_the_owner(tmp_path):
    child, says = in_child(lambda writer: (log.lock(tmp_path), os.write(writer, (tmp_path / "lock").read_bytes())))
    assert os.read(says, 200).decode() == f"host {os.uname().nodename} pid {child}"
    os.waitpid(child, 0)
