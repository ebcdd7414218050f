"""Whether a run computes shared prefixes once."""

from __future__ import annotations

from sftx.data.plan import Plan
from sftx.data.shared_packs import Saving, saving_of
from sftx.data.store.corpus import Corpus
from sftx.model.pack_loss import PackLoss
from sftx.report.facts import RunFacts
from sftx.settings.schema import Runtime
from sftx.types import UserError


def possible_saving(runtime: Runtime, plan: Plan, corpus: Corpus) -> Saving:
    """What sharing would save in this run, where the settings allow it."""
    if runtime.share_prefixes == "off":
        return Saving()
    return saving_of(plan, corpus)


def shares_prefixes(runtime: Runtime, facts: RunFacts, loss: PackLoss) -> bool:
    """What `runtime.share_prefixes` comes to; a run that is continued does as before, so that it
    goes on to the bit.

    Raises:
        UserError: it is `on`, and the model cannot.
    """
    problem = why_not(loss)
    match runtime.share_prefixes:
        case "off":
            return False
        case "on":
            if problem:
                raise UserError(f"runtime.share_prefixes: on, but {problem}; leave it to `auto`")
            return True
        case "auto":
            begun_without = bool(facts.mathematics) and not facts.shares_prefixes
            return not problem and not begun_without


def why_not(loss: PackLoss) -> str:
    """Why a prefix cannot stand for the examples that share it; empty where it can."""
    if not loss.paths.isolate:
        return f"{type(loss.model).__name__} runs one example at a time"
    if loss.objective.neftune_alpha:
        return "loss.neftune_alpha adds noise of its own to every example"
    if loss.objective.router_aux:
        return "loss.router_aux balances experts over the tokens of each example alone"
    return ""
