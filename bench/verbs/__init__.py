"""The verbs of the command line, one module each: `add` states the options, `act` does it.

`act` takes the parsed options and the words as typed, and gives the exit code. Heavy libraries are
imported in it, so that `python -m bench --help` stays quick.
"""

from pathlib import Path

# Where records and training runs go unless --out says otherwise.
RUNS = Path("runs")
