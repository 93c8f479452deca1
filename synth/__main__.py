"""Write a data set of generated scenes with exact ground truth, in the layout that a folder trains on:

python -m synth {lbm,stereo,moge,pi3,mvdiff} OUT [options]
"""

import argparse
import importlib
from pathlib import Path

WRITERS = ("lbm", "stereo", "moge", "pi3", "mvdiff")


def image_size(text: str) -> tuple[int, int]:
    """'128x160' -> (128, 160): height x width."""
    try:
        height, width = (int(v) for v in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write HEIGHTxWIDTH, as in 128x160") from None
    if min(height, width) < 8:
        raise argparse.ArgumentTypeError(f"{text!r} is too small: at least 8 pixels a side")
    return height, width


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m synth", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{" + ",".join(WRITERS) + "}")
    for kind in WRITERS:
        module = importlib.import_module(f"synth.{kind}")
        sub = kinds.add_parser(kind, description=module.__doc__, help=module.__doc__.splitlines()[0],
                               formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("out", type=Path, help="folder to write to")
        sub.add_argument("--seed", type=int, default=0, help="scene i is a pure function of (seed, i)")
        sub.add_argument("--size", type=image_size, default=module.SIZE, metavar="HxW",
                         help=f"image size (default {module.SIZE[0]}x{module.SIZE[1]})")
        sub.add_argument("--workers", type=int, default=1, help="processes")
        module.arguments(sub)
        sub.set_defaults(write=module.write)
    args = parser.parse_args(argv)
    args.write(args.out, args)


if __name__ == "__main__":
    main()
