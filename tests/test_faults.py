"""What breaks in the night, for every trainer: real ranks under torchrun's agent, with a fault put into a run on its way.

A run of 4 steps is made once per system without a fault; what comes back from a fault must equal it in every bit. In the regular
suite each promise that depends on the trainer is shown by all of them, each that `common` keeps by one; the long tests show
everything by all. docs/reliability.md lists them.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
import time

import forks
import pytest
import torch
from runs import ROOT, checkpoint, difference, generated, metrics
from systems import NAMES, SYSTEMS

from common import config
from common.checkpoint import Checkpoints

sys.path.insert(0, str(ROOT / "tests" / "stress"))
from kill import drill
from long import is_flat, long_run

STEPS = 4
OWN = ("loss/", "train/", "metric/", "val/")


def each(*regular: str, names: tuple[str, ...] = NAMES):
    """Parametrise over the systems; those not named here are long tests (none named: all are regular)."""
    marks = lambda name: [pytest.mark.xdist_group(f"faults_{name}")] + [pytest.mark.slow] * bool(regular and name not in regular)
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in names])


class Lab:
    """Runs of one system in one folder."""

    def __init__(self, name: str, folder, data):
        self.system, self.folder, self.data = SYSTEMS[name], folder, data

    def start(self, workspace, *overrides: dict, ranks: int = 2, restarts: int = 0, faults: dict | None = None, data=None) -> forks.Run:
        size = self.system.two if ranks == 2 else self.system.one
        words = self.system.words(data or self.data, self.folder / workspace, {"max_steps": STEPS}, size, *overrides)
        self.started = getattr(self, "started", 0) + 1
        output = self.folder / f"output_{self.started}"
        return forks.start(*words, ranks=ranks if ranks > 1 else 0, restarts=restarts, output=output, faults=faults)

    def run(self, workspace, *overrides, code: int | None = 0, timeout: float = 300, **options) -> str:
        return self.start(workspace, *overrides, **options).end(code, timeout)

    def newest(self, workspace) -> int:
        """The step that a run in this workspace would go on from; every file of it is whole."""
        return (Checkpoints(self.folder / workspace / "checkpoint", say=lambda _: None).load() or {"step": 0})["step"]


@pytest.fixture(scope="session")
def straights():
    return {}


@pytest.fixture
def lab(name, tmp_path, tmp_path_factory):
    """A folder for the runs of one test; checkpoints of 11 million parameters do not stay behind."""
    options = [f"--{key}={value}" for key, value in SYSTEMS[name].synth.items()]
    yield Lab(name, tmp_path, generated(tmp_path_factory, name, *options))
    shutil.rmtree(tmp_path)


@pytest.fixture
def straight(name, lab, straights, tmp_path_factory):
    """The run without a fault: two ranks, validation at steps 2 and 4, checkpoints at both; its samples in `samples`."""
    if name not in straights:
        folder = straights[name] = tmp_path_factory.mktemp(f"straight_{name}")
        whole = Lab(name, folder, lab.data)
        whole.run(".", lab.system.validate, faults={"samples": str(folder / "samples")})
    return straights[name]


@pytest.fixture(scope="session", autouse=True)
def tidy(straights):
    yield
    for folder in straights.values():
        shutil.rmtree(folder)


def logged(folder) -> dict[int, dict]:
    """{step: values that do not depend on the clock}."""
    return {step: {k: v for k, v in row.items() if k.startswith(OWN) and "fps" not in k} for step, row in metrics(folder).items()}


def samples(folder) -> set[tuple[str, str]]:
    """(position, digest of the sample) of all samples that a run has read."""
    return {tuple(json.loads(line)) for line in (folder / "samples").read_text().splitlines()}


def same_end(lab: Lab, workspace, straight) -> None:
    """Every part of the last checkpoint and every logged value are those of the run without a fault."""
    for part in lab.system.parts:
        assert difference(checkpoint(lab.folder / workspace, STEPS, part), checkpoint(straight, STEPS, part)) == []
    mine, whole = logged(lab.folder / workspace), logged(straight)
    assert set(whole) >= set(range(1, STEPS + 1)) and all(len(whole[step]) >= 6 for step in range(1, STEPS + 1))
    assert mine == whole


@each()
def test_stop_signals_and_resumes_leave_no_trace(name, lab, straight):
    """Stopped by SIGUSR1 to rank 1 in the first batch, by SIGTERM twice to rank 0 in a validation; other numbers of workers."""
    signals = {"numbers": [signal.SIGUSR1], "step": 0, "phase": "data", "rank": 1}
    record = {"samples": str(lab.folder / "samples")}
    output = lab.run("run", lab.system.validate, {"workers": 0}, faults={"signal": signals, **record})
    assert "stop signal: saved at step 1" in output and lab.newest("run") == 1
    signals = {"numbers": [signal.SIGTERM, signal.SIGTERM], "step": 1, "phase": "validate|evaluate", "rank": 0}
    output = lab.run("run", lab.system.validate, {"workers": 3}, faults={"signal": signals, **record})
    assert "resumed at step 1" in output and "stop signal: saved at step 2" in output and lab.newest("run") == 2
    assert "resumed at step 2" in lab.run("run", lab.system.validate, faults=record)
    same_end(lab, "run", straight)
    once, again = samples(straight), samples(lab.folder)
    assert len(once) == len({position for position, _ in once}) >= 2 * STEPS
    assert {pair for pair in again if pair[0] in dict(once)} == once  # bit for bit the same, whoever read them


@each("mvdiff")
@pytest.mark.parametrize("whom", ["launcher", "all"])
def test_stop_signal_to_the_launcher_or_all(name, lab, straight, whom):
    """As a scheduler sends it. The ranks save and end well; torchrun itself reports the signal when it was sent to it."""
    go = lab.folder / "go"
    run = lab.start("run", lab.system.validate, faults={"pause": {"step": 1, "file": str(go)}})
    run.wait_for("PAUSED")
    launcher, *others = forks.descendants(run.pid)  # the ranks and their loader workers
    for pid in [launcher] if whom == "launcher" else others:
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.5)
    go.touch()
    output = run.end(None if whom == "launcher" else 0)
    assert "stop signal: saved at step 2" in output and "Traceback" not in output.split("SignalException")[0].rsplit("Process Fork", 1)[0]
    assert "resumed at step 2" in lab.run("run", lab.system.validate)
    same_end(lab, "run", straight)


@each()
def test_bad_steps_are_skipped_on_all_ranks_together(name, lab, straight):
    """On rank 1 alone: the gradient overflows at update 2, the loss is not a number at update 3, and from update 5 on always.

    Both ranks skip; the loss scale halves once; neither weights nor averages nor the schedule move; three in a row end the run.
    """
    nan = {"rank": 1, "steps": [3], "until": 5}
    faults = {"scaler": {"_": 0}, "gradient": {"rank": 1, "factors": {"2": math.inf}}, "loss": nan}
    output = lab.run("run", {"max_steps": 12, "max_bad_steps": 3}, faults=faults, code=None)
    for step in (2, 3, 5, 6, 7):
        assert re.search(rf"non-finite loss or gradient at step {step}\b.*(samples|sequences|positions)", output), (step, output[-3000:])
    assert "non-finite loss or gradient at step 4" not in output and "3 steps in a row had a non-finite loss" in output
    before, after, last = (checkpoint(lab.folder / "run", step) for step in (2, 4, 6))
    moved = [place for place in difference(before["model"], after["model"]) if "num_batches_tracked" not in place]  # nothing reads it
    assert moved == [] != difference(after["model"], last["model"])
    if lab.system.ema:
        averages = [checkpoint(lab.folder / "run", step, "ema") for step in (2, 4, 6)]
        moved = [place for place in difference(averages[0], averages[1]) if "num_batches_tracked" not in place]
        assert moved == [] != difference(averages[1], averages[2])
    runs = [checkpoint(lab.folder / "run", step, "optimizer") for step in (2, 4, 6)]
    assert [run["scaler"]["scale"] for run in runs] == [1024, 512, 512] and [run["skipped"] for run in runs] == [0, 2, 3]
    assert difference(runs[0]["optimizer"]["state"], runs[1]["optimizer"]["state"]) == []
    rows, whole = metrics(lab.folder / "run"), metrics(straight)
    assert [rows[5]["train/lr"], rows[5]["train/skipped"]] == [whole[3]["train/lr"], 2]  # update 4 is the third that counts
    assert lab.newest("run") == 6


@each()
def test_drifting_ranks_are_found_and_nothing_is_saved(name, lab):
    output = lab.run("run", faults={"drift": {"step": 2, "rank": 1}}, code=None)
    assert "the ranks' parameters differ" in output and lab.newest("run") == 2


@each("pi3", "mvdiff")
def test_dead_rank_is_restarted_by_torchrun(name, lab, straight):
    death = {"step": 3, "rank": 1, "once": str(lab.folder / "died")}
    output = lab.run("run", lab.system.validate, restarts=1, faults={"death": death})
    assert (lab.folder / "died").exists() and "resumed at step 2" in output
    same_end(lab, "run", straight)


@each("pi3")
def test_hanging_rank_ends_the_run_by_name(name, lab):
    start = time.monotonic()
    output = lab.run("run", {"timeout": 10, "max_steps": 100}, faults={"hang": {"step": 2, "rank": 1}}, code=None)
    assert "TimeoutError: rank" in output and re.search(r"rank 1 \(host .*\) at step 2 in phase 'train step'", output), output[-3000:]
    assert time.monotonic() - start < 120 and lab.newest("run") == 2


@each("moge", "mvdiff")
def test_full_disk_while_saving(name, lab):
    """A save that fails is told and made up for by the next; only where the last one fails is the run's end not a good one."""
    output = lab.run("run", faults={"full_disk": {"first": 1, "last": 3}})
    assert output.count("checkpoint 2 was NOT saved") == 1 and "training goes on" in output and lab.newest("run") == STEPS
    output = lab.run("run", {"max_steps": 6}, faults={"full_disk": {"first": 5, "last": 99}}, code=None)
    assert "resumed at step 4" in output and "checkpoint 6 was NOT saved" in output and lab.newest("run") == STEPS
    assert not list((lab.folder / "run" / "checkpoint").glob("*.tmp"))


@each("pi3")
@pytest.mark.parametrize("count", [1, 3, 7])
def test_small_data_sets_give_all_ranks_the_same_steps(name, lab, count):
    data = lab.system.pruned(lab.data, lab.folder / "few", count)
    output = lab.run("run", {"workers": 0, "save_every": 100}, data=data)
    assert sorted(metrics(lab.folder / "run")) == list(range(1, STEPS + 1)) and "bad sample" not in output


@each("pi3", "moge", "mvdiff")
def test_world_size_may_change(name, lab, straight):
    """2 ranks, then 1, then 2 again: the same samples in each step, and losses within rounding where no layer counts its batch."""
    record = {"samples": str(lab.folder / "samples")}
    for ranks, steps in ((2, 1), (1, 3), (2, STEPS)):
        lab.run("run", lab.system.validate, {"max_steps": steps, "workers": 0}, ranks=ranks, faults=record)
    once, again = dict(samples(straight)), samples(lab.folder)
    assert len(again) == 2 * STEPS and all(once[position] == digest for position, digest in again)
    mine, whole = metrics(lab.folder / "run"), metrics(straight)
    for step in range(1, STEPS + 1):
        assert mine[step]["loss/loss"] == pytest.approx(whole[step]["loss/loss"], rel=lab.system.tolerance)


@each("moge")
def test_killed_loader_worker(name, lab, straight):
    death = {"call": 2, "once": str(lab.folder / "died")}
    output = lab.run("run", lab.system.validate, {"workers": 1}, faults={"worker_death": death}, code=None)
    assert "a data worker was killed" in output and "lower `workers`" in output, output[-6000:]
    lab.run("run", lab.system.validate)
    same_end(lab, "run", straight)


@each("pi3", "mvdiff")
def test_changed_config_is_told_honoured_or_refused(name, lab, straight):
    lab.run("run", {"max_steps": 2}, lab.system.validate)
    output = lab.run("run", lab.system.validate, lab.system.rate, {"max_steps": 3})
    ((key, rate),) = lab.system.rate.items()
    old = config.read(straight / "config.yaml")
    for part in key.split("."):
        old = old[int(part) if part.isdigit() else part]
    said = re.findall(r"config changed: .*", output)
    assert any(f"{old} -> {rate}" in line or f"'lr': {rate}" in line for line in said) and "config changed: max_steps: 2 -> 3" in said
    assert logged(lab.folder / "run")[2] == logged(straight)[2]
    ratio = logged(lab.folder / "run")[3]["train/lr"] / logged(straight)[3]["train/lr"]
    assert ratio == pytest.approx(rate / old, rel=1e-6)
    output = lab.run("run", lab.system.validate, lab.system.wider, code=None)
    assert "config changed:" in output and re.search(r"(do|does) not fit|instead of|missing|is another one", output), output[-3000:]


@each("moge", names=tuple(name for name in NAMES if SYSTEMS[name].init))
def test_partial_weights_for_a_start_are_refused_by_name(name, lab, straight):
    state = torch.load(straight / "checkpoint" / f"{STEPS:08d}.pt", weights_only=True)
    lost = sorted(state["model"])[0]
    value = state["model"].pop(lost)
    torch.save(state, lab.folder / "partial.pt")
    output = lab.run("run", {lab.system.init: lab.folder / "partial.pt"}, code=None, ranks=1)
    assert lost in output and "missing" in output
    state["model"][lost] = value[..., None].expand(*value.shape, 2).clone()
    torch.save(state, lab.folder / "shape.pt")
    output = lab.run("other", {lab.system.init: lab.folder / "shape.pt"}, code=None, ranks=1)
    assert re.search(rf"{re.escape(lost)}|position embedding is for input_size", output) and "Traceback" in output


@each("pi3")
def test_second_run_in_a_workspace_is_refused(name, lab):
    go = lab.folder / "go"
    first = lab.start("run", {"max_steps": 2}, faults={"pause": {"step": 1, "file": str(go)}})
    first.wait_for("PAUSED")
    output = lab.run("run", {"max_steps": 2}, code=None)
    assert re.search(rf"is in use by another run \(host {os.uname().nodename} pid \d+\)", output)
    go.touch()
    first.end()
    assert sorted(metrics(lab.folder / "run")) == [1, 2]


@each("mvdiff")
def test_broken_samples_are_replaced_counted_and_limited(name, lab):
    """Cut short, empty, missing, and of another size; then none that can be read."""
    data = lab.system.pruned(lab.data, lab.folder / "broken", 7)
    pictures = []
    for sample in sorted(data.glob(lab.system.samples)):
        pictures.append(next(p for p in sorted(data.glob(lab.system.images)) if sample.name in p.parts or p.stem == sample.stem))
    pictures[0].write_bytes(pictures[0].read_bytes()[:100])
    pictures[1].write_bytes(b"")
    pictures[2].unlink()
    output = lab.run("run", {"workers": 0}, data=data)
    assert output.count("bad sample replaced") >= 2, output[-3000:]
    rows = metrics(lab.folder / "run")
    assert rows[STEPS]["train/bad_samples"] >= 1 and all(math.isfinite(row["loss/loss"]) for row in rows.values())
    for picture in data.glob(lab.system.images):
        picture.write_bytes(b"")
    assert "attempts failed" in lab.run("none", {"workers": 0}, data=data, code=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_memory_and_files_stay_flat_over_2000_steps(name, lab):
    figures = long_run(name, 2000, lab.folder, data=lab.data)
    assert is_flat(figures), figures


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_moment_the_run_comes_back_bit_for_bit(name):
    counts = drill(name, kills=10)
    assert counts["bit_exact"] == counts["kills"] == 10 > counts["before_the_first_checkpoint"], counts
    assert counts["most_steps_lost"] <= 2 * counts["save_every"], counts


@each("stereo", "moge", "mvdiff")
def test_means_over_a_log_window_survive_a_stop(name, lab):
    """A log line covers two steps; the run is stopped between them."""
    window = {"log_every": 2, "max_steps": 2}
    lab.run("whole", window)
    stop = {"numbers": [signal.SIGUSR1], "step": 0, "phase": "data", "rank": 1}
    assert "saved at step 1" in lab.run("run", window, faults={"signal": stop})
    lab.run("run", window)
    assert logged(lab.folder / "run") == logged(lab.folder / "whole")
