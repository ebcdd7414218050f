"""`runtime.deterministic`: every switch is set for the time of a run, and put back."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

from sftx.model.runtime import machine
from sftx.settings.schema import Runtime
from sftx.types import UserError

FILL: Any = import_module("torch.utils.deterministic")


def switches() -> tuple[bool, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        FILL.fill_uninitialized_memory,
        inductor.deterministic,
    )


def run(deterministic: bool) -> tuple[bool, ...]:
    with machine(Runtime(device="cpu", threads=1, deterministic=deterministic)):
        return switches()


def test_all_is_set_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = switches()
    assert run(deterministic=False) == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert run(deterministic=True) == (True, True, False, False, True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert switches() == before
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = switches()
    # `put_` without adding up is one of the operations that have no such form on a CPU either
    with (
        pytest.raises(UserError, match=r"runtime\.deterministic: put_ does not have"),
        machine(Runtime(device="cpu", threads=1, deterministic=True)),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    assert switches() == before
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts"):
        run(deterministic=True)
    assert switches() == before
