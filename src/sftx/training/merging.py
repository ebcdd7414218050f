"""A trained model with its adapter merged, as a Hugging Face folder that appears whole or not at all."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from sftx.data.encoder import Encoder
from sftx.data.tokenizer import Tokenizer
from sftx.files import make_folder, sync
from sftx.model.load import load_model, stored_dtype
from sftx.model.save import load_tokenizer, save_model
from sftx.model.trainable import choose_weights
from sftx.report.model_card import public_name
from sftx.report.record import Run
from sftx.settings.schema import Adapter, Model
from sftx.types import UserError


@dataclass(frozen=True, slots=True)
class Trained:
    """A run's model in float32, its adapter still apart (`adapted`, if there is one), and what goes
    with it: `served` is the tokenizer with the template of the run.
    """

    source: Model
    model: Any
    adapted: PeftModel | None
    encoder: Encoder
    served: Any
    facts: dict[str, Any]

    def merged(self) -> tuple[Any, float]:
        """The model with its adapter merged in (in place), and how far a logit moved by that,
        relative to the largest one. UserError where it is more than 1e-5.
        """
        before = probe(self.model)
        merged: Any = self.model if self.adapted is None else self.adapted.merge_and_unload()
        moved = apart(before, probe(merged))
        if moved > 1e-5:
            raise UserError(
                f"sftx export: merging moves the logits by {moved:.1e} of the largest; nothing was "
                "written"
            )
        merged.config.use_cache = True
        return merged, moved


def load_trained(
    source: Model,
    adapter: Adapter,
    encoder: Encoder,
    added_token_ids: dict[int, bool],
    seed: int,
    facts: dict[str, Any],
) -> Trained:
    """The model of `source` on the CPU with the adapter in it, and the tokenizer to serve it with;
    `added_token_ids` = the tokens that the run added.
    """
    nf4 = torch.float32 if adapter.quantize == "nf4" else None
    model = load_model(source, torch.device("cpu"), nf4=nf4)
    model = model.dequantize() if nf4 else model
    adapted, _ = choose_weights(model, source, adapter, seed, added_token_ids)
    served = load_tokenizer(source)
    served.chat_template = encoder.chat_template or served.chat_template
    return Trained(source, model, adapted, encoder, served, facts)


def trained_by(run: Run) -> Trained:
    """What a run that has just finished has trained, with the adapter in its folder."""
    config = run.config
    given = config.adapter
    adapter = Adapter(method=given.method, quantize=given.quantize, path=str(run.folder))
    tokenizer = Tokenizer.of_model(config.model)
    encoder = Encoder(tokenizer, config.data, 1 << 20)
    ids = tokenizer.added_token_ids
    return load_trained(config.model, adapter, encoder, ids, config.seed, run.facts.to_json())


def write_merged(trained: Trained, target: Path) -> tuple[float, float]:
    """Write a trained model into `target`, its adapter merged; what an earlier call left there is
    replaced.

    Returns how far a logit moves, relative to the largest one: by merging, and as stored. Raises
    UserError where merging moves one by more than 1e-5.
    """
    before = probe(trained.model)
    merged, moved = trained.merged()
    started_from = public_name(trained.facts["config"]["model"].get("path", ""))
    card = f"Exported by sftx from a run that started from `{started_from}`.\n"
    stops = sorted(trained.encoder.stop_ids)
    stored = stored_dtype(trained.source)
    with beside(target) as temporary:
        save_model(temporary, merged, trained.served, stops, card, stored)
        written = probe(load_model(Model(path=str(temporary)), torch.device("cpu")))
    return moved, apart(before, written)


@contextmanager
def beside(target: Path) -> Generator[Path]:
    """A folder beside `target` that takes its place at the end, and is deleted where something goes
    wrong before.
    """
    host = socket.gethostname()
    clear_leftovers(target)
    temporary = target.with_name(f".{target.name}.export-{host}-{os.getpid()}")
    try:
        make_folder(target.parent)
        temporary.mkdir()
        yield temporary
        if target.exists():
            if any(target.iterdir()) and not (target / "config.json").exists():
                raise UserError(
                    f"{target}: holds files that are no model, and is not replaced; choose "
                    "another folder"
                )
            shutil.rmtree(target)
        temporary.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(target: Path) -> None:
    """Delete what exports into `target` left that were killed: folders beside it, and a target
    without a model.
    """
    prefix = f".{target.name}.export-{socket.gethostname()}-"
    for left in target.parent.glob(f"{prefix}*"):
        owner = left.name.removeprefix(prefix)
        if owner.isdecimal() and not _is_alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    if (target / ".model.tmp").is_dir() and not (target / "config.json").exists():
        shutil.rmtree(target / ".model.tmp", ignore_errors=True)
        with suppress(OSError):  # it holds something else: that is not ours to delete
            target.rmdir()


def _is_alive(process: int) -> bool:
    """Whether a process of that number runs on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, but is somebody else's
        return True
    return True


def probe(model: Any) -> torch.Tensor:
    """Logits [1, 64, V] of tokens drawn from the whole vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (1, 64), generator=generator)
    ids[0, -8:] = torch.arange(rows - 8, rows)  # the rows of added tokens are the last
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far a logit of `other` is from that of `one` at most, relative to the largest of `one`."""
    moved = (other - one).abs().max()
    return float(moved / one.abs().max())
