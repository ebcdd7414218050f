"""The page that `sftx eval html=FILE` writes: numbers and answers, the base beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from sftx.eval.judge import Judgement

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sftx eval</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 0 auto; padding: 20px; }
h1 { font-size: 24px; overflow-wrap: anywhere; } h2 { font-size: 18px; }
table { border-collapse: collapse; } th, td { padding: 3px 16px 3px 0; text-align: right; }
th:first-child { text-align: left; font-weight: 400; }
article { border-top: 1px solid #8886; padding: 10px 0; }
dl { display: grid; grid-template-columns: 6em 1fr; gap: 4px 12px; margin: 0; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; } dt { color: #888; }
@media (max-width: 560px) { dl { grid-template-columns: 1fr; } }
</style>
</head>
<body>
"""


def write_page(file: str, title: str, judged: Mapping[str, Judgement]) -> None:
    """Write one file that needs no network and no scripts. `judged`: "model", and "base" if any."""
    columns = [name for name in ("base", "model") if name in judged]
    parts = [_HEAD, f"<h1>{escape(title)}</h1>\n"]
    parts += _numbers(judged, columns)
    parts.append("<h2>Answers</h2>\n")
    for number in range(len(judged["model"].samples)):
        parts.append(_answer(judged, columns, number))
    parts.append("</body>\n</html>\n")
    Path(file).write_text("".join(parts), encoding="utf-8", errors="replace")


def _numbers(judged: Mapping[str, Judgement], columns: list[str]) -> list[str]:
    """A table with a row for each number and a column for each model."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in columns)
    parts = [f"<table>\n<thead><tr><th></th>{heads}</tr></thead>\n"]
    for metric in judged["model"].numbers:
        cells = ""
        for name in columns:
            value = judged[name].numbers.get(metric)
            cells += "<td></td>" if value is None else f"<td>{value:.4g}</td>"
        parts.append(f'<tr><th scope="row">{escape(metric)}</th>{cells}</tr>\n')
    parts.append("</table>\n")
    return parts


def _answer(judged: Mapping[str, Judgement], columns: list[str], number: int) -> str:
    """A prompt, its reference, what each model said, and the scores of the last."""
    sample = judged["model"].samples[number]
    rows = [("prompt", sample.prompt), ("reference", sample.reference)]
    for name in columns:
        answer = judged[name].samples[number]
        rows.append((name, answer.output + ("" if answer.ended else " [cut]")))
    scores = judged["model"].scores.items()
    rows.append(("scores", ", ".join(f"{name} {each[number]:.4g}" for name, each in scores)))
    texts = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    return f"<article><dl>{texts}</dl></article>\n"
