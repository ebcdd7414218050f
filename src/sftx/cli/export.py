"""Write what a run trained as a Hugging Face folder, as GGUF or as an adapter: `sftx export runs/first
to=merged format=gguf dtype=q8_0`.

An adapter is merged into its base, tied embeddings, rows of added tokens and a quantised base
(dequantised) included; `step=N` takes a checkpoint instead of the finished model. What is written is
read back and compared with what was trained: token ids, logits and greedy answers. Where they do not
agree, nothing is left behind.

The folder of a run is data. Whatever its run.json says, code that comes with a model runs only
where you say so here; models that it names are read from this disk, and fetched only where you name
them; a template's file likewise.
"""

from __future__ import annotations

import os
from pathlib import Path

from sftx.cli._inputs import whole_number
from sftx.printable import printable
from sftx.report.progress import working
from sftx.training.export import Allowed
from sftx.training.hand_over import DTYPES, FORMATS, Wish, hand_over
from sftx.training.hand_over_push import push_folder
from sftx.training.hand_over_rows import rows_of_file
from sftx.training.merging import clear_leftovers
from sftx.types import UserError

STAGE = "hand over"
EXAMPLE = "sftx export runs/first to=merged dtype=bf16"
EXTRA = {
    "to": "folder to write; default: RUN/exported",
    "format": "hf (a Hugging Face folder, the default), gguf (with an Ollama Modelfile) or adapter",
    "dtype": "of matrices. hf: fp32, bf16, fp16 or auto (as in the model the run started from); "
    "default: what the run says. gguf: f32, f16, bf16, q8_0, or a type of llama.cpp's quantiser, "
    "such as q4_k_m, where that is installed",
    "step": "number of a checkpoint; default: the finished model",
    "average": "numbers of checkpoints with commas between them: the mean of their weights",
    "mix": "share of the trained weights, between 0 and 1; the rest comes from the base",
    "data": "a file of rows to check token ids, logits and answers with; default: rows of sftx's own",
    "rows": "how many rows of that file are checked; default: 64",
    "push": "OWNER/NAME on the hub: upload the folder there too, as a private repository",
    "private": "false makes a repository that push= creates public",
    "trust_remote_code": "true lets Python code that comes with the model run; default: false, "
    "whatever run.json says",
    "model": "the base, a folder or a name on the hub; default: the one that run.json names, if "
    "it is on this disk",
    "tokenizer": "the same for the tokenizer, where it is not the base's own",
    "adapter": "the same for the adapter that the run started from (with step=N)",
    "template": "the chat template, as in data.template; default: the one saved with the run",
}


def run(
    path: str = "",
    to: str = "",
    format: str = "hf",
    dtype: str = "",
    step: str = "",
    average: str = "",
    mix: str = "",
    data: str = "",
    rows: str = "64",
    push: str = "",
    private: str = "true",
    trust_remote_code: str = "false",
    model: str = "",
    tokenizer: str = "",
    adapter: str = "",
    template: str = "",
) -> int:
    """Export the run in `path`. Raises UserError where what was written is not what was trained."""
    folder = Path(path)
    target = Path(to or Path(path) / "exported")
    if (folder / "sftx" / "run.json").is_file():  # the checkpoint_dir of a trlx script
        folder = folder / "sftx"
    if not (folder / "run.json").is_file():
        raise UserError(
            f"sftx export: {path or 'no folder given'}: the folder of a run (with run.json) is "
            "needed"
        )
    _check_choice("format", format, FORMATS)
    _check_choice("trust_remote_code", trust_remote_code, ("true", "false"))
    _check_choice("private", private, ("true", "false"))
    if format == "hf":
        _check_choice("dtype", dtype, ("", "auto", *DTYPES))
    clear_leftovers(target)
    if os.path.lexists(target):
        raise UserError(
            f"sftx export: {target} exists and is not overwritten; choose another with to="
        )
    wish = Wish(
        format,
        dtype,
        step,
        _steps(average, step),
        _share(mix),
        rows_of_file(data, whole_number("export: rows", rows)) if data else (),
    )
    allowed = Allowed(trust_remote_code == "true", model, tokenizer, adapter, template)
    with working("loading, merging, writing and checking the model"):
        checked = hand_over(folder, target, wish, allowed)
    print(f"{printable(str(target))}: {printable(checked.line())}")
    if push:
        print(f"pushed to {printable(push_folder(target, push, private == 'true'))}")
    return 0


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        known = ", ".join(filter(None, allowed))
        raise UserError(f"sftx export: {key}={value!r}; allowed: {known}")


def _steps(average: str, step: str) -> tuple[str, ...]:
    """The checkpoints to average."""
    if not average:
        return ()
    if step:
        raise UserError("sftx export: step= and average= both name checkpoints; set one")
    steps = tuple(part.strip() for part in average.split(","))
    if len(set(steps)) < 2 or len(set(steps)) < len(steps):
        raise UserError(f"sftx export: average={average!r}: at least two steps, each once")
    return tuple(str(whole_number("export: average", part)) for part in steps)


def _share(mix: str) -> float | None:
    if not mix:
        return None
    try:
        share = float(mix)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UserError(f"sftx export: mix={mix!r}: a number between 0 and 1 is needed")
    return share
