"""Several answers to each prompt, and what `sftx eval` writes of them: `samples=`, `rows=`, `weight=`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sftx.cli._inputs import whole_number
from sftx.cli._output import check_file
from sftx.data.encoder import Encoder
from sftx.data.store.corpus import Corpus
from sftx.eval.answer_rows import answer_rows, as_lines, check_turns
from sftx.eval.judge import Judgement, Questions
from sftx.eval.sampling import Sampling, generation_config
from sftx.eval.served import Served
from sftx.printable import printable
from sftx.settings.schema import Config
from sftx.talk.sampling import sampling_of
from sftx.types import UserError


@dataclass(frozen=True, slots=True)
class Sampled:
    """How answers are drawn, and the file that they are written to ("": none)."""

    samples: int
    sampling: Sampling
    rows: str
    weight: str

    def check(self, corpus: Corpus, questions: Questions) -> None:
        """UserError, before anything is computed, where rows could not be written."""
        if not self.rows:
            return
        check_turns(corpus)
        if not questions.prompts:
            raise UserError("sftx eval rows=: no prompt is asked, so there is no answer to write")
        if self.weight and self.weight not in questions.scored:
            known = ", ".join(questions.scored) or "none"
            raise UserError(
                f"sftx eval weight={printable(self.weight)}: no such metric; metrics= gives: {known}"
            )

    def said(self, questions: Questions) -> str:
        """What is asked: `24 prompts`, or `6 prompts, 4 answers each`."""
        prompts = f"{len(questions.prompts) // self.samples:,} prompts"
        return prompts if self.samples == 1 else f"{prompts}, {self.samples} answers each"

    def check_model(self, served: Served) -> None:
        """UserError where all samples of a prompt would be the same answer."""
        config = generation_config(served.loss.model, [], 1, self.sampling)
        if self.samples > 1 and not config.do_sample:
            raise UserError(
                f"sftx eval samples={self.samples}: the most probable token is taken each time, so "
                "all answers to a prompt would be the same; set temperature=1"
            )

    def write(
        self,
        config: Config,
        encoder: Encoder,
        corpus: Corpus,
        questions: Questions,
        judged: Judgement,
    ) -> str:
        """Write the answers as rows; what to say of that, "" where none are asked for.

        Raises:
            UserError: a weight is negative.
        """
        if not self.rows:
            return ""
        weights = judged.scores[self.weight] if self.weight else [1.0] * len(judged.samples)
        if min(weights) < 0:
            raise UserError(f"sftx eval weight={self.weight}: a weight of {min(weights):g}")
        made = answer_rows(config, encoder, corpus, questions.prompts, judged.samples, weights)
        Path(self.rows).write_text(as_lines(made), encoding="utf-8")
        return f"rows     {made.summary()}; written to {self.rows}"


def sampled_of(samples: str, sampling: Mapping[str, str] | None, rows: str, weight: str) -> Sampled:
    """What the keys of the command line ask for, each of them checked."""
    count = whole_number("eval: samples", samples)
    if weight and not rows:
        raise UserError("sftx eval weight=: it weighs the rows of rows=FILE, which is not given")
    check_file("eval", "rows", rows)
    return Sampled(count, sampling_of(sampling or {}), rows, weight)
