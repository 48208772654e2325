"""The import name `migrations` of an installation. Its scripts are in basic_batch/migrations.

Another distribution may have a top-level package of this name too: this file is all that the two could share.
"""

from __future__ import annotations

from pathlib import Path

_INSTALLED = Path(__file__).resolve().parents[1] / "basic_batch" / "migrations"
_CHECKOUT = Path(__file__).resolve().parents[3] / "migrations"

__path__.append(str(_INSTALLED if _INSTALLED.is_dir() else _CHECKOUT))
