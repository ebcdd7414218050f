"""What the verbs that look at data need of a model: its tokenizer and its longest example, without
loading it.
"""

from __future__ import annotations

from sftx.data.dataset import load_corpora
from sftx.data.encoder import DEFAULT_LENGTH, Encoder
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.model_config import positions
from sftx.report.progress import working
from sftx.settings.schema import Config
from sftx.types import UserError


def tokenizer_and_length(config: Config) -> tuple[Tokenizer, int]:
    """The tokenizer, and `data.max_length` or what a run would take in its place."""
    tokenizer = Tokenizer.of_model(config.model)
    return tokenizer, config.data.max_length or min(
        positions(config.model.path, DEFAULT_LENGTH), DEFAULT_LENGTH
    )


def encoded(config: Config, encoder: Encoder) -> Corpus:
    """The training corpus; a line on stderr says how far encoding it has come."""
    with working("reading the data", config.runtime.progress) as progress:
        corpus, _ = load_corpora(
            config, encoder.tokenizer, encoder.max_length, progress.encoding, encoder
        )
    return corpus


def whole_number(key: str, value: str, least: int = 1) -> int:
    """The number given for a verb's own `key`; UserError if it is none, or less than `least`."""
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"sftx {key}={value!r}: expected a whole number of at least {least}")
    return int(value)
