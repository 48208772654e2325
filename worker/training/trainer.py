"""The trainer: a student goes through the lessons until it foresees held-out texts no better.

accelerate runs it, so that one CPU, one GPU and eight GPUs take the same code; an interrupted training goes on at its
last checkpoint. Of several processes the first judges and writes, and all go by what it says.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from worker.engine.model.loading import native_dtype
from worker.training.config import Recipe
from worker.training.features import FeatureDataset
from worker.training.losses import Batch

_WARM_UP = 0.03  # of all updates
_CLIP = 1.0  # length of a gradient at most
_GROWTH = 0.01  # of E(A), that an epoch must bring for another to follow
_CHECKPOINT_S = 120.0  # between checkpoints
_LOOK = 8  # updates between looks at the clock


@dataclass(frozen=True, slots=True)
class Report:
    """Where a training stands."""

    epoch: float  # done, with its fraction
    update: int
    updates: int
    learning_rate: float
    loss: float  # running mean
    right: tuple[float, ...]  # running means of the share foreseen at first rank, by depth
    expected_acceptance: float | None  # held-out, after the last whole epoch


@dataclass
class _Progress:
    """What a checkpoint keeps besides the weights."""

    update: int = 0
    best: float = -math.inf
    history: tuple[float, ...] = ()  # E(A) after each epoch

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.update, "best": self.best, "history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update, self.best, self.history = state["update"], state["best"], tuple(state["history"])


def train(
    student: nn.Module,
    network: nn.Module,
    lessons: FeatureDataset,
    recipe: Recipe,
    folder: Path,
    measure: Callable[[], float],
    tell: Callable[[Report], None],
) -> tuple[float, ...]:
    """Train the `network` inside a student; leave its best weights in `folder`/best.safetensors.

    `measure` returns E(A) on held-out texts, after each epoch. Returns these, in order. Every process of a training
    calls this, and the first of them measures and tells.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=_precision())
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    per_epoch = max((len(lessons) - recipe.held_out) // (recipe.rows * accelerator.num_processes), 1)
    updates = per_epoch * recipe.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: _rate(update, updates))
    student, optimizer = accelerator.prepare(student, optimizer)
    progress, running = _Progress(), _Running()
    accelerator.register_for_checkpointing(progress, schedule)
    checkpoint = folder / "checkpoint"
    if checkpoint.exists():
        accelerator.load_state(str(checkpoint))
    saved = monotonic()
    while progress.update < updates and not _enough(progress):
        epoch, done = divmod(progress.update, per_epoch)
        for batch in accelerator.prepare_data_loader(_loader(lessons, recipe, epoch, (done, per_epoch), accelerator)):
            rate = float(schedule.get_last_lr()[0])
            running.add(_update(accelerator, student, optimizer, weights, batch))
            schedule.step()
            progress.update += 1
            expected = progress.history[-1] if progress.history else None
            if accelerator.is_main_process:
                part = progress.update / per_epoch
                tell(Report(part, progress.update, updates, rate, running.loss, running.right, expected))
            if progress.update % _LOOK == 0 and _agreed(monotonic() - saved > _CHECKPOINT_S):
                _save(accelerator, checkpoint)
                saved = monotonic()
        if accelerator.is_main_process:
            _judge(progress, measure(), network, folder)
        progress.load_state_dict(_agreed(progress.state_dict()))
        _save(accelerator, checkpoint)
    return progress.history


def _agreed(said: Any) -> Any:
    """Return what the first process says."""
    return broadcast_object_list([said])[0]


def _precision() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if native_dtype(device) is torch.bfloat16 else "no"


def _rate(update: int, updates: int) -> float:
    """Return the share of the learning rate: up in a line, down in half a cosine."""
    warm = max(int(updates * _WARM_UP), 1)
    if update < warm:
        return (update + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (update - warm) / max(updates - warm, 1)))


def _enough(progress: _Progress) -> bool:
    """Return whether the last epoch brought too little for another."""
    return len(progress.history) > 1 and progress.history[-1] < progress.history[-2] + _GROWTH


def _loader(
    lessons: FeatureDataset, recipe: Recipe, epoch: int, updates: tuple[int, int], accelerator: Accelerator
) -> DataLoader[Batch]:
    """Return the lots of an epoch's updates first..last-1, in its own order; every process gets as many of them."""
    order = torch.randperm(len(lessons) - recipe.held_out, generator=torch.Generator().manual_seed(recipe.seed + epoch))
    first, last = (update * accelerator.num_processes * recipe.rows for update in updates)
    rest = (order + recipe.held_out).tolist()[first:last]
    return DataLoader(Subset(lessons, rest), recipe.rows, collate_fn=Batch.of, drop_last=True)  # type: ignore[arg-type]


def _update(
    accelerator: Accelerator, student: nn.Module, optimizer: Any, weights: Sequence[Tensor], batch: Batch
) -> tuple[float, tuple[float, ...]]:
    """Learn from one batch; return its loss and the shares foreseen at first rank."""
    output = student(batch.to(accelerator.device))
    accelerator.backward(output.loss)
    accelerator.clip_grad_norm_(weights, _CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return float(output.loss.detach()), output.right


class _Running:
    """Running means of what an update tells."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.right: tuple[float, ...] = ()
        self._count = 0

    def add(self, output: tuple[float, tuple[float, ...]]) -> None:
        loss, right = output
        self._count += 1
        weight = max(1 / self._count, 0.02)
        before = self.right or (0.0,) * len(right)
        self.loss += weight * (loss - self.loss)
        self.right = tuple(old + weight * (new - old) for old, new in zip(before, right, strict=True))


def _judge(progress: _Progress, expected: float, network: nn.Module, folder: Path) -> None:
    """Note an epoch's E(A), and keep its weights if they are the best."""
    progress.history = (*progress.history, expected)
    if expected > progress.best:
        progress.best = expected
        weights = network.state_dict()
        save_file(
            {name: weight.detach().bfloat16().contiguous() for name, weight in weights.items()},
            folder / "best.safetensors",
        )


def _save(accelerator: Accelerator, checkpoint: Path) -> None:
    """Write a checkpoint whole or not at all."""
    scratch = checkpoint.with_name("checkpoint.part")
    accelerator.save_state(str(scratch))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        old = checkpoint.with_name("checkpoint.old")
        if checkpoint.exists():
            checkpoint.replace(old)
        scratch.replace(checkpoint)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
