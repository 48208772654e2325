"""Laws of drafts by settings: a published head is found by its files, and reads the target's layers."""

from __future__ import annotations

from pathlib import Path

from tests.models import TOKENIZER_VOCAB, byte_tokenizer, save_tiny, tiny
from tests.unit.worker.drafters import test_eagle3 as published
from worker.drafters.mixed import MixedDrafter
from worker.engine.kv.hidden_states import HiddenStates
from worker.loading.drafts import draft_path, load_draft, uses_head
from worker.settings import WorkerSettings


def test_a_published_head_is_a_draft_by_its_directory(tmp_path: Path) -> None:
    config, weights = published.FORMATS["SpecForge"]()
    config["vocab_size"] = TOKENIZER_VOCAB
    weights["t2d"] = weights["t2d"].new_zeros(TOKENIZER_VOCAB)
    folder = published.write(tmp_path / "head", "SpecForge", config, weights)
    byte_tokenizer().save_pretrained(folder)  # some publish a tokenizer beside the head
    save_tiny(tmp_path / "target", hidden_size=published.WIDTH, num_hidden_layers=8)
    settings = WorkerSettings(target=str(tmp_path / "target"), draft=str(folder))
    assert uses_head(settings)
    assert draft_path(settings) == str(folder)

    model = tiny("llama", vocab=TOKENIZER_VOCAB, hidden_size=published.WIDTH, num_hidden_layers=8)
    factory = load_draft(settings, model, byte_tokenizer())
    assert (factory.name, factory.taps) == ("head", (0, 3, 5))
    assert factory.token_bytes == 4 * (2 * published.KV_HEADS * published.HEAD_DIM + 3 * published.WIDTH)
    hidden = HiddenStates(2, 64, 3 * published.WIDTH, model.dtype, model.device)
    assert isinstance(factory.make(hidden, 2, 64, None)(), MixedDrafter)
