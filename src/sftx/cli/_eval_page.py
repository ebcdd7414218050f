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
    numbers = {name: judged[name].numbers for name in columns}
    parts = [_HEAD, f"<h1>{escape(title)}</h1>\n<table>\n<thead><tr><th></th>"]
    parts += [f'<th scope="col">{name}</th>' for name in columns]
    parts.append("</tr></thead>\n")
    for metric in judged["model"].numbers:
        values = [numbers[name].get(metric) for name in columns]
        cells = "".join(f"<td>{'' if value is None else f'{value:.4g}'}</td>" for value in values)
        parts.append(f'<tr><th scope="row">{escape(metric)}</th>{cells}</tr>\n')
    parts.append("</table>\n<h2>Answers</h2>\n")
    for number, sample in enumerate(judged["model"].samples):
        rows = [("prompt", sample.prompt), ("reference", sample.reference)]
        for name in columns:
            answer = judged[name].samples[number]
            rows.append((name, answer.output + ("" if answer.ended else " [cut]")))
        scores = judged["model"].scores.items()
        rows.append(("scores", ", ".join(f"{name} {each[number]:.4g}" for name, each in scores)))
        texts = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in rows)
        parts.append(f"<article><dl>{texts}</dl></article>\n")
    parts.append("</body>\n</html>\n")
    Path(file).write_text("".join(parts), encoding="utf-8", errors="replace")
