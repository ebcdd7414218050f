"""The settings of a run as types: editors complete them, type checkers find a misspelt one.

Made from the schema by `sftx schema format=python`; do not edit. Nothing here is read while a run
is made: `Config` alone decides what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict

from sftx.settings import schema
from sftx.settings.given import Rows, Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SourceSettings(TypedDict, total=False):
    """One data set of a mixture."""

    path: Required[Text]
    """A file, glob or folder, here or as a URL (s3://, gs://, hf://), or a hub data set."""
    name: Text | None
    """Name in reports; default: the path."""
    weight: float
    """Weight of this source in the mixture, as `data.mix_by` reads it; by rows, 2.0 shows every row
    twice per epoch and 0.5 half of them: another half in each epoch, no row again before all were
    shown.
    """


class ModelSettings(TypedDict, total=False):
    """The model to start from. `model: PATH` is short for `model: {path: PATH}`."""

    path: Required[Text | PreTrainedModel]
    """A Hugging Face folder (config.json, safetensors, tokenizer), a GGUF file or a folder with one
    (package `gguf`), or the name of a model on the hub.
    """
    tokenizer: Text | None
    """Folder or hub name of the tokenizer, if it is not the model's own."""
    trust_remote_code: bool
    """Run Python code that comes with the model. Off unless you set it; recorded in the run folder.
    """
    save_dtype: Literal["auto", "fp32", "bf16"]
    """How the trained weights are stored; `auto` = as in the model the run starts from. Training
    itself is in fp32.
    """
    add_tokens: Sequence[Text]
    """Words this run gives a token of their own, matched wherever they stand in a text. A new
    token's rows in the embeddings and the head start at the mean of the others plus a little noise
    by `seed` (0.02 standard deviations). With an adapter, the rows of all tokens listed here train
    beside it, those of tokens the model already has too.
    """
    add_special_tokens: Sequence[Text]
    """The same for control tokens, such as a chat template's markers; `data.special_tokens` says
    what their text means inside a row.
    """
    unfrozen_layers: int | None
    """Train only the last so many layers, the final norm and a head that is not tied to the
    (frozen) embeddings; 0 = the final norm alone. Default: all weights.
    """
    freeze: Sequence[Text] | None
    """Names of parameters that stay as they are, with `*` for any text: [model.embed_tokens.*,
    '*.norm.weight'].
    """
    train_only: Sequence[Text] | None
    """Names of the only parameters that train, in the form of `freeze`."""


class DataSettings(TypedDict, total=False):
    """What to train on, and how text becomes weighted tokens. `data: PATH` is short for `data:
    {train: PATH}`.
    """

    train: Text | Sequence[Text | SourceSettings | schema.Source] | None
    """Training rows: a path or several (.jsonl .json .txt .csv .parquet .arrow; also .gz, .zst, a
    glob, a folder, a URL: s3://, gs://, hf://).
    """
    rows: Rows | None
    """Training rows held in memory (Python only): a list or generator of texts, [prompt, output,
    ...] lists or dictionaries. `data=ROWS` is short for `data={"rows": ROWS}`.
    """
    eval: Text | Sequence[Text | SourceSettings | schema.Source] | None
    """Held-out rows, in the same forms as `train`."""
    eval_rows: Rows | None
    """Held-out rows held in memory (Python only)."""
    eval_split: float
    """Share of the training rows to hold out when no held-out data is given; chosen by seed, row by
    row.
    """
    mix_by: Literal["rows", "tokens"]
    """What the weights of `train` count: how often the `rows` of a source are shown in an epoch, or
    its share of the `tokens` of an epoch (which then has as many tokens as all sources together:
    small sources are repeated).
    """
    format: Literal[
        "auto", "text", "pairs", "dialogue", "messages", "sharegpt", "alpaca", "segments", "tokens"
    ]
    """Shape of the rows. `auto` decides once per file from its first row; a row of another shape is
    an error.
    """
    columns: Mapping[str, Text | None]
    """New names for columns: {question: prompt, answer: completion}; a column named null is left
    out. Each must be in some row.
    """
    template: Text
    """How turns become text: `auto` = the tokenizer's chat template, without which rows of turns
    are refused; `none` = turns joined as they are, EOS after the last output; else a .jinja file or
    a bundled template: chatml, plain.
    """
    train_on: (
        Literal["all", "last"]
        | Sequence[Literal["system", "developer", "user", "assistant", "tool"]]
    )
    """Which turns are targets: `all` outputs, the `last` one only, or the turns of these roles."""
    weights: Mapping[str, float]
    """How much the text of a turn counts by its role, a thought apart from its answer
    (`reasoning`), and the prompts of pairs, lists and Alpaca rows (`prompt`, else as `user`):
    {user: 0.1}. The rest: 1 for outputs, 0 for all else.
    """
    max_length: int | None
    """Longest example in tokens; default: the positions of the model, at most 8,192."""
    too_long: Literal["split", "truncate_left", "truncate_right", "drop", "error"]
    """What to do with a longer one. `split` keeps every target: text is cut in pieces; a dialogue
    is cut between turns where its turns fit, each piece keeping as much context as fits.
    """
    on_bad_row: Literal["stop", "skip"]
    """A malformed row stops the run with its file and line, or is dropped, counted and listed in
    the ledger.
    """
    forced_opening: Literal["close", "error"]
    """For templates whose prompt opens a thought that the row lacks: close it as the template does,
    or refuse.
    """
    lost_reasoning: Literal["note", "error"]
    """Reasoning of a turn that the template does not write: the row is trained without it and
    counted, or refused.
    """
    special_tokens: Literal["escape", "allow"]
    """Text in a row that spells a special token: `escape` keeps it text; `allow` makes it the
    control token.
    """
    cache: Text | None
    """Folder of the token cache; default: $SFTX_CACHE, else ~/.cache/sftx."""
    workers: int | None
    """Processes that encode; default: one per core. 0 encodes in this process."""


class BatchSettings(TypedDict, total=False):
    """The step: which examples share one update. A property of the run, not of the machine."""

    examples_per_step: int
    """Examples in one optimiser step, over all processes."""
    tokens_per_step: int | None
    """Instead: as many examples as make up to this many tokens (at least one)."""
    epochs: float
    """Passes over the training examples; each pass is shuffled anew."""
    steps: int | None
    """Stop after this many steps instead of after `epochs`."""
    shuffle: bool
    """Shuffle the examples of each epoch by `seed`; false keeps the order of the data."""
    group_by: Text
    """Put the examples of a group into the same step: those of one row (`row`: the turns that a
    template writes as sequences of their own), of one prompt (`prompt`: the same tokens before the
    first target), or with the same value in a field of the rows (its name). Whole groups are
    shuffled, and a step takes whole groups, as many as fit; what they share is computed once.
    """


class OptimSettings(TypedDict, total=False):
    """AdamW and its learning rate, as pure functions of the step."""

    learning_rate: float | None
    """Peak learning rate; default: 2e-5 for all weights, 2e-4 for an adapter."""
    schedule: Literal["cosine", "linear", "constant", "wsd"]
    """Shape after the warm-up; `wsd` = constant, then a linear decay over the last `decay` of the
    run.
    """
    warmup: float
    """Linear warm-up: a share of the steps if below 1, else a number of steps."""
    decay: float
    """Share of the steps in which `wsd` decays."""
    final_ratio: float
    """Where the schedule ends, relative to the peak."""
    weight_decay: float
    """Decoupled weight decay, on matrices only (never on norms, biases or embeddings)."""
    betas: tuple[float, float] | list[float]
    """Decay of AdamW's running means."""
    eps: float
    """AdamW's epsilon."""
    max_grad_norm: float
    """Clip the global gradient norm to this; 0 does not clip."""
    weights: Literal["fp32", "bf16_stochastic"]
    """How weights are kept while training: in fp32, or in bf16 (gradients too; the means stay fp32:
    12 bytes a parameter for 16), each update rounded up or down at random by how near it is, so
    that small ones are not lost.
    """
    max_bad_steps: int
    """Steps with a non-finite loss or gradient that may be skipped in a row before the run stops
    with exit code 3.
    """


class LossSettings(TypedDict, total=False):
    """What is added to the plain objective, the weighted mean of -log p. All of it only while
    training: held-out loss is always the plain one. The reported training loss is the whole
    objective.
    """

    label_smoothing: float
    """Train towards (1 - this) on the label and this spread evenly over all rows of the head."""
    z_loss: float
    """Add this times log(Z)^2 per target, Z = sum of exp(logits), so that logits do not drift
    (PaLM: 1e-4).
    """
    dft: bool
    """Dynamic fine-tuning (arXiv:2508.05629): weigh each target's cross-entropy by its probability,
    as a constant.
    """
    neftune_alpha: float
    """Add uniform noise of up to this / sqrt(tokens of the example x hidden size) to embeddings
    (arXiv:2310.05914).
    """
    router_aux: float
    """Add this times the load-balancing loss of a mixture of experts: computed for each example
    alone, over its tokens and all layers, and averaged over the examples by their weight, so that
    packing does not change it. Refused where experts are not chosen by a softmax (DeepSeek-V3).
    """


class AdapterSettings(TypedDict, total=False):
    """Which weights train. `adapter: lora` is short for `adapter: {method: lora}`."""

    method: Literal["none", "lora", "rslora", "dora"]
    """`none` trains all weights; the others train a low-rank adapter through peft. The folder of a
    `lora` is laid out as vLLM and llama.cpp load it (an `rslora` for vLLM); serve a `dora`, or one
    with added tokens, by `sftx export`.
    """
    rank: int
    """Rank of the adapter."""
    alpha: float
    """Scale of the adapter: alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: float
    """Dropout on the adapter's input. What it drops is drawn pack by pack: here, as with dropout of
    the model's own, another pack size, number of processes or `share_prefixes` is another draw.
    """
    targets: Text | Sequence[Text]
    """Modules to adapt: `all-linear` (all but the head), or names."""
    path: Text | None
    """Start from this saved adapter (a folder or a hub name): it trains on, and has its own rank,
    alpha, dropout and targets. `method` must be its method.
    """
    quantize: Literal["none", "nf4"]
    """Hold the frozen weights of linear layers in 4 bits (QLoRA: NF4, block scales quantised too)
    by bitsandbytes.
    """
    merge: bool
    """Also write the merged model, as `sftx export` does, into `OUTPUT/merged`."""


class EvalSettings(TypedDict, total=False):
    """Held-out loss, and answers of the model to held-out prompts."""

    every: int
    """Evaluate every so many steps; 0 = before the first step and after the last only."""
    at_start: bool
    """Evaluate before the first step, so that the gain can be seen."""
    prompts: int | Text | Sequence[Any]
    """What the model answers at every evaluation, into samples.jsonl: so many held-out rows, or a
    file of rows, or rows (Python only). The prompt is all before a row's last output, which is the
    reference. 0 = none.
    """
    metrics: Sequence[Text | Callable[..., Any]]
    """How answers are judged: exact, contains, number, f1, json_valid, tool_call, rouge_l, bleu,
    chrf, or a function of your own, as file.py:function (in Python the function itself).
    """
    new_tokens: int
    """Most tokens of an answer. Prompts that leave no room for them in the model are not asked."""
    general: bool | Text | Sequence[Any]
    """A text that the base knew, whose loss shows what is forgotten, where `prompts` is set: true =
    one that comes with sftx, else a file of rows, or rows (Python only).
    """
    keep_best: Text | None
    """Write the model that was best by this number instead of the last one: loss, accuracy, any of
    `metrics`, ended, kl, `general loss`. Of losses, perplexity and kl the lowest is best, of the
    others the highest.
    """
    stop_after: int
    """End after so many evaluations in a row without a gain in `keep_best` (or loss); 0 = never."""
    min_delta: float
    """What counts as a gain for `stop_after`: more than this."""


class CheckpointSettings(TypedDict, total=False):
    """State to continue from."""

    every: int
    """Save every so many steps; 0 = only by `minutes`, and when the run is stopped by a signal."""
    minutes: float
    """Save when so many minutes have passed since the last save, at the end of a step; 0 = not by
    time. Where there is no room for such a checkpoint the run says so and goes on.
    """
    keep: int
    """How many checkpoints to keep: the newest, and besides them the best by `eval.keep_best`
    (default: held-out loss).
    """
    background: bool
    """Write checkpoints while training goes on, from a copy in memory; an error in writing ends the
    next step.
    """
    mirror: Text | None
    """A folder elsewhere that gets a copy of every checkpoint while the run trains, and of the
    whole run at its end: s3://bucket/runs/first, gs://, hf://, file:// (package: `sftx[remote]`). A
    lost upload never ends a run: it is sent again with the next checkpoint. A run whose own folder
    is empty is continued from it.
    """
    resume: Literal["auto", "never", "must"]
    """`auto` continues a run found in the output folder; `never` refuses to touch one; `must`
    refuses to start anew.
    """
    resume_allow: Sequence[Text]
    """What may differ from the run that is continued: dotted settings, sections, or `data`. It is
    recorded; any other difference is refused.
    """


class RuntimeSettings(TypedDict, total=False):
    """The machine. Only `precision` changes the numbers beyond rounding; and where there is
    dropout, what changes the packs changes what is dropped.
    """

    device: Literal["auto", "cpu", "cuda"]
    """Where to compute; `auto` takes a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"]
    """`bf16` computes in bfloat16 over fp32 weights; `auto` = bf16 on a GPU, fp32 on a CPU."""
    tokens_per_pack: int | None
    """Tokens computed at once. Changes speed and memory, never the result; default: chosen for the
    device. An example longer than this is a pack of its own.
    """
    share_prefixes: Literal["auto", "on", "off"]
    """Compute the tokens with which examples of a step begin alike (a system prompt, one prompt
    with several answers) once per pack. Changes speed and memory, never the result. `auto` = where
    the model can, a run that is continued as before; `on` refuses a model that cannot.
    """
    recompute: Literal["auto", "none", "all"] | int
    """Decoder layers (none, all, or how many) whose activations are computed again in the backward
    pass instead of kept: less memory for about a third more time. `auto` = as few as fit into the
    available memory.
    """
    compile: Literal["auto", "on", "off"]
    """Compile every decoder layer with torch.compile. `auto` = where the planned steps repay it
    (see docs/performance.md) and the model allows it.
    """
    threads: int | None
    """CPU threads of one process; default: OMP_NUM_THREADS, else one per physical core that a
    control group's quota leaves, shared among the processes of the machine; fewer where other
    programs use the cores and that is faster (measured at the start). A run that is continued keeps
    its number.
    """
    parallel: Literal["auto", "replicate", "fsdp", "hsdp"]
    """How several processes (started by torchrun, or `sftx train nproc=8`) hold the model:
    `replicate` = whole in each; `fsdp` = in shards over all; `hsdp` = in shards within a node,
    which nodes repeat; `auto` = `replicate` where weights, gradients and optimiser fit into half
    the memory of a GPU, else `fsdp`. One process holds all of it.
    """
    context_parallel: Literal["auto"] | int
    """Processes that compute a pack together, each a part of its tokens: for examples that are
    longer than one of them holds. Changes speed and memory, never the result. Packs are those of
    such a group: it takes `tokens_per_pack` tokens at once. `auto` = as few as a step fits into on
    GPUs; 1 on a CPU. The attention heads and the number of processes must be multiples of it.
    """
    deterministic: bool
    """On a GPU: use only operations that give the same bits every time, so that runs and continued
    runs are equal to the bit. Slower; an operation that has no such form ends the run. A CPU is the
    same to the bit without it.
    """
    rank_timeout: float
    """Seconds for which a process may wait for another; then the job ends and the silent one is
    named.
    """
    progress: bool
    """Show progress on the terminal."""
    report: bool
    """Write `report.html` into the run's folder, at evaluations and at the end."""


class Sections(TypedDict, total=False):
    """A whole run."""

    model: Required[Text | ModelSettings | schema.Model | PreTrainedModel]
    """The model to start from."""
    data: Required[Text | Rows | DataSettings | schema.Data]
    """What to train on."""
    output: Required[Text]
    """Folder of the run: the trained model, the record and the checkpoints."""
    batch: BatchSettings | schema.Batch
    """Which examples share one update."""
    optim: OptimSettings | schema.Optim
    """AdamW and its learning rate."""
    loss: LossSettings | schema.Loss
    """What is added to the plain objective."""
    adapter: Literal["none", "lora", "rslora", "dora"] | AdapterSettings | schema.Adapter
    """Which weights train."""
    eval: EvalSettings | schema.Eval
    """Held-out loss and answers."""
    checkpoint: CheckpointSettings | schema.Checkpoint
    """State to continue from."""
    runtime: RuntimeSettings | schema.Runtime
    """The machine."""
    track: (
        Literal["tensorboard", "wandb", "mlflow", "trackio"]
        | Sequence[Literal["tensorboard", "wandb", "mlflow", "trackio"]]
    )
    """Trackers that get the numbers, samples and settings of the run while it trains, one or a list
    of them; none is contacted unless it is named. Each is an extra: `pip install 'sftx[wandb]'`.
    """
    seed: int
    """Seed of shuffling, adapter initialisation and dropout."""
    license: Text | None
    """Licence of the trained model, for its card: an identifier of the hub, such as apache-2.0.
    Default: that of the base, where its card or its GGUF file states one.
    """
    license_link: Text | None
    """Where a licence can be read that the hub has no identifier for; `license` is then its name.
    """
