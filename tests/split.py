"""`python -m tests.split RANK STORE TARGET DRAFT`: one of two ranks that decode the tests' prompts, for test_ranks.

The first rank prints its texts, and both print every order they gave or heard, as JSON. On the second rank the draft
has other weights and every logit is off: whatever it made of its own numbers would differ.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.unit.worker.engine.harness import decode, engine, options, outputs, sequences
from worker.drafters.model import ModelDrafter
from worker.engine.model.language_model import PackedModel, load
from worker.engine.options import Mode
from worker.engine.parallel.channel import Wire
from worker.engine.parallel.commands import Op, Order
from worker.engine.parallel.leader_model import FollowingModels, LeadingModel
from worker.engine.sampling.sampling import Sampling
from worker.engine.segments import Segment

CPU = torch.device("cpu")
TARGET, DRAFT = 0, 1
SAMPLINGS = (Sampling(), Sampling(temperature=0.9, top_k=20, top_p=0.95))


class LoggingWire(Wire):
    """A wire that remembers what passed, by hash."""

    def __init__(self, *arguments: Any) -> None:
        self.passed: list[str] = []
        super().__init__(*arguments)

    def tell(self, order: Order) -> None:
        self._note(order)
        super().tell(order)

    def hear(self) -> Order:
        order = super().hear()
        self._note(order)
        return order

    def _note(self, order: Order) -> None:
        self.passed.append(f"{order.op.name}{order.model} " + hashlib.sha256(order.encode().tobytes()).hexdigest())


def texts(target: PackedModel, draft: PackedModel | None) -> Iterator[list[list[int]]]:
    """Decode greedily and sampled, with fixed trees and with priced ones."""
    for sampling in SAMPLINGS:
        for mode in (Mode.PAPER, Mode.OPT_TREE):
            some = sequences(sampling=sampling)
            drafter = None if draft is None else ModelDrafter(draft, "draft", draft.config.vocab_size)
            results = decode(engine(target, drafter, options(mode)), some)
            assert draft is None or any(r.stats.accepted_tokens for r in results), "no tree was of any use"
            yield outputs(some)


def lead(wire: LoggingWire, target: PreTrainedModel, draft: PreTrainedModel) -> list[list[list[int]]]:
    split = LeadingModel(target, wire, TARGET, slots=4, capacity=512)
    everywhere = LeadingModel(draft, wire, DRAFT, slots=4, capacity=1024)
    written = list(texts(split, everywhere))
    wire.tell(Order(Op.END))
    return written


def follow(wire: LoggingWire, target: PreTrainedModel, draft: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter))
    models = FollowingModels([target, draft])
    while (order := wire.hear()).op is not Op.END:
        models.obey(order)


def disturb(forward: Any) -> Any:
    """Return a forward whose logits are noise."""

    def disturbed(self: PackedModel, segments: Sequence[Segment]) -> Tensor:
        logits: Tensor = forward(self, segments)
        return torch.randn_like(logits)

    return disturbed


def main() -> None:
    rank, store, target_path, draft_path = int(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    wire = LoggingWire(Path(store), rank, 2, CPU)
    target = load(target_path, dtype=torch.float32, device=CPU, ranks=2)
    draft = load(draft_path, dtype=torch.float32, device=CPU)
    written = None
    if rank == 0:
        written = lead(wire, target, draft)
    else:
        PackedModel.forward = disturb(PackedModel.forward)  # type: ignore[method-assign]
        follow(wire, target, draft)
    print(json.dumps({"texts": written, "orders": wire.passed}))
    wire.close()


if __name__ == "__main__":
    main()
