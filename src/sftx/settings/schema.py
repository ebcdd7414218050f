"""The schema of a run: one frozen section per concern, one docstring per setting.

The schema is the only list of settings: help, documentation and checks are made from it. `batch`,
`optim`, `loss`, `adapter`, `data` and `seed` describe the mathematics of a run; `runtime` describes
the machine it happens to run on, and nothing in `runtime` but `precision` changes a result beyond
rounding. (Dropout is drawn pack by pack: with it, other packs are another draw.)
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import Field, model_validator

from sftx.settings.data_section import Data, Source
from sftx.settings.eval_section import Eval
from sftx.settings.section import SHORT_FORMS, Section

__all__ = [
    "SHORT_FORMS",
    "Adapter",
    "Batch",
    "Checkpoint",
    "Config",
    "Data",
    "Eval",
    "Loss",
    "Model",
    "Optim",
    "Runtime",
    "Section",
    "Source",
    "Tracker",
]


class Model(Section):
    """The model to start from. `model: PATH` is short for `model: {path: PATH}`."""

    path: str
    """A Hugging Face folder (config.json, safetensors, tokenizer), a GGUF file or a folder with one
    (package `gguf`), or the name of a model on the hub.
    """
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer, if it is not the model's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you set it; recorded in the run folder.
    """
    save_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """How the trained weights are stored; `auto` = as in the model the run starts from. Training
    itself is in fp32.
    """
    add_tokens: list[str] = Field(default=[])
    """Words this run gives a token of their own, matched wherever they stand in a text. A new
    token's rows in the embeddings and the head start at the mean of the others plus a little noise
    by `seed` (0.02 standard deviations). With an adapter, the rows of all tokens listed here train
    beside it, those of tokens the model already has too.
    """
    add_special_tokens: list[str] = Field(default=[])
    """The same for control tokens, such as a chat template's markers; `data.special_tokens` says
    what their text means inside a row.
    """
    unfrozen_layers: int | None = Field(default=None, ge=0)
    """Train only the last so many layers, the final norm and a head that is not tied to the
    (frozen) embeddings; 0 = the final norm alone. Default: all weights.
    """
    freeze: list[str] | None = None
    """Names of parameters that stay as they are, with `*` for any text: [model.embed_tokens.*,
    '*.norm.weight'].
    """
    train_only: list[str] | None = None
    """Names of the only parameters that train, in the form of `freeze`."""


class Batch(Section):
    """The step: which examples share one update. A property of the run, not of the machine."""

    examples_per_step: int = Field(default=16, ge=1)
    """Examples in one optimiser step, over all processes."""
    tokens_per_step: int | None = Field(default=None, ge=1)
    """Instead: as many examples as make up to this many tokens (at least one)."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training examples; each pass is shuffled anew."""
    steps: int | None = Field(default=None, ge=0)
    """Stop after this many steps instead of after `epochs`."""
    shuffle: bool = True
    """Shuffle the examples of each epoch by `seed`; false keeps the order of the data."""
    group_by: str = Field(default="none", min_length=1)
    """Put the examples of a group into the same step: those of one row (`row`: the turns that a
    template writes as sequences of their own), of one prompt (`prompt`: the same tokens before the
    first target), or with the same value in a field of the rows (its name). Whole groups are
    shuffled, and a step takes whole groups, as many as fit; what they share is computed once.
    """

    @model_validator(mode="after")
    def _fits_together(self) -> Batch:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError("`epochs` and `steps` both say how long to train; set one")
        if self.tokens_per_step is not None and "examples_per_step" in self.model_fields_set:
            raise ValueError(
                "`examples_per_step` and `tokens_per_step` both say how large a step is; set one"
            )
        return self


class Optim(Section):
    """AdamW and its learning rate, as pure functions of the step."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; default: 2e-5 for all weights, 2e-4 for an adapter."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; `wsd` = constant, then a linear decay over the last `decay` of the
    run.
    """
    warmup: float = Field(default=0.03, ge=0)
    """Linear warm-up: a share of the steps if below 1, else a number of steps."""
    decay: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps in which `wsd` decays."""
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where the schedule ends, relative to the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only (never on norms, biases or embeddings)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's running means."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the global gradient norm to this; 0 does not clip."""
    weights: Literal["fp32", "bf16_stochastic"] = "fp32"
    """How weights are kept while training: in fp32, or in bf16 (gradients too; the means stay fp32:
    12 bytes a parameter for 16), each update rounded up or down at random by how near it is, so
    that small ones are not lost.
    """
    max_bad_steps: int = Field(default=3, ge=0)
    """Steps with a non-finite loss or gradient that may be skipped in a row before the run stops
    with exit code 3.
    """

    @model_validator(mode="after")
    def _fits_together(self) -> Optim:
        if "decay" in self.model_fields_set and self.schedule != "wsd":
            raise ValueError(
                f"`decay` belongs to `schedule: wsd`, but the schedule is {self.schedule}"
            )
        if "final_ratio" in self.model_fields_set and self.schedule == "constant":
            raise ValueError(
                "`final_ratio` says where a schedule ends, but the schedule is constant"
            )
        if self.warmup > 1 and not self.warmup.is_integer():
            raise ValueError(
                f"`warmup` is {self.warmup}; give a share of the steps below 1, or a whole number "
                "of steps"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` are {self.betas}; each is at least 0 and below 1")
        return self


class Loss(Section):
    """What is added to the plain objective, the weighted mean of -log p.

    All of it only while training: held-out loss is always the plain one. The reported training loss
    is the whole objective.
    """

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Train towards (1 - this) on the label and this spread evenly over all rows of the head."""
    z_loss: float = Field(default=0.0, ge=0)
    """Add this times log(Z)^2 per target, Z = sum of exp(logits), so that logits do not drift
    (PaLM: 1e-4).
    """
    dft: bool = False
    """Dynamic fine-tuning (arXiv:2508.05629): weigh each target's cross-entropy by its probability,
    as a constant.
    """
    neftune_alpha: float = Field(default=0.0, ge=0)
    """Add uniform noise of up to this / sqrt(tokens of the example x hidden size) to embeddings
    (arXiv:2310.05914).
    """
    router_aux: float = Field(default=0.0, ge=0)
    """Add this times the load-balancing loss of a mixture of experts: computed for each example
    alone, over its tokens and all layers, and averaged over the examples by their weight, so that
    packing does not change it. Refused where experts are not chosen by a softmax (DeepSeek-V3).
    """


class Adapter(Section):
    """Which weights train. `adapter: lora` is short for `adapter: {method: lora}`."""

    method: Literal["none", "lora", "rslora", "dora"] = "none"
    """`none` trains all weights; the others train a low-rank adapter through peft. The folder of a
    `lora` is laid out as vLLM and llama.cpp load it (an `rslora` for vLLM); serve a `dora`, or one
    with added tokens, by `sftx export`.
    """
    rank: int = Field(default=16, ge=1)
    """Rank of the adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapter: alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input. What it drops is drawn pack by pack: here, as with dropout of the
    model's own, another pack size, number of processes or `share_prefixes` is another draw.
    """
    targets: str | list[str] = "all-linear"
    """Modules to adapt: `all-linear` (all but the head), or names."""
    path: str | None = None
    """Start from this saved adapter (a folder or a hub name): it trains on, and has its own rank,
    alpha, dropout and targets. `method` must be its method.
    """
    quantize: Literal["none", "nf4"] = "none"
    """Hold the frozen weights of linear layers in 4 bits (QLoRA: NF4, block scales quantised too)
    by bitsandbytes.
    """
    merge: bool = False
    """Also write the merged model, as `sftx export` does, into `OUTPUT/merged`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Adapter:
        unused = sorted(self.model_fields_set - {"method"})
        if self.method == "none" and unused:
            raise ValueError(
                f"`{unused[0]}` says how to adapt, but `method` is none; set `method: lora`"
            )
        return self


class Checkpoint(Section):
    """State to continue from."""

    every: int = Field(default=0, ge=0)
    """Save every so many steps; 0 = only by `minutes`, and when the run is stopped by a signal."""
    minutes: float = Field(default=15, ge=0)
    """Save when so many minutes have passed since the last save, at the end of a step; 0 = not by
    time. Where there is no room for such a checkpoint the run says so and goes on.
    """
    keep: int = Field(default=2, ge=1)
    """How many checkpoints to keep: the newest, and besides them the best by `eval.keep_best`
    (default: held-out loss).
    """
    background: bool = False
    """Write checkpoints while training goes on, from a copy in memory; an error in writing ends the
    next step.
    """
    mirror: str | None = None
    """A folder elsewhere that gets a copy of every checkpoint while the run trains, and of the whole
    run at its end: s3://bucket/runs/first, gs://, hf://, file:// (package: `sftx[remote]`). A lost
    upload never ends a run: it is sent again with the next checkpoint. A run whose own folder is empty
    is continued from it.
    """
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto` continues a run found in the output folder; `never` refuses to touch one; `must`
    refuses to start anew.
    """
    resume_allow: list[str] = Field(default=[])
    """What may differ from the run that is continued: dotted settings, sections, or `data`. It is
    recorded; any other difference is refused.
    """


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""A tool that draws the numbers of runs."""


class Runtime(Section):
    """The machine. Only `precision` changes the numbers beyond rounding; and where there is dropout,
    what changes the packs changes what is dropped.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16` computes in bfloat16 over fp32 weights; `auto` = bf16 on a GPU, fp32 on a CPU."""
    tokens_per_pack: int | None = Field(default=None, ge=1)
    """Tokens computed at once. Changes speed and memory, never the result; default: chosen for the
    device. An example longer than this is a pack of its own.
    """
    share_prefixes: Literal["auto", "on", "off"] = "auto"
    """Compute the tokens with which examples of a step begin alike (a system prompt, one prompt
    with several answers) once per pack. Changes speed and memory, never the result. `auto` = where
    the model can, a run that is continued as before; `on` refuses a model that cannot.
    """
    recompute: Literal["auto", "none", "all"] | Annotated[int, Ge(0)] = "auto"
    """Decoder layers (none, all, or how many) whose activations are computed again in the backward
    pass instead of kept: less memory for about a third more time. `auto` = as few as fit into the
    available memory.
    """
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile every decoder layer with torch.compile. `auto` = where the planned steps repay it
    (see docs/performance.md) and the model allows it.
    """
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of one process; default: OMP_NUM_THREADS, else one per physical core that a
    control group's quota leaves, shared among the processes of the machine; fewer where other
    programs use the cores and that is faster (measured at the start). A run that is continued keeps
    its number.
    """
    parallel: Literal["auto", "replicate", "fsdp", "hsdp"] = "auto"
    """How several processes (started by torchrun, or `sftx train nproc=8`) hold the model:
    `replicate` = whole in each; `fsdp` = in shards over all; `hsdp` = in shards within a node,
    which nodes repeat; `auto` = `replicate` where weights, gradients and optimiser fit into half
    the memory of a GPU, else `fsdp`. One process holds all of it.
    """
    context_parallel: Literal["auto"] | Annotated[int, Ge(1)] = "auto"
    """Processes that compute a pack together, each a part of its tokens: for examples that are
    longer than one of them holds. Changes speed and memory, never the result. Packs are those of
    such a group: it takes `tokens_per_pack` tokens at once. `auto` = as few as a step fits into on
    GPUs; 1 on a CPU. The attention heads and the number of processes must be multiples of it.
    """
    deterministic: bool = False
    """On a GPU: use only operations that give the same bits every time, so that runs and continued
    runs are equal to the bit. Slower; an operation that has no such form ends the run. A CPU is the
    same to the bit without it.
    """
    rank_timeout: float = Field(default=600, gt=0)
    """Seconds for which a process may wait for another; then the job ends and the silent one is
    named.
    """
    progress: bool = True
    """Show progress on the terminal."""
    report: bool = True
    """Write `report.html` into the run's folder, at evaluations and at the end."""


class Config(Section):
    """A whole run."""

    model: Model
    """The model to start from."""
    data: Data
    """What to train on."""
    output: str
    """Folder of the run: the trained model, the record and the checkpoints."""
    batch: Batch = Batch()
    """Which examples share one update."""
    optim: Optim = Optim()
    """AdamW and its learning rate."""
    loss: Loss = Loss()
    """What is added to the plain objective."""
    adapter: Adapter = Adapter()
    """Which weights train."""
    eval: Eval = Eval()
    """Held-out loss and answers."""
    checkpoint: Checkpoint = Checkpoint()
    """State to continue from."""
    runtime: Runtime = Runtime()
    """The machine."""
    track: Tracker | list[Tracker] = Field(default=[])
    """Trackers that get the numbers, samples and settings of the run while it trains, one or a list
    of them; none is contacted unless it is named. Each is an extra: `pip install 'sftx[wandb]'`.
    """
    seed: int = 0
    """Seed of shuffling, adapter initialisation and dropout."""
    license: str | None = None
    """Licence of the trained model, for its card: an identifier of the hub, such as apache-2.0.
    Default: that of the base, where its card or its GGUF file states one.
    """
    license_link: str | None = None
    """Where a licence can be read that the hub has no identifier for; `license` is then its name."""

    @model_validator(mode="after")
    def _trains_one_choice(self) -> Config:
        model = self.model
        chosen = {
            "unfrozen_layers": model.unfrozen_layers,
            "train_only": model.train_only,
            "freeze": model.freeze,
        }
        ways = [name for name, value in chosen.items() if value is not None]
        has_adapter = self.adapter.method != "none"
        if ways and has_adapter:
            raise ValueError(
                f"`model.{ways[0]}` is for training without an adapter, which freezes all but "
                "itself"
            )
        if self.optim.weights != "fp32" and has_adapter:
            raise ValueError(
                "`optim.weights` is for training without an adapter, whose weights are always fp32"
            )
        if ways[:2] == ["unfrozen_layers", "train_only"]:
            raise ValueError(
                "`model.unfrozen_layers` and `model.train_only` both say what trains; set one"
            )
        return self

    @model_validator(mode="after")
    def _has_something_to_evaluate(self) -> Config:
        has_rows = bool(self.data.eval or self.data.eval_rows or self.data.eval_split)
        asked = self.eval.prompts
        if self.eval.every and not has_rows and not asked:
            raise ValueError(
                "`eval.every` is set, but there is nothing to evaluate on: set data.eval or "
                "data.eval_split"
            )
        if asked and isinstance(asked, int) and not has_rows:
            raise ValueError(
                f"`eval.prompts: {asked}` takes held-out rows, and there are none: set data.eval "
                "or data.eval_split, or name a file of prompts"
            )
        return self
