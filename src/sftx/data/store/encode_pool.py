"""Encoding the blocks that the cache lacks: in this process and in others beside it, one block at a
time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

import sftx
from sftx.cores import usable_cores
from sftx.data.encoder import Encoder
from sftx.data.store.cache import Cache
from sftx.data.store.encode_worker import encode_block, read_block, tokenizer_state
from sftx.data.tokenizer import Tokenizer
from sftx.settings.schema import Data
from sftx.types import UserError

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""
WORTH_A_PROCESS = 2 << 20  # bytes; starting one costs about a second


class Job(NamedTuple):
    """One block to encode and the name of its file in the cache."""

    key: str
    path: Path
    start: int
    stop: int
    form: str
    lines: int
    place: str


def cores() -> int:
    """Cores this process may use."""
    return usable_cores()


def encode_jobs(
    jobs: Sequence[Job],
    encoder: Encoder,
    tokenizer: Tokenizer,
    data: Data,
    max_length: int,
    cache: Cache,
    scratch: Path,
    progress: Progress | None = None,
) -> None:
    """Encode all `jobs` into the cache.

    Raises:
        UserError: encoding cannot go on (a template that fails for every row, a full disk), or a process died.
    """
    done, total = 0, sum(job.lines for job in jobs)

    def report(job: Job) -> None:
        nonlocal done
        done += job.lines
        if progress:
            progress(done, total)

    workers = cores() if data.workers is None else data.workers
    size = sum(job.stop - job.start for job in jobs)
    workers = min(workers, len(jobs), 1 + size // WORTH_A_PROCESS)
    ordered = sorted(
        jobs, key=lambda job: job.start - job.stop
    )  # large ones first: all processes end together

    def setup() -> str:
        asked = {
            "tokenizer": tokenizer_state(tokenizer, scratch),
            "data": data.model_dump(exclude={"rows", "eval_rows"}),
            "max_length": max_length,
            "fingerprint": encoder.fingerprint,
            "cache": str(cache.folder),
        }
        return json.dumps(asked)

    def encode_here(job: Job) -> None:
        if cache.load(job.key) is None:
            cache.save(
                job.key, encode_block(read_block(job.path, job.start, job.stop), job.form, encoder)
            )

    _share(ordered, max(workers, 1) - 1, setup, encode_here, report)


def _share(
    jobs: Sequence[Job],
    processes: int,
    setup: Callable[[], str],
    encode_here: Callable[[Job], None],
    report: Callable[[Job], None],
) -> None:
    """Do all jobs, here and in so many further processes; whoever is free takes the next one."""
    waiting, left = deque(jobs), len(jobs)
    answers: SimpleQueue[Job | UserError] = SimpleQueue()
    with ExitStack() as stack:
        others: list[subprocess.Popen[str]] = []
        for _ in range(processes):
            others.append(_start())
            stack.callback(_end, others[-1])
        asked = setup() if others else ""  # made while they start
        for process in others:
            Thread(target=_serve, args=(process, asked, waiting, answers), daemon=True).start()
        while left:
            job = _take(waiting)
            if job:
                encode_here(job)
                answers.put(job)
            while left and (job is None or not answers.empty()):
                answer = answers.get()
                if isinstance(answer, UserError):
                    raise answer
                report(answer)
                left -= 1


def _take(waiting: deque[Job]) -> Job | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _start() -> subprocess.Popen[str]:
    home = str(Path(sftx.__file__).parents[1])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "sftx.data.store.encode_worker",
        ],  # -P: the user's folder shadows no module
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
    )


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()  # it has answered all its jobs, or its answers are no longer wanted
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):
            pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
    process.wait()


def _serve(
    process: subprocess.Popen[str],
    setup: str,
    waiting: deque[Job],
    answers: SimpleQueue[Job | UserError],
) -> None:
    """Hand jobs to one process, one at a time, until none is left."""
    assert process.stdin is not None
    assert process.stdout is not None
    message, job = setup, None
    while True:
        try:
            process.stdin.write(message + "\n")
            process.stdin.flush()
            answer = process.stdout.readline() if job else "ready"
        except (BrokenPipeError, ValueError):
            answer = ""
        if not answer:
            where, code = f" at {job.place}" if job else "", process.wait()
            endless = (
                "the chat template was in an endless operation; the stacks above show its line"
            )
            why = (
                endless
                if code == -signal.SIGVTALRM
                else "if memory ran out, set data.workers to fewer processes"
            )
            answers.put(
                UserError(f"a process that encodes rows ended{where} with code {code}; {why}")
            )
            return
        if job:
            error = json.loads(answer).get("error")
            answers.put(UserError(error) if error else job)
        job = _take(waiting)
        if job is None:
            process.stdin.close()
            return
        message = json.dumps(
            {
                "key": job.key,
                "path": str(job.path),
                "start": job.start,
                "stop": job.stop,
                "form": job.form,
            }
        )
