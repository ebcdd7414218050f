"""Whether a run computes shared prefixes once."""

from __future__ import annotations

from sftx.data.plan import Plan
from sftx.data.shared_packs import Saving, saving_of
from sftx.data.store.corpus import Corpus
from sftx.model.context_parallel import Context
from sftx.model.pack_loss import PackLoss
from sftx.report.facts import RunFacts
from sftx.settings.schema import Runtime
from sftx.types import UserError


def possible_saving(runtime: Runtime, plan: Plan, corpus: Corpus) -> Saving:
    """What sharing would save in this run, where the settings allow it."""
    if runtime.share_prefixes == "off":
        return Saving()
    return saving_of(plan, corpus)


def wants_to_share(runtime: Runtime, saving: Saving) -> bool:
    """Whether it is worth checking that the model can."""
    return runtime.share_prefixes == "on" or saving.saved_tokens > 0


def refuse_unshared(runtime: Runtime, loss: PackLoss, notes: list[str]) -> None:
    """UserError where prefixes must be shared and the model cannot, as the first of `notes` says."""
    if runtime.share_prefixes == "on" and not loss.paths.shares_prefixes:
        raise UserError(f"runtime.share_prefixes: on, but {notes[0]}")


def shares_prefixes(
    runtime: Runtime, facts: RunFacts, loss: PackLoss, context: Context | None
) -> bool:
    """What `runtime.share_prefixes` comes to, once the model was checked; a run that is continued
    does as before, so that it goes on to the bit. Ranks that compute a pack together do not share.
    """
    if context is not None:
        if runtime.share_prefixes == "on":
            raise UserError(
                f"runtime.share_prefixes: on, but {context.size} processes compute a pack together "
                "(runtime.context_parallel), and these do not share prefixes; leave one of them out"
            )
        return False
    if runtime.share_prefixes == "auto" and facts.mathematics and not facts.shares_prefixes:
        return False
    return runtime.share_prefixes != "off" and loss.paths.shares_prefixes
