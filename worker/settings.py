"""Settings of the node: which models, which numbers, how large the batch. Read once, at the edge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import platformdirs
from pydantic import AfterValidator, Field

from jobs.settings import Directory, JobsSettings

SUFFIX: Final = "suffix"  # the setting's word for no network at all
_NO_NETWORK: Final = (SUFFIX, "none")


def _draft(named: str) -> str:
    return SUFFIX if named in _NO_NETWORK else named


class WorkerSettings(JobsSettings):
    """Settings of a worker process."""

    draft: Annotated[str, AfterValidator(_draft)] = Field(
        "",
        description="Draft: a directory, a hub id, or `suffix` (or `none`) for none but the text's own repetitions; "
        "empty: the one that comes with the target, if there is one.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Numbers of the models; auto: bfloat16 where the hardware computes in it, else float32.",
    )
    special_in_content: Literal["text", "control"] = Field(
        "text",
        description="Special tokens that the content of a chat message spells; text: they are read as any text; "
        "control: as those that the chat template writes.",
    )
    mode: Literal["plain", "opt-tree", "paper"] = Field("opt-tree", description="Decoding mode.")
    max_sequences: int = Field(64, gt=0, description="Sequences decoded together at most.")
    interactive_sequences: int = Field(
        2, ge=0, description="Sequences beside those, for single requests that somebody waits for."
    )
    kv_tokens: int = Field(
        0, ge=0, description="Tokens of KV memory for all sequences together; 0: half of the free memory."
    )
    max_context: int = Field(
        4096, gt=1, description="Tokens of prompt and completion together, if the model holds them."
    )
    prefill_rows: int = Field(512, gt=0, description="Prompt tokens that one step may carry.")
    nodes: int = Field(60, gt=0, description="Nodes of one draft tree at most.")
    threshold: float = Field(0.5, ge=0, description="Paper mode stops when a layer adds less expected acceptance.")
    max_depth: int = Field(10, gt=0, description="Layers of one draft tree at most.")
    threads: int = Field(0, ge=0, description="CPU threads of the engine; 0: all.")
    replicas: int = Field(1, ge=0, description="Worker processes of this machine; 0: as many as its GPUs hold.")
    tp: int = Field(1, gt=0, description="Ranks of each replica: the target is split over so many GPUs or processes.")
    draft_ranks: Literal["first", "all"] = Field(
        "first", description="Where a draft model lies: on the first rank, or on all of them."
    )
    device_map: Literal["", "auto"] = Field(
        "", description="auto: lay layers over GPUs, memory and disk; for what fits no other way."
    )
    memory_share: float = Field(
        1.0, gt=0, le=1, description="Part of the machine's free memory that this process may count on."
    )
    stall_s: float = Field(
        120.0, gt=0, description="Seconds without a finished step after which a worker ends, to be started again."
    )
    deaf_s: float = Field(
        60.0,
        gt=0,
        description="Seconds without a message to itself, though Redis answers, until a worker ends.",
    )
    drain_s: float = Field(15.0, gt=0, description="Seconds in which a stopping worker hands its requests back.")
    cache_dir: Directory = Field(
        default_factory=lambda: Path(platformdirs.user_cache_dir("basic")),
        description="Converted models.",
        json_schema_extra={"default_rule": "the cache directory of the user"},
    )

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the settings name: the target, and a draft where one is named and will be used."""
        drafts = self.draft not in ("", SUFFIX) and self.mode != "plain"
        return (self.target, self.draft) if drafts else (self.target,)
