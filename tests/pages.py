"""What tests read out of the pages that sftx writes, and a run's folder made by hand for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

EVIL = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)><!-- & \u202e"
"""What a row may hold; it must stay text."""


def data_of(text: str) -> dict[str, Any]:
    """The data of a page that stands alone: it names nothing outside of itself, and the four
    scripts that it has are ours.
    """
    inside = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    links = re.findall(r"https?://[^\s\"')]*", inside)
    assert {*links} <= {"https://github.com/leeoniya/uPlot", "http://www.w3.org/2000/svg"}
    assert not re.findall(r"<[^>]*\s(?:src|href)\s*=|@import|url\(", inside)
    assert text.count("<script") == text.count("</script>") == 4
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def record(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl, as runs wrote it before there was a report."""
    line = {
        "step": step,
        "num_steps": 60,
        "epoch": step / 60,
        "loss": loss,
        "learning_rate": 1e-3 * (1 - step / 60),
        "grad_norm": None if loss is None else 1.0,
        "examples": 4,
        "tokens": 100 + step,
        "targets": 50,
        "weight": 50.0,
        "packs": 1,
        "seconds": 0.5,
        "tokens_per_second": 200.0 + 2 * step,
        "memory": 2**20 * (100 + step),
        "total_tokens": 100 * step,
        "total_targets": 50 * step,
        "eval": None,
        "seconds_left": 1.0,
    }
    return line | more


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def folder(path: Path, rate: float = 1e-3, **changes: Any) -> Path:
    """The folder of a run of 60 steps with all that a page shows: an evaluation every 20 steps,
    answers, a spike at step 41, step 50 not finite, and hostile text wherever text may stand.
    """
    path.mkdir(parents=True)
    evaluated = {
        step: {
            "loss": 3 - step / 40,
            "perplexity": 9.0,
            "targets": 70,
            "accuracy": 0.2 + step / 100,
        }
        | {f"loss of {EVIL}": 3 - step / 50, "exact": step / 60, "kl": step / 100}
        for step in (0, 20, 40, 60)
    }
    lines = [record(0, None, tokens=0, targets=0, seconds=0.0, memory=0, eval=evaluated[0])]
    for step in range(1, 61):
        loss = 3 - step / 30 + 0.02 * (step % 3)
        line = record(step, loss, eval=evaluated.get(step), accuracy=step / 100)
        if step == 41:
            line |= {"loss": 6.0, "grad_norm": 40.0}
        if step == 50:
            line |= {"loss": None, "grad_norm": None}
        lines.append(line)
    write_lines(path / "metrics.jsonl", lines)
    bad = {"step": 50, "loss": "nan", "grad_norm": "nan", "rows": ["a.jsonl:9"]}
    write_lines(path / "bad_steps.jsonl", [bad])
    samples = [
        {"step": step, "prompt": f"{EVIL} question {i}", "output": f"{EVIL} after {step}"}
        | {"reference": f"answer {i}", "ended": step > 0, "tokens": 7, "scores": {"exact": 1.0}}
        for step in evaluated
        for i in range(3)
    ]
    write_lines(path / "samples.jsonl", samples)
    ledger = {"read": 9, "trained": 8, "split": 0, "dropped": 1, "tokens": 900, "targets": 450}
    ledger |= {"notes": {EVIL: 2}, "kinds": {"output": {"tokens": 4, "targets": 4, "weight": 4.0}}}
    counts = {"summary": "read 9 rows", "all": ledger, "sources": {EVIL: ledger}}
    (path / "ledger.json").write_text(json.dumps(counts))
    write_lines(path / "dropped.jsonl", [{"file": EVIL, "line": 3, "reason": EVIL}])
    row = {"place": f"{EVIL}:4", "tokens": 9, "targets": 5, "weight": 5.0, "text": EVIL}
    noted = {
        "lengths": {"edges": [0, 10, 20], "counts": [3, 6]},
        "weights": [{"weight": "0", "tokens": 450}, {"weight": "1", "tokens": 450}],
        "weights_of": 9,
        "rows": {"41": {"of": 9, "rows": [row]}, "50": {"of": 1, "rows": [row]}},
    }
    (path / "report.json").write_text(json.dumps(noted))
    facts = {
        "status": "finished",
        "config": {"model": {"path": EVIL}, "optim": {"learning_rate": rate}},
        "versions": {"sftx": "0.1.0"},
        "num_steps": 60,
        "predicted": {"memory": {"peak": 2**28}, "seconds": 20.0},
        "measured": {"memory": 2**27, "seconds": 30.0},
        "eval_before": evaluated[0],
        "eval_after": evaluated[60],
        "best": {"step": 40, "metric": "loss", "value": 2.0},
        "total_tokens": 7800,
        "total_targets": 3000,
    }
    (path / "run.json").write_text(json.dumps(facts | changes))
    return path
