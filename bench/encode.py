"""How fast rows become tokens, beside TRL's preparation of the same rows, in one run.

python bench/encode.py DATA.jsonl TOKENIZER [--rows N] [--repeats 3] [--many 1000000] [--sharing]

Both read the same file of `messages` rows, render them with the tokenizer's chat template and
tokenise them, each time in a fresh process with an empty cache, in turn. sftx is timed whole:
reading, encoding in as many processes as there are cores, writing the cache, mapping it. Of TRL
only the preparation inside `SFTTrainer` is timed, with its default settings; loading the file and
building the trainer are left out, in its favour. Medians are compared. The processor time of both
is printed too: on a machine that does other work at the same time, it is the better comparison.

`--many N`: also encode N rows (the file, repeated with changes) and report how much resident memory
grew. `--sharing`: also let eight processes encode into one empty cache at once, and compare what
they get.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAX_LENGTH = "4096"

SFTX = """
import json, resource, sys, time
from sftx.data.dataset import load_corpora
from sftx.data.tokenizer import Tokenizer
from sftx.settings.make import make_config
data, path, length, cache, workers = sys.argv[1:]
tokenizer = Tokenizer.load(path)
extra = {} if workers == "auto" else {"workers": int(workers)}
config = make_config(model=path, output="unused", data={"train": data, "cache": cache, **extra})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def spent():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
cpu, start = spent(), time.perf_counter()
corpus, _ = load_corpora(config, tokenizer, int(length))
seconds, cpu = time.perf_counter() - start, spent() - cpu
workers_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
ledger = corpus.ledger
print(json.dumps({"seconds": seconds, "cpu": cpu, "rows": ledger.read, "tokens": ledger.tokens,
                  "fingerprint": corpus.fingerprint, "grown_mb": grown / 1024,
                  "worker_mb": workers_peak / 1024}))
"""

TRL = """
import json, os, sys, tempfile, time
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config
from trl import SFTConfig, SFTTrainer
data, path, length = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=len(tokenizer), head_dim=8, **size))
lines = open(data, encoding="utf-8")
rows = Dataset.from_list([{"messages": json.loads(line)["messages"]} for line in lines])
seconds, cpu = [], []
prepare = SFTTrainer._prepare_dataset
def timed(*args, **kwargs):
    start, used = time.perf_counter(), time.process_time()
    prepared = prepare(*args, **kwargs)
    seconds.append(time.perf_counter() - start)
    cpu.append(time.process_time() - used)
    return prepared
SFTTrainer._prepare_dataset = timed
args = SFTConfig(output_dir=tempfile.mkdtemp(), report_to="none", max_length=int(length),
    use_cpu=True)
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
print(json.dumps({"seconds": sum(seconds), "cpu": sum(cpu), "rows": len(trainer.train_dataset)}))
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A fresh process that runs `code` and prints one line of JSON last."""
    log = None if "--verbose" in sys.argv else subprocess.DEVNULL  # TRL draws many progress bars
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=log, text=True
    )


def result(process: subprocess.Popen[str]) -> dict:
    """What a process printed last."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a measured process failed with code {process.returncode}")
    return json.loads(out.strip().splitlines()[-1])


def compare(data: str, tokenizer: str, repeats: int, folder: Path) -> str:
    """Time both sides in turn; the line with the result."""
    ours, theirs, again = [], [], []
    for turn in range(repeats):
        cache = str(folder / f"cache-{turn}")
        first = result(start(SFTX, data, tokenizer, MAX_LENGTH, cache, "auto"))
        ours.append(first["rows"] / first["seconds"])
        second = result(start(SFTX, data, tokenizer, MAX_LENGTH, cache, "auto"))
        assert second["fingerprint"] == first["fingerprint"]
        again.append(second["seconds"])
        trl = result(start(TRL, data, tokenizer, MAX_LENGTH))
        theirs.append(trl["rows"] / trl["seconds"])
        print(
            f"turn {turn + 1}: sftx {first['seconds']:.2f} s ({ours[-1]:,.0f} rows/s, "
            f"{first['tokens']:,} tokens, "
            f"processor {first['cpu']:.1f} s), "
            f"from its cache {second['seconds']:.2f} s; trl {trl['seconds']:.2f} s "
            f"({theirs[-1]:,.0f} rows/s, "
            f"processor {trl['cpu']:.1f} s)",
            flush=True,
        )
    speed = statistics.median(ours)
    speedup = speed / statistics.median(theirs)
    return (
        f"encode speedup={speedup:.1f} rows_per_second={speed:.0f} "
        f"cached_seconds={statistics.median(again):.2f}"
    )


def many(data: str, tokenizer: str, rows: int, folder: Path) -> None:
    """Encode so many different rows and report the growth of resident memory."""
    path, count = folder / "many.jsonl", 0
    lines = Path(data).read_text(encoding="utf-8").rstrip("\n").split("\n")
    with path.open("w", encoding="utf-8") as out:
        while count < rows:
            for line in lines[: rows - count]:
                out.write(line[:-1] + f', "copy": {count}}}\n')
                count += 1
    for what in ("encoded", "from the cache"):
        found = result(start(SFTX, str(path), tokenizer, MAX_LENGTH, str(folder / "many"), "auto"))
        print(
            f"{rows:,} rows {what}: {found['seconds']:.1f} s, {found['tokens']:,} tokens, "
            "resident memory grew by "
            f"{found['grown_mb']:.0f} MB (largest other process {found['worker_mb']:.0f} MB)",
            flush=True,
        )


def sharing(data: str, tokenizer: str, folder: Path) -> None:
    """Eight processes, one cache."""
    began = time.perf_counter()
    running = [
        start(SFTX, data, tokenizer, MAX_LENGTH, str(folder / "shared"), "0") for _ in range(8)
    ]
    prints = {result(process)["fingerprint"] for process in running}
    files = len(list((folder / "shared").rglob("*.safetensors")))
    print(
        f"8 processes, one cache: {time.perf_counter() - began:.1f} s, {files} files, "
        f"{len(prints)} fingerprint(s)"
    )
    assert len(prints) == 1


def main() -> None:
    """Measure and print; the last line holds the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("tokenizer")
    parser.add_argument("--rows", type=int, default=0, help="use the first rows only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--verbose", action="store_true", help="let the measured processes write to the terminal"
    )
    parser.add_argument("--many", type=int, default=0, metavar="ROWS")
    parser.add_argument("--sharing", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), options.data
        if options.rows:
            lines = Path(data).read_bytes().split(b"\n")[: options.rows]
            data = str(folder / "rows.jsonl")
            Path(data).write_bytes(b"\n".join(lines) + b"\n")
        if options.sharing:
            sharing(data, options.tokenizer, folder)
        if options.many:
            many(data, options.tokenizer, options.many, folder)
        if options.repeats:
            print(compare(data, options.tokenizer, options.repeats, folder))


if __name__ == "__main__":
    main()
