"""Train a draft until its held-out acceptance stops growing.

accelerate runs the loop, so one CPU, one GPU and eight GPUs run the same code. An interrupted training resumes from its
last checkpoint. The main process evaluates and writes; its decisions are broadcast to the other processes.
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

from worker.drafters.block_network import BlockNetwork
from worker.engine.model.loading import native_dtype
from worker.training.config import Recipe
from worker.training.features import FeatureDataset
from worker.training.losses import LossOutput, TrainingBatch

_WARM_UP = 0.03  # share of all updates
_MAX_GRADIENT_NORM = 1.0
_MIN_GROWTH = 0.01  # of E(A) in an epoch for another epoch to follow
_CHECKPOINT_S = 120.0  # between checkpoints
_CLOCK_UPDATES = 8  # updates between looks at the clock: each look is a broadcast
_MIN_WEIGHT = 0.02  # of the latest update in a running mean


@dataclass(frozen=True, slots=True)
class Report:
    """State of a training after an update."""

    epoch: float  # completed, with the fraction of the current one
    update: int
    updates: int
    learning_rate: float
    loss: float  # running mean
    accuracy: tuple[float, ...]  # running means by depth
    expected_acceptance: float | None  # E(A) on held-out texts after the last completed epoch


@dataclass
class _State:
    """Part of a checkpoint beside weights, optimizer and schedule."""

    update: int = 0
    best: float = -math.inf
    history: tuple[float, ...] = ()  # E(A) after each epoch

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.update, "best": self.best, "history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update, self.best, self.history = state["update"], state["best"], tuple(state["history"])


def train(
    loss: nn.Module,
    network: nn.Module,
    dataset: FeatureDataset,
    recipe: Recipe,
    folder: Path,
    evaluate: Callable[[], float],
    on_report: Callable[[Report], None],
) -> tuple[float, ...]:
    """Train the `network` inside the `loss` module; write its best weights to `folder`/best.safetensors.

    `evaluate` returns E(A) on held-out texts and runs after each epoch. Return these values in order. Every process
    of a training calls this function; only the main process calls `evaluate` and `on_report`.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=_precision())
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(_groups(network, recipe), betas=(0.9, 0.95), weight_decay=0.01)
    per_epoch = max((len(dataset) - recipe.held_out) // (recipe.rows * accelerator.num_processes), 1)
    updates = per_epoch * recipe.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: _rate(update, updates))
    loss, optimizer = accelerator.prepare(loss, optimizer)
    state, means = _State(), _RunningMeans()
    accelerator.register_for_checkpointing(state, schedule)
    checkpoint = folder / "checkpoint"
    if checkpoint.exists():
        accelerator.load_state(str(checkpoint))
    saved = monotonic()
    while state.update < updates and not _converged(state):
        epoch, done = divmod(state.update, per_epoch)
        for batch in accelerator.prepare_data_loader(_loader(dataset, recipe, epoch, (done, per_epoch), accelerator)):
            rate = float(schedule.get_last_lr()[0])
            means.add(_update(accelerator, loss, optimizer, weights, batch))
            schedule.step()
            state.update += 1
            expected = state.history[-1] if state.history else None
            if accelerator.is_main_process:
                completed = state.update / per_epoch
                on_report(Report(completed, state.update, updates, rate, means.loss, means.accuracy, expected))
            within = state.update % per_epoch > 0  # the end of an epoch is saved with its evaluation
            if within and state.update % _CLOCK_UPDATES == 0 and _from_main(monotonic() - saved > _CHECKPOINT_S):
                _save(accelerator, checkpoint)
                saved = monotonic()
        if accelerator.is_main_process:
            _record_epoch(state, evaluate(), network, folder)
        state.load_state_dict(_from_main(state.state_dict()))
        _save(accelerator, checkpoint)
    return state.history


def _groups(network: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the weights with their learning rates; those that a head has trained already move less."""
    named = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
    started = network.of_head if recipe.start and isinstance(network, BlockNetwork) else lambda _: False
    groups = [(False, recipe.learning_rate), (True, recipe.learning_rate * recipe.start_rate)]
    found = [{"params": [w for name, w in named if started(name) is kind], "lr": rate} for kind, rate in groups]
    return [group for group in found if group["params"]]


def _from_main(value: Any) -> Any:
    """Broadcast a value from the main process; every process must call it."""
    return broadcast_object_list([value])[0]


def _precision() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if native_dtype(device) is torch.bfloat16 else "no"


def _rate(update: int, updates: int) -> float:
    """Return the factor of the learning rate: linear warm-up, then cosine decay."""
    warm = max(int(updates * _WARM_UP), 1)
    if update < warm:
        return (update + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (update - warm) / max(updates - warm, 1)))


def _converged(state: _State) -> bool:
    """Return whether the last epoch improved E(A) by less than `_MIN_GROWTH`."""
    return len(state.history) > 1 and state.history[-1] < state.history[-2] + _MIN_GROWTH


def _loader(
    dataset: FeatureDataset, recipe: Recipe, epoch: int, updates: tuple[int, int], accelerator: Accelerator
) -> DataLoader[TrainingBatch]:
    """Return the batches of updates first..last-1 of an epoch, shuffled by seed and epoch; as many for each process."""
    order = torch.randperm(len(dataset) - recipe.held_out, generator=torch.Generator().manual_seed(recipe.seed + epoch))
    first, last = (update * accelerator.num_processes * recipe.rows for update in updates)
    indices = (order + recipe.held_out).tolist()[first:last]
    return DataLoader(Subset(dataset, indices), recipe.rows, collate_fn=TrainingBatch.collate, drop_last=True)  # type: ignore[arg-type]


def _update(
    accelerator: Accelerator, loss: nn.Module, optimizer: Any, weights: Sequence[Tensor], batch: TrainingBatch
) -> LossOutput:
    """Run one optimizer step."""
    output: LossOutput = loss(batch.to(accelerator.device))
    accelerator.backward(output.loss)
    accelerator.clip_grad_norm_(weights, _MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return output


class _RunningMeans:
    """Running means of loss and accuracy."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.accuracy: tuple[float, ...] = ()
        self._count = 0

    def add(self, output: LossOutput) -> None:
        self._count += 1
        weight = max(1 / self._count, _MIN_WEIGHT)
        before = self.accuracy or (0.0,) * len(output.accuracy)
        self.loss += weight * (float(output.loss.detach()) - self.loss)
        self.accuracy = tuple(old + weight * (new - old) for old, new in zip(before, output.accuracy, strict=True))


def _record_epoch(state: _State, expected: float, network: nn.Module, folder: Path) -> None:
    """Append an epoch's E(A) to the history, and write the weights if they are the best so far."""
    state.history = (*state.history, expected)
    if expected > state.best:
        state.best = expected
        weights = network.state_dict()
        save_file(
            {name: weight.detach().bfloat16().contiguous() for name, weight in weights.items()},
            folder / "best.safetensors",
        )


def _save(accelerator: Accelerator, checkpoint: Path) -> None:
    """Write a checkpoint atomically."""
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
