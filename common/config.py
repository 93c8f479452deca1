"""Configuration: one commented YAML file lists every option; a user's file and then the command line override it."""

import argparse
import json
import math
import os
import re
import sys
from copy import deepcopy
from difflib import SequenceMatcher
from pathlib import Path

import yaml


class Config(dict):
    """A dict whose keys are attributes too, at every depth and inside lists."""

    def __init__(self, values=()):
        super().__init__({k: _wrap(v) for k, v in dict(values).items()})

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(f"the config has no key '{name}'")

    __setattr__ = dict.__setitem__


def _wrap(value):
    return Config(value) if isinstance(value, dict) else [_wrap(v) for v in value] if isinstance(value, list) else value


for _kind in (yaml.SafeLoader, yaml.SafeDumper):  # YAML 1.1 reads 1e-4 as a string: here it is a number
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def read(path) -> Config:
    """Read a YAML file, or a .json file with # and // comments. ValueError names the file and the fault."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".json":  # strings match first, so that "http://..." and "#" inside quotes stay
            tree = json.loads(re.sub(r'("(?:\\.|[^"\\\n])*")|(?:#|//)[^\n]*', lambda m: m[1] or "", text))
        elif any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):  # a few nested ones expand to gigabytes
            raise ValueError("YAML aliases (*name) are not accepted: write the value out")
        else:
            tree = yaml.safe_load(text)
        if not isinstance(tree, dict | None):
            raise ValueError(f"it holds a {type(tree).__name__}, not keys and values")
        return Config(tree or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"config file {path}: {' '.join(str(error).split())}") from None


def _flatten(tree: dict, prefix: str = "") -> dict:
    """{dotted key: value} of every leaf; an empty dict is a leaf."""
    out = {}
    for key, value in tree.items():
        leaf = not isinstance(value, dict) or not value
        out.update({f"{prefix}{key}": value} if leaf else _flatten(value, f"{prefix}{key}."))
    return out


def _fit(default, value, key: str):
    """Return value in the type of the default, or raise ValueError."""
    kind, given = type(default), type(value)
    if default is None or value is None or given is kind is not list:
        return value
    if (kind is float and given is int) or (kind is int and given is float and value.is_integer()):  # max_steps: 1e5
        return kind(value)
    if kind is bool and value in (0, 1):
        return bool(value)
    if kind is str and given in (bool, int):  # YAML reads a bare off as false, 5000 as int
        return ("off", "on")[value] if given is bool else str(value)
    if kind is given is list:
        plain = len({type(v) for v in default}) == 1 and not isinstance(default[0], (dict, list))
        return [_fit(default[0], v, f"{key}[{i}]") for i, v in enumerate(value)] if plain else value
    raise ValueError(f"'{key}' must be of type {kind.__name__}, not {value!r} ({given.__name__})")


def _merge(config: dict, given: dict, defaults: dict, free: tuple, prefix: str = "") -> None:
    """Write `given` into `config` in place, checked against the names and types of `defaults`."""
    for name, value in given.items():
        key, default = f"{prefix}{name}", defaults.get(name)
        if name not in defaults:
            near = [(SequenceMatcher(None, str(name), n).ratio(), k) for k in _flatten(defaults) for n in (k, *k.split("."))]
            raise ValueError(f"unknown key '{key}': did you mean '{prefix}{max(near)[1]}'? --help lists every key")
        if value is None or not isinstance(default, dict):
            config[name] = _fit(default, _wrap(value), key)
        elif not isinstance(value, dict):
            raise ValueError(f"'{key}' must be a section of keys, not {value!r}")
        elif key in free or not default:
            config[name] = _wrap(value)
        else:
            config[name] = deepcopy(default) if config[name] is None else config[name]
            _merge(config[name], value, default, free, key + ".")


def _override(config: Config, key: str, text: str, defaults: Config, free: tuple) -> None:
    """Apply one command-line override in place; inside a free key it may add names, and numbers index lists."""
    default = _flatten(defaults).get(key)
    try:
        value = yaml.safe_load(f"[{text}]" if isinstance(default, list) and text not in ("", "~", "null") and text[0] != "[" else text)
    except yaml.YAMLError:
        value = text
    if isinstance(default, str) and not isinstance(value, (bool, type(None))):
        value = text  # a name such as 2024_01 or 1e5 stays as typed
    *path, last = key.split(".")
    if any(key.startswith(f"{name}.") for name in free):
        for part in path:
            config = config[int(part)] if isinstance(config, list) else config.setdefault(part, Config())
        config[int(last) if isinstance(config, list) else last] = _wrap(value)
    else:
        for part in reversed([*path, last]):
            value = {part: value}
        _merge(config, value, defaults, free)


def _arguments(argv, defaults: Config, aliases: dict):
    """Yield (key, text) from --key value, --key=value, key=value, --flag and --no-flag."""
    tokens, known = list(argv)[::-1], _flatten(defaults)
    while tokens:
        token = tokens.pop()
        name, equals, text = token.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        name = aliases.get(name, name)
        if not equals and not token.startswith("--"):
            raise ValueError(f"unexpected argument '{token}': write --key value or key=value")
        if not equals and name not in known and name.startswith("no_"):
            name, text = aliases.get(name[3:], name[3:]), "false"
        elif not equals:  # the next word is the value; not so after a switch where that word is an override itself
            words = r"(?!--)[^=]*" if isinstance(known.get(name), bool) else r"(?!--)[^\0]*"
            text = tokens.pop() if tokens and re.fullmatch(words, tokens[-1]) else "true"
        yield name, text


def parse(argv, doc: str, reference, aliases: dict | None = None, free: tuple = ()) -> Config:
    """Return the reference config with the values of `--config FILE` and then the overrides of argv.

    reference: YAML file with every key, its default and its comment; --help prints it. aliases: {other name: key}. free: dotted
    keys whose content is taken whole and unchecked. Exits with 0 after --help, with 2 and one line on wrong input.
    """
    if {"--help", "-h"} & set(argv):
        print(f"{doc.strip()}\n\nOptions (--key value, --key=value or key=value; section.key where nested; --config FILE):\n")
        print(Path(reference).read_text(encoding="utf-8"))
        raise SystemExit(0)
    aliases, place = {"config_path": "config"} | (aliases or {}), ""
    try:
        defaults = read(reference)
        config, given = deepcopy(defaults), list(_arguments(argv, defaults, aliases))
        for path in [text for key, text in given if key == "config"]:
            tree, place = read(path), f"config file {path}: "
            _merge(config, {aliases.get(k, k): v for k, v in tree.items()}, defaults, free)
        place = ""
        for key, text in [pair for pair in given if pair[0] != "config"]:
            _override(config, key, text, defaults, free)
        return config
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        print(f"error: {place}{error}", file=sys.stderr)
        raise SystemExit(2) from None


def number(kind: type, low: float, high: float = math.inf):
    """A type for argparse: int or float from `low` to `high`."""

    def convert(text: str):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low}" + f" and at most {high}" * (high < math.inf))
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


def save(config: dict, path) -> None:
    """Write the resolved config as YAML, atomically."""
    text = yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True)
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def diff(old: dict, new: dict) -> list[str]:
    """Lines 'key: old -> new' for every dotted key that differs."""
    a, b = _flatten(old), _flatten(new)
    return [f"{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}" for k in a | b if (k in a, a.get(k)) != (k in b, b.get(k))]
