"""Other distributions that own one of bASIC's top-level import names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import packages_distributions
from typing import Final

DISTRIBUTION: Final = "basic-batch"
NAMES: Final = ("basic_batch", "jobs", "storage", "worker")


def shared_names(owners: Mapping[str, Sequence[str]] | None = None) -> Iterator[tuple[str, str]]:
    """Yield each import name that other distributions install too, with these distributions.

    `owners` maps import names to distributions; default: those of this environment.
    """
    installed = _owners() if owners is None else owners
    for name in NAMES:
        others = sorted(set(installed.get(name, ())) - {DISTRIBUTION})
        if others:
            yield name, ", ".join(others)


@cache  # reading what is installed takes longer than all other checks, and it does not change
def _owners() -> Mapping[str, Sequence[str]]:
    return packages_distributions()
