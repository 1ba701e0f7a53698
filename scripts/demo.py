"""Sets up `.venv` and runs the demo in it: `python scripts/demo.py [DIRECTORY]`. Needs Python 3.11 or newer only."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there of itself under PYTHONSAFEPATH
    from _setup import main

    sys.exit(main("demo", sys.argv[1:]))
