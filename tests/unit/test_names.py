"""Names and rooms of the product: a class is found by its name alone, and a folder fits on a screen."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

from tests.paths import ROOT

PATHS = [path for package in ("basic_batch", "jobs", "storage", "worker") for path in (ROOT / package).rglob("*.py")]


def test_every_class_has_a_name_of_its_own() -> None:
    where: defaultdict[str, list[Path]] = defaultdict(list)
    for path in PATHS:
        for name in re.findall(r"^ *class (\w+)[(:]", path.read_text(), re.MULTILINE):
            where[name].append(path.relative_to(ROOT))
    assert len(where) > 400
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def test_a_folder_has_at_most_16_modules() -> None:
    modules = Counter(path.parent.relative_to(ROOT) for path in PATHS)
    del modules[Path("storage")]  # one module per subject of the database, all on one level
    assert {folder: count for folder, count in modules.items() if count > 16} == {}
