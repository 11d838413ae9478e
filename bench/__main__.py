"""`python -m bench <verb>`; see bench/cli.py and bench/verbs/."""

import sys

from bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
