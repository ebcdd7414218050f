"""The mutants of `mutants.py`: one wrong line each, as a person would write it, and what should notice it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` stands exactly once in `src/sftx/FILE`, and becomes `new`.

    `tests` are tried in their order, and stop at the first failure: arguments for pytest, or `scorecard NUMBERS`.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str = ""
    """Why a survivor may live."""


LOSS = ("test_loss.py test_objective.py",)
STEP = ("test_step.py test_loss.py", "test_train.py")
PACK = ("test_pack.py",)
BLOCKS = ("test_attention.py",)
ENCODE = ("test_encode.py test_template.py test_cache.py",)
OPTIM = ("test_step.py", "test_train.py -k schedule", "test_train.py -k decay")
RANKS = ("test_shard.py", "test_dist.py")

# fmt: off
MUTANTS = [
    # --- the loss
    Mutant("loss-softcap-slope", "model/loss.py", "grad *= slope\n", "grad *= 1\n", LOSS),
    Mutant("loss-bias-of-last-chunk", "model/loss.py", "d_bias += grad.sum(0)", "d_bias = grad.sum(0)", LOSS),
    Mutant("loss-head-of-last-chunk", "model/loss.py", "first=a == 0)", "first=True)", LOSS),
    Mutant("loss-head-without-divisor", "model/loss.py", "d_head.mul_(grad)\n", "d_head\n", LOSS),
    Mutant("loss-head-of-last-pack", "model/loss.py", "ctx.head.grad.addcmul_(d_head, grad)",
           "ctx.head.grad.copy_(d_head * grad)", LOSS),
    Mutant("loss-bf16-head-of-last-chunk", "model/loss.py", "total += grad.t() @ hidden",
           "total.copy_(grad.t() @ hidden)", LOSS),
    Mutant("loss-total-in-fp32", "model/loss.py", "total = torch.zeros((), dtype=torch.float64",
           "total = torch.zeros((), dtype=torch.float32", LOSS),
    Mutant("loss-z-loss-of-dft", "model/loss.py", "2 * objective.z_loss * weight[s] * lse",
           "2 * objective.z_loss * pull * lse", LOSS),
    Mutant("loss-smoothing-over-rows", "model/loss.py", "eps / z.shape[1]", "eps / z.shape[0]", LOSS),
    Mutant("loss-dft-share-has-gradient", "model/loss.py", "torch.exp(-nll.detach())", "torch.exp(-nll)", LOSS),
    Mutant("loss-weight-ignored", "model/loss.py", "return (losses.double() * weight[s]).sum(), grad",
           "return losses.double().sum(), grad", LOSS),
    Mutant("loss-noise-in-evaluation", "model/load.py", "objective = self.objective if self.training else PLAIN",
           "objective = self.objective", LOSS),
    Mutant("loss-one-by-one-index", "model/load.py", "at, weight = pack.index[mine] - a, pack.weight[mine]",
           "at, weight = pack.index[mine] - a, pack.weight[: len(pack.index[mine])]", LOSS),
    Mutant("loss-noise-by-place", "model/load.py", "example for example in pack.examples or range(len(lengths))]",
           "example for example in range(len(lengths))]", LOSS),
    Mutant("loss-padding-row-trains", "model/accumulate.py", "if ctx.padding is not None:", "if False:", LOSS),
    # --- the step
    Mutant("step-loss-of-last-pack", "training/step.py", "loss += pack_loss.detach() / total_weight",
           "loss = pack_loss.detach() / total_weight", STEP),
    Mutant("step-mean-of-means", "training/step.py", "(pack_loss / total_weight).backward()",
           "(pack_loss / pack.weight.sum().clamp(min=1e-9) / len(packs)).backward()", STEP),
    Mutant("step-no-clipping", "training/step.py", "if max_grad_norm > 0:", "if False:", STEP),
    Mutant("step-clips-each-tensor", "training/step.py",
           "torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)",
           "[torch.nn.utils.clip_grad_norm_([p], max_grad_norm) for p in parameters]", STEP),
    Mutant("step-bad-gradient-applied", "training/step.py", "(torch.isfinite(loss) & torch.isfinite(grad_norm))",
           "torch.isfinite(loss)", STEP),
    Mutant("step-gradients-are-kept", "training/step.py", "    optimizer.zero_grad(set_to_none=True)\n", "", STEP),
    Mutant("step-rate-of-first-group", "training/step.py",
           "for group in optimizer.param_groups:\n        group[\"lr\"]",
           "for group in optimizer.param_groups[:1]:\n        group[\"lr\"]", STEP),
    Mutant("step-loss-of-own-rank", "training/step.py", "loss = dist.add_up(loss)", "loss = loss + 0", RANKS),
    Mutant("step-replicas-exchange-first-pack", "training/step.py", "number == len(packs)", "number == 1",
           (*RANKS, "scorecard 3")),
    # --- the optimiser
    Mutant("optim-warmup-from-zero", "training/optim.py", "return peak * (step + 1) / warmup",
           "return peak * step / warmup", OPTIM),
    Mutant("optim-warmup-within-decay", "training/optim.py", "(step - warmup) / max(1, num_steps - warmup)",
           "step / num_steps", OPTIM),
    Mutant("optim-decays-norms-of-heads", "training/optim.py", " and not _NO_MATRIX.search(name)", "", OPTIM),
    Mutant("optim-decays-embeddings", "training/optim.py", " and id(parameter) not in embeddings", "", OPTIM),
    Mutant("optim-bits-alike-in-every-step", "training/optim.py", "first = self.seed * 0x9E3779B9", "first = 0",
           ("test_weights.py",)),
    Mutant("optim-bad-step-in-bf16", "training/optim.py", "found_inf=self.found_inf", "found_inf=None",
           ("test_weights.py",)),
    # --- the plan
    Mutant("plan-epochs-alike", "data/plan.py", "[self.seed % 2**32, epoch]", "[self.seed % 2**32]", PACK),
    Mutant("plan-seed-ignored", "data/plan.py", "[self.seed % 2**32, epoch]", "[0, epoch]", PACK),
    Mutant("plan-mean-weight", "data/plan.py", "float(self.weights[self.examples(step)].sum())",
           "float(self.weights.sum() / self.num_steps)", PACK),
    Mutant("plan-budget-not-used-up", "data/plan.py", 'side="right"', 'side="left"', PACK),
    Mutant("plan-example-beyond-budget", "data/plan.py", "min(max(start + 1, int(", "min(max(start, int(", PACK),
    Mutant("plan-epoch-before-step", "data/plan.py", "self._starts[step + 1] / len(self.lengths)",
           "self._starts[step] / len(self.lengths)", PACK),
    Mutant("plan-epochs-cut-off", "data/plan.py", "round(batch.epochs * count)", "int(batch.epochs * count)", PACK),
    Mutant("plan-fingerprint-without-weights", "data/plan.py", "(self.lengths, self.weights, self._starts)",
           "(self.lengths, self._starts)", PACK),
    Mutant("plan-fingerprint-without-lengths", "data/plan.py", "(self.lengths, self.weights, self._starts)",
           "(self.weights, self._starts)", PACK),
    Mutant("plan-fingerprint-without-shuffle", "data/plan.py", '{self.seed} {self.batch.shuffle}', '{self.seed}', PACK),
    Mutant("plan-stream-cut-at-epochs", "data/plan.py", "self._order(e)[max(start - e * count, 0) : stop - e * count]",
           "self._order(e)[(start - e * count) % count : stop - e * count]", PACK),
    # --- packs
    Mutant("pack-target-across-segments", "data/pack.py", "weights[cu_seqlens[:-1]] = 0.0", "weights[0] = 0.0", PACK),
    Mutant("pack-never-full", "data/pack.py", "full + sizes[i] <= capacity", "full + sizes[i] < capacity", PACK),
    Mutant("pack-unequal-ranks", "data/pack.py", "if len(ranks[r]) < each]", "if True]", PACK),
    Mutant("pack-examples-forgotten", "data/pack.py", "examples=indices,", "examples=(),", LOSS),
    Mutant("pack-order-by-bin", "data/pack.py", "rank = min(open_ranks, key=lambda r: (total[r], r))",
           "rank = open_ranks[0]", PACK),
    # --- attention
    Mutant("attention-window-too-wide", "model/blocks.py", "hidden.tril(rows.start - seen.start - window)",
           "hidden.tril(rows.start - seen.start - window - 1)", BLOCKS),
    Mutant("attention-window-too-narrow", "model/blocks.py", "slice(max(0, a - window + 1) if window else 0, b)",
           "slice(max(0, a - window + 2) if window else 0, b)", BLOCKS),
    Mutant("attention-sees-next", "model/blocks.py", "hidden[:, -count:].triu(1)", "hidden[:, -count:].triu(2)",
           BLOCKS),
    Mutant("attention-softcap-slope", "model/blocks.py", "d_z if slope is None else d_z * slope", "d_z", BLOCKS),
    Mutant("attention-dropout-without-window", "model/blocks.py", ".tril().triu(1 - (window or b - a))", ".tril()",
           BLOCKS),
    Mutant("attention-dropout-without-scale", "model/blocks.py", "seen, dropout, scale=scale)", "seen, dropout)",
           BLOCKS),
    Mutant("attention-heads-in-turn", "model/attention.py", "states.repeat_interleave(groups, dim=1)",
           "states.repeat(1, groups, 1, 1)", BLOCKS),
    Mutant("attention-flash-without-sinks", "model/attention.py", "not softcap and s_aux is None and",
           "not softcap and", BLOCKS),
    Mutant("attention-gradient-of-keys-set", "model/blocks.py", "d_k[:, seen] += torch.bmm(d_z.mT, block)",
           "d_k[:, seen] = torch.bmm(d_z.mT, block)", BLOCKS),
    # --- the cache and its key
    Mutant("key-without-form", "data/encode.py", "{VERSION} {digest} {form} {fingerprint}",
           "{VERSION} {digest} {fingerprint}", ENCODE),
    Mutant("key-without-digest", "data/encode.py", "{VERSION} {digest} {form} {fingerprint}",
           "{VERSION} {form} {fingerprint}", ENCODE),
    Mutant("key-without-encoder", "data/encode.py", "{VERSION} {digest} {form} {fingerprint}",
           "{VERSION} {digest} {form}", ENCODE),
    Mutant("key-without-version", "data/encode.py", "{VERSION} {digest} {form} {fingerprint}",
           "{digest} {form} {fingerprint}", ENCODE),
    Mutant("key-without-length", "data/render.py", '            "max_length": self.max_length,\n', "", ENCODE),
    Mutant("key-without-tokenizer", "data/render.py", '            "tokenizer": self.tokenizer.fingerprint,\n', "",
           ENCODE),
    Mutant("key-without-template", "data/render.py",
           '"template": {name: template.source for name, template in self._templates.items()},',
           '"template": self.data.template,', ENCODE),
    Mutant("key-without-special-tokens", "data/render.py", '"forced_opening", "special_tokens")', '"forced_opening")',
           ENCODE),
    Mutant("key-of-table-without-format", "data/sources.py", "{convert.VERSION} {data.format} {data.on_bad_row}",
           "{convert.VERSION} {data.on_bad_row}", ENCODE),
    Mutant("key-of-table-without-bad-rows", "data/sources.py", "{convert.VERSION} {data.format} {data.on_bad_row}",
           "{convert.VERSION} {data.format}", ENCODE),
    Mutant("key-of-table-without-content", "data/sources.py", '{kind_of(file)} {file.suffix} ".encode() + content',
           '{kind_of(file)} {file.suffix} ".encode() + str(file).encode()', ENCODE),
    Mutant("cache-digest-not-compared", "data/cache.py", "!= int(self.digest[index])", "== -1", ENCODE),
    Mutant("cache-digest-of-ids-alone", "data/cache.py",
           "    content.update(weights.data if len(weights) else b\"\")\n", "", ENCODE),
    Mutant("cache-block-not-synced", "data/cache.py", "                os.fsync(file.fileno())\n", "", ENCODE),
    Mutant("cache-written-in-place", "data/cache.py", "os.replace(temporary, path)", "path.write_bytes(content)",
           ENCODE),
    # --- ranks
    Mutant("ranks-gradients-averaged", "model/shard.py",
           "            module.set_gradient_divide_factor(1.0)\n"
           "            module.set_force_sum_reduction_for_comms(True)\n", "            pass\n", RANKS),
    Mutant("ranks-own-part-from-zero", "model/shard.py",
           "offset[0] * (tensor.numel() // max(len(tensor), 1)) if offset else 0", "0", (*RANKS, "test_weights.py")),
    Mutant("ranks-hsdp-mesh-turned", "model/shard.py", "(size // shards, shards)", "(shards, size // shards)", RANKS),
    Mutant("ranks-group-waits-half-an-hour", "model/shard.py",
           "        torch_dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)\n", "        pass\n",
           RANKS),
    Mutant("ranks-reduced-in-bf16", "model/shard.py", "        reduce_dtype=torch.float32,\n        cast",
           "        cast", RANKS),
    Mutant("ranks-replicas-not-compared", "model/shard.py",
           "if found != next(other for shard, other in held if shard == place):", "if False:",
           (*RANKS, "scorecard 16")),
    Mutant("ranks-signal-of-all", "dist.py", "torch_dist.ReduceOp.MAX", "torch_dist.ReduceOp.MIN",
           (*RANKS, "scorecard 15")),
    Mutant("ranks-main-not-asked", "dist.py", "    return holder[0]\n", "    return value\n", RANKS),
    Mutant("ranks-not-told-of-launcher", "dist.py", "prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)", "prctl(1, 0)",
           (*RANKS, "scorecard 18")),
    Mutant("ranks-without-launcher", "dist.py", "(rank() or world_size() > 1)", "(rank() > 99)", RANKS),
    Mutant("ranks-hang-for-ever", "dist.py",
           "        faulthandler.dump_traceback_later(self.timeout + GRACE, exit=True)\n", "",
           (*RANKS, "scorecard 17")),
    Mutant("ranks-barrier-missing", "dist.py", "        torch_dist.all_reduce(torch.zeros(()), group=_saving if saving",
           "        return\n        torch_dist.all_reduce(torch.zeros(()), group=_saving if saving", RANKS),
    # --- evaluation
    Mutant("eval-mean-of-sources", "eval/loss.py", "loss = sum(sums) / sum(weights)",
           "loss = sum(s / w for s, w in zip(sums, weights)) / len(sums)", ("test_eval.py",)),
    Mutant("eval-own-rank", "eval/loss.py", "sums = dist.add_up(totals).tolist()", "sums = totals.tolist()", RANKS),
    Mutant("eval-with-dropout", "eval/loss.py", "with evaluating(model), torch.no_grad():", "with torch.no_grad():",
           ("test_eval.py",)),
]
# fmt: on
