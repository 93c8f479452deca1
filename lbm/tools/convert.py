"""Write the bare released form {'model': weights} from any LBM checkpoint: ours, an official training file, or a state dict.

  python lbm/tools/convert.py -i checkpoint.pt -o lbm.pt
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository root instead of lbm/tools/

import torch

from lbm.eval import stored_config
from lbm.model import LBM, load_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", required=True, type=Path)
    parser.add_argument("-o", "--output", required=True, type=Path)
    args = parser.parse_args()
    model = LBM(**stored_config(args.input))
    for note in load_checkpoint(model, args.input)["notes"]:
        print(note)
    temporary = args.output.with_name(args.output.name + ".tmp")
    torch.save({"model": model.state_dict()}, temporary)
    os.replace(temporary, args.output)
    print(f"{args.output}: {len(model.state_dict())} tensors, without optimizer and config")


if __name__ == "__main__":
    main()
