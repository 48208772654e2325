"""A model's tokenizer as the grammar library reads it: the bytes of every token, checked against the decoder.

A grammar is exact only if the library and the decoder of texts agree on what each token writes. So every token that
the library could allow is decoded after a letter and compared.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy

from llguidance import LLTokenizer
from transformers import PreTrainedTokenizerFast

from worker.engine.errors import GrammarsRefused, error_summary
from worker.text.token_bytes import token_bytes


def grammar_tokenizer(tokenizer: PreTrainedTokenizerFast, eos_ids: Collection[int], width: int) -> LLTokenizer:
    """Return a tokenizer for grammars on logits of `width` tokens; ids without a token are never allowed.

    It takes about a second for 150,000 tokens. Raises GrammarsRefused if the library does not hold the tokenizer
    exactly, and if no token ends an answer.
    """
    if not eos_ids:
        raise GrammarsRefused("the model has no end-of-sequence token, which would end an answer that is complete")
    backend = copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    try:
        held = LLTokenizer(backend.to_str(), max(width, len(tokenizer)), sorted(eos_ids))
    except Exception as error:
        raise GrammarsRefused(f"the grammar library can't read the tokenizer: {error_summary(error)}") from error
    except BaseException as error:  # a panic in Rust is no Exception
        raise GrammarsRefused(f"the grammar library can't read the tokenizer: {error}") from error
    _check_bytes(tokenizer, held)
    return held


def _check_bytes(tokenizer: PreTrainedTokenizerFast, held: LLTokenizer) -> None:
    """Refuse a tokenizer with a token whose text differs from its bytes in `held`."""
    before = list(token_bytes(tokenizer).neutral_prefix)
    written = {
        token: held.decode_bytes([token]) for token in range(held.vocab_size) if not held.is_special_token(token)
    }
    written = {token: raw for token, raw in written.items() if raw}  # a token without bytes is never allowed
    backend = tokenizer.backend_tokenizer
    lead = backend.decode(before, skip_special_tokens=False)
    texts = backend.decode_batch([[*before, token] for token in written], skip_special_tokens=False)
    for (token, raw), text in zip(written.items(), texts, strict=True):
        expected = lead + raw.decode(errors="replace")
        if text != expected:
            raise GrammarsRefused(
                f"the grammar library reads token {token} as {expected[len(lead) :]!r}, and it writes "
                f"{text[len(lead) :]!r}"
            )
