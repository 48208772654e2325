"""Cached target features of the training texts: hidden states and top-k next-token probabilities.

The target reads each text once; every epoch reads the cache. Each safetensors file holds a group of texts, one row per
token: the hidden states of the tapped layers, and the most probable next tokens with their probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from worker.engine.model.packed_model import PackedModel
from worker.engine.sampling.sampling import topk
from worker.engine.segments import Segment
from worker.training.self_generated import Text

_TEXTS_PER_FILE = 64
_ROWS = 512  # tokens per forward of the target
_TOP_K = 32  # next tokens per row; the rest has a probability of about 0.001


@dataclass(frozen=True, slots=True)
class Example:
    """A training text with the target's features; row p holds those after the target has read token p."""

    ids: Tensor  # [n] int64
    num_prompt: int
    hidden: Tensor  # [n, taps * width]
    next_ids: Tensor  # [n, k] int64, most probable first
    next_probabilities: Tensor  # [n, k] float32, at temperature 1


class FeatureDataset(Dataset[Example]):
    """The examples in a folder, by the index of their text."""

    def __init__(self, folder: Path) -> None:
        """Open the files that `extract_features` wrote."""
        self._folder = folder
        self._spans: list[tuple[str, int, int, int]] = []  # file, first row, last row + 1, num_prompt
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                for start, end, num_prompt in json.loads(stored.metadata()["texts"]):
                    self._spans.append((file.name, start, end, num_prompt))

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._spans)

    def __getitem__(self, index: int) -> Example:
        """Read one example."""
        name, start, end, num_prompt = self._spans[index]
        with safe_open(self._folder / name, "pt") as stored:
            ids, hidden, next_ids, probabilities = (
                stored.get_slice(part)[start:end] for part in ("ids", "hidden", "next_ids", "next_probabilities")
            )
        return Example(ids.long(), num_prompt, hidden, next_ids.long(), probabilities.float())


def extract_features(
    target: PackedModel,
    texts: Sequence[Text],
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
    process: tuple[int, int] = (0, 1),
) -> FeatureDataset:
    """Run the target, with tapped layers, over the texts and return the dataset. Files that exist are reused.

    `process` is (index, count) of the processes that share the work; each extracts every count-th group. `progress`
    takes the tokens read since its last call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index, count = process
    for first in range(index * _TEXTS_PER_FILE, len(texts), count * _TEXTS_PER_FILE):
        group, file = texts[first : first + _TEXTS_PER_FILE], folder / f"{first // _TEXTS_PER_FILE:05}.safetensors"
        if not file.exists():
            _save(file, group, [_read(target, text) for text in group])
        progress(sum(len(text.ids) for text in group))
    return FeatureDataset(folder)


def _read(target: PackedModel, text: Text) -> dict[str, Tensor]:
    hidden, ids, probabilities = [], [], []
    for start in range(0, len(text.ids), _ROWS):
        rows = np.array(text.ids[start : start + _ROWS], np.int64)
        all_rows = np.arange(len(rows))
        segment = Segment(0, start, start, rows, start + all_rows, None, all_rows)
        top_ids, top_probabilities = topk(target.forward([segment]).float(), _TOP_K)
        assert target.hidden is not None
        hidden.append(target.hidden.read(0, start, segment.end).clone())
        ids.append(top_ids.int().cpu())
        probabilities.append(top_probabilities.half().cpu())
    return {
        "ids": torch.tensor(text.ids, dtype=torch.int32),
        "hidden": torch.cat(hidden).cpu(),
        "next_ids": torch.cat(ids),
        "next_probabilities": torch.cat(probabilities),
    }


def _save(file: Path, texts: Sequence[Text], parts: Sequence[dict[str, Tensor]]) -> None:
    """Write a file atomically."""
    ends = list(accumulate(len(text.ids) for text in texts))
    spans = [(end - len(text.ids), end, text.num_prompt) for text, end in zip(texts, ends, strict=True)]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    scratch = file.with_suffix(".part")
    save_file(tensors, scratch, metadata={"texts": json.dumps(spans)})
    scratch.replace(file)
