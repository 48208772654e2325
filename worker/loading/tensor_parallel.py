"""Start the tensor parallel ranks of a replica: rank 0 is the worker, the others are its child processes.

If rank 0 dies, the kernel kills the others. If another rank dies, rank 0 exits, so that its supervisor restarts the
whole replica and its leases expire; committed progress stays.
"""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from jobs.processes import BAD_SETTINGS_STATUS, RESTART_STATUS
from worker.engine.errors import ModelRefused
from worker.engine.model.architecture import refuse_tp_size
from worker.engine.model.checkpoint import as_model_refused
from worker.engine.options import EngineOptions
from worker.engine.parallel.channel import RankChannel
from worker.engine.parallel.commands import CommandKind, RankCommand
from worker.engine.parallel.leader_model import LeaderModel
from worker.loading.rank_processes import RankProcesses
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

TARGET, DRAFT = 0, 1  # indices of the models on every rank

NOT_EXACT = (
    "In bfloat16 the texts of such a replica can depend on the batch: transformers splits this model, and ranks sum "
    "its products in an order of their own; it also runs without fused kernels and CUDA graphs"
)

_GRACE_S = 5.0  # for a step to fail by itself after a rank died; a step that waits on a GPU never does
_STOP_S = 5.0


class RankGroup:
    """The other ranks of a replica, seen from rank 0."""

    def __init__(self, processes: RankProcesses, device: torch.device) -> None:
        """Connect to the ranks that run as `processes`; see `start`."""
        self._processes = processes
        self._closing = threading.Event()
        for process in processes.running:  # before connecting: waiting for a dead rank would never end
            threading.Thread(target=self._exit_with, args=(process,), name="basic-rank", daemon=True).start()
        self._channel = RankChannel(processes.store, 0, 1 + len(processes.running), device)
        atexit.register(self.close)

    @classmethod
    def start(
        cls, settings: WorkerSettings, path: str, device: torch.device, processes: RankProcesses | None = None
    ) -> RankGroup:
        """Connect to the other ranks of the target at `path`, which are started now unless they run already.

        Raises ModelRefused if the target can't be split over that many ranks.
        """
        with as_model_refused(f"{path} could not be loaded"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        refuse_tp_size(config.get_text_config(), settings.tp)
        return cls(processes or RankProcesses(settings), device)

    def lead(self, model: PreTrainedModel, index: int, **options: Any) -> LeaderModel:
        """Return a model whose calls run on all ranks."""
        return LeaderModel(model, self._channel, index, **options)

    def min_free_bytes(self, options: EngineOptions, own: Callable[[], int]) -> int:
        """Return the smallest of all ranks' bytes for KV; `own` returns this rank's (`bytes_left`)."""
        sizes = (options.max_sequences, options.max_context, options.prefill_rows)
        self._channel.send([RankCommand(CommandKind.FREE_MEMORY, numbers=sizes)])
        return self._channel.all_reduce_min(own())

    def close(self) -> None:
        """Stop the other ranks."""
        if self._closing.is_set():
            return
        self._closing.set()
        if all(process.poll() is None for process in self._processes.running):
            self._channel.send([RankCommand(CommandKind.END)])
        self._processes.stop(_STOP_S)

    def _exit_with(self, process: subprocess.Popen[bytes]) -> None:
        """Exit this process, at the latest `_GRACE_S` after `process` ended: a failing step may exit earlier."""
        status = process.wait()
        if self._closing.is_set():
            return
        log.error(
            "A rank exited with status %s; the replica exits and its leases expire",
            status,
            extra={"action": "rank_lost"},
        )
        if not self._closing.wait(_GRACE_S):
            logging.shutdown()
            # A rank that refused its settings would refuse them again after a restart.
            os._exit(BAD_SETTINGS_STATUS if status == BAD_SETTINGS_STATUS else RESTART_STATUS)


def draft_tp_size(path: str, settings: WorkerSettings) -> int:
    """Return the tensor parallel size of a draft that all ranks hold: `settings.tp`, or 1 if it can't be split so."""
    try:
        refuse_tp_size(AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config(), settings.tp)
    except ModelRefused:
        return 1
    return settings.tp
