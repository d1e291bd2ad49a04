"""An owner to be killed: starts `stubborn.py` as a `Child`, writes the pids it has to `--report`.owner, and waits.

With `--fork` it first starts a child and then forks a process that execs nothing, so that the lifeline has a second
holder, as after a multiprocessing fork.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from varcas.child import Child

STUBBORN = Path(__file__).with_name("stubborn.py")


def main() -> None:
    """Runs the owner."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--fork", action="store_true")
    options, rest = parser.parse_known_args()
    argv = [sys.executable, str(STUBBORN), "--report", str(options.report), *rest]
    child = Child.start(argv, env=dict(os.environ), log=options.report.with_suffix(".log"))
    forked = 0
    if options.fork:
        forked = os.fork()
        if not forked:
            time.sleep(60)
            os._exit(0)
    print(child.pid, forked, flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print("interrupted", flush=True)


if __name__ == "__main__":
    main()
