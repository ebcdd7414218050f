"""Checks 28 to 30: what comes from strangers (models, templates, data, settings) runs nothing and
reveals nothing.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import re
import signal
import time
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import tiny
import torch

import sftx
from scorecard import good_rows
from scorecard.frame import check, expect
from scorecard.inputs import Reader
from scorecard.runs import Child, checkpoints, die, facts, on_step, run, settings, write_rows
from sftx.cli import main
from sftx.data.chat import limits
from sftx.data.chat.limits import SECONDS
from sftx.settings.load import load_config
from sftx.types import UserError

SECRETS = {
    "HF_TOKEN": "hf_planted0123456789",
    "WANDB_API_KEY": "wandbplanted0123456789",
    "MY_KEY": "skplanted0123456789",
}


class Bomb:
    """Unpickling this leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def pickles_are_refused(folder: Path, trace: Path, pickled: dict[str, Any]) -> None:
    """In the place of weights, of any file of a checkpoint or of the cache, of an adapter and of
    data.
    """
    torch.save({"model.norm.weight": Bomb(trace)}, folder / "pytorch_model.bin")
    bin_only = Path(tiny.folder(folder / "bin"))
    (bin_only / "model.safetensors").unlink()
    os.rename(folder / "pytorch_model.bin", bin_only / "pytorch_model.bin")
    text = run({**pickled, "model": {"path": str(bin_only)}}, code=2)
    expect("safetensors" in text, f"a pickled model: {text[-300:]}")
    run(pickled, on_step(5, die), code=-9)
    for file in sorted((folder / "pickled" / "checkpoints" / checkpoints(pickled)[0]).iterdir()):
        kept = file.read_bytes()
        file.write_bytes(pickle.dumps(Bomb(trace)))
        text = run(
            {**pickled, "batch": {"examples_per_step": 4, "steps": 12}}, on_step(1, die), code=-9
        )
        expect("is damaged" in text, f"a pickle as {file.name}: {text[-300:]}")
        file.write_bytes(kept)
    for file in sorted((folder / "cache").rglob("*.*")):
        if file.is_file():
            file.write_bytes(pickle.dumps(Bomb(trace)))
    run(settings(folder, "recached", dropout=0.0, batch={"steps": 1}))
    tuned = settings(folder, "tuned", dropout=0.0, adapter={"method": "lora"}, batch={"steps": 1})
    run(tuned)
    (folder / "tuned" / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(trace)}, folder / "tuned" / "adapter_model.bin")
    again = settings(
        folder,
        "tuned-on",
        dropout=0.0,
        adapter={"method": "lora", "path": tuned["output"]},
        batch={"steps": 1},
    )
    text = run(again, code=2)
    expect("safetensors" in text, f"a pickled adapter: {text[-300:]}")
    (folder / "data.pkl").write_bytes(pickle.dumps(Bomb(trace)))
    run(
        {**pickled, "data": {"train": str(folder / "data.pkl")}, "output": str(folder / "pkl")},
        code=2,
    )


@check(28, "Nothing executes on load", limit=150)
def loading(folder: Path) -> str:
    """Pickles, code beside a model or a data set, and YAML tags: nothing runs; remote code only
    where it is set.
    """
    trace = folder / "EXECUTED"
    pickled = settings(folder, "pickled", dropout=0.0)
    model = Path(pickled["model"]["path"])
    pickles_are_refused(folder, trace, pickled)
    remote = Path(tiny.folder(folder / "remote"))
    for name in ("config.json", "tokenizer_config.json"):
        told = json.loads((remote / name).read_text())
        names = {
            "AutoConfig": "evil.C",
            "AutoModelForCausalLM": "evil.M",
            "AutoTokenizer": ["evil.T", None],
        }
        told |= {"auto_map": names, "model_type": "evil", "tokenizer_class": "T"}
        (remote / name).write_text(json.dumps(told))
    (remote / "evil.py").write_text(
        f"open({str(trace)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM as M\n"
        "class C(LlamaConfig):\n    model_type = 'evil'\n"
    )
    text = run(
        {**pickled, "model": {"path": str(remote)}, "output": str(folder / "remote-run")}, code=2
    )
    expect("trust_remote_code" in text, text[-300:])
    (folder / "script").mkdir()
    (folder / "script" / "script.py").write_text(f"open({str(trace)!r}, 'w')")
    text = run(
        {
            **pickled,
            "data": {"train": str(folder / "script")},
            "output": str(folder / "script-run"),
        },
        code=2,
    )
    expect("no data file" in text, text[-300:])
    (folder / "tag.yaml").write_text(f"model: !!python/object/apply:pathlib.Path.touch [{trace}]\n")
    with contextlib.suppress(UserError):
        load_config(str(folder / "tag.yaml"))
        expect(False, "a YAML tag was read")
    expect(not trace.exists(), "code was executed")
    run(
        {
            **pickled,
            "model": {"path": str(remote), "trust_remote_code": True},
            "output": str(folder / "x"),
        },
        code=None,
    )
    expect(trace.exists(), "the trap does not work: with trust_remote_code its code must run")
    trusted = settings(
        folder, "trusted", dropout=0.0, model={"path": str(model), "trust_remote_code": True}
    )
    run(trusted)
    expect(
        facts(trusted)["config"]["model"]["trust_remote_code"] is True,
        "trust_remote_code is not recorded",
    )
    needed = [line for line in requires("sftx") or [] if line.startswith("torch")]
    expect(needed and re.match(r"torch>=2\.1[1-9]", needed[0]), f"torch is required as {needed}")
    return f"0 executed; {calls_that_execute()} files hold no call that could"


def calls_that_execute() -> int:
    """How many modules the library has; `Failed` if one of them unpickles, evaluates, or trusts
    code by itself.
    """
    modules = list(Path(sftx.__file__).parent.rglob("*.py"))
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                literal = {key.arg: ast.unparse(key.value) for key in node.keywords}
                where = f"{path.name}:{node.lineno}: {called}"
                expect(
                    called
                    not in (
                        "eval",
                        "exec",
                        "os.system",
                        "torch.load",
                        "pickle.load",
                        "pickle.loads",
                    ),
                    where,
                )
                expect(
                    literal.get("trust_remote_code") != "True"
                    and literal.get("weights_only") != "False",
                    where,
                )
                expect(literal.get("shell") != "True" and called != "yaml.load", where)
    return len(modules)


ESCAPES = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() | length }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "mutation": "{% set _ = messages.append(1) %}",
    "include": "{% include '/etc/passwd' %}",
    "attr filter": "{{ (messages | attr('__class__')).__mro__ }}",
}
SHARED = (
    "{% set n = namespace(t=['long']) %}{% for i in range(40) %}{% set n.t = [n.t, n.t] %}{% "
    "endfor %}"
)
BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested range": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "long text": "{{ ('x' * 10000000000) | length }}",
    "doubling": "{% set n = namespace(t='xx') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t "
    "%}{% endfor %}",
    "holds itself": SHARED + "{{ n.t }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
}


@check(29, "Templates and paths", limit=420)
def templates(folder: Path) -> str:
    """Templates cannot escape or go on without end; names and rows cannot reach files outside the
    data.
    """
    limits.limit_this_process()
    reader = Reader(folder)
    rows = write_rows(folder / "rows.jsonl", [good_rows.GOOD["messages"]])
    slowest = 0.0
    for name, source in {**ESCAPES, **BOMBS}.items():
        path = folder / f"{name}.jinja"
        path.write_text(source + tiny.CHAT_TEMPLATE)
        began = time.process_time()
        refusal = reader.refusal(rows, template=str(path))
        slowest = max(slowest, time.process_time() - began)
        expect(refusal and "root:" not in refusal, f"template {name!r} was rendered")
    expect(slowest < 4 * SECONDS, f"a template ran for {slowest:.0f} s")
    bombs_in_runs(folder)
    secret = folder / "elsewhere" / "secret.jsonl"
    secret.parent.mkdir()
    write_rows(secret, [{"text": "top secret"}])
    (folder / "data").mkdir()
    write_rows(folder / "data" / "a.jsonl", [{"text": "fine"}])
    (folder / "data" / "b.jsonl").symlink_to(secret)
    expect(
        "b.jsonl" in reader.refusal(str(folder / "data")),
        "a link out of the data folder was followed",
    )
    (folder / "data" / "b.jsonl").unlink()
    (folder / "data" / "c.jsonl").symlink_to("a.jsonl")
    expect(len(reader.read(str(folder / "data"))) == 2, "a link inside the data folder is fine")
    for value in ("../elsewhere/secret.jsonl", str(secret), f"file://{secret}"):
        path = write_rows(folder / "named.jsonl", [{"text": value, "file_name": value}])
        corpus = reader.read(path, template="none")
        shown = tiny.tokenizer().decode(corpus.example(0).ids)
        expect("top secret" not in shown and value in shown, f"a row that names a file: {shown}")
    before = {path for path in folder.rglob("*") if "cache" not in path.parts}
    source = {"path": rows, "name": "../../escaped"}
    run(settings(folder, "named", data={"train": [source]}, batch={"steps": 1}))
    made = {path for path in folder.rglob("*") if "cache" not in path.parts} - before
    expect(
        not [path for path in made if "escaped" in path.name], "the name of a source became a file"
    )
    expect(not (folder.parent / "escaped").exists(), "the name of a source became a file outside")
    return (
        f"{len(ESCAPES)} escapes and {len(BOMBS)} bombs refused in {slowest:.1f} CPU-s at "
        "most, links stay inside"
    )


def bombs_in_runs(folder: Path) -> None:
    """A bomb that one row sets off costs that row alone; an operation that cannot be interrupted
    ends the process.
    """
    row = {"messages": [{"role": "user", "content": "set it off"}, good_rows.ANSWER]}
    rows = write_rows(
        folder / "one.jsonl", [good_rows.GOOD["messages"], row, good_rows.GOOD["messages"]]
    )
    bomb = "{% if 'off' in messages[0].content %}" + BOMBS["nested range"] + "{% endif %}"
    endless = (
        SHARED + "{% set a = n.t %}" + SHARED.replace("'long'", "'l' ~ 'ong'") + "{{ a == n.t }}"
    )
    config = settings(folder, "one", dropout=0.0, batch={"steps": 1, "examples_per_step": 2})
    for name, source, code in (("one", bomb, 0), ("endless", endless, -signal.SIGVTALRM)):
        (folder / f"{name}.jinja").write_text(source + tiny.CHAT_TEMPLATE)
        config["data"] |= {
            "train": rows,
            "template": str(folder / f"{name}.jinja"),
            "on_bad_row": "skip",
        }
        text = run(config, lambda: _limited(15.0), code=code)
        told = "read 3 rows = trained 2 + split 0 + dropped 1" if not code else 'File "<template>"'
        expect(told in text, f"{name}: {text[-300:]}")


def _limited(last: float) -> None:
    """Limit this process as the command line limits its own."""
    limits.LAST = last
    limits.limit_this_process()


def listening() -> list[str]:
    """Addresses at which this process listens."""
    mine = {
        os.readlink(entry)
        for entry in Path("/proc/self/fd").iterdir()
        if entry.is_symlink() and entry.exists()
    }
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path("/proc/self/net", table).read_text().split("\n")[1:]
    ]
    return [line[1] for line in lines if line and line[3] == "0A" and f"socket:[{line[9]}]" in mine]


@check(30, "Secrets and exposure", limit=120)
def secrets(folder: Path) -> str:
    """Planted tokens are in no file, output, repr or traceback; nothing listens; settings are read
    strictly.
    """
    os.environ.update(SECRETS)
    key = SECRETS["MY_KEY"]
    out = folder / "listening"
    config = settings(folder, "run", adapter={"method": "lora"})
    run(config, on_step(5, lambda: out.write_text(str(listening()))))
    expect(out.read_text() == "[]", f"the run listens at {out.read_text()}")

    def broken() -> None:
        raise RuntimeError("planted")

    run(settings(folder, "crashed"), on_step(5, broken), code=1)
    for name, arguments in {
        "unknown": [f"hub_token={key}"],
        "unknown section": [f"wandb={{api_key: {key}}}"],
        "unknown inside": [f"model.token={key}"],
    }.items():
        asked = ["train", str(folder / "run.yaml"), *arguments]
        child = Child(lambda asked=asked: main(asked), folder / f"{name}.log")
        expect(child.wait() == 2 and "no such setting" in child.text, child.text[-300:])
    child = Child(
        lambda: main(["inspect", str(folder / "run.yaml"), f"html={folder / 'page.html'}"]),
        folder / "page.log",
    )
    expect(child.wait() == 0, child.text[-300:])
    found = [
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and any(s.encode() in p.read_bytes() for s in SECRETS.values())
    ]
    expect(not found, f"secrets in {found}")
    loaded = load_config(str(folder / "run.yaml"))
    expect(
        not any(secret in repr(loaded) + str(loaded) for secret in SECRETS.values()),
        "a secret is in a repr",
    )
    expect(
        load_config(str(folder / "run.yaml"), ["optim.learning_rate=1e-4"]).optim.learning_rate
        == 1e-4,
        "1e-4 is text",
    )
    for text, expected in (("seed: 1\nseed: 2\n", "written twice"), ("sed: 1\n", "did you mean")):
        (folder / "bad.yaml").write_text(f"model: m\ndata: d.jsonl\noutput: o\n{text}")
        try:
            load_config(str(folder / "bad.yaml"))
            expect(False, f"{text!r} was accepted")
        except UserError as error:
            expect(expected in str(error), str(error))
    files = sum(path.is_file() for path in folder.rglob("*"))
    return f"{len(SECRETS)} tokens in 0 of {files} files, nothing listens, settings strict"
