"""What a head is trained on, and which of its weights are served."""

from __future__ import annotations

import random
from copy import deepcopy

from worker.learning.head_trainer import HeadTrainer, LearningRecipe
from worker.learning.shared_memory import LearningText, TextRing


class LearningLoop:
    """Train on the texts of a ring; serve the weights that would have drafted its latest held-out texts best."""

    def __init__(self, trainer: HeadTrainer, ring: TextRing, recipe: LearningRecipe, seed: int = 0) -> None:
        """Start from the trainer's weights, which are served now."""
        self._trainer, self._ring, self._recipe = trainer, ring, recipe
        self._original = deepcopy(trainer.network)
        self.served = deepcopy(trainer.network)
        self._random = random.Random(seed)
        self._visited = 0  # texts, over all updates
        self._updates = 0
        self._worse = 0  # comparisons in a row in which the trained weights were worse than the served ones

    def run_once(self) -> bool | None:
        """Run an update; return whether `served` has changed. None: there is nothing to learn until more texts come."""
        recipe = self._recipe
        appended = self._ring.appended
        self._ring.mark_learned(min(int(self._visited / recipe.visits), appended))
        if self._visited >= recipe.visits * appended:
            return None
        texts = self._sample(appended)
        self._visited += max(len(texts), 1)
        if not texts:
            return False
        self._trainer.update(texts)
        self._updates += 1
        return self._updates % recipe.updates == 0 and self._choose()

    def _sample(self, appended: int) -> list[LearningText]:
        """Return texts of an update: random ones of the latest, without the held-out ones."""
        every = self._recipe.held_out_every
        numbers = [n for n in range(max(appended - self._recipe.latest, 0), appended) if n % every != every - 1]
        chosen = self._random.sample(numbers, min(self._recipe.texts, len(numbers)))
        return [text for text in map(self._ring.read, chosen) if text is not None]

    def _held_out(self) -> list[LearningText]:
        every, appended = self._recipe.held_out_every, self._ring.appended
        numbers = range(every - 1, appended, every)[-self._recipe.held_out :]
        return [text for text in map(self._ring.read, numbers) if text is not None]

    def _choose(self) -> bool:
        """Compare trained, served and original weights on held-out texts; return whether `served` has changed."""
        texts = self._held_out()
        if len(texts) < self._recipe.min_held_out:
            return False
        trained, served, original = (
            self._trainer.accepted(network, texts) for network in (self._trainer.network, self.served, self._original)
        )
        self._worse = self._worse + 1 if trained < served else 0
        if trained > max(served * (1 + self._recipe.min_gain), original):
            self.served.load_state_dict(self._trainer.network.state_dict())
            return True
        if original > served:  # what was learned does not fit the texts of today
            self.served.load_state_dict(self._original.state_dict())
            self._trainer.restart(self.served)
            return True
        if self._worse == self._recipe.patience:
            self._trainer.restart(self.served)
            self._worse = 0
        return False
