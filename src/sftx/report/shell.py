"""The shell of every page that sftx writes: one HTML file that opens from disk and asks no network.

The look is `page.css`, the charts are `charts.js` over uPlot (https://github.com/leeoniya/uPlot,
MIT licence, in `uplot/`). The data of a page is JSON in an element of its own; scripts put text
into the page by `textContent` alone, so that text from rows and models stays text. The policy of
the page allows the scripts and the style that stand here, by their hashes, and nothing else.
"""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from html import escape
from importlib import resources


@cache
def asset(name: str) -> str:
    """The text of a file that comes with this package."""
    return resources.files("sftx.report").joinpath(name).read_text(encoding="utf-8")


def page(
    title: str, body: str, data: object, script: str, style: str = "", connects: bool = False
) -> str:
    """A whole page, as text for one file.

    `title`: any text. `body`: HTML that we wrote; text of rows, models or paths never goes in here,
    but into `data`: any JSON value, which `script` finds as `data`. `script`: JavaScript; it has
    what `charts.js` offers (`make`, `chart`, `bars`, `table`, ...). Numbers in `data` that are not
    finite become null. `style`: CSS of this page alone. `connects`: the page may ask the server
    that it came from, and no other.
    """
    style = asset("uplot/uPlot.css") + asset("page.css") + style
    uplot = f"/*\n{asset('uplot/LICENSE.txt')}*/\n{asset('uplot/uPlot.js')}"
    scripts = [uplot, asset("charts.js"), script]
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"script-src {' '.join(map(_hash, scripts))}; style-src {_hash(style)}"
    )
    if connects:
        policy += "; connect-src 'self'"
    blocks = "\n".join(f"<script>{text}</script>" for text in scripts)
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
<noscript><p>This page draws its tables and charts with JavaScript.</p></noscript>
<script type="application/json" id="data">{as_json(data)}</script>
{blocks}
</body>
</html>
"""
    return text.encode("utf-8", "replace").decode("utf-8")  # half of a pair of surrogates


def as_json(data: object) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _finite(value: object) -> object:
    """`value` with None for numbers that are not finite, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(each) for each in value]
    return value


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
