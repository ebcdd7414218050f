"""All properties, one after the other, on one model and a few rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sftx.model.adapter import trainable
from sftx.model.folder import load_config
from sftx.model.runtime import machine
from sftx.model_config import read_json
from sftx.settings.schema import Adapter, Config
from sftx.training.memory_plan import meta_model
from sftx.types import Example, UserError
from sftx.verify import losses, runs, serving
from sftx.verify.finding import Finding
from sftx.verify.oracle import Server
from sftx.verify.sample import Sample, take_sample

Say = Callable[[str], None]


def verify(config: Config, folder: Path, rows: int, tokens: int, say: Say) -> Iterator[Finding]:
    """Each finding as soon as it is known; everything is written beneath `folder`, which is the
    caller's to delete. `say` gets what is under way.

    Raises:
        UserError: the data or the model is wrong, as it would be for training.
    """
    config, adapter = with_adapter(config)
    say("reading and encoding a few rows")
    sample = take_sample(config, folder, rows, tokens)
    examples = losses.chosen(sample.corpus)
    size = sum(len(example.ids) for example in examples)
    exact = config.runtime
    if exact.precision == "auto":
        exact = exact.model_copy(update={"precision": "fp32"})
    with machine(exact) as here:
        say(f"{len(examples)} examples, {size:,} tokens, each alone through the plain model")
        began = time.perf_counter()
        alone = losses.oracle(config.model, adapter, examples, here)
        parameters = _parameters(config)
        say(f"model of {parameters:,} parameters; {_left(time.perf_counter() - began)}")
        found = losses.compare_losses(config.model, adapter, examples, alone, here)
        for note in found.notes:
            say(note)
        yield from found.findings
    config = sample.config.model_copy(update={"runtime": exact})
    yield from _of_runs(
        Sample(sample.folder, config, sample.rows, sample.corpus), examples, parameters, say
    )


def with_adapter(config: Config) -> tuple[Config, str | None]:
    """Where `model` is the folder of an adapter: its base in its place, and the adapter to go on
    from. The folder of the adapter, if there is one.

    Raises:
        UserError: the adapter names no base, or is no low-rank adapter.
    """
    folder = config.adapter.path or config.model.path
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        return config, config.adapter.path
    told = read_json(file)
    base = told.get("base_model_name_or_path")
    if config.adapter.path:
        return config, folder
    if not isinstance(base, str) or not base:
        raise UserError(f"{file}: base_model_name_or_path names no model; write the base there")
    method = "dora" if told.get("use_dora") else "rslora" if told.get("use_rslora") else "lora"
    model = config.model.model_copy(update={"path": base, "tokenizer": config.model.tokenizer})
    going_on = Adapter(method=method, path=folder)
    return config.model_copy(update={"model": model, "adapter": going_on}), folder


def _of_runs(
    sample: Sample, examples: list[Example], parameters: int, say: Say
) -> Iterator[Finding]:
    """What takes short runs: ranks, resuming, serving, merging, saving."""
    adapter = runs.method_for(sample.config, parameters, sample.folder)
    say(f"a run of {runs.STEPS} steps")
    straight = runs.run_through(runs.settings_of(sample, adapter, "straight"))
    say("the same run by two processes")
    yield runs.compare_ranks(straight, parameters)
    say("the same run, stopped and continued")
    yield runs.compare_resumed(straight)
    server = Server(straight.folder, sample.config.model.trust_remote_code)
    yield serving.compare_prompts(sample, server)
    yield serving.check_stops(sample, server)
    say("the folder it left")
    yield runs.compare_saved(straight, examples)
    if adapter.method == "none":
        say("a run with an adapter")
        lora = Adapter(method="lora", rank=8)
        straight = runs.run_through(runs.settings_of(sample, lora, "adapted"))
    yield runs.compare_merged(straight, examples)


def _parameters(config: Config) -> int:
    loss = meta_model(config, load_config(config.model), {})
    return trainable(loss)[1]


def _left(seconds: float) -> str:
    return f"all of it will take about {12 * seconds + 30:,.0f} s"
