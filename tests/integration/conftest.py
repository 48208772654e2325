from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, named `tiny`."""
    from tests.models import save_tiny  # imports torch

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")
