"""Settings of the worker: models, dtype, batch size, processes and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import platformdirs
from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from jobs.settings import Directory, JobsSettings, targets_of
from storage.fair_share import AGEING_REQUESTS

SUFFIX: Final = "suffix"  # the value of `draft` for drafting without a network
_NO_NETWORK: Final = (SUFFIX, "none")


def _draft(named: str) -> str:
    return SUFFIX if named.strip() in _NO_NETWORK else named


class WorkerSettings(JobsSettings):
    """Settings of a worker process, and of commands that load the same models."""

    base_model: str = Field(
        "",
        description="Base model of targets that are directories of LoRA adapters; empty: as its adapter_config.json "
        "says.",
    )
    draft: Annotated[str, AfterValidator(_draft)] = Field(
        "",
        description="Draft: a directory, a hub id, or `suffix` (or `none`) to draft from repetitions of the text only; "
        "empty: the draft shipped with the target, if there is one. Several targets take one each, with commas between "
        "them and in the same order.",
    )
    draft_learning_threads: int = Field(
        0,
        ge=0,
        description="CPU threads, at the lowest priority, that train the draft on the texts of running jobs; 0: the "
        "draft does not learn.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of the models; auto: bfloat16 if the hardware computes in it, else float32.",
    )
    quantization: Literal["auto", "int8", "fp8", "fp8-dynamic"] = Field(
        "auto",
        description="Weights of linear layers, of target and draft; auto: as the checkpoint has them, with the "
        "activations that it declares; int8: rounded to int8 at load (CPU); fp8: rounded to FP8 (e4m3) at load; "
        "fp8-dynamic: and activations to FP8 in each step, with a scale for each row. Weights have a scale for each "
        "column.",
    )
    kv_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="Keys and values of target and draft model; auto: in the dtype of the model; fp8: rounded to FP8 "
        "(e4m3), half the bytes, with a scale for each token and KV head.",
    )
    special_in_content: Literal["text", "control"] = Field(
        "text",
        description="How special tokens in chat content are read; text: as plain text; "
        "control: as control tokens, like those of the chat template.",
    )
    reasoning_parser: Literal[
        "auto",
        "off",
        "deepseek_r1",
        "deepseek_v3",
        "ernie45",
        "exaone",
        "glm45",
        "kimi",
        "minimax_m2",
        "mistral",
        "olmo3",
        "qwen3",
        "qwq",
        "seed_oss",
        "step3",
    ] = Field(
        "auto",
        description="How chat answers split into reasoning and content; auto: at the markers in the model's chat "
        "template; off: not at all; a name: at the markers of this family.",
    )
    generation_config: Literal["auto", "off"] = Field(
        "auto",
        description="Sampling parameters that a request does not set; auto: from the model's generation_config.json, "
        "as vLLM does; off: the defaults of the API.",
    )
    mode: Literal["plain", "opt-tree", "paper"] = Field("opt-tree", description="Decoding mode.")
    max_sequences: int = Field(
        0,
        ge=0,
        description="Max sequences decoded together; 0: as many as the memory and the largest CUDA graph hold, and 64 "
        "on a CPU.",
    )
    priority_ageing_requests: int = Field(
        AGEING_REQUESTS,
        ge=1,
        description="Requests of other priority classes after which a waiting class gets the next slot, so that none "
        "starves.",
    )
    power_w: float = Field(
        0,
        ge=0,
        description="Power of the worker's device in watts, for estimates of energy where neither NVML nor RAPL "
        "measures it; 0: no estimate.",
    )
    interactive_sequences: int = Field(
        2, ge=0, description="Additional sequences that are reserved for interactive requests."
    )
    kv_tokens: int = Field(
        0,
        ge=0,
        description="KV cache of all sequences, in tokens; 0: 92 % of what the models leave free on a GPU, half of the "
        "free memory on a CPU.",
    )
    max_context: int = Field(
        0,
        ge=0,
        description="Max tokens of prompt and completion together; 0: the context of the model, as far as the memory "
        "holds it.",
    )
    prefill_rows: int = Field(512, gt=0, description="Max prompt tokens in one step.")
    nodes: int = Field(60, gt=0, description="Max nodes of one draft tree.")
    threshold: float = Field(
        0.5, ge=0, description="Paper mode: stop growing a tree when a layer adds less expected acceptance."
    )
    max_depth: int = Field(10, gt=0, description="Max depth of one draft tree.")
    threads: int = Field(0, ge=0, description="CPU threads of the engine; 0: all.")
    replicas: int = Field(1, ge=0, description="Worker processes on this machine; 0: as many as its GPUs hold.")
    tp: int = Field(1, gt=0, description="Tensor-parallel ranks (GPUs or processes) of each replica.")
    draft_ranks: Literal["first", "all"] = Field(
        "first", description="Ranks that hold the draft model: the first, or all."
    )
    device_map: Literal["", "auto"] = Field(
        "", description="auto: distribute layers over GPUs, memory and disk, for models that do not fit otherwise."
    )
    memory_share: float = Field(
        1.0, gt=0, le=1, description="Share of the machine's free memory that this process may use."
    )
    stall_s: float = Field(
        120.0, gt=0, description="Seconds without a finished step after which a worker exits, so that it is restarted."
    )
    deaf_s: float = Field(
        60.0,
        gt=0,
        description="Seconds without its own messages, although Redis accepts them, after which a worker exits.",
    )
    drain_s: float = Field(15.0, gt=0, description="Seconds that a stopping worker has to release its requests.")
    cache_dir: Directory = Field(
        default_factory=lambda: Path(platformdirs.user_cache_dir("basic")),
        description="Directory of converted models.",
        json_schema_extra={"default_rule": "the cache directory of the user"},
    )

    @field_validator("draft")
    @classmethod
    def _each_target_has_a_draft(cls, draft: str, info: ValidationInfo) -> str:
        targets, drafts = targets_of(info.data.get("target", "")), draft.split(",")
        if len(targets) > 1 and draft not in ("", SUFFIX) and len(drafts) != len(targets):
            raise ValueError(
                f"it names {len(drafts)} drafts for {len(targets)} targets; name one for each, in the same order, with "
                "commas between them; an empty name is the shipped draft"
            )
        return draft

    def for_each_target(self) -> tuple[WorkerSettings, ...]:
        """Return the settings of each target alone. A draft of several is split; `suffix` and none are those of all."""
        if len(self.targets) == 1:
            return (self,)
        drafts = self.draft.split(",") if "," in self.draft else [self.draft] * len(self.targets)
        return tuple(
            self.model_copy(update={"target": target, "draft": _draft(draft.strip())})
            for target, draft in zip(self.targets, drafts, strict=True)
        )

    @property
    def models(self) -> tuple[str, ...]:
        """The models to load: the target, and the draft if one is set and used by the mode."""
        drafts = self.draft not in ("", SUFFIX) and self.mode != "plain"
        return (self.target, self.draft) if drafts else (self.target,)
