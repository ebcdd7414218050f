"""Settings of the process the tests run in, and what many tests start from."""

import os
import sys
from collections.abc import Iterator

import pytest

# Tiny models spend more time waiting for threads than computing; waiting threads must not take the
# other core's time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model with a chat template."""
    import tiny  # brings PyTorch, which reads the setting above

    return tiny.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def quick_starts() -> Iterator[None]:
    """Runs in one process find out once what they want to know about equal models before their
    first step.
    """
    if "sftx.training.build" not in sys.modules:  # no run in any file that is tested
        yield
        return
    import remembered

    with remembered.remembering():
        yield


@pytest.fixture
def no_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """To predict time and memory takes longer than the runs of some tests."""

    def unpredictable(*_: object) -> None:
        raise RuntimeError("not predicted")

    monkeypatch.setattr("sftx.training.build.seconds_of", lambda *_: None)
    monkeypatch.setattr("sftx.training.memory_plan.predict", unpredictable)
