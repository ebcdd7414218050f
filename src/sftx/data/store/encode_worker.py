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
from typing import Any

from sftx.data.chat.limits import limit_this_process
from sftx.data.encoder import KEPT_AS_TEXT, Encoded, Encoder
from sftx.data.oversize import AT_ONCE, check_size
from sftx.data.sources.formats import renamed, unused
from sftx.data.sources.messages import other_fields
from sftx.data.sources.read import rows_in
from sftx.data.sources.rows import parse
from sftx.data.store.cache import Cache, Entry, TokenBlock, make_block
from sftx.data.tokenizer import Tokenizer
from sftx.settings.schema import Data
from sftx.types import Row, RowError, UserError


def encode_block(data: bytes, form: str, encoder: Encoder) -> TokenBlock:
    """Encode the rows in the lines of `data`. What is wrong with a row is kept in the block's
    `bad`.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(
        50_000, 20, 100
    )  # what a block needs lives until its end, and would be searched in vain
    try:
        return _encode_block(data, form, encoder)
    finally:
        gc.set_threshold(*thresholds)


def _encode_block(data: bytes, form: str, encoder: Encoder) -> TokenBlock:
    rows: list[tuple[int, int, Row]] = []
    meta: dict[str, Any] = {"dropped": [], "bad": [], "unused": {}, "noted": {}, "renamed": {}}
    columns = encoder.data.columns
    for line, raw, given in rows_in(data, 0):
        try:
            if isinstance(given, RowError):
                raise given
            for column in columns.keys() & given.keys() if isinstance(given, dict) else ():
                meta["renamed"][column] = meta["renamed"].get(column, 0) + 1
            value = renamed(given, columns)
            row = parse(value, form)
            if len(raw) > AT_ONCE:
                check_size(row, encoder.tokenizer)
        except RowError as error:
            meta["bad"].append((line, str(error)))
            continue
        rows.append((line, row_hash(raw), row))
        for column in unused(tuple(value), form) if isinstance(value, dict) else ():
            meta["unused"][column] = meta["unused"].get(column, 0) + 1
        passed = [
            f"message field {name!r} left to the template"
            for name in sorted(other_fields(row.messages))
        ]
        for note in (*passed, *row.notes):
            meta["noted"][note] = meta["noted"].get(note, 0) + 1
    entries: list[Entry] = []
    for (line, digest, row), encoded in zip(
        rows, encoder.encode([row for _, _, row in rows]), strict=True
    ):
        if isinstance(encoded, RowError):
            meta["bad"].append((line, str(encoded)))
        elif encoded.action == "dropped":
            meta["dropped"].append((line, encoded.reason))
        else:
            cut = (encoded.action == "split", encoded.tokens_truncated, encoded.targets_truncated)
            notes = _notes(row, encoded, encoder)
            entries += [Entry(example, line, digest, *cut, notes) for example in encoded.examples]
    return make_block(entries, meta)


def _notes(row: Row, encoded: Encoded, encoder: Encoder) -> tuple[str, ...]:
    """What was done to a row, its spelled special tokens included: where a template renders it, the
    encoder says so.
    """
    rendered = row.kind in ("messages", "phrases") and encoder.chat_template is not None
    if (
        rendered
        or encoder.data.special_tokens == "allow"
        or not _spells_special(row, encoder.tokenizer)
    ):
        return tuple(encoded.notes)
    return (*encoded.notes, KEPT_AS_TEXT)


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


def read_block(path: Path, start: int, stop: int) -> bytes:
    """Bytes `start:stop` of a file."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


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
        job = json.loads(line)
        answer: dict[str, Any] = {"key": job["key"]}
        try:
            if cache.load(job["key"]) is None:  # another run may have been faster
                block = encode_block(
                    read_block(Path(job["path"]), job["start"], job["stop"]), job["form"], encoder
                )
                cache.save(job["key"], block)
        except UserError as error:
            answer["error"] = str(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
