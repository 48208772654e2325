"""The engine's side of learning: hand finished texts to the learning process, and swap its weights in between steps."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import weakref
from dataclasses import asdict
from time import thread_time

from torch import Tensor

from jobs.processes import python_module
from worker.drafters.head import PackedHead
from worker.drafters.head_network import HeadNetwork
from worker.learning.head_trainer import OUTPUT, TOKENS
from worker.learning.shared_memory import RingShape, SharedTensors, TextRing, anonymous_file

log = logging.getLogger(__name__)

MODULE = "worker.learning.learning_process"
_RING_BYTES = 256 << 20  # of texts to learn from
_MIN_WRITTEN = 8  # tokens of the target: shorter texts teach little
_ACTION = {"action": "draft_learning"}


class HeadLearner:
    """Trains a head on the texts that finish. No failure of it changes how the engine decodes."""

    def __init__(self, head: PackedHead, network: HeadNetwork, output: Tensor, *, threads: int) -> None:
        """Take a head, the `network` that it was made of, and the `output` weights [n, width] of its tokens.

        A learning process starts with the first text and trains with this number of CPU threads.
        """
        self._head, self._network, self._output, self._threads = head, network, output, threads
        self._process: _LearningProcess | None = None
        self._closed = False  # nothing more is learned
        self._version = 0  # of the weights that the head has, or that were left out
        self.swaps = 0  # how often the head got other weights
        self.thread_s = 0.0  # CPU time that learning has taken on the engine's thread

    @property
    def pid(self) -> int | None:
        """Process id of the learning process; None before the first text."""
        return None if self._process is None else self._process.pid

    @property
    def ended(self) -> bool:
        """True when the learning process has ended: the head keeps the weights that it has."""
        return self._process is not None and self._process.status() is not None

    @property
    def backlog(self) -> int:
        """Texts that the learning process is still to train on; 0 when it has ended."""
        return 0 if self._process is None or self.ended else self._process.ring.backlog

    def take(self, ids: list[int], num_prompt: int, states: Tensor) -> None:
        """Learn from a finished text; `states` [n - 1, size] are the target's after each token but the last."""
        if self._closed or len(ids) - num_prompt < _MIN_WRITTEN:
            return
        began_at = thread_time()
        if self._process is None:
            self._process = self._started(states)
        status = self._process.status()
        if status is None:
            self._process.ring.append(ids, num_prompt, states, self._head.embedded(ids))
        else:
            self._closed = True
            log.warning("The draft learns no more: its process ended with status %s", status, extra=_ACTION)
        self.thread_s += thread_time() - began_at

    def refresh(self) -> None:
        """Let the head draft with the latest weights. Weights that are damaged are left out."""
        if self._process is None or self._process.weights.version == self._version:
            return
        began_at = thread_time()
        self._version = self._process.weights.version
        try:
            self._head.load(self._process.weights.read())
        except ValueError as error:
            log.warning("Learned weights of the draft are left out: %s", error, extra=_ACTION)
        else:
            self.swaps += 1
        self.thread_s += thread_time() - began_at

    def close(self) -> None:
        """End the learning process; the head keeps the weights that it has."""
        self._closed = True
        if self._process is not None:
            self._process.kill()

    def _started(self, states: Tensor) -> _LearningProcess:
        given = {name: weight.float() for name, weight in self._network.state_dict().items()}
        given |= {OUTPUT: self._output.float(), TOKENS: self._head.tokens}
        ring = RingShape.of(states.shape[1], self._output.shape[1], states.dtype, _RING_BYTES)
        shape = self._network.shape.as_json()
        return _LearningProcess({name: t.cpu().contiguous() for name, t in given.items()}, ring, shape, self._threads)


class _LearningProcess:
    """A learning process and the memory that it shares with this one."""

    def __init__(self, given: dict[str, Tensor], ring: RingShape, shape: dict[str, object], threads: int) -> None:
        size = SharedTensors.size_of(given)
        files = [anonymous_file(TextRing.size_of(ring)), anonymous_file(size), anonymous_file(size)]
        try:
            self.ring, started, self.weights = TextRing(files[0], ring), *map(SharedTensors, files[1:])
            started.write(given)
            task = {"files": files, "ring": asdict(ring), "shape": shape, "threads": threads, "parent": os.getpid()}
            self._process = launch(json.dumps(task), files)
        finally:
            for file in files:
                os.close(file)  # what is mapped stays
        self._finalizer = weakref.finalize(self, self._process.kill)

    @property
    def pid(self) -> int:
        return self._process.pid

    def status(self) -> int | None:
        """Return the exit status; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def launch(task: str, files: list[int]) -> subprocess.Popen[bytes]:
    """Start a learning process, which inherits `files`."""
    return subprocess.Popen(
        python_module(MODULE, task),
        stdin=subprocess.DEVNULL,
        pass_fds=files,
        process_group=0,  # Ctrl-C reaches the parent only
    )
