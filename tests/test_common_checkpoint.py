"""Checkpoints: what was committed survives kill -9, rot, a full disk and a newer format; nothing half-written is ever taken."""

import os
import resource
import signal
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from common import checkpoint
from common.checkpoint import Checkpoints, apply_optimizer, apply_weights, load_weights


def parts(step: int) -> dict:
    """Parts whose every value tells the step; big enough to be written in several calls."""
    full = lambda value: torch.full((40, 50), float(value))
    return {
        "": {"model": {"w": full(step), "h": torch.full((3,), step).bfloat16()}, "config": {"size": [step, 2]}},
        "optimizer": {"state": {0: {"exp_avg": full(step + 0.5)}}, "skipped": step, "best": {"aj": 1.5}, "lr": None},
        "ema": {"model": {"w": full(step + 0.25)}},
    }


def saved(folder, *steps, **options) -> Checkpoints:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, parts(step))
    assert checkpoints.wait() is None
    return checkpoints


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


def holds(state: dict, step: int) -> bool:
    """True where state is exactly what was saved at that step."""
    got = {name: {k: v for k, v in state[name].items() if k not in ("step", "format")} for name in parts(0)}
    return state["step"] == step and state[""]["step"] == step and same(got, parts(step))


def test_round_trip_and_ways_to_name_it(tmp_path):
    assert Checkpoints(tmp_path / "none_yet").load("latest") is None
    saved(tmp_path, 1, 2, 3)
    fresh = lambda: Checkpoints(tmp_path)
    assert holds(fresh().load(), 3) and holds(fresh().load("latest"), 3)
    assert fresh().load("none") is None and fresh().load(None) is None
    assert holds(fresh().load(2), 2) and holds(fresh().load("1"), 1)
    other = Checkpoints("elsewhere")
    assert holds(other.load(tmp_path / "00000002.pt"), 2)
    assert holds(other.load(str(tmp_path)), 3) and holds(other.load(tmp_path / "latest.pt"), 3)
    with pytest.raises(ValueError, match=r"00000007\.pt is missing"):
        fresh().load(7)
    with pytest.raises(ValueError, match=r"nowhere\.pt is missing"):
        fresh().load(tmp_path / "nowhere.pt")
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "released.pt")
    assert torch.equal(fresh().load(tmp_path / "released.pt")[""]["model"]["w"], torch.ones(2))
    assert Checkpoints.owns("a/00000002.pt") and Checkpoints.owns("a/latest.pt") and not Checkpoints.owns("a/lbm.pt")


def test_the_copy_is_taken_at_once(tmp_path):
    weight = torch.ones(1000)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"": {"w": weight}})
    weight.fill_(2)
    assert checkpoints.wait() is None and torch.equal(checkpoints.load()[""]["w"], torch.ones(1000))


def test_foreign_types_are_refused_with_their_place(tmp_path):
    with pytest.raises(TypeError, match=r"optimizer\.a\[1\]\.path holds a PosixPath"):
        Checkpoints(tmp_path).save(1, {"": {}, "optimizer": {"a": [0, {"path": Path("x")}]}})
    value = checkpoint.snapshot({"b": np.float32(2), "c": (1, [torch.Size([2])])})
    assert type(value["b"]) is float and value["c"] == (1, [(2,)])


def test_keeps_the_last_and_every_nth(tmp_path):
    saved(tmp_path, *range(1, 12), keep_last=2, keep_every=5)
    kept = sorted(p.name for p in tmp_path.glob("*.pt") if "_" not in p.name)
    assert kept == ["00000005.pt", "00000010.pt", "00000011.pt", "latest.pt"]
    assert len(list(tmp_path.iterdir())) == 3 * 3 + 1
    assert all(holds(Checkpoints(tmp_path).load(step), step) for step in (5, 10, 11))
    saved(tmp_path / "all", *range(1, 6), keep_last=None)
    assert len(list((tmp_path / "all").glob("0000000?.pt"))) == 5


def test_turning_back_makes_the_new_branch_the_latest(tmp_path):
    saved(tmp_path, 10, 20, 30, keep_last=2)
    branch = Checkpoints(tmp_path, keep_last=2)
    assert holds(branch.load(20), 20)
    branch.save(25, parts(25))
    branch.wait()
    assert holds(Checkpoints(tmp_path).load(), 25)  # not 30, which the run turned back from
    (tmp_path / "00000025.pt").write_bytes(b"")
    assert holds(Checkpoints(tmp_path, say=lambda _: None).load(), 20)


def test_best_weights_stand_beside_the_record(tmp_path):
    checkpoints = saved(tmp_path, 1, keep_last=1)
    checkpoints.save_weights("best_aj.pt", {"model": {"w": torch.ones(3)}})
    checkpoints.save(2, parts(2))
    assert checkpoints.wait() is None and holds(Checkpoints(tmp_path).load(), 2)
    assert torch.equal(load_weights(tmp_path / "best_aj.pt")["w"], torch.ones(3))


def flip(path, at: float):
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def newer(path):
    torch.save({**torch.load(path, weights_only=True), "format": checkpoint.FORMAT + 1}, path)


DAMAGE = {
    **{f"cut at {q}/4": lambda p, q=q: os.truncate(p, p.stat().st_size * q // 4) for q in range(4)},
    "cut by one byte": lambda p: os.truncate(p, p.stat().st_size - 1),
    **{f"flipped bit at {at}": lambda p, at=at: flip(p, at) for at in (0.0, 0.3, 0.5, 0.7, 1.0)},
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "newer format": newer,
    "gone": lambda p: p.unlink(),
}


# Without the record nothing tells of a lost file, and a bit of the archive's frame that carries no data goes unnoticed.
UNSEEN = ("gone", "flipped bit at 0.0", "flipped bit at 1.0")
CASES = [(True, damage) for damage in DAMAGE] + [(False, damage) for damage in DAMAGE if damage not in UNSEEN]


@pytest.mark.parametrize("file", ["00000003.pt", "00000003_optimizer.pt", "00000003_ema.pt"])
@pytest.mark.parametrize(("record", "damage"), CASES)
def test_damaged_newest_is_reported_and_the_one_before_used(tmp_path, damage, file, record):
    saved(tmp_path, 1, 2, 3)
    DAMAGE[damage](tmp_path / file)
    if not record:
        (tmp_path / "latest.pt").unlink()
    elif damage == "newer format":  # as a newer version would have recorded it
        latest = torch.load(tmp_path / "latest.pt", weights_only=True)
        latest["steps"][3][file] = checkpoint._entry(tmp_path / file)
        torch.save(latest, tmp_path / "latest.pt")
    said = []
    assert holds(Checkpoints(tmp_path, say=said.append).load("latest"), 2)
    assert any(file in line and "before" in line for line in said)
    for which in (3, "3", tmp_path / "00000003.pt"):
        with pytest.raises(ValueError, match=file):
            Checkpoints(tmp_path).load(which)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_record_falls_back_to_the_files(tmp_path, damage):
    saved(tmp_path, 1, 2)
    DAMAGE[damage](tmp_path / "latest.pt")
    assert holds(Checkpoints(tmp_path, say=lambda _: None).load(), 2)
    saved(tmp_path, 3)
    assert holds(Checkpoints(tmp_path).load(), 3)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    saved(tmp_path, 1, 2)
    for path in tmp_path.glob("0*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"every checkpoint .* is damaged"):
        Checkpoints(tmp_path, say=lambda _: None).load()


def in_child(work) -> int:
    """Exit status of work() in a forked process; negative: the signal that ended it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("before", [1, 0])
def test_kill_9_at_every_stage_of_a_save(tmp_path, before):
    """The process dies before its k-th call into the file system, or with half of a file written, for every k there is.

    The folder holds a checkpoint already, or none.
    """

    def work(folder, fatal):
        calls = 0

        def doomed(call, half=None):
            def wrapped(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == fatal:
                    if half:
                        half(call, *args)
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapped

        def half_file(call, value, file):
            call(value, file)
            file.truncate(file.tell() // 2)

        torch.save = doomed(torch.save, half_file)
        os.replace, os.fsync, os.open, Path.unlink = map(doomed, (os.replace, os.fsync, os.open, Path.unlink))
        checkpoints = Checkpoints(folder, keep_last=1)
        checkpoints.save(2, parts(2))
        os._exit(0 if checkpoints.wait() is None else 1)

    loaded = []
    for fatal in range(1, 100):
        folder = tmp_path / str(fatal)
        saved(folder, *range(1, 1 + before))
        status = in_child(lambda: work(folder, fatal))  # noqa: B023
        state = Checkpoints(folder, say=lambda _: None).load("latest") or {"step": 0}
        assert state["step"] == 0 or holds(state, state["step"]), f"stage {fatal}"
        loaded.append(state["step"])
        later = saved(folder, 3, keep_last=1)
        assert holds(Checkpoints(folder).load(), 3) and not list(folder.glob("*.tmp")) and later.error is None
        if status == 0:
            break
        assert status == -signal.SIGKILL
    committed = loaded.index(2)
    assert loaded == [before] * committed + [2] * (fatal - committed)
    assert committed > 10 and fatal == 4 * 5 + 3 * before + 1  # five calls a file, and the three old files go


def test_full_disk_keeps_the_old_checkpoint_and_the_run(tmp_path):
    """A limit on file sizes makes the write fail where a full disk would: in the middle of a file."""
    saved(tmp_path, 1)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        said = []
        checkpoints = Checkpoints(tmp_path, say=said.append)
        checkpoints.save(2, parts(2))
        failed = checkpoints.wait()
        clean = not list(tmp_path.glob("*.tmp"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        reported = failed and "checkpoint 2 was NOT saved" in failed and failed in said[0] and "training goes on" in said[0]
        kept = holds(Checkpoints(tmp_path).load(), 1)
        checkpoints.save(3, parts(3))  # there is room again
        os._exit(0 if reported and clean and kept and checkpoints.wait() is None else 1)

    assert in_child(work) == 0
    assert holds(Checkpoints(tmp_path).load(), 3)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoint", say=said.append)
    checkpoints.save(1, parts(1))
    assert "NOT saved" in checkpoints.wait() and len(said) == 1 and "NotADirectory" in said[0]


def test_a_step_saved_or_loaded_is_not_written_again(tmp_path):
    first, again = saved(tmp_path, 1, 2), Checkpoints(tmp_path)
    again.load()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    for checkpoints in (first, again):
        checkpoints.save(2, parts(99))
        assert checkpoints.wait() is None and {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_weights_in_every_wrapping(tmp_path):
    weights = {"a.weight": torch.randn(2, 3), "b": torch.arange(3)}
    for name, value in {
        "bare": weights,
        "model": {"model": weights, "epoch": 3},
        "state_dict": {"state_dict": {f"module.{k}": v for k, v in weights.items()}},
    }.items():
        torch.save(value, tmp_path / f"{name}.pt")
        assert same(load_weights(tmp_path / f"{name}.pt"), weights)
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "w.safetensors")
    assert same(load_weights(tmp_path / "w.safetensors"), weights)


class Touch:
    """Unpickled without restriction this would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_beside_numpy_scalars_are_read(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "epoch": np.float64(3), "step": np.int64(5)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():  # as numpy 1 wrote it
            old.writestr(name, new.read(name).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    for name in ("new.pt", "old.pt"):
        assert load_weights(tmp_path / name).keys() == {"w"}


def test_optimizer_state_of_another_shape_is_refused():
    state, scaler = {}, torch.amp.GradScaler("cpu", enabled=False)
    for width in (3, 4):
        optimizer = torch.optim.AdamW([torch.ones(width, requires_grad=True)], fused=True)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(width)
        optimizer.step()
        saved = {"optimizer": optimizer.state_dict()}
        apply_optimizer(optimizer, scaler, saved)
        state = state or saved
    with pytest.raises(ValueError, match=r"parameter 0 is not of its shape \(4,\)"):
        apply_optimizer(optimizer, scaler, state)


def test_weights_that_lie_are_refused_by_name(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"model": {"w": torch.ones(2)}, "args": Touch(marker)}, tmp_path / "code.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    (tmp_path / "noise.pt").write_bytes(os.urandom(200))
    header = b'{"w":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    (tmp_path / "header.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch marker'\ntR.")
        file.writestr("archive/version", b"3")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=path.name):
            load_weights(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.pt does not exist"):
        load_weights(tmp_path / "gone.pt")
    with pytest.raises(ValueError, match=f"{tmp_path.name} is a folder"):
        load_weights(tmp_path)
    assert not marker.exists()


def test_weights_that_do_not_fit_are_reported_whole():
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "b": torch.nn.Linear(3, 1)})
    good = {k: torch.full_like(v, 5) for k, v in module.state_dict().items()}
    before = {k: v.clone() for k, v in module.state_dict().items()}
    bad = {k: v for k, v in good.items() if k != "b.bias"} | {"a.weight": torch.ones(3, 9), "old.scale": torch.ones(1)}
    names = ("1 missing: b.bias", "1 unexpected: old.scale", "1 of wrong shape: a.weight (3, 9) instead of (3, 2)")
    with pytest.raises(ValueError, match="do not fit") as error:
        apply_weights(module, bad)
    assert all(name in str(error.value) for name in names) and same(dict(module.state_dict()), before)
    report = apply_weights(module, bad, strict=False)
    assert all(name in report for name in names)
    assert same(dict(module.state_dict()), {**good, "a.weight": before["a.weight"], "b.bias": before["b.bias"]})
    assert "all 4" in apply_weights(module, good) and same(dict(module.state_dict()), good)
