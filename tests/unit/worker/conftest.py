"""One thread: the models of engine tests are so small that a second one slows them down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from storage.session import Database
from tests.databases import on_shared_sqlite

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Let torch fill fresh tensors with NaN: a result that depends on what was there before shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """An empty database."""
    with on_shared_sqlite(tmp_path) as database:
        yield database
