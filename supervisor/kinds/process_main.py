"""The program of a worker process, run as a file: `python -P process_main.py CALL`; CALL is there for people who look at `ps`.

It is compiled at each start, so it is short: it finds the package it belongs to, whatever the directories it is to import from
hold, and goes on in `process_worker.py`.
"""

from __future__ import annotations

import sys
from os.path import dirname

if __name__ == "__main__":
    sys.path.insert(0, dirname(dirname(dirname(__file__))))
    from supervisor.kinds.process_worker import main

    del sys.path[0]
    main()
