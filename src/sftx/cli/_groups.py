"""Keys that several verbs take: a verb names their group in `GROUPS`, and its `run` is given those
that the user named as one dictionary, the parameter of the group's name.
"""

from __future__ import annotations

KEYS: dict[str, dict[str, str]] = {
    "sampling": {
        "temperature": "0 = always the most probable token; default: the folder's.",
        "top_p": "Sample from the most probable tokens that make up this probability together.",
        "top_k": "Sample from this many most probable tokens.",
        "repetition_penalty": "Above 1: make tokens that have come before less probable.",
    },
    "answers": {
        "max_tokens": "Most tokens of an answer; default: 1024.",
        "seed": "Of the sampling; default: another one for each answer.",
        "stop": "A text at which answers are cut.",
    },
}


def keys_of(groups: tuple[str, ...]) -> dict[str, str]:
    """The keys of some groups with what each means."""
    return {key: text for group in groups for key, text in KEYS[group].items()}


def group_of(key: str, groups: tuple[str, ...]) -> str:
    """The group among `groups` that a key belongs to; "" for none."""
    return next((group for group in groups if key in KEYS[group]), "")
