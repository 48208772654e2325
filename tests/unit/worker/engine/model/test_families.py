"""docs/models.md says what a tiny model of each family shows, and no family loads and differs."""

from __future__ import annotations

import pytest
import torch

from tests import families
from worker.engine.cpu.kernels import kernels

pytestmark = pytest.mark.skipif(kernels(torch.float32) is None, reason="no compiled kernels")


@pytest.mark.parametrize("kind", families.POPULAR)
def test_a_family_is_exact_and_docs_say_so(kind: str) -> None:
    found = families.verdict(kind)
    assert found.exact, found.reason
    assert f"| `{kind}` | {families.KNOWN[kind]} | {found.cells} |" in families.TABLE.read_text()


@pytest.mark.long
def test_the_table_in_docs_is_what_all_families_show() -> None:
    found = {kind: families.verdict(kind) for kind in families.families()}
    assert [kind for kind, shown in found.items() if shown.reason.startswith("DIFFERS")] == []
    assert sum(shown.exact for shown in found.values()) >= 85
    assert families.table(found) == families.TABLE.read_text()


@pytest.mark.long
def test_in_bfloat16_no_batch_or_tree_changes_a_bit_of_any_family() -> None:
    """Texts of transformers may differ there: it rounds to bfloat16 in other places."""
    broken = {}
    for kind in families.families():
        found = families.verdict(kind, torch.bfloat16).reason
        if "bits" in found or "trees" in found:
            broken[kind] = found
    assert broken == {}
