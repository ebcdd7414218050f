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
from typing import Any, Literal, NamedTuple, get_args

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
from sftx.model.checks.stand_in import stand_in, vocabulary
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
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 40,
    "indexer_compress_ratio": 4,
}
MORE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 5e5, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "xmod": {"default_language": "en_XX"},
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
            hint = f"known: {', '.join(known)}"
            if close:
                hint = f"did you mean {' or '.join(close)}?"
            raise UserError(
                f"sftx verify families: only={begin}: transformers {transformers.__version__} has "
                f"no causal language model of a type that begins so; {hint}"
            )
    if not only:
        return known
    return [name for name in known if name.startswith(tuple(only))]


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
    until = time.monotonic() + PATIENCE * SECONDS
    return _Trial(name, process, ours, until)


def _ready(running: dict[Connection, _Trial]) -> list[Connection]:
    """Those that have answered, ended or taken too long; waits for up to a second."""
    answered = wait_for(list(running), timeout=1.0)
    now = time.monotonic()
    ready: list[Connection] = []
    for answer, trial in running.items():
        if answer in answered or now > trial.until:
            ready.append(answer)
    return ready


def _end(trial: _Trial) -> Family:
    """Its answer, or why there is none; the process is gone then."""
    process = trial.process
    found = None
    try:
        if trial.answer.poll():
            found = trial.answer.recv()
    except EOFError:
        process.join(5)
    code = process.exitcode
    process.kill()
    process.join()
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
    passed = time.monotonic() - began
    seconds = passed * (total - done) / done
    if seconds < 120:
        return f", about {seconds:,.0f} s left"
    return f", about {seconds / 60:,.0f} min left"


def try_family(name: str) -> Family:
    """What became of one model type."""
    try:
        with boundary(name):  # whatever a class wants that is not known here
            model = small_model(name)
            data = examples(vocabulary(model))
            whole, shared = behind_a_prefix(data)
            packed = Wanted(build_pack(data), _weight(data), *alone_in_float64(model, data))
            tree = Wanted(shared, _weight(whole), *alone_in_float64(model, whole))
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
    wanted = [packed, tree] if loss.paths.shares_prefixes else [packed]
    errors = _errors(loss, wanted)
    if not _is_exact(errors):
        # Some models round so much that one example alone is off in float32 too.
        precise = _errors(copy.deepcopy(loss).double(), wanted)
        if _is_exact(precise):
            notes.append(
                f"measured in float64: float32 rounds gradients by {errors['gradient']:.1e}"
            )
            errors = precise
    verdict = _way(loss.paths) if _is_exact(errors) else "wrong"
    return Family(name, verdict, "; ".join(notes), **errors)


class Wanted(NamedTuple):
    """A pack, the weight of its targets, and the loss and gradients of its examples alone."""

    pack: Pack
    weight: float
    loss: float
    gradients: list[Tensor]


def _way(paths: Paths) -> Verdict:
    """How the examples run."""
    if paths.isolate:
        return "packed"
    return "padded" if paths.padded else "alone"


def _is_exact(errors: dict[str, float]) -> bool:
    return all(errors[key] < limit for key, limit in LIMITS.items())


def _errors(loss: PackLoss, several: Sequence[Wanted]) -> dict[str, float]:
    """The largest relative differences of the loss of a pack and of all its gradients (L2) from
    those of the examples alone.
    """
    losses: list[float] = []
    gradients: list[float] = []
    for wanted in several:
        loss.zero_grad()
        total = loss(to_tensors(wanted.pack, torch.device("cpu"))) / wanted.weight
        total.backward()
        losses.append(abs(float(total.detach()) - wanted.loss) / wanted.loss)
        gradients.append(_apart(loss.model, wanted.gradients))
    # NumPy's maximum of NaN and a number is NaN.
    return {"loss": float(np.max(losses)), "gradient": float(np.max(gradients))}


def _apart(model: PreTrainedModel, gradients: list[Tensor]) -> float:
    """The L2 norm of what its gradients differ by, relative to that of `gradients`."""
    apart = squares = 0.0
    for parameter, wanted in zip(model.parameters(), gradients, strict=True):
        difference = wanted
        if parameter.grad is not None:
            difference = parameter.grad.double() - wanted
        apart += float((difference**2).sum())
        squares += float((wanted**2).sum())
    return (apart / squares) ** 0.5


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
        is_target = rng.rand(length) < 0.5
        weights = (is_target * rng.rand(length) * 2).astype(np.float32)
        weights[-1] = 1.0
        weights[0] = 0.0
        ids = rng.randint(3, vocabulary, length).astype(np.int32)
        made.append(Example(ids, weights))
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
    weights = np.concatenate([part.weights for part in parts])
    return Example(ids, weights)


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
        labels = ids[0, 1:]
        losses = torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="none")
        weights = torch.tensor(example.weights[1:].astype("float64"))
        value = (losses * weights).sum() / weight
        value.backward()
        total += float(value.detach())
        for kept, parameter in zip(gradients, twin.parameters(), strict=True):
            if parameter.grad is not None:
                kept += parameter.grad
    return total, gradients


def summary(found: Sequence[Family]) -> str:
    """How many there are of each verdict."""
    parts: list[str] = []
    for verdict in get_args(Verdict):
        count = sum(family.verdict == verdict for family in found)
        parts.append(f"{verdict}: {count}")
    return f"transformers {transformers.__version__}: {', '.join(parts)}"


def _weight(data: Sequence[Example]) -> float:
    return sum(float(example.weights[1:].astype(float).sum()) for example in data)
