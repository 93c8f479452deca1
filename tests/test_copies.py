"""Files that stand in several folders are byte-identical. `python tests/test_copies.py --fix FILE` copies FILE over its twins."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TWINS = [
    ["stereo/dinov2.py", "moge/dinov2.py", "pi3/dinov2.py"],
    ["moge/alignment.py", "pi3/alignment.py"],
]


def test_twins_are_identical():
    for names in TWINS:
        first = (ROOT / names[0]).read_bytes()
        for name in names[1:]:
            assert (ROOT / name).read_bytes() == first, f"{name} differs from {names[0]}: run tests/test_copies.py --fix FILE"


def fix(path: str) -> list[str]:
    """Copy the file over its twins; returns the names written."""
    name = Path(path).resolve().relative_to(ROOT).as_posix()
    twins = [other for names in TWINS if name in names for other in names if other != name]
    if not twins:
        raise SystemExit(f"{name} has no twin: the files with twins are {', '.join(other for names in TWINS for other in names)}")
    for other in twins:
        (ROOT / other).write_bytes((ROOT / name).read_bytes())
    return twins


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--fix":
        raise SystemExit(__doc__)
    print("wrote", *fix(sys.argv[2]))
