"""The data of a run, read and planned, before there is a model."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from sftx.data.dataset import load_corpora
from sftx.data.encoder import DEFAULT_LENGTH, Encoder
from sftx.data.pack import probe_pack
from sftx.data.plan import Plan, plan_of
from sftx.data.shared_packs import Saving
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.eval.questions import Questions, read_questions
from sftx.model_config import positions_in
from sftx.report.progress import Progress
from sftx.settings.schema import Config
from sftx.training.best import chosen_by
from sftx.training.checks import check_best, check_stop_token
from sftx.training.prefix_sharing import possible_saving
from sftx.types import Pack


@dataclass(frozen=True)
class RunData:
    """What a run trains on and evaluates."""

    tokenizer: Tokenizer
    max_length: int
    encoder: Encoder
    corpus: Corpus
    held_out: Corpus | None
    plan: Plan
    questions: Questions | None
    saving: Saving  # by sharing prefixes

    @property
    def notes(self) -> list[str]:
        """What there is to say of the questions."""
        if self.questions is None:
            return []
        return self.questions.notes

    def probe(self) -> Pack:
        """A few tokens of the data, to try the model with."""
        few = min(len(self.corpus), 3)
        return probe_pack([self.corpus.example(i) for i in range(few)])


def longest_example(config: Config, model_config: PreTrainedConfig) -> int:
    """`data.max_length`, or the model's positions up to 8,192 tokens."""
    positions = positions_in(model_config.get_text_config().to_dict()) or DEFAULT_LENGTH
    return config.data.max_length or min(positions, DEFAULT_LENGTH)


def read_data(config: Config, model_config: PreTrainedConfig, progress: Progress) -> RunData:
    """Encode the data and plan the steps. Raises UserError for what is wrong with it."""
    progress.phase("reading the data")
    max_length = longest_example(config, model_config)
    tokenizer = Tokenizer.of_model(config.model)
    encoder = Encoder(tokenizer, config.data, max_length)
    corpus, held_out = load_corpora(config, tokenizer, max_length, progress.encoding, encoder)
    plan = plan_of(corpus, config)
    progress.data(corpus.ledger, None if held_out is None else held_out.ledger, plan.num_steps)
    check_stop_token(corpus, encoder, config.data)
    positions = positions_in(model_config.get_text_config().to_dict())
    questions = read_questions(config, encoder, held_out, positions)
    check_best(chosen_by(config.eval), held_out, questions)
    saving = possible_saving(config.runtime, plan, corpus)
    return RunData(tokenizer, max_length, encoder, corpus, held_out, plan, questions, saving)
