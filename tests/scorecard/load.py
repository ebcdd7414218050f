"""Checks 21 to 23: many rows, many steps, many processes."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import tiny

from scorecard.frame import check, expect
from scorecard.runs import Child, on_call, run, settings, write_config, write_rows
from sftx.cli import main
from sftx.data.dataset import load_corpora
from sftx.data.tokenizer import Tokenizer
from sftx.settings.make import make_config
from sftx.training import checkpoint

ROWS = 1_000_000


def memory(name: str) -> int:
    """`VmRSS` (all that is resident) or `RssAnon` (without files) of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@check(21, "1 M rows", limit=600)
def million(folder: Path) -> str:
    """1,000,000 rows are encoded at 4,000 and more a second in one process, within 500 MB, saying
    how long is left.
    """
    rows = folder / "million.jsonl"
    with rows.open("w") as file:
        file.writelines(
            f'{{"prompt": "question {i}", "completion": "answer {i * 7}"}}\n' for i in range(ROWS)
        )
    config = settings(
        folder, dropout=0.0, data={"train": str(rows)}, batch={"steps": 2}, checkpoint={"every": 0}
    )
    small = settings(folder, "small", dropout=0.0, checkpoint={"every": 0})

    def work() -> int:
        main(["train", write_config(small)])  # what every run takes, to be taken off
        before, began = memory("RssAnon"), time.process_time()
        # Without mapped pages of the cache's files: the system takes these back when it needs them,
        # and how many of them one access maps is up to its kernel.
        peak = [before]
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.02):
                peak[0] = max(peak[0], memory("RssAnon"))

        threading.Thread(target=watch, daemon=True).start()
        code = main(["train", write_config(config)])
        ended.set()
        print(json.dumps({"grown": peak[0] - before, "seconds": time.process_time() - began}))
        return code

    child = Child(work, folder / "million.log")
    expect(child.wait(580) == 0, child.text[-300:])
    told = json.loads(child.text.strip().rpartition("\n")[2])
    rate, grown = ROWS / told["seconds"], told["grown"] / 1e6
    expect("read 1,000,000 rows = trained 1,000,000" in child.text, child.text[:300])
    expect(
        re.search(r"encoding [\d,]+ of 1,000,000 rows, about \d+ s left", child.text),
        "progress was not told",
    )
    expect(
        rate >= 4000 and grown <= 500,
        f"{rate:,.0f} rows per CPU-second, {grown:,.0f} MB more memory",
    )
    return (
        f"{rate:,.0f} rows per CPU-second in one process, {grown:,.0f} MB more memory, time "
        "left told"
    )


@check(22, "Soak 2 000 steps with 40 saves", limit=300)
def soak(folder: Path) -> str:
    """From step 400 on memory grows by at most 2 %; descriptors and threads stay as many. Before
    that it settles.
    """
    log = folder / "soak.jsonl"

    def note() -> None:
        seen = len(os.listdir("/proc/self/fd")), threading.active_count(), memory("VmRSS")
        with log.open("a") as file:
            file.write(json.dumps(seen) + "\n")

    config = settings(folder, batch={"steps": 2000}, checkpoint={"every": 50})
    config["batch"]["steps"] = (
        2001  # so that step 2,000 is not the last, which has the model itself
    )
    child = Child(
        lambda: [on_call(checkpoint, "save", note, calls=0), main(["train", write_config(config)])][
            1
        ],
        folder / "log",
    )
    expect(child.wait(280) == 0, child.text[-300:])
    seen = [json.loads(line) for line in log.read_text().splitlines()]
    expect(len(seen) == 40, f"{len(seen)} saves")
    descriptors, threads, sizes = zip(*seen[7:], strict=True)
    grown = max(sizes) / sizes[0] - 1
    expect(
        len(set(descriptors)) == 1 == len(set(threads)),
        f"descriptors {set(descriptors)}, threads {set(threads)}",
    )
    expect(grown <= 0.02, f"memory grew by {100 * grown:.1f} %")
    return (
        f"memory +{100 * grown:.2f} % from step 400 to 2,000, 40 saves, {descriptors[0]} "
        "descriptors throughout"
    )


def _prepare(config: dict[str, Any], out: Path) -> int:
    tokenizer = Tokenizer.load(config["model"]["path"])
    corpus, _ = load_corpora(make_config(**config), tokenizer, 128)
    ids = b"".join(corpus.example(i).ids.tobytes() for i in range(len(corpus)))
    out.write_text(f"{corpus.fingerprint} {hash(ids)} {len(corpus)}")
    return 0


@check(23, "8 processes, one cache; 20 prepare runs with 1-3 rows and 4 workers", limit=180)
def shared_cache(folder: Path) -> str:
    """Eight processes encode the same data into one new cache at once: equal results, no damage.
    And nothing hangs.
    """
    rows = write_rows(folder / "many.jsonl", tiny.pairs(40_000, 20, 60))
    config = settings(folder, dropout=0.0, data={"train": rows})
    children = [
        Child(lambda out=folder / f"{i}.out": _prepare(config, out), folder / f"{i}.log")
        for i in range(8)
    ]
    for child in children:
        expect(child.wait(120) == 0, child.text[-300:])
    found = {(folder / f"{i}.out").read_text() for i in range(8)}
    expect(len(found) == 1 and found.pop().endswith(" 40000"), f"8 processes, results {found}")
    for trial in range(20):
        few = write_rows(folder / "few.jsonl", tiny.pairs(1 + trial % 3))
        data = {"train": few, "workers": 4, "cache": str(folder / f"cache-{trial}")}
        child = Child(
            lambda data=data: _prepare(
                settings(folder, dropout=0.0, data=data), folder / "few.out"
            ),
            folder / "few.log",
        )
        expect(child.wait(60) == 0, child.text[-300:])
    run(settings(folder, "again", dropout=0.0, data={"train": rows}, batch={"steps": 1}))
    return "8 of 8 equal, 20 of 20 small preparations done"
