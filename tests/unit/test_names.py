"""Names in the product: every class has a name of its own."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from tests.paths import ROOT

PACKAGES = ("basic_batch", "jobs", "storage", "worker")


def test_every_class_has_a_name_of_its_own() -> None:
    where: defaultdict[str, list[Path]] = defaultdict(list)
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for name in re.findall(r"^ *class (\w+)[(:]", path.read_text(), re.MULTILINE):
            where[name].append(path.relative_to(ROOT))
    assert len(where) > 400
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}
