#!/usr/bin/env python3
"""Train or evaluate a detector: `d2-balance train` under the name that Detectron2's projects have.

    train_net.py --config-file FILE [--num-gpus N] [--resume] [KEY VALUE ...]
    train_net.py --config-file FILE --eval-only MODEL.WEIGHTS FILE
    torchrun --nproc-per-node N train_net.py --config-file FILE [--resume] [KEY VALUE ...]

docs/training.md says more.
"""

import sys

from d2_balance.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
