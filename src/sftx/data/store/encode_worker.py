"""Encoding one block of rows, and the process that does it beside others.

`python -m sftx.data.store.encode_worker` reads jobs as lines of JSON and answers each with one
line. It is a plain child process rather than multiprocessing, which would run the user's own script
again.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from sftx.data.chat.limits import limit_this_process
from sftx.data.encoder import KEPT_AS_TEXT, Encoded, Encoder
from sftx.data.oversize import AT_ONCE, check_size
from sftx.data.sources.formats import renamed, unused
from sftx.data.sources.messages import other_fields
from sftx.data.sources.read import rows_in
from sftx.data.sources.rows import parse
from sftx.data.store.block import Block, Facts, make_block
from sftx.data.store.cache import Cache
from sftx.data.tokenizer import Tokenizer
from sftx.settings.schema import Data
from sftx.types import Json, Row, RowError, UserError


class Job(NamedTuple):
    """One block of lines to encode: its name in the cache, and where it stands."""

    key: str
    path: str
    start: int
    stop: int
    form: str
    lines: int
    place: str


def encode_job(job: Job, encoder: Encoder, cache: Cache) -> None:
    """Encode a block into the cache, unless another run was faster."""
    if cache.load(job.key) is not None:
        return
    with Path(job.path).open("rb") as file:
        file.seek(job.start)
        data = file.read(job.stop - job.start)
    cache.save(job.key, encode_block(data, job.form, encoder))


def encode_block(data: bytes, form: str, encoder: Encoder) -> Block:
    """Encode the rows in the lines of `data`. The block's facts say what is wrong with a row."""
    thresholds = gc.get_threshold()
    # What a block needs lives until its end, and would be searched in vain.
    gc.set_threshold(50_000, 20, 100)
    try:
        return _encode_block(data, form, encoder)
    finally:
        gc.set_threshold(*thresholds)


def _encode_block(data: bytes, form: str, encoder: Encoder) -> Block:
    facts = Facts()
    lines: list[tuple[int, int]] = []  # number and hash
    rows: list[Row] = []
    for line, raw, given in rows_in(data, 0):
        try:
            row = _read(given, len(raw), form, encoder, facts)
        except RowError as error:
            facts.bad.append((line, str(error)))
            continue
        lines.append((line, row_hash(raw)))
        rows.append(row)
    made: list[tuple[int, int, Encoded]] = []
    for (line, digest), row, encoded in zip(lines, rows, encoder.encode(rows), strict=True):
        if isinstance(encoded, RowError):
            facts.bad.append((line, str(encoded)))
        elif encoded.action == "dropped":
            facts.dropped.append((line, encoded.reason))
        else:
            if _keeps_special_tokens(row, encoder):
                encoded.notes.append(KEPT_AS_TEXT)
            made.append((line, digest, encoded))
    return make_block(made, facts)


def _read(given: Json | RowError, size: int, form: str, encoder: Encoder, facts: Facts) -> Row:
    """A value of JSON as a row; what it holds beside is counted in `facts`."""
    if isinstance(given, RowError):
        raise given
    columns = encoder.data.columns
    if isinstance(given, dict):
        facts.renamed.update(columns.keys() & given.keys())
    value = renamed(given, columns)
    row = parse(value, form)
    if size > AT_ONCE:
        check_size(row, encoder.tokenizer)
    if isinstance(value, dict):
        facts.unused.update(unused(tuple(value), form))
    for name in sorted(other_fields(row.messages)):
        facts.noted[f"message field {name!r} left to the template"] += 1
    facts.noted.update(row.notes)
    return row


def _keeps_special_tokens(row: Row, encoder: Encoder) -> bool:
    """Whether special tokens that a row spells were kept as text, and the encoder has not said so,
    as it does of rows that a template renders.
    """
    if encoder.data.special_tokens == "allow":
        return False
    if row.kind in ("messages", "phrases") and encoder.chat_template is not None:
        return False
    return _spells_special(row, encoder.tokenizer)


def _spells_special(row: Row, tokenizer: Tokenizer) -> bool:
    """Whether the row's text spells a special token that stays text. One that ends a row is the
    token itself.
    """
    bos, eos = (tokenizer.special.get(name, "") for name in ("bos_token", "eos_token"))
    texts = [phrase.text for phrase in row.phrases] + [
        str(message.get("content")) for message in row.messages
    ]
    if row.kind == "text":
        texts = [row.text.removeprefix(bos).removesuffix(eos)]
    elif row.kind != "segments" and texts:
        texts[-1] = texts[-1].removesuffix(eos)
    return any(tokenizer.control.search(text) for text in texts)


def row_hash(raw: bytes) -> int:
    """64-bit hash of a row as it stands in its file."""
    return int.from_bytes(blake2b(raw.strip(), digest_size=8).digest(), "little")


def tokenizer_state(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """What `main` needs to make the same tokenizer again; the large part goes to a file in
    `folder`.
    """
    path = folder / "tokenizer.json"
    path.write_text(tokenizer.backend.to_str(), encoding="utf-8")
    return {
        "path": str(path),
        "special": tokenizer.special,
        "chat_templates": tokenizer.chat_templates,
        "stop_ids": sorted(tokenizer.stop_ids),
        "known": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
    }


def main() -> None:
    """Answer jobs until standard input ends."""
    import tokenizers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    limit_this_process()
    setup = json.loads(sys.stdin.readline())
    state = setup["tokenizer"]
    backend = tokenizers.Tokenizer.from_file(state["path"])
    tokenizer = Tokenizer(backend, state["special"], state["chat_templates"], state["stop_ids"])
    vars(tokenizer).update(state["known"])  # not worked out again
    encoder = Encoder(tokenizer, Data.model_validate(setup["data"]), setup["max_length"])
    assert encoder.fingerprint == setup["fingerprint"], (
        "this process would encode otherwise than the one that asked"
    )
    cache = Cache(setup["cache"])
    gc.freeze()
    for line in sys.stdin:
        job = Job(**json.loads(line))
        answer = {"key": job.key}
        try:
            encode_job(job, encoder, cache)
        except UserError as error:
            answer["error"] = str(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
