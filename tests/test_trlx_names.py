"""The names of trlx: what scripts import, what they may construct, and what is refused with the way
to do it.
"""

from __future__ import annotations

import logging as python_logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_trlx import SAMPLES, config
from transformers import AutoTokenizer

import sftx.compat.trlx as trlx
from sftx.compat.trlx.data.configs import TRLConfig
from sftx.compat.trlx.data.default_configs import (
    default_ilql_config,
    default_ppo_config,
    default_sft_config,
)
from sftx.compat.trlx.data.method_configs import get_method
from sftx.compat.trlx.trainer import register_trainer
from sftx.compat.trlx.trainer.accelerate_sft_trainer import AccelerateSFTTrainer
from sftx.compat.trlx.utils import logging
from sftx.compat.trlx.utils.loading import get_trainer
from sftx.types import UserError

NAMES = {
    "data.default_configs": "PPOConfig ILQLConfig SFTConfig TRLConfig TrainConfig "
    "default_nemo_1_3b_config",
    "data.method_configs": "MethodConfig PPOConfig ILQLConfig",
    "data.ppo_types": "PPORLElement PPORLBatch",
    "data.ilql_types": "ILQLElement ILQLBatch",
    "data.accelerate_base_datatypes": "PromptBatch",
    "models.modeling_base": "PreTrainedModelWrapper",
    "models.modeling_ppo": "PPOConfig AdaptiveKLController AutoModelForCausalLMWithValueHead",
    "models.modeling_ilql": "ILQLConfig AutoModelForCausalLMWithILQLHeads",
    "models.modeling_nemo_sft": "SFTGPT",
    "pipeline.offline_pipeline": "DialogStore ILQLRolloutStorage",
    "pipeline.ppo_pipeline": "PPORolloutStorage",
    "trainer.accelerate_ppo_trainer": "AcceleratePPOTrainer",
    "trainer.accelerate_ilql_trainer": "AccelerateILQLTrainer make_experience",
    "trainer.accelerate_rft_trainer": "AccelerateRFTTrainer RFTConfig",
    "trainer.nemo_sft_trainer": "NeMoSFTTrainer",
    "trainer.nemo_ppo_trainer": "NeMoPPOTrainer",
    "trainer.nemo_ilql_trainer": "NeMoILQLTrainer",
    "utils.modeling": "whiten flatten_dict",
}


pytestmark = pytest.mark.usefixtures("no_predictions")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder(tmp_path_factory.mktemp("model"), chat=False)


@pytest.fixture
def as_trlx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "trlx", trlx)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("trlx."):
            del sys.modules[name]


@pytest.mark.parametrize("package", ["sftx.compat.trlx", "trlx"])
@pytest.mark.parametrize("module", sorted(NAMES))
def test_names_of_reinforcement_learning_and_nemo_import(
    module: str, package: str, as_trlx: None
) -> None:
    found: dict[str, Any] = {}
    exec(f"from {package}.{module} import {', '.join(NAMES[module].split())}", found)
    assert set(NAMES[module].split()) <= set(found)


def test_one_name_is_one_class_wherever_it_comes_from(as_trlx: None) -> None:
    found: dict[str, Any] = {}
    exec(
        "from trlx.models.modeling_ppo import PPOConfig as a\n"
        "from sftx.compat.trlx.models.modeling_ppo import PPOConfig as b\n"
        "from trlx.data.default_configs import PPOConfig as c",
        found,
    )
    assert found["a"] is found["b"] is found["c"] is get_method("ppoconfig")
    with pytest.raises(ImportError, match="PPOConfigg"):
        exec("from trlx.data.default_configs import PPOConfigg", {})
    with pytest.raises(ModuleNotFoundError, match=r"modeling_qqo"):
        exec("import trlx.models.modeling_qqo", {})


@pytest.mark.parametrize("make", [default_ppo_config, default_ilql_config])
def test_configurations_construct_and_change(make: Any, tmp_path: Path) -> None:
    made = make()
    made.method.num_rollouts = 7
    changed = made.evolve(method={"gamma": 0.5}, train={"batch_size": 3})
    assert (changed.method.gamma, changed.method.num_rollouts, changed.train.batch_size) == (
        0.5,
        7,
        3,
    )
    path = tmp_path / "config.yml"
    path.write_text(str(made))  # JSON is YAML
    assert TRLConfig.load_yaml(str(path)).to_dict()["method"] == made.to_dict()["method"]
    assert not hasattr(made.method, "nothing_of_that_name")


@pytest.mark.parametrize(
    ("make", "trainer", "advice"),
    [
        (default_ppo_config, "AcceleratePPOTrainer", "supervised fine-tuning, not reinforcement"),
        (default_ilql_config, "AccelerateILQLTrainer", "supervised fine-tuning, not reinforcement"),
        (default_sft_config, "NeMoSFTTrainer", "set train.trainer to AccelerateSFTTrainer"),
        (default_ppo_config, "AccelerateSFTTrainer", "method PPOConfig"),
        (default_sft_config, "MyPPO", "supervised fine-tuning, not reinforcement"),
    ],
)
def test_training_with_them_is_refused_before_anything_is_loaded(
    make: Any, trainer: str, advice: str
) -> None:
    @register_trainer("MyPPO")
    class MyPPO(get_trainer("AcceleratePPOTrainer")):
        pass

    with pytest.raises(UserError, match=advice):
        trlx.train(samples=["a"], config=make().evolve(train={"trainer": trainer}))


def test_what_they_would_do_is_refused(as_trlx: None) -> None:
    found: dict[str, Any] = {}
    exec(
        "from trlx.models.modeling_ppo import AutoModelForCausalLMWithValueHead as Model\n"
        "from trlx.trainer.nemo_sft_trainer import NeMoSFTTrainer as Trainer\n"
        "from trlx.utils.modeling import whiten\n"
        "from trlx.data.default_configs import default_nemo_1_3b_config as nemo",
        found,
    )
    for refused in (
        lambda: found["Model"].from_pretrained("gpt2"),
        lambda: found["Trainer"](config=None).learn(),
        lambda: found["whiten"](1),
        lambda: found["nemo"](),
    ):
        with pytest.raises(UserError, match=r"TRL, verl|AccelerateSFTTrainer"):
            refused()


def test_without_a_trlx_the_one_import_gives_this_one(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("from trlx.models.modeling_ppo import PPOConfig\n")
    (tmp_path / "trlx").mkdir()  # a folder of that name is no package
    (tmp_path / "script.py").write_text(
        "import sftx.compat.trlx\n"
        "import sys\n"
        "assert 'torch' not in sys.modules\n"
        "from helper import PPOConfig\n"
        "import trlx\n"
        "assert trlx is sftx.compat.trlx\n"
    )
    command = [sys.executable, str(tmp_path / "script.py")]
    assert subprocess.run(command, cwd=tmp_path, timeout=300).returncode == 0
    (tmp_path / "trlx" / "__init__.py").write_text("installed = True\n")
    (tmp_path / "script.py").write_text("import sftx.compat.trlx, trlx\nassert trlx.installed\n")
    assert subprocess.run(command, cwd=tmp_path, timeout=300).returncode == 0


# --- trlx's own example scripts: what they import and how they call -------------------------------

PPO_HH = """
import numpy as np
import tritonclient.grpc as client_util
import trlx
from trlx.data.default_configs import (
    ModelConfig, OptimizerConfig, PPOConfig, SchedulerConfig, TokenizerConfig, TrainConfig,
    TRLConfig,
)
default_config = TRLConfig(
    train=TrainConfig(
        seq_length=1024, epochs=10000, total_steps=10000, batch_size=4, checkpoint_interval=10000,
        eval_interval=500,
        pipeline="PromptPipeline", trainer="AcceleratePPOTrainer",
        checkpoint_dir="checkpoints/ppo_hh",
    ),
    model=ModelConfig(model_path="EleutherAI/gpt-j-6B", num_layers_unfrozen=2),
    tokenizer=TokenizerConfig(tokenizer_path="EleutherAI/gpt-j-6B", truncation_side="left"),
    optimizer=OptimizerConfig(name="adamw", kwargs=dict(lr=8e-6, betas=(0.9, 0.95), eps=1.0e-8,
    weight_decay=1.0e-6)),
    scheduler=SchedulerConfig(name="cosine_annealing", kwargs=dict(T_max=10000, eta_min=8e-6)),
    method=PPOConfig(name="PPOConfig", num_rollouts=64, chunk_size=16,
    gen_kwargs=dict(max_new_tokens=128)),
)
default_config.method.num_rollouts = 128
def create_reward_fn():
    def reward_fn(samples, prompts, original_output, **kwargs):
        return [float(len(sample)) for sample in samples]
    return reward_fn
"""
SFT_HH = """
import json, sys
from ppo_hh import create_reward_fn
import trlx
from trlx.data.default_configs import (
    ModelConfig, OptimizerConfig, SchedulerConfig, SFTConfig, TokenizerConfig, TrainConfig,
    TRLConfig,
)
default_config = TRLConfig(
    train=TrainConfig(
        seq_length=64, epochs=100, total_steps=2, batch_size=4, checkpoint_interval=10000,
        eval_interval=1000,
        pipeline="PromptPipeline", trainer="AccelerateSFTTrainer",
        checkpoint_dir="checkpoints/sft_hh",
    ),
    model=ModelConfig(model_path="EleutherAI/gpt-j-6B", num_layers_unfrozen=-1),
    tokenizer=TokenizerConfig(tokenizer_path="EleutherAI/gpt-j-6B", truncation_side="left"),
    optimizer=OptimizerConfig(name="adamw", kwargs=dict(lr=1e-6, betas=(0.9, 0.95), eps=1.0e-8,
    weight_decay=1.0e-6)),
    scheduler=SchedulerConfig(name="cosine_annealing", kwargs=dict(T_max=100000000, eta_min=1e-6)),
    method=SFTConfig(name="sftconfig", gen_kwargs=dict(max_new_tokens=4, top_k=20, top_p=1.0,
    do_sample=True)),
)
def main(hparams={}):
    config = TRLConfig.update(default_config, hparams)
    reward_fn = create_reward_fn()
    trlx.train(
        config=config,
        samples=["\\n\\nHuman: hi\\n\\nAssistant: hello"] * 8,
        eval_prompts=[{"prompt": "\\n\\nHuman: hi\\n\\nAssistant:",
        "original_output": " hello"}] * 3,
        metric_fn=lambda **kwargs: {"reward": reward_fn(**kwargs)},
        stop_sequences=["Human:", "human:", "Assistant:", "assistant:"],
    )
if __name__ == "__main__":
    main({} if len(sys.argv) == 1 else json.loads(sys.argv[1]))
"""


def test_sft_hh_runs_though_its_reward_comes_from_ppo_hh(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_trlx: None
) -> None:
    (tmp_path / "tritonclient").mkdir()
    (tmp_path / "tritonclient" / "__init__.py").touch()
    (tmp_path / "tritonclient" / "grpc.py").touch()
    (tmp_path / "ppo_hh.py").write_text(PPO_HH)
    (tmp_path / "sft_hh.py").write_text(SFT_HH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import sft_hh  # pyright: ignore[reportMissingImports]

    sft_hh.main(
        {"model.model_path": model, "tokenizer.tokenizer_path": model, "train.tracker": None}
    )
    assert (
        tmp_path / "checkpoints" / "sft_hh" / "best_checkpoint" / "hf_model" / "model.safetensors"
    ).exists()
    for name in ("sft_hh", "ppo_hh", "tritonclient", "tritonclient.grpc"):
        sys.modules.pop(name)


def test_a_metric_may_name_the_tokenizer(model: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    def metric_fn(
        samples: list[str], prompts: list[str], outputs: list[str], tokenizer: Any
    ) -> dict[str, Any]:
        seen.append(tokenizer)
        return {"length": [float(len(tokenizer(sample).input_ids)) for sample in samples]}

    trainer = trlx.train(samples=SAMPLES, metric_fn=metric_fn, config=config(model, tmp_path))
    assert seen == [trainer.tokenizer] * 2


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"]
)
def test_several_processes_are_refused_before_the_samples_are_read(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Untouchable(list[Any]):
        def __len__(self) -> int:
            raise AssertionError("the samples were looked at")

    monkeypatch.setenv(name, "2")
    ours = config(model, tmp_path, train={"tracker": "wandb"})
    with pytest.raises(
        UserError, match=rf"{name}=2.*python script.py.*torchrun -m sftx train.*metric_fn"
    ):
        trlx.train(samples=Untouchable(), config=ours)
    with pytest.raises(UserError, match=f"{name}=2"):
        AccelerateSFTTrainer(ours)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(name, "1")
    AccelerateSFTTrainer(ours)


def test_a_mistake_in_the_configuration_is_found_before_the_samples_are_tokenised(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised first")

    monkeypatch.setattr(AccelerateSFTTrainer, "make_experience", never)
    with pytest.raises(UserError, match=r"model\.delta_kwargs"):
        trlx.train(samples=["a"], config=config(model, tmp_path, model={"delta_kwargs": {"a": 1}}))


# --- logging --------------------------------------------------------------------------------------


def test_the_names_of_logging() -> None:
    assert trlx.logging is logging
    levels = (
        logging.CRITICAL,
        logging.FATAL,
        logging.ERROR,
        logging.WARNING,
        logging.WARN,
        logging.INFO,
    )
    assert levels == (50, 50, 40, 30, 30, 20)
    assert (logging.DEBUG, logging.NOTSET) == (10, 0)
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    assert logging.get_verbosity() == 40
    assert not logging.get_logger("here").isEnabledFor(logging.WARNING)
    logging.set_verbosity(before)
    assert python_logging.getLogger().level != 40 or before == 40


def test_messages_have_ranks_formats_and_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    class Kept(python_logging.Handler):
        def emit(self, record: python_logging.LogRecord) -> None:
            lines.append(self.format(record))

    kept = Kept()
    logging.add_handler(kept)
    logging.disable_default_handler()
    try:
        logger = logging.get_logger(__name__)
        logger.warning("to %s", "all", ranks=[])
        logger.warning("by rank 3", ranks=["3"])
        logger.warning_advice("advice")
        monkeypatch.setenv("TRLX_NO_ADVISORY_WARNINGS", "1")
        logger.warning_advice("no advice")
        logging.enable_explicit_format()
        logger.error("explicit")
        logging.reset_format()
        monkeypatch.setenv("RANK", "3")
        logger.warning("by rank 3", ranks=["3"])
        logger.warning("by the first alone")
    finally:
        logging.remove_handler(kept)
        logging.enable_default_handler()
    assert lines[:2] == ["to all", "advice"]
    assert lines[2].endswith("explicit")
    assert "[ERROR] [test_trlx_names.py:" in lines[2]
    assert "test_messages_have_ranks_formats_and_handlers" in lines[2]
    assert lines[3:] == ["by rank 3"]


@pytest.mark.parametrize(
    ("said", "level"), [("error", 40), ("DEBUG", 10), ("loud", 20), (None, 20)]
)
def test_verbosity_comes_from_the_environment(said: str | None, level: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRLX_VERBOSITY"}
    environment |= {"TRLX_VERBOSITY": said} if said else {}
    # The module alone: the package around it loads torch.
    code = textwrap.dedent(f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("logging_of_trlx", {logging.__file__!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(module.get_verbosity())
    """)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == f"{level}\n", done.stderr
    assert ("TRLX_VERBOSITY: found 'loud'" in done.stderr) == (said == "loud")


def test_the_progress_bar_can_be_disabled(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trlx.train(samples=SAMPLES, config=config(model, tmp_path))
    assert "step     1/3  loss" in capsys.readouterr().err
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        assert list(logging.tqdm(range(3))) == [0, 1, 2]
        assert not logging.is_progress_bar_enabled()
        trlx.train(samples=SAMPLES, config=config(model, tmp_path))
    finally:
        logging.enable_progress_bar()
    said = capsys.readouterr().err
    assert "step     1/3" not in said
    assert "read 6 rows" in said
    AutoTokenizer.from_pretrained(tmp_path / "checkpoint_3" / "hf_model")
