"""Config: the file is the list of options, the command line wins, and wrong input ends with one line and exit code 2."""

import argparse
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from common import config

REFERENCE = """\
# where results go
workspace: out
checkpoint: latest     # latest | none | a step
amp: "on"              # bf16 | fp16 | off
lr: 0.1                # learning rate
steps: 100
flip: true             # mirror images
note: null
size: [384, 512]
train:
  # weight decay
  decay: 1e-2
  url: "http://a//b#c" # where from
data:
  root: here
  sets: [{name: a, weight: 1.0}]
"""


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "default.yaml"
    path.write_text(REFERENCE)
    return path


@pytest.fixture
def parse(reference):
    aliases = {"output": "workspace", "flip_it": "flip"}
    return lambda *argv: config.parse(argv, "Trains a thing.", reference, aliases, free=("data",))


def refused(capsys, parse, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    return line


def test_help_prints_every_key_default_and_comment(parse, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--lr", "3", "--help")
    out = capsys.readouterr().out
    assert end.value.code == 0 and "Trains a thing." in out
    for text in ("# where results go", "lr: 0.1", "# learning rate", "decay: 1e-2", "# weight decay", "flip: true"):
        assert text in out


def test_defaults_and_attribute_access(parse):
    cfg = parse()
    assert cfg.lr == 0.1 and cfg.train.decay == 0.01 and cfg["train"]["url"] == "http://a//b#c"
    assert cfg.data.sets[0].name == "a"
    with pytest.raises(AttributeError, match="no key 'learning'"):
        _ = cfg.learning


def test_every_way_to_write_an_override(parse):
    for argv in (["--lr", "1e-4"], ["--lr=1e-4"], ["lr=1e-4"]):
        assert parse(*argv).lr == 1e-4
    assert parse("--train.decay", "3").train.decay == 3.0 and parse("train.decay=.5").train.decay == 0.5
    assert parse("--output", "x").workspace == "x" and parse("--size", "1,2").size == [1, 2] == parse("size=[1, 2]").size
    assert parse("lr=1", "lr=2").lr == 2.0
    assert parse("--train.url=http://x/?a=b").train.url == "http://x/?a=b"
    assert type(parse("--lr", "1").lr) is float and type(parse("--steps", "1e5").steps) is int
    assert parse("--lr", "-1").lr == -1


def test_switches(parse):
    assert parse("--no-flip").flip is False and parse("--no_flip").flip is False and parse("--flip").flip is True
    assert parse("--flip", "1").flip is True and parse("flip=0").flip is False
    assert parse("--flip", "false").flip is False and parse("--flip=off").flip is False
    cfg = parse("--flip", "lr=2")  # a switch does not swallow an override
    assert cfg.flip is True and cfg.lr == 2
    assert parse("--no-flip-it").flip is False
    assert parse("--amp").amp == "on" and parse("--no-amp").amp == "off" and parse("--amp", "off").amp == "off"
    assert parse("--amp", "--lr", "2").amp == "on"


def test_strings_stay_as_typed(parse):
    assert parse("--workspace", "2024_01").workspace == "2024_01" and parse("--workspace", "1e5").workspace == "1e5"
    assert parse("--checkpoint", "5000").checkpoint == "5000" and parse("--checkpoint", "none").checkpoint == "none"
    assert parse("--note", "7").note == 7 and parse("--note", "null").note is None
    assert parse("--workspace", "null").workspace is None and parse("--size", "null").size is None
    assert parse("--workspace", "a: b: [").workspace == "a: b: ["


def test_unknown_key_names_the_nearest(parse, capsys, tmp_path):
    assert "did you mean 'steps'" in refused(capsys, parse, "--stepz", "3")
    assert "did you mean 'train.decay'" in refused(capsys, parse, "--decay", "3")
    assert "unknown key 'train.dekay': did you mean 'train.decay'" in refused(capsys, parse, "train.dekay=3")
    (tmp_path / "mine.yaml").write_text("train: {dekay: 1}")
    line = refused(capsys, parse, "--config", str(tmp_path / "mine.yaml"))
    assert "mine.yaml" in line and "'train.dekay'" in line and "'train.decay'" in line


@pytest.mark.parametrize(
    "argv",
    [
        ["--steps", "2.5"], ["--steps", "x"], ["--lr", "fast"], ["--lr", "true"], ["--flip", "3"], ["--steps"], ["--train", "3"],
        ["--size", "a,b"], ["size=[1.5,2]"], ["steps={a: 1}"], ["--no-steps"], ["size={a: 1}"],
    ],
)  # fmt: skip
def test_wrong_type(parse, capsys, argv):
    key = argv[0].removeprefix("--").removeprefix("no-").split("=")[0]
    line = refused(capsys, parse, *argv)
    assert f"'{key}" in line and "must be" in line


def test_stray_argument(parse, capsys):
    assert "unexpected argument 'lr'" in refused(capsys, parse, "lr", "3")


def test_file_then_command_line(parse, tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-4\namp: off\ncheckpoint: 500\nsteps: null\noutput: there\ntrain:\n  decay: 5\n")
    cfg = parse("--config_path", str(tmp_path / "a.yaml"), "--train.decay=6")
    assert (cfg.lr, cfg.amp, cfg.checkpoint, cfg.steps, cfg.workspace) == (1e-4, "off", "500", None, "there")
    assert cfg.train == {"decay": 6.0, "url": "http://a//b#c"}


@pytest.mark.parametrize(
    "text", ["amp: [1]", "lr: '3'", "flip: 3", "steps: true", "train: 3", "train: [1]", "workspace: 1.5", "size: 3", "size: [a]"]
)
def test_wrong_type_in_a_file(parse, capsys, tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    line = refused(capsys, parse, "--config", str(tmp_path / "a.yaml"))
    assert f"'{text.split(':')[0]}" in line and "must be" in line and "a.yaml" in line


def test_json_with_comments(parse, tmp_path):
    text = '{ # first\n "lr": 1e-4, // second "x"\n "train": {"url": "https://h//p#q \\" // no"}, // {\n "note": "a // b"}\n#'
    (tmp_path / "a.json").write_text(text)
    cfg = parse("--config", str(tmp_path / "a.json"))
    assert cfg.lr == 1e-4 and cfg.train.url == 'https://h//p#q " // no' and cfg.note == "a // b" and cfg.steps == 100


def test_free_section_is_taken_whole(parse, tmp_path):
    (tmp_path / "a.yaml").write_text("data:\n  sets: [{name: b, extra: 1}, {name: c}]\n")
    cfg = parse("--config", str(tmp_path / "a.yaml"), "data.sets.1.name=d", "--data.new.depth", "3")
    assert cfg.data == {"sets": [{"name": "b", "extra": 1}, {"name": "d"}], "new": {"depth": 3}}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("tag.yaml", "lr: !!python/object/apply:os.system ['touch {marker}']", "could not determine a constructor"),
        ("alias.yaml", "a: &a [1, 1]\nb: &b [*a, *a]\n", "aliases"),
        ("deep.yaml", "[" * 5000, ""),
        ("deep.json", "[" * 50000, ""),
        ("list.yaml", "- a\n- b\n", "it holds a list, not keys"),
        ("word.json", "true", "it holds a bool, not keys"),
        ("broken.json", '{"lr": 1,}', "line 1"),
        ("bytes.yaml", "\0\1", ""),
        ("missing.yaml", None, "No such file"),
    ],
)
def test_hostile_or_broken_file_is_refused_by_name(parse, capsys, tmp_path, name, text, reason):
    marker = tmp_path / "marker"
    if text is not None:
        (tmp_path / name).write_text(text.replace("{marker}", str(marker)))
    line = refused(capsys, parse, "--config", str(tmp_path / name))
    assert name in line and reason in line and not marker.exists()


def test_save_reads_back_equal_and_diff_names_changes(parse, tmp_path):
    cfg = parse("lr=1e-5", "--note", "'1e-4'", "amp=off")
    assert cfg.note == "1e-4"
    config.save(cfg, tmp_path / "config.yaml")
    assert config.read(tmp_path / "config.yaml") == cfg == parse("--config", str(tmp_path / "config.yaml"))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["sets"] == [{"name": "a", "weight": 1.0}]
    new = parse("lr=1e-5", "--note", "'1e-4'", "amp=off", "train.decay=1", "size=[1,2]")
    assert config.diff(cfg, cfg) == []
    assert config.diff(cfg, new) == ["size: [384, 512] -> [1, 2]", "train.decay: 0.01 -> 1.0"]
    assert config.diff({"a": None}, {}) == ["a: None -> absent"]


@pytest.mark.parametrize("text, reason", [("0", "0: must be at least 1"), ("x", "invalid int value"), ("1.5", "invalid int value")])
def test_numbers_of_an_argparse_line_are_within_their_limits(capsys, text, reason):
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=config.number(int, 1))
    parser.add_argument("--share", type=config.number(float, 0, 1))
    args = parser.parse_args(["--limit", "3", "--share", "0.5"])
    assert (args.limit, args.share) == (3, 0.5)
    for words, told in ((["--limit", text], reason), (["--share", "2"], "2: must be at least 0 and at most 1")):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert told in capsys.readouterr().err


LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=5)
BRANCHES = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
TREES = st.recursive(LEAVES, BRANCHES, max_leaves=8).map(json.dumps)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=80), st.binary(max_size=80), TREES))
def test_read_gives_a_config_or_a_value_error(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for name in ("fuzz.yaml", "fuzz.json"):
        (folder / name).write_bytes(content.encode("utf-8", "ignore") if isinstance(content, str) else content)
        try:
            assert isinstance(config.read(folder / name), config.Config)
        except ValueError as error:
            assert name in str(error)
