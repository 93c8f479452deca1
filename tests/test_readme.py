"""The root README: its two commands exist and the demo behind the first runs in small form; its tables name what is there."""

import re

from runs import ROOT, generated, run


def test_demo_small(tmp_path_factory, tmp_path):
    """Six steps need not beat 'points never move' ; all else happens: stop, resume, table, picture."""
    clips = generated(
        tmp_path_factory, "lbm", "--scenes", "4", "--frames", "8", "--val_scenes", "1", "--val_frames", "8", "--size", "96x128"
    )
    output = run("bench/demo.py", "--steps", "6", "--data", clips, "--workspace", tmp_path / "demo", code=None, timeout=600)
    assert output.count("$ torchrun") == 2 and "SIGTERM" in output and "resumed at step" in output
    for row in ("points never move", "Lucas-Kanade", "LBM before training", "LBM after training", "TensorBoard"):
        assert row in output
    assert (tmp_path / "demo" / "tracks" / "tracks.png").stat().st_size > 1000 and (tmp_path / "demo" / "result.txt").exists()
    assert "training did not beat 'points never move'" in output


def test_commands_and_folders_named_in_the_readme_exist():
    text, make = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w[\w-]*)", text, re.M):
        assert re.search(rf"^{target}:", make, re.M), target
    for script in re.findall(r"\$\(PY\) (\S+\.py)", make):
        assert (ROOT / script).exists(), script
    folders = re.findall(r"\[`(\w+)/`\]\(([\w/.]+)\)", text)
    assert folders
    for name, link in folders:
        assert (ROOT / link).exists() and (ROOT / name / "train.py").exists(), name
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_common_is_small_and_imports_no_folder():
    lines = 0
    for path in (ROOT / "common").glob("*.py"):
        lines += len(path.read_text().splitlines())
        assert not re.search(r"^\s*(from|import) (lbm|stereo|moge|pi3|mvdiff|synth)\b", path.read_text(), re.M), path
    assert lines < 1150, lines


def test_folders_do_not_import_each_other_and_models_import_nothing_from_common():
    systems = ("lbm", "stereo", "moge", "pi3", "mvdiff")
    for name in systems:
        for path in (ROOT / name).glob("*.py"):
            text = path.read_text()
            others = "|".join(other for other in (*systems, "synth", "bench", "tests") if other != name)
            assert not re.search(rf"^\s*(from|import) ({others})\b", text, re.M), path
            if path.name in ("model.py", "loss.py", "metrics.py"):
                assert not re.search(r"^\s*(from|import) common\b", text, re.M), path
