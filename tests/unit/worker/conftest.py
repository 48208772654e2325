"""Engine tests run on models so small that a second thread only gets in the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from storage.session import Database
from tests.databases import on_sqlite

torch.set_num_threads(1)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """An empty record."""
    with on_sqlite(tmp_path) as database:
        yield database
