"""FeatureDataset: what the target thought of its own texts. Read once, kept on disk, read again in every epoch.

One file of safetensors per group of texts: the hidden states of the tapped layers, and the likeliest next tokens with
their probabilities, for every token of every text.
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

_GROUP = 64  # texts of one file
_ROWS = 512  # tokens that the target reads in one forward
_LIKELIEST = 32  # next tokens of each row; what lies behind them is a thousandth or so


@dataclass(frozen=True, slots=True)
class Example:
    """One text as the draft learns from it; row p is the target's after it has read token p."""

    ids: Tensor  # [n] int64
    num_prompt: int
    hidden: Tensor  # [n, taps * width]
    next_ids: Tensor  # [n, k] int64, likeliest first
    next_probabilities: Tensor  # [n, k] float32, at temperature 1


class FeatureDataset(Dataset[Example]):
    """The lessons of a folder, by the number of their text."""

    def __init__(self, folder: Path) -> None:
        """Open what `extract_features` has written."""
        self._folder = folder
        self._texts: list[tuple[str, int, int, int]] = []  # file, first row, behind the last, num_prompt
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                for start, end, num_prompt in json.loads(stored.metadata()["texts"]):
                    self._texts.append((file.name, start, end, num_prompt))

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._texts)

    def __getitem__(self, number: int) -> Example:
        """Read one example."""
        name, start, end, num_prompt = self._texts[number]
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
    share: tuple[int, int] = (0, 1),
) -> FeatureDataset:
    """Let the target, with tapped layers, read the texts; return the lessons. Files that are there are kept.

    Of several processes each reads its `share`, (number of the process, processes).
    """
    folder.mkdir(parents=True, exist_ok=True)
    number, processes = share
    for first in range(number * _GROUP, len(texts), processes * _GROUP):
        group, file = texts[first : first + _GROUP], folder / f"{first // _GROUP:05}.safetensors"
        if not file.exists():
            _save(file, group, [_read(target, text) for text in group])
        progress(sum(len(text.ids) for text in group))
    return FeatureDataset(folder)


def _read(target: PackedModel, text: Text) -> dict[str, Tensor]:
    hidden, ids, probabilities = [], [], []
    for start in range(0, len(text.ids), _ROWS):
        rows = np.array(text.ids[start : start + _ROWS], np.int64)
        everything = np.arange(len(rows))
        segment = Segment(0, start, start, rows, start + everything, None, everything)
        likeliest, shares = topk(target.forward([segment]).float(), _LIKELIEST)
        assert target.hidden is not None
        hidden.append(target.hidden.read(0, start, segment.end).clone())
        ids.append(likeliest.int().cpu())
        probabilities.append(shares.half().cpu())
    return {
        "ids": torch.tensor(text.ids, dtype=torch.int32),
        "hidden": torch.cat(hidden).cpu(),
        "next_ids": torch.cat(ids),
        "next_probabilities": torch.cat(probabilities),
    }


def _save(file: Path, texts: Sequence[Text], parts: Sequence[dict[str, Tensor]]) -> None:
    """Write a file whole or not at all."""
    ends = list(accumulate(len(text.ids) for text in texts))
    spans = [(end - len(text.ids), end, text.num_prompt) for text, end in zip(texts, ends, strict=True)]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    scratch = file.with_suffix(".part")
    save_file(tensors, scratch, metadata={"texts": json.dumps(spans)})
    scratch.replace(file)
