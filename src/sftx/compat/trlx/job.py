"""A trlx configuration and its tokens, made ready to take sftx's steps."""

from __future__ import annotations

import json

from sftx.compat.trlx import translate
from sftx.compat.trlx.data.configs import TRLConfig
from sftx.data.encode import load_corpora, write_ledger
from sftx.data.pack import probe_pack
from sftx.data.plan import Plan
from sftx.data.render import Encoder
from sftx.data.tokenizer import Tokenizer
from sftx.model.adapter import attach, trainable
from sftx.model.checks import check_paths, check_sizes
from sftx.model.load import PackLoss, load_model
from sftx.model.runtime import Machine
from sftx.model.save import load_tokenizer
from sftx.track.progress import Progress
from sftx.track.record import Run
from sftx.training.optim import build_optimizer
from sftx.training.prepare import Job


def open_job(
    theirs: TRLConfig, rows: list[dict[str, list[int]]], run: Run, machine: Machine, progress: Progress
) -> Job:
    """As `sftx.training.prepare.prepare`, except that the tokens are final (no stop token is asked for among them),
    layers may be frozen, and the optimizer may be another."""
    config = run.config
    longest = max(len(row["input_ids"]) for row in rows)
    tokenizer = Tokenizer.load(config.model.tokenizer or config.model.path)
    corpus, _ = load_corpora(config, tokenizer, longest, progress.encoding)
    plan = Plan(corpus.lengths, corpus.weights, config.batch, config.seed)
    progress.data(corpus.ledger, None, plan.num_steps)
    model = load_model(config.model, machine.device)
    adapted = attach(model, config.adapter, config.seed)
    translate.freeze_bottom_layers(model, theirs.model.num_layers_unfrozen)
    loss = PackLoss(model)
    check_sizes(loss, longest, corpus.largest_id)
    probe = probe_pack([corpus.example(i) for i in range(min(len(corpus), 3))])
    notes = check_paths(loss, probe, machine.precision)
    loss.train()
    peak = config.optim.learning_rate
    assert peak is not None, "every translated configuration has one"
    job = Job(
        config=config,
        machine=machine,
        run=run,
        encoder=Encoder(tokenizer, config.data, longest),
        corpus=corpus,
        held_out=None,
        plan=plan,
        loss=loss,
        adapted=adapted,
        tokenizer=load_tokenizer(config.model),
        optimizer=translate.optimizer(theirs.optimizer, build_optimizer(loss, config.optim)),
        peak=peak,
        mathematics=str(theirs),
        notes=notes,
    )
    run.start(0, trlx=json.loads(str(theirs)), plan=plan.fingerprint, num_steps=plan.num_steps, notes=notes)
    write_ledger(corpus, run.folder)
    progress.model(type(model).__name__, trainable(loss), machine, peak, notes, 0)
    return job
