"""Write the bare released form {'model': weights} from any LBM checkpoint: ours, an official training file, or a state dict.

  python lbm/tools/convert.py -i checkpoint.pt -o lbm.pt
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository root instead of lbm/tools/

import torch

from lbm.model import read_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", required=True, type=Path)
    parser.add_argument("-o", "--output", required=True, type=Path)
    args = parser.parse_args()
    weights, _ = read_checkpoint(args.input)
    temporary = args.output.with_name(args.output.name + ".tmp")
    torch.save({"model": weights}, temporary)
    os.replace(temporary, args.output)
    print(f"{args.output}: {len(weights)} tensors, without optimizer and config")


if __name__ == "__main__":
    main()
