"""Sets up `.venv`, then lint, types and tests: `python scripts/test.py [PYTEST ARGUMENT]…`. Needs Python 3.11 only."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there of itself under PYTHONSAFEPATH
    from _setup import main

    sys.exit(main("test", sys.argv[1:]))
