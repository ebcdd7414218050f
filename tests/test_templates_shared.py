"""Published chat templates: every trained turn is what transformers would send, and render as the
answer.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from sftx.data.encoder import Encoder
from sftx.settings.schema import Data

ROOT = Path(__file__).parents[1]
FOLDER = ROOT.parent / "shared" / "data" / "chat_templates"
# One of each kind; the others are checked by the slow tests.
KINDS = [
    "Apertus-8B-Instruct",
    "Apriel-1.6-15b-Thinker-fixed",
    "Cohere2MoE",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "GLM-4.6",
    "GLM-4.7-Flash",
    "HuggingFaceTB-SmolLM3-3B",
    "Kimi-K2-Thinking",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "Qwen-QwQ-32B",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-V3.1",
    "deepseek-ai-DeepSeek-V3.2",
    "google-gemma-2-2b-it",
    "google-gemma-4-31B-it",
    "meetkai-functionary-medium-v3.1",
    "meta-llama-Llama-3.1-8B-Instruct",
    "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "openai-gpt-oss-120b",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "idefics3",
    "llava_next",
    "qwen2_5",
    "qwen3",
    "qwen3_5_nothink",
    "qwen3_5_think",
    "deepseekv3",
    "llama-cpp-rwkv-world",
]

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs the shared templates")


def _table() -> Any:
    """`bench/templates.py`, which prints the same checks as a table."""
    spec = importlib.util.spec_from_file_location(
        "bench_templates", ROOT / "bench" / "templates.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_templates"] = module
    spec.loader.exec_module(module)
    return module


PATHS = sorted(FOLDER.rglob("*.jinja"))
SOME = [
    pytest.param(p, id=p.stem, marks=[] if p.stem in KINDS else pytest.mark.slow) for p in PATHS
]


@pytest.fixture(scope="module")
def table() -> Any:
    return _table()


@pytest.fixture(scope="module")
def tokenizers(table: Any) -> tuple[Any, Any]:
    return table.prepared([path.read_text(encoding="utf-8") for path in PATHS])


@pytest.mark.parametrize("path", SOME)
def test_turns_are_what_a_server_asks_for_and_gets(
    path: Path, table: Any, tokenizers: tuple[Any, Any]
) -> None:
    """No turn of any kind of conversation is wrong, and no row is refused that transformers renders
    whole.
    """
    ours, theirs = tokenizers
    encoder = Encoder(ours, Data(template=str(path)), 4096)
    wrong = {name: table.check(encoder, theirs, name).wrong for name in table.CONVERSATIONS}
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_no_result_depends_on_the_order_of_the_rows(
    path: Path, table: Any, tokenizers: tuple[Any, Any]
) -> None:
    assert table.moved(tokenizers[0], path) == []
