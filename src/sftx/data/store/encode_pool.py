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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import sftx
from sftx.cores import usable_cores
from sftx.data.encoder import Encoder
from sftx.data.store.cache import Cache
from sftx.data.store.encode_worker import Job, encode_job, tokenizer_state
from sftx.types import UserError

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""
WORTH_A_PROCESS = 2 << 20  # bytes; starting one costs about a second


def encode_jobs(
    jobs: Sequence[Job],
    encoder: Encoder,
    cache: Cache,
    scratch: Path,
    progress: Progress | None = None,
) -> None:
    """Encode all `jobs` into the cache, here and in other processes; who is free takes the next.

    Raises:
        UserError: encoding cannot go on (a template that fails for every row, a full disk), or a
            process died.
    """
    # Large ones first, so that all processes end together.
    waiting = deque(sorted(jobs, key=lambda job: job.start - job.stop))
    answers: SimpleQueue[Job | UserError] = SimpleQueue()
    total = sum(job.lines for job in jobs)
    done = 0
    with ExitStack() as stack:
        others: list[subprocess.Popen[str]] = []
        for _ in range(_workers(jobs, encoder) - 1):
            others.append(_start())
            stack.callback(_end, others[-1])
        setup = _setup(encoder, cache, scratch) if others else ""  # made while they start
        for process in others:
            Thread(target=_serve, args=(process, setup, waiting, answers), daemon=True).start()
        for answer in _answers(len(jobs), waiting, answers, encoder, cache):
            done += answer.lines
            if progress:
                progress(done, total)


def _workers(jobs: Sequence[Job], encoder: Encoder) -> int:
    """How many processes encode, this one among them."""
    wanted = encoder.data.workers
    if wanted is None:
        wanted = usable_cores()
    size = sum(job.stop - job.start for job in jobs)
    return min(wanted, len(jobs), 1 + size // WORTH_A_PROCESS)


def _answers(
    left: int,
    waiting: deque[Job],
    answers: SimpleQueue[Job | UserError],
    encoder: Encoder,
    cache: Cache,
) -> Iterator[Job]:
    """The jobs as they get done, here or elsewhere, until none of so many is `left`."""
    while left:
        job = _take(waiting)
        if job:
            encode_job(job, encoder, cache)
            answers.put(job)
        while left and (job is None or not answers.empty()):
            answer = answers.get()
            if isinstance(answer, UserError):
                raise answer
            left -= 1
            yield answer


def _setup(encoder: Encoder, cache: Cache, scratch: Path) -> str:
    """What another process needs to make the same encoder."""
    asked = {
        "tokenizer": tokenizer_state(encoder.tokenizer, scratch),
        "data": encoder.data.model_dump(exclude={"rows", "eval_rows"}),
        "max_length": encoder.max_length,
        "fingerprint": encoder.fingerprint,
        "cache": str(cache.folder),
    }
    return json.dumps(asked)


def _take(waiting: deque[Job]) -> Job | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _start() -> subprocess.Popen[str]:
    home = str(Path(sftx.__file__).parents[1])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    # -P: the user's folder shadows no module
    command = [sys.executable, "-P", "-m", "sftx.data.store.encode_worker"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
    )


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()  # it has answered all its jobs, or its answers are no longer wanted
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()
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
    message = setup
    job = None
    while True:
        try:
            process.stdin.write(message + "\n")
            process.stdin.flush()
            answer = process.stdout.readline() if job else "ready"
        except (BrokenPipeError, ValueError):
            answer = ""
        if not answer:
            answers.put(_ended(process.wait(), job))
            return
        if job:
            error = json.loads(answer).get("error")
            answers.put(UserError(error) if error else job)
        job = _take(waiting)
        if job is None:
            process.stdin.close()
            return
        message = json.dumps(job._asdict())


def _ended(code: int, job: Job | None) -> UserError:
    where = f" at {job.place}" if job else ""
    why = "if memory ran out, set data.workers to fewer processes"
    if code == -signal.SIGVTALRM:
        why = "the chat template was in an endless operation; the stacks above show its line"
    return UserError(f"a process that encodes rows ended{where} with code {code}; {why}")
