"""The short form of tests/stress/fuzz.py: damaged files of every kind, read by every reader, for some seconds."""

import json

import pytest
from runs import run


@pytest.mark.parametrize("part", [0, 1])
def test_damaged_files_are_refused_by_name_and_do_no_harm(tmp_path, part):
    output = run("tests/stress/fuzz.py", "--seconds", "7", "--examples", "20", "--seed", part, "--keep", tmp_path / "findings")
    counts = json.loads(output.splitlines()[-1])
    assert counts["findings"] == [] and counts["readers"] >= 30 and counts["files"] > 300


def test_the_watch_sees_harm(tmp_path):
    """A reader that executes what it reads, one that forgets the name, one that fills the memory, one that hangs: all are findings."""
    code = """
import os, pickle, sys, time
from pathlib import Path
sys.path.insert(0, 'tests/stress')
import fuzz
path = Path(sys.argv[1])
path.write_bytes(b"cos\\nsystem\\n(S'true'\\ntR.")
fuzz.watch()
fuzz.SECONDS = 1
def forget(path): raise ValueError('broken')
def fill(path): bytes(8 << 30)
def hang(path): time.sleep(1.5)
def good(path): raise ValueError(f'{path}: broken')
for read in (lambda path: pickle.loads(path.read_bytes()), forget, fill, hang, good):
    print(str(fuzz.fault_of(fuzz.Reader('x', read, []), path)).splitlines()[0])
"""
    executed, forgot, filled, hung, good = run("-c", code, tmp_path / "evil.pkl").splitlines()[-5:]
    assert "os.system" in executed and "does not name the file" in forgot and "MemoryError" in filled
    assert "more than 1 s" in hung and good == "None"
