"""Write what a run trained as one Hugging Face folder: `sftx export runs/first to=merged
dtype=bf16`.

An adapter is merged into its base, tied embeddings, rows of added tokens and a quantised base
(dequantised) included; `step=N` takes a checkpoint instead of the finished model. How far the
logits move is measured and printed.

The folder of a run is data. Whatever its run.json says, code that comes with a model runs only
where you say so here; models that it names are read from this disk, and fetched only where you name
them; a template's file likewise.
"""

from __future__ import annotations

import os
from pathlib import Path

from sftx.printable import printable
from sftx.training.export import Allowed, clear_leftovers, export
from sftx.types import UserError

STAGE = "hand over"
EXAMPLE = "sftx export runs/first to=merged dtype=bf16"
EXTRA = {
    "to": "folder to write; default: RUN/exported",
    "dtype": "fp32, bf16 or auto (as in the model the run started from); default: what the run "
    "says",
    "step": "number of a checkpoint; default: the finished model",
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
    dtype: str = "",
    step: str = "",
    trust_remote_code: str = "false",
    model: str = "",
    tokenizer: str = "",
    adapter: str = "",
    template: str = "",
) -> int:
    """Export the run in `path`. Raises UserError where merging moves a logit by more than 1e-5 of
    the largest.
    """
    folder, target = Path(path), Path(to or Path(path) / "exported")
    if (folder / "sftx" / "run.json").is_file():  # the checkpoint_dir of a trlx script
        folder = folder / "sftx"
    if not (folder / "run.json").is_file():
        raise UserError(
            f"sftx export: {path or 'no folder given'}: the folder of a run (with run.json) is "
            "needed"
        )
    if trust_remote_code not in ("true", "false"):
        raise UserError(
            f"sftx export: trust_remote_code={trust_remote_code!r}; allowed: true, false"
        )
    clear_leftovers(target)
    if os.path.lexists(target):
        raise UserError(
            f"sftx export: {target} exists and is not overwritten; choose another with to="
        )
    allowed = Allowed(trust_remote_code == "true", model, tokenizer, adapter, template)
    moved, rounded = export(folder, target, dtype, step, allowed)
    print(
        f"{printable(str(target))}: logits moved by {moved:.1e} of the largest in merging, "
        f"{rounded:.1e} as stored"
    )
    return 0
