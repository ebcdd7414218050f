"""From the settings to what is asked of a model: prompts, metrics, and a general text."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from typing import Any

from sftx.data.dataset import load_corpora
from sftx.data.encoder import Encoder
from sftx.data.store.corpus import Corpus
from sftx.eval.generate import Prompt, prompt_of
from sftx.eval.judge import Questions
from sftx.eval.metrics import check_metric, score
from sftx.eval.sampling import AS_SAVED, Sampling
from sftx.settings.schema import Config, Data
from sftx.types import UserError

GENERAL_TEXT = "general.txt"
"""Beside this file: ten paragraphs of Alice's Adventures in Wonderland, the last cut short, 1865,
in the public domain; the text of Project Gutenberg's eBook 11, without its marks of emphasis, and
with each paragraph as one line.
"""


def read_questions(
    config: Config, encoder: Encoder, held_out: Corpus | None, positions: int | None
) -> Questions | None:
    """What a run asks at its evaluations; None where it asks nothing.

    `positions` is how many tokens the model takes. UserError for prompts that cannot be asked, and
    for a metric that fails where the references stand in for the answers.
    """
    wanted = config.eval
    if not wanted.prompts:
        return None
    for metric in wanted.metrics:
        check_metric(metric)
    corpus = held_out
    count = wanted.prompts
    if not isinstance(count, int):
        corpus = _corpus(config, count, encoder)
        count = len(corpus)
    assert corpus is not None, "the settings say so"
    found = questions_on(config, encoder, corpus, count, positions)
    if not found.prompts:
        raise UserError("eval.prompts: no prompt is left to be asked: " + "; ".join(found.notes))
    return found


def questions_on(
    config: Config,
    encoder: Encoder,
    corpus: Corpus,
    count: int,
    positions: int | None,
    samples: int = 1,
    sampling: Sampling = AS_SAVED,
) -> Questions:
    """What `eval` asks, with the prompts of up to `count` examples of `corpus`, each `samples` times."""
    wanted = config.eval
    prompts, notes = prompts_of(corpus, encoder, count, wanted.new_tokens, positions)
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    texts = [prompt.text for prompt in prompts]
    references = [prompt.reference for prompt in prompts]
    tried = score(wanted.metrics, texts, references, references) if prompts else {}
    return Questions(
        tokenizer=encoder.tokenizer,
        stop_ids=encoder.stop_ids,
        prompts=prompts,
        metrics=wanted.metrics,
        new_tokens=wanted.new_tokens,
        seed=config.seed,
        general=read_general(config, encoder) if prompts else None,
        scored=list(tried),
        notes=notes,
        sampling=sampling,
    )


def prompts_of(
    corpus: Corpus, encoder: Encoder, count: int, new_tokens: int, positions: int | None
) -> tuple[list[Prompt], list[str]]:
    """The prompts of up to `count` examples, taken evenly over the corpus, and what to say of those
    that are left out.
    """
    found: list[Prompt] = []
    shortened = too_long = without = 0
    stride = max(len(corpus) // max(count, 1), 1)
    for number in range(0, len(corpus), stride):
        if len(found) == count:
            break
        example = corpus.example(number)
        prompt = prompt_of(example, encoder.tokenizer, encoder.stop_ids)
        if prompt is None:
            without += 1
        elif example.shortened:
            shortened += 1
        elif positions is not None and len(prompt.ids) + new_tokens > positions:
            too_long += 1
        else:
            found.append(replace(prompt, number=number))
    said = [
        (without, "have no prompt before an output"),
        (shortened, "are longer than data.max_length"),
        (too_long, f"leave no room for {new_tokens} new tokens in {positions} positions"),
    ]
    notes = [f"{number:,} prompts are not asked: they {why}" for number, why in said if number]
    return found, notes


def read_general(config: Config, encoder: Encoder) -> Corpus | None:
    """The general text, encoded; None where `eval.general` is off."""
    general = config.eval.general
    if general is False:
        return None
    if general is not True:
        return _corpus(config, general, encoder)
    text = (files("sftx.eval") / GENERAL_TEXT).read_text(encoding="utf-8")
    plain = Data(format="text", cache=config.data.cache)
    return _corpus(
        config.model_copy(update={"data": plain}),
        [text],
        Encoder(encoder.tokenizer, plain, encoder.max_length),
    )


def _corpus(config: Config, source: str | list[Any], encoder: Encoder) -> Corpus:
    """Rows of a file or in memory, by the settings of `data`."""
    nothing = {"train": None, "rows": None, "eval": None, "eval_rows": None, "eval_split": 0.0}
    given = {"train": source} if isinstance(source, str) else {"rows": source}
    data = config.data.model_copy(update={**nothing, **given, "workers": 0})
    config = config.model_copy(update={"data": data})
    corpus, _ = load_corpora(config, encoder.tokenizer, encoder.max_length, encoder=encoder)
    return corpus
