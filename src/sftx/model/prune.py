"""The last decoder layer computes only what a target will read.

Keys and values of its attention are needed of every token. Queries, the output projection and the MLP are not: nothing
after them mixes tokens, and the head reads the rows of targets alone. Each such module acts on every row for itself, so
it is given the rows that count and its result is put back among zeros, which nobody reads. This holds whatever else the
layer does (norms before or after, parallel branches, experts), so no model's layer is written anew; `checks` measures
that it does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

ROW_WISE = ("q_proj", "o_proj", "dense", "mlp")
"""Names, in transformers, of the modules of a layer or of its attention that act on each row for itself."""
WORTH_IT = 0.8
"""Largest share of rows for which taking and putting back costs less than it saves."""


class LastLayer:
    """Hooks on a decoder layer that obey `rows_needed`, a keyword of the model's forward: int64[M], rising, or absent.

    The keyword passes through the model like those of the segments; a call without it computes every row.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.rows: Tensor | None = None
        self.tokens = 0
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.register_forward_hook(self._end, always_call=True)
        for name, module in layer.named_modules():
            if name.count(".") < 2 and name.rpartition(".")[2] in ROW_WISE:
                module.register_forward_pre_hook(self._take)
                module.register_forward_hook(self._put)

    def _begin(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rows = kwargs.get("rows_needed")
        self.tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]

    def _end(self, *_: Any) -> None:
        self.rows = None  # a copy of the model, made to predict its memory, must hold no tensor of a pack

    def _take(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self.rows is None else (args[0].index_select(1, self.rows), *args[1:])

    def _put(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        if self.rows is None:
            return out
        return out.new_zeros(1, self.tokens, out.shape[-1]).index_copy(1, self.rows, out)
