"""The decision of a step: draft trees, or why none."""

from __future__ import annotations

from enum import StrEnum


class Decision(StrEnum):
    """What a step did, and why. The values are stored in the column `decision`."""

    TREE = "tree"  # some sequence verified draft nodes
    GRAMMAR = "grammar"  # only tokens that a grammar forces were verified, and no draft
    OFF = "off"  # the mode is plain, or no sequence may have drafts
    PROBE = "probe"  # plain on purpose, to measure plain decoding
    GUARD = "guard"  # blocked by the regret guard: speculation has not paid lately
    UNPROFITABLE = "unprofitable"  # drafts were grown, and none was worth its time
    NO_CANDIDATES = "nothing"  # the drafter offered nothing
    DRAFT_LAGGING = "behind"  # catching up would cost the drafter more than its drafts are expected to bring
    MEMORY = "memory"  # no KV memory was left for draft nodes
    PREFILL = "prefill"  # no sequence was decoding
