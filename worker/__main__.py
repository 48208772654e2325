"""`python -m worker`: run one worker process."""

from __future__ import annotations

import sys

from worker.start import main

sys.exit(main(*sys.argv[1:]))
