"""Published chat templates: every trained span stands behind the very prompt that transformers would send."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from sftx.config import Data
from sftx.data.render import Encoder

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

# Writes its instructions behind the newest turn, so that the text of a call continues no prompt.
REFUSED = {("CohereForAI-c4ai-command-r-plus-tool_use", "calls")}

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs the shared templates")


def _table() -> Any:
    """`bench/templates.py`, which prints the same checks as a table."""
    spec = importlib.util.spec_from_file_location("bench_templates", ROOT / "bench" / "templates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_templates"] = module
    spec.loader.exec_module(module)
    return module


PATHS = sorted(FOLDER.rglob("*.jinja"))


@pytest.fixture(scope="module")
def table() -> Any:
    return _table()


@pytest.fixture(scope="module")
def tokenizers(table: Any) -> tuple[Any, Any]:
    return table.prepared([path.read_text(encoding="utf-8") for path in PATHS])


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[] if p.stem in KINDS else pytest.mark.slow) for p in PATHS]
)
def test_spans_follow_served_prompts(path: Path, table: Any, tokenizers: tuple[Any, Any]) -> None:
    ours, theirs = tokenizers
    encoder = Encoder(ours, Data(template=str(path)), 4096)
    for name in table.CONVERSATIONS:
        result = table.check(encoder, theirs, name)
        assert result.wrong == [], f"{name}: {result.wrong}"
        if result.kind == "refused" and (path.stem, name) not in REFUSED:
            assert _refused_by_transformers(encoder, theirs, table, name) or _vanishes(encoder, theirs, table, name), (
                f"{name}: {result.reason}"
            )


def _render(encoder: Encoder, theirs: Any, messages: list[Any], tools: Any, generate: bool) -> str | None:
    shaped = [encoder.template(bool(tools)).habits.shaped(message) for message in messages]
    try:
        return theirs.apply_chat_template(
            shaped, tools=tools, chat_template=encoder.chat_template, add_generation_prompt=generate, tokenize=False
        )
    except Exception:
        return None


def _refused_by_transformers(encoder: Encoder, theirs: Any, table: Any, name: str) -> bool:
    """Whether transformers cannot render what a server would need either."""
    messages, tools = table.CONVERSATIONS[name]
    turns = [t for t, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [_render(encoder, theirs, messages[:t], tools or None, True) for t in turns]
    return None in [*prompts, *(_render(encoder, theirs, messages[: t + 1], tools or None, False) for t in turns)]


def _vanishes(encoder: Encoder, theirs: Any, table: Any, name: str) -> bool:
    """Whether the template shows nothing of a tool call: the text is the same with another call in its place."""
    messages, tools = table.CONVERSATIONS[name]
    for t, message in enumerate(messages):
        if "tool_calls" in message:
            (call,) = message["tool_calls"]
            other = {**message, "tool_calls": [{**call, "function": {**call["function"], "name": "qzother"}}]}
            texts = {_render(encoder, theirs, [*messages[:t], each], tools or None, False) for each in (message, other)}
            if len(texts) == 1:
                return True
    return False
