"""`python -m tests.split FOLDER TARGET DRAFT RANKS DTYPE …`: ranks that decode the tests' prompts, for test_ranks.

For each RANKS and DTYPE it runs as many processes. They are forked, so that torch is imported once. Each writes
FOLDER/RANKS-RANK.json: the leader its texts, and all every command that they sent or received. On followers the draft
has other weights and all logits are noise: a decision from their own logits would differ.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.unit.worker.engine.harness import decode, engine, options, outputs, sequences
from worker.drafters.model import ModelDrafter
from worker.engine.model.backend import fuse_layers
from worker.engine.model.loading import load
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.parallel.channel import RankChannel
from worker.engine.parallel.commands import CommandKind, RankCommand
from worker.engine.parallel.leader_model import FollowerModels, LeaderModel
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import Segment

CPU = torch.device("cpu")
TARGET, DRAFT = 0, 1
SAMPLINGS = (Sampling(), Sampling(temperature=0.9, top_k=20, top_p=0.95))


class LoggingChannel(RankChannel):
    """A channel that records the hash of each command."""

    def __init__(self, *arguments: Any) -> None:
        self.passed: list[str] = []
        super().__init__(*arguments)

    def send(self, commands: Sequence[RankCommand]) -> None:
        self._note(commands)
        super().send(commands)

    def recv(self) -> list[RankCommand]:
        commands = super().recv()
        self._note(commands)
        return commands

    def _note(self, commands: Sequence[RankCommand]) -> None:
        self.passed += [
            f"{command.kind.name}{command.model} " + hashlib.sha256(command.encode().tobytes()).hexdigest()
            for command in commands
        ]


def texts(target: PackedModel, draft: PackedModel | None) -> Iterator[list[list[int]]]:
    """Decode greedily and with sampling, with fixed and with cost-aware trees."""
    for sampling in SAMPLINGS:
        for mode in (Mode.PAPER, Mode.OPT_TREE):
            some = sequences(sampling=sampling)
            drafter = None if draft is None else ModelDrafter(draft, "draft", draft.config.vocab_size)
            results = decode(engine(target, drafter, options(mode)), some)
            assert draft is None or any(r.stats.accepted_tokens for r in results), "no tree was of any use"
            yield outputs(some)


def lead(channel: LoggingChannel, target: PreTrainedModel, draft: PreTrainedModel) -> list[list[list[int]]]:
    split = LeaderModel(target, channel, TARGET, slots=4, capacity=512)
    everywhere = LeaderModel(draft, channel, DRAFT, slots=4, capacity=1024)
    written = list(texts(split, everywhere))
    channel.send([RankCommand(CommandKind.END)])
    return written


def follow(channel: LoggingChannel, target: PreTrainedModel, draft: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter))
    models = FollowerModels([target, draft])
    while (commands := channel.recv())[-1].kind is not CommandKind.END:
        for command in commands:
            models.execute(command)


def disturb(forward: Any) -> Any:
    """Return a forward with noise as logits."""

    def disturbed(self: PackedModel, segments: Sequence[Segment]) -> Tensor:
        logits: Tensor = forward(self, segments)
        return torch.randn_like(logits)

    return disturbed


def run(rank: int, ranks: int, dtype: torch.dtype, folder: Path, target_path: str, draft_path: str) -> None:
    """Be one rank."""
    torch.set_num_threads(1)
    channel = LoggingChannel(folder / f"store-{ranks}", rank, ranks, CPU)
    target = load(target_path, dtype=dtype, device=CPU, ranks=ranks)
    draft = load(draft_path, dtype=dtype, device=CPU)
    written = None
    fuse_layers(target)
    if rank == 0:
        written = lead(channel, target, draft)
    else:
        PackedModel.forward = disturb(PackedModel.forward)  # type: ignore[method-assign]
        follow(channel, target, draft)
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps({"texts": written, "commands": channel.passed}))
    channel.close()


def main() -> int:
    folder, target, draft, *cases = sys.argv[1:]
    forks = get_context("fork")
    for ranks, dtype in zip(map(int, cases[::2]), cases[1::2], strict=True):
        arguments = (ranks, getattr(torch, dtype), Path(folder), target, draft)
        processes = [forks.Process(target=run, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
