"""Write what a run trained as one Hugging Face folder: `sftx export runs/first to=merged dtype=bf16`.

An adapter is merged into its base, tied embeddings, rows of added tokens and a quantised base (dequantised)
included; `step=N` takes a checkpoint instead of the finished model. How far the logits move is measured and printed.
"""

from __future__ import annotations

from pathlib import Path

from sftx.training.export import export
from sftx.types import UserError

EXTRA = {
    "to": "folder to write; default: RUN/exported",
    "dtype": "fp32, bf16 or auto (as in the model the run started from); default: what the run says",
    "step": "number of a checkpoint; default: the finished model",
}


def run(path: str = "", to: str = "", dtype: str = "", step: str = "") -> int:
    """Export the run in `path`. Raises UserError where merging moves a logit by more than 1e-5 of the largest."""
    folder, target = Path(path), Path(to or Path(path) / "exported")
    if (folder / "sftx" / "run.json").is_file():  # the checkpoint_dir of a trlx script
        folder = folder / "sftx"
    if not (folder / "run.json").is_file():
        raise UserError(f"sftx export: {path or 'no folder given'}: the folder of a run (with run.json) is needed")
    if target.exists():
        raise UserError(f"sftx export: {target} exists and is not overwritten; choose another with to=")
    moved, rounded = export(folder, target, dtype, step)
    print(f"{target}: logits moved by {moved:.1e} of the largest in merging, {rounded:.1e} as stored")
    return 0
