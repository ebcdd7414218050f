"""A run that is already there, handed over to a tracker."""

from __future__ import annotations

from pathlib import Path

from sftx.boundary import boundary
from sftx.files import write_json
from sftx.report.facts import check_needed, read_facts
from sftx.report.tracker_clients import open_client
from sftx.report.trackers import Feed, card_of, check_installed, new_id, numbers_of
from sftx.settings.schema import Tracker
from sftx.types import UserError


def send(folder: str | Path, tracker: Tracker) -> int:
    """Hand over to `tracker` what it does not have yet of the run in `folder`.

    Returns how many steps that were. Raises UserError where there is no run, or the tracker fails.
    """
    folder = Path(folder)
    path = folder / "run.json"
    facts = read_facts(path)
    if not facts:
        raise UserError(f"{folder}: the folder of a run (with run.json) is needed")
    check_needed(facts, path)
    check_installed(tracker)
    if not facts.get("tracker_id"):
        facts["tracker_id"] = new_id()
        write_json(path, facts)
    card = card_of(folder)
    feed = Feed(card, tracker)
    with boundary(f"track: {tracker}"):
        client = open_client(tracker, card)
        sent = 0
        for step in feed.take(over=True):
            client.add(step.number, numbers_of(step.record), step.samples)
            sent += 1
        client.flush()
        feed.mark()
        client.close(facts["status"])
    return sent
