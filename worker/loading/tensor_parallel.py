"""The ranks of a replica: the first one is the worker, and starts the others as its children.

The kernel kills the others when the first rank dies. When another rank dies, the first one ends too, so that whoever
supervises it starts the whole replica again and its leases lapse; what it had committed stays.
"""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from jobs.local.startup import environment
from jobs.processes import BAD_SETTINGS_STATUS, RESTART_STATUS, Command, launch, python_module
from worker.engine.errors import ModelRefused
from worker.engine.model.architecture import refuse_tp_size
from worker.engine.model.checkpoint import as_model_refused
from worker.engine.parallel.channel import Channel
from worker.engine.parallel.commands import CommandKind, RankCommand
from worker.engine.parallel.leader_model import LeaderModel
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

TARGET, DRAFT = 0, 1  # numbers of the models on every rank

_GRACE_S = 5.0  # within which a step notices by itself that a rank is gone; one that waits on a GPU never does
_STOP_S = 5.0


class RankGroup:
    """The other ranks of a replica, as the first one sees them."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], folder: TemporaryDirectory[str], device: torch.device):
        """Meet the ranks that run as `processes` at the store in `folder`; see `start`."""
        self._processes = processes
        self._folder = folder  # stays as long as we do: each new group of ranks meets at the store again
        self._closing = threading.Event()
        for process in processes:  # from now on: one that dies before we met would never come
            threading.Thread(target=self._end_with, args=(process,), name="basic-rank", daemon=True).start()
        self._channel = Channel(_store(folder), 0, 1 + len(processes), device)
        atexit.register(self.close)

    @classmethod
    def start(cls, settings: WorkerSettings, path: str, device: torch.device) -> RankGroup:
        """Start the other ranks of the target at `path` and meet them. Call it from the main thread (see `launch`).

        Raises ModelRefused, with what can be done instead, when the target can't be split so.
        """
        with as_model_refused(f"{path} could not be loaded"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        refuse_tp_size(config.get_text_config(), settings.tp)
        folder = TemporaryDirectory(prefix="basic-ranks-")
        return cls([_start(settings, rank, _store(folder)) for rank in range(1, settings.tp)], folder, device)

    def lead(self, model: PreTrainedModel, number: int, **options: Any) -> LeaderModel:
        """Return a model whose calls the other ranks follow."""
        return LeaderModel(model, self._channel, number, **options)

    def min_free_bytes(self, mine: int) -> int:
        """Return the free memory of the rank that has least."""
        self._channel.send(RankCommand(CommandKind.FREE_MEMORY))
        return self._channel.all_reduce_min(mine)

    def close(self) -> None:
        """Let the other ranks go."""
        if self._closing.is_set():
            return
        self._closing.set()
        if all(process.poll() is None for process in self._processes):
            self._channel.send(RankCommand(CommandKind.END))
        for process in self._processes:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._folder.cleanup()

    def _end_with(self, process: subprocess.Popen[bytes]) -> None:
        """End this process when a rank ends: at once where a step fails by it, after a while where none runs."""
        status = process.wait()
        if self._closing.is_set():
            return
        log.error(
            "A rank of the replica ended with status %s; the replica ends, and its leases lapse",
            status,
            extra={"action": "rank_lost"},
        )
        if not self._closing.wait(_GRACE_S):
            logging.shutdown()
            # What a rank refuses, another start would refuse as well.
            os._exit(BAD_SETTINGS_STATUS if status == BAD_SETTINGS_STATUS else RESTART_STATUS)


def draft_tp_size(path: str, settings: WorkerSettings) -> int:
    """Return over how many ranks a draft model on all ranks is split: over all of them, or not at all."""
    try:
        refuse_tp_size(AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config(), settings.tp)
    except ModelRefused:
        return 1
    return settings.tp


def _store(folder: TemporaryDirectory[str]) -> Path:
    return Path(folder.name) / "store"


def _start(settings: WorkerSettings, rank: int, store: Path) -> subprocess.Popen[bytes]:
    told = environment(settings) | {"LOCAL_RANK": str(rank)}  # transformers takes the GPU of this number
    return launch(Command(f"rank {rank}", python_module("worker.node.rank_main", str(store), str(rank)), told))
