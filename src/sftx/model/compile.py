"""Regional compilation: every decoder layer is compiled on its own, as one graph; the loss and the
rest stay eager.

Layers of one kind share one graph, and lengths are symbols in it, so that packs of any size and
segmentation use the same code: nothing is compiled again on the way, and no pack has to be filled
up to a fixed size. Random numbers are drawn as without compiling; results differ by rounding only.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from sftx.model.checkpointing import decoder_layers
from sftx.model.context_parallel import Context
from sftx.model.pack_loss import CompiledLayer, PackLoss, to_tensors
from sftx.model.runtime import Machine
from sftx.types import Pack, UserError

COMPILER = "inductor"
KEPT = 0.55
"""Share of what layers keep for the backward pass that compiled ones keep on a CPU: 0.35 to 0.73
where measured.
"""
_ASSUMED = {"cuda": (30.0, 0.2, 2.5e14), "cpu": (30.0, 0.1, 2e11)}
"""Seconds to compile, the share of a step that is saved, and the speed without it in FLOP/s. Rough
on purpose: whether a run compiles must not depend on how fast the machine happens to be when it
starts, or is continued.
"""


def planned(
    wish: Literal["auto", "on", "off"], device: torch.device, parameters: int, tokens: float
) -> bool:
    """Whether a run over `tokens` tokens compiles its layers: `auto` = where that saves more time
    than it costs, which is where share * 6 * parameters * tokens / speed > seconds. One process or
    many: the same run compiles or does not.
    """
    seconds, share, speed = _ASSUMED[device.type]
    repays = share * 6 * parameters * tokens / speed > seconds
    return tokens > 0 and (wish == "on" or (wish == "auto" and repays))


def compile_layers(
    loss: PackLoss,
    pack: Pack,
    machine: Machine,
    wish: Literal["auto", "on", "off"],
    context: Context | None = None,
) -> str:
    """Compile the layers and try them, forward and backward, on `pack`; what came of it, in words.
    With a `context`, its ranks share the pack.

    Where a layer does not compile, everything stays as it was; UserError if that was not the wish.
    """
    # These imports take a second: only who compiles waits for them.
    from torch._dynamo import config as dynamo
    from torch._dynamo.exc import TorchDynamoException
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    began = time.perf_counter()
    paths = loss.paths
    # Routers are watched inside a graph too, but not when it is computed again.
    dynamo.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    layers = _layers_without_hooks(loss)
    inductor.fallback_random = True
    # The backward pass computes again whatever needs no product, also where products then wait for
    # it. On a CPU that is as fast, and keeps a third less; on a GPU it was not measured.
    functorch.ban_recompute_materialized_backward = machine.device.type != "cpu"
    # One code object serves all layers of all kinds, in training and evaluation; the default allows
    # 8 graphs of it.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    try:
        if not layers or not loss.paths.isolate or loss.objective.router_aux:
            raise RuntimeError(
                "it takes layers without hooks, segments that are kept apart and no loss.router_aux"
            )
        loss.take(replace(paths, compiled=tuple(map(_compiled, layers))))
        with machine.autocast():
            value = loss(to_tensors(pack, machine.device, context))
        value.backward()
    except (
        TorchDynamoException,
        RuntimeError,
        AssertionError,
    ) as error:  # the last: generated code checks strides
        loss.use_segments(False)  # with layers as they were
        loss.take(paths)
        reason = str(error).strip().split("\n")[0]
        found = f"the layers of {type(loss.model).__name__} do not compile: {reason}"
        if wish == "on":
            raise UserError(f"runtime.compile: {found}") from error
        return f"{found}; they run as they are"
    finally:
        loss.zero_grad(set_to_none=True)
    return f"{len(layers)} layers compiled in {time.perf_counter() - began:.0f} s"


def _layers_without_hooks(loss: PackLoss) -> list[nn.Module]:
    """The layers without hooks inside, but for those that watch routers: what others do is not part
    of a graph. Those on the layer itself, by which `fully_shard` gathers its weights, run around
    the compiled `forward`.
    """
    hooked = {id(m) for m in loss.modules() if m._forward_pre_hooks or m._forward_hooks}
    hooked -= {id(m) for m in loss.routers.modules}
    return [
        m
        for m in decoder_layers(loss.model)
        if not hooked & {id(part) for part in [*m.modules()][1:]}
    ]


def _compiled(layer: nn.Module) -> CompiledLayer:
    """The layer with a compiled `forward` beside its own; nothing is compiled before it is called."""
    own = layer.forward
    compiled = torch.compile(own, backend=COMPILER, fullgraph=True, dynamic=True)
    return CompiledLayer(layer, compiled, own)
