"""Which weights train: by layer count and by name, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from sftx.data.pack import build_pack
from sftx.model.freeze import freeze
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.settings.schema import Config, Model
from sftx.types import UserError


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_last_layers_train_with_norm_and_head() -> None:
    model = tiny.model(num_hidden_layers=3)
    freeze(model, Model(path="m", unfrozen_layers=1))
    assert {name.partition(".layers.")[2][:1] or name for name in trained(model)} == {
        "2",
        "model.norm.weight",
        "lm_head.weight",
    }
    model = tiny.model("GPT2", tie_word_embeddings=True)
    freeze(model, Model(path="m", unfrozen_layers=1))
    assert {name.partition(".h.")[2][:1] or name for name in trained(model)} == {
        "1",
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }
    model = tiny.model()
    freeze(model, Model(path="m", unfrozen_layers=0))
    assert trained(model) == {"model.norm.weight"}


def test_names_choose_what_trains_and_what_does_not() -> None:
    model = tiny.model()
    everything = trained(model)
    freeze(model, Model(path="m", freeze=["model.embed_tokens.*", "*.0.*"]))
    assert trained(model) == {n for n in everything if "embed_tokens" not in n and ".0." not in n}
    model = tiny.model()
    freeze(model, Model(path="m", train_only=["*norm.weight"], freeze=["model.norm.*"]))
    assert trained(model) == {
        n for n in everything if n.endswith("norm.weight") and n != "model.norm.weight"
    }
    tied = tiny.model(tie_word_embeddings=True)
    freeze(tied, Model(path="m", freeze=["lm_head.weight"]))
    assert "model.embed_tokens.weight" not in trained(tied)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unfrozen_layers": 3}, r"found 3, but LlamaForCausalLM has 2 layers"),
        (
            {"freeze": ["modle.*"]},
            r"model\.freeze: 'modle\.\*' matches no parameter .* like model\.embed_tokens\.weight",
        ),
        ({"train_only": ["nothing"]}, r"model\.train_only: 'nothing' matches no parameter"),
        ({"freeze": ["*"]}, "nothing is left to train"),
    ],
)
def test_what_fits_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        freeze(tiny.model(), Model(path="m", **settings))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"path": "m", "freeze": ["a"]}, "adapter": "lora"}, "without an adapter"),
        ({"model": {"path": "m", "unfrozen_layers": 1, "train_only": ["a"]}}, "set one"),
    ],
)
def test_contradictions_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"data": "d", "output": "o", **sections})


def test_a_head_that_trains_alone_takes_part_in_an_empty_pack() -> None:
    model = tiny.model()
    freeze(model, Model(path="m", train_only=["lm_head.*"]))
    loss = PackLoss(model)
    for examples in ([], tiny.examples([9])):
        loss.zero_grad()
        loss(to_tensors(build_pack(examples), torch.device("cpu"))).backward()
        gradient = model.get_output_embeddings().weight.grad
        assert bool(gradient.any()) == bool(examples)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"unfrozen_layers": 1}, "embeddings"),
        ({"freeze": ["model.embed_tokens.*"]}, "embeddings"),
        ({"train_only": ["model.embed_tokens.*"]}, "head"),
    ],
)
def test_new_tokens_whose_rows_would_not_train_are_refused(
    settings: dict[str, Any], what: str
) -> None:
    with pytest.raises(
        UserError, match=rf"model\.add_tokens: the {what} of LlamaForCausalLM would stay frozen"
    ):
        freeze(tiny.model(), Model(path="m", add_special_tokens=["<new>"], **settings))
    freeze(tiny.model(), Model(path="m", add_tokens=["<new>"], freeze=["*.0.*"]))
