"""Run `python -m d2_balance`, which is the command `d2-balance`."""

import sys

from d2_balance.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
