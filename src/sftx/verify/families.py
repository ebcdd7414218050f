"""Every causal language model of the installed transformers: is what sftx trains exact, and is it
packed?

Of each class a small model with random weights is made from its own default configuration, with
windows, chunks and the like shortened to 40 tokens. Its loss and gradients over examples of up to
120 tokens, in one pack, are compared with each example alone through a fresh float64 copy of the
plain model and torch's cross-entropy; so are those of examples that share a prefix, where the checks
let the model share it.
"""

from __future__ import annotations

import copy
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from typing import Literal, get_args

import numpy as np
import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sftx.boundary import boundary
from sftx.cores import usable_cores
from sftx.data.pack import build_pack, probe_pack
from sftx.model.checks.sharing import tree_pack
from sftx.model.checks.stand_in import stand_in
from sftx.model.checks.start import check_paths
from sftx.model.fallbacks import own_fallbacks
from sftx.model.pack_loss import PackLoss, Paths, to_tensors
from sftx.types import Example, Pack, UserError

Verdict = Literal["packed", "padded", "alone", "refused", "wrong", "not tried"]
LENGTHS = [120, 9, 97, 43, 110, 5]
BY_LENGTH = {
    "attention_chunk_size",
    "attention_window_size",
    "chunk_size",
    "floor_scale",
    "index_topk",
    "local_attention_window",
    "mamba_chunk_size",
    "original_max_position_embeddings",
    "sliding_window",
    "window_size",
}
"""Lengths in configurations that are shortened."""
MORE = {
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]}
}
"""What default configurations lack."""
SECONDS = 240
"""Of processor time: a class that takes more counts as not tried. It waits for a busy machine."""
PATIENCE = 10
"""How many times as long it may take by the clock."""
LIMITS = {"loss": 1e-4, "gradient": 5e-3}
"""Routers in fp32 choose otherwise than in float64 here and there: some classes are 1e-3 off when
all runs alone.
"""
CRASHED = "crashed in the checks"


@dataclass(frozen=True, slots=True)
class Family:
    """What became of one model type: exact in packs, in right-padded batches (`padded`) or with
    every example `alone`; or one of the rest. `loss` and `gradient` are relative differences;
    `why` says what the checks said, or why there is no answer.
    """

    name: str
    verdict: Verdict
    why: str = ""
    loss: float | None = None
    gradient: float | None = None

    def detail(self) -> str:
        """The numbers and the reason, on one line."""
        if self.loss is None or self.gradient is None:
            return self.why
        return f"loss {self.loss:.1e}, gradient {self.gradient:.1e}  {self.why}".rstrip()


def names_of(only: Sequence[str]) -> list[str]:
    """The model types that begin with one of `only`; all of them where none is named.

    Raises:
        UserError: no model type begins so.
    """
    known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for begin in only:
        if not any(name.startswith(begin) for name in known):
            close = get_close_matches(begin, known, 3, 0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
            raise UserError(
                f"sftx verify families: only={begin}: transformers {transformers.__version__} has "
                f"no causal language model of a type that begins so; {hint}"
            )
    return [name for name in known if not only or name.startswith(tuple(only))]


def try_families(only: Sequence[str], shown: bool) -> Iterator[Family]:
    """What became of each model type, each tried in a process of its own, as many at once as there
    are cores; a line on stderr says how far it has come.
    """
    waiting = names_of(only)
    total = len(waiting)
    began = time.monotonic()
    running: dict[Connection, _Trial] = {}
    done = 0
    with Console(stderr=True, quiet=not shown).status("") as status:
        while waiting or running:
            while waiting and len(running) < usable_cores():
                trial = _start(waiting.pop(0))
                running[trial.answer] = trial
            names = ", ".join(trial.name for trial in running.values())
            status.update(f"{done} of {total} families{_eta(began, done, total)}: {names}")
            for answer in _ready(running):
                yield _end(running.pop(answer))
                done += 1


@dataclass(frozen=True, slots=True)
class _Trial:
    """A model type that is being tried."""

    name: str
    process: BaseProcess
    answer: Connection
    until: float


def _start(name: str) -> _Trial:
    # Everything is imported already, and a forked process has one thread.
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(name, theirs))
    process.start()
    theirs.close()
    return _Trial(name, process, ours, time.monotonic() + PATIENCE * SECONDS)


def _ready(running: dict[Connection, _Trial]) -> list[Connection]:
    """Those that have answered, ended or taken too long; waits for up to a second."""
    answered = wait_for(list(running), timeout=1.0)
    late = [answer for answer, trial in running.items() if time.monotonic() > trial.until]
    return [answer for answer in running if answer in answered or answer in late]


def _end(trial: _Trial) -> Family:
    """Its answer, or why there is none; the process is gone then."""
    try:
        found = trial.answer.recv() if trial.answer.poll() else None
    except EOFError:
        found = None
        trial.process.join(5)
    code = trial.process.exitcode
    trial.process.kill()
    trial.process.join()
    trial.answer.close()
    if found is not None:
        return found
    late = code is None or code == -getattr(signal, "SIGXCPU", 24)
    why = f"more than {SECONDS} s" if late else f"its process ended with {code}"
    return Family(trial.name, "not tried", why)


def _answer(name: str, pipe: Connection) -> None:
    import resource  # not on Windows, where nothing can be forked either

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    pipe.send(try_family(name))


def _eta(began: float, done: int, total: int) -> str:
    if not done:
        return ""
    seconds = (time.monotonic() - began) * (total - done) / done
    return (
        f", about {seconds:,.0f} s left"
        if seconds < 120
        else f", about {seconds / 60:,.0f} min left"
    )


def try_family(name: str) -> Family:
    """What became of one model type."""
    try:
        with boundary(name):  # whatever a class wants that is not known here
            model = small_model(name)
            data = examples(_vocabulary(model))
            value, gradients = alone_in_float64(model, data)
            whole, shared = behind_a_prefix(data)
            shared_value, shared_gradients = alone_in_float64(model, whole)
    except UserError as error:
        return Family(name, "not tried", str(error)[:300])
    loss = PackLoss(model).eval()
    try:
        with boundary(CRASHED):
            probe = probe_pack(data)
            notes = check_paths(loss, probe, torch.float32, max(LENGTHS), 2048, share=True)
    except UserError as error:
        verdict: Verdict = "wrong" if str(error).startswith(CRASHED) else "refused"
        return Family(name, verdict, str(error)[:300])
    errors = _errors(loss, build_pack(data), data, value, gradients)
    if loss.paths.shares_prefixes:
        loss.zero_grad()
        others = _errors(loss, shared, whole, shared_value, shared_gradients)
        errors = {key: max(errors[key], others[key]) for key in errors}
    right = all(errors[key] < limit for key, limit in LIMITS.items())
    return Family(name, _way(loss.paths) if right else "wrong", "; ".join(notes), **errors)


def _way(paths: Paths) -> Verdict:
    """How the examples run."""
    if paths.isolate:
        return "packed"
    return "padded" if paths.padded else "alone"


def _errors(
    loss: PackLoss, pack: Pack, data: list[Example], value: float, gradients: list[Tensor]
) -> dict[str, float]:
    """Relative differences of the loss of `pack` and of all its gradients (L2) from those of the
    examples alone.
    """
    total = loss(to_tensors(pack, torch.device("cpu"))) / _weight(data)
    total.backward()
    apart = squares = 0.0
    for parameter, wanted in zip(loss.model.parameters(), gradients, strict=True):
        ours = torch.zeros_like(wanted) if parameter.grad is None else parameter.grad.double()
        apart += float(((ours - wanted) ** 2).sum())
        squares += float((wanted**2).sum())
    return {
        "loss": abs(float(total.detach()) - value) / value,
        "gradient": (apart / squares) ** 0.5,
    }


def small_model(name: str) -> PreTrainedModel:
    """A model of the type with random weights, narrow and of few layers, and with short windows."""
    config = AutoConfig.for_model(name, **MORE.get(name, {}))
    shorten(config)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config)
    small = stand_in(large)
    if small is None:
        raise UserError(f"{name}: no small model could be made of the default configuration")
    return small.float()


def shorten(config: PreTrainedConfig) -> None:
    """Let all that goes by length do so within the examples; in place, in the sections too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            shorten(value)
        elif name in BY_LENGTH and isinstance(value, int) and value > 40:
            setattr(config, name, 40)


def examples(vocabulary: int) -> list[Example]:
    """Random tokens, about half of them targets."""
    rng = np.random.RandomState(0)
    made = []
    for length in LENGTHS:
        weights = ((rng.rand(length) < 0.5) * rng.rand(length) * 2).astype(np.float32)
        weights[-1] = 1.0
        weights[0] = 0.0
        made.append(Example(rng.randint(3, vocabulary, length).astype(np.int32), weights))
    return made


def behind_a_prefix(data: list[Example]) -> tuple[list[Example], Pack]:
    """Three examples that begin with the first 60 tokens of the first, one of them going on where
    another does, and the pack that holds what they share once.
    """
    root = Example(data[0].ids[:60], data[0].weights[:60])
    first = data[0]
    second = data[1]
    third = data[3]
    tokens = [root.ids, first.ids[60:], second.ids, third.ids]
    weights = [3 * root.weights, first.weights[60:], 2 * second.weights, third.weights]
    whole = [first, _joined(root, second), _joined(root, second, third)]
    return whole, tree_pack(tokens, weights, [-1, 0, 0, 2])


def _joined(*parts: Example) -> Example:
    ids = np.concatenate([part.ids for part in parts])
    return Example(ids, np.concatenate([part.weights for part in parts]))


def alone_in_float64(model: PreTrainedModel, data: Sequence[Example]) -> tuple[float, list[Tensor]]:
    """Loss and gradients, each example alone through a fresh copy of the plain model."""
    total = 0.0
    weight = _weight(data)
    gradients = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for example in data:
        twin = copy.deepcopy(model).double().eval()
        ids = torch.tensor(example.ids.astype("int64"))[None]
        with own_fallbacks():
            logits = twin(input_ids=ids, use_cache=False).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        value = (losses * torch.tensor(example.weights[1:].astype("float64"))).sum() / weight
        value.backward()
        total += float(value.detach())
        for kept, parameter in zip(gradients, twin.parameters(), strict=True):
            if parameter.grad is not None:
                kept += parameter.grad
    return total, gradients


def summary(found: Sequence[Family]) -> str:
    """How many there are of each verdict."""
    counts = {
        verdict: sum(family.verdict == verdict for family in found) for verdict in get_args(Verdict)
    }
    said = ", ".join(f"{verdict}: {count}" for verdict, count in counts.items())
    return f"transformers {transformers.__version__}: {said}"


def _weight(data: Sequence[Example]) -> float:
    return sum(float(example.weights[1:].astype(float).sum()) for example in data)


def _vocabulary(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]
