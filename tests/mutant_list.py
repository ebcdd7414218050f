"""The mutants of `mutants.py`: one wrong line each, as a person would write it, and what should
notice it.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` stands exactly once in `src/sftx/FILE`, and becomes `new`.

    `tests` are tried in their order, and stop at the first failure: arguments for pytest, or
    `scorecard NUMBERS`.
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
SHARED = ("test_prefix_attention.py", "test_sharing.py")
ENCODE = ("test_encode.py test_template.py test_cache.py",)
OPTIM = ("test_step.py", "test_train.py -k schedule", "test_train.py -k decay")
SAVED = ("test_saved_state.py",)
CONTINUED = ("test_train.py -k killed",)
RANDOM = ("test_randomness.py",)
LOOP = ("test_step.py -k recorded",)
CRASH = ("test_crash.py", "test_run_folder.py -k record")
OWNER = ("test_owner.py",)
LENGTHS = (
    "test_isolation.py -k 'probe or place or leak'",
    "test_isolation.py -k one_at_a_time",
    "test_loss.py",
)
BOX = ("test_box.py", "test_template.py -k limits")
WEIGHTS = ("test_turn_weights.py",)
CHAT = ("test_template.py test_chat.py", "test_small_templates.py", "test_encode.py")
ANSWERS = ("test_questions.py",)
RANKS = ("test_shard.py", "test_dist.py")

# fmt: off
MUTANTS = [
    # --- the loss
    Mutant("loss-softcap-slope", "model/loss.py", "grad *= slope\n", "grad *= 1\n", LOSS),
    Mutant("loss-bias-of-last-chunk", "model/loss.py", "d_bias += grad.sum(0)", "d_bias = grad.sum(0)", LOSS),
    Mutant("loss-head-of-last-chunk", "model/loss.py", "first=a == 0)", "first=True)", LOSS),
    Mutant("loss-gradient-without-divisor", "model/loss.py",
           "d.mul_(grad) for d in gradients", "d for d in gradients", LOSS),
    Mutant("loss-bf16-head-of-last-chunk", "model/loss.py", "total += grad.t() @ hidden",
           "total.copy_(grad.t() @ hidden)", LOSS),
    Mutant("loss-total-in-fp32", "model/loss.py", "total = torch.zeros((), dtype=torch.float64",
           "total = torch.zeros((), dtype=torch.float32", LOSS),
    Mutant("loss-z-loss-of-dft", "model/loss.py", "2 * objective.z_loss * weight[s] * lse",
           "2 * objective.z_loss * pull * lse", LOSS),
    Mutant("loss-smoothing-over-rows", "model/loss.py", "eps / z.shape[1]", "eps / z.shape[0]", LOSS),
    Mutant("loss-dft-share-has-gradient", "model/loss.py", "torch.exp(-nll.detach())", "torch.exp(-nll)", LOSS),
    Mutant("loss-weight-ignored", "model/loss.py", "return (losses.double() * weight[s]).sum(), "
                                                   "grad",
           "return losses.double().sum(), grad", LOSS),
    Mutant("loss-noise-in-evaluation", "model/pack_loss.py", "objective = self.objective if "
                                                        "self.training else PLAIN",
           "objective = self.objective", LOSS),
    Mutant("loss-one-by-one-index", "model/pack_loss.py", "label, weight = pack.label[mine], pack.weight[mine]",
           "label, weight = pack.label[mine], pack.weight[: len(at)]", LOSS),
    Mutant("loss-noise-by-place", "model/pack_loss.py", "numbers = pack.examples or range(len(lengths))",
           "numbers = range(len(lengths))", LOSS),
    # --- the step
    Mutant("step-loss-of-last-pack", "training/step.py", "loss += pack_loss.detach() / "
                                                         "total_weight",
           "loss = pack_loss.detach() / total_weight", STEP),
    Mutant("step-mean-of-means", "training/step.py", "(pack_loss / total_weight).backward()",
           "(pack_loss / pack.weight.sum().clamp(min=1e-9) / len(packs)).backward()", STEP),
    Mutant("step-no-clipping", "training/step.py", "if max_grad_norm > 0:", "if False:", STEP),
    Mutant("step-clips-each-tensor", "training/step.py",
           "torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)",
           "[torch.nn.utils.clip_grad_norm_([p], max_grad_norm) for p in parameters]", STEP),
    Mutant("step-bad-gradient-applied", "training/step.py", "(torch.isfinite(loss) & "
                                                            "torch.isfinite(grad_norm))",
           "torch.isfinite(loss)", STEP),
    Mutant("step-gradients-are-kept", "training/step.py", "    optimizer.zero_grad(set_to_none=True)\n", "", STEP),
    Mutant("step-rate-of-first-group", "training/step.py",
           "for group in optimizer.param_groups:\n        group[\"lr\"]",
           "for group in optimizer.param_groups[:1]:\n        group[\"lr\"]", STEP),
    Mutant("step-loss-of-own-rank", "training/step.py",
           "distributed.all_reduce_sum(torch.stack([loss.double(), tally.correct]))",
           "torch.stack([loss.double(), tally.correct])", RANKS),
    Mutant("loss-accuracy-of-last-pack", "model/pack_loss.py", "self.correct += correct",
           "self.correct = correct", ("test_accuracy.py",)),
    Mutant("loss-accuracy-without-weights", "model/loss.py", "(chosen * weight.double()).sum()",
           "chosen.double().sum()", ("test_accuracy.py",)),

    Mutant("step-replicas-exchange-first-pack", "training/step.py", "number == len(packs)", "number == 1",
           (*RANKS, "scorecard 3")),
    # --- the optimiser
    Mutant("optim-warmup-from-zero", "training/optim.py", "return peak * (step + 1) / warmup",
           "return peak * step / warmup", OPTIM),
    Mutant("optim-warmup-within-decay", "training/optim.py", "(step - warmup) / max(1, num_steps "
                                                             "- warmup)",
           "step / num_steps", OPTIM),
    Mutant("optim-decays-norms-of-heads", "training/optim.py", " and not _NO_MATRIX.search(name)", "", OPTIM),
    Mutant("optim-decays-embeddings", "training/optim.py", " and id(parameter) not in "
                                                           "embeddings", "", OPTIM),
    Mutant("optim-bits-alike-in-every-step", "training/optim.py", "first = self.seed * "
                                                                  "0x9E3779B9", "first = 0",
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
    Mutant("plan-epoch-before-step", "data/plan.py", "position = int(self._starts[step + 1])",
           "position = int(self._starts[step])", PACK),
    Mutant("plan-epochs-cut-off", "data/plan.py", "max(1, round(epochs * len(self.lengths)))",
           "max(1, int(epochs * len(self.lengths)))", PACK),
    Mutant("plan-fingerprint-without-weights", "data/plan.py", "(self.lengths, self.weights, "
                                                               "self._starts)",
           "(self.lengths, self._starts)", PACK),
    Mutant("plan-fingerprint-without-lengths", "data/plan.py", "(self.lengths, self.weights, "
                                                               "self._starts)",
           "(self.weights, self._starts)", PACK),
    Mutant("plan-fingerprint-without-shuffle", "data/plan.py",
           '{self.seed} {self.batch.shuffle}', '{self.seed}', PACK),
    Mutant("plan-stream-cut-at-epochs", "data/plan.py",
           "self._order(e)[max(start - self._begin(e), 0) : stop - self._begin(e)]",
           "self._order(e)[max(start - self._begin(e), 0) :]", PACK),
    Mutant("plan-share-never-changes", "data/plan.py", "rotation.members(epoch)", "rotation.members(0)",
           ("test_ledger.py", "test_pack.py")),
    Mutant("plan-shown-counts-all", "data/plan.py", "[: end - self._begin(epoch)]] = True", "] = True",
           ("test_ledger.py", "test_pack.py")),
    # --- packs
    Mutant("pack-target-across-segments", "types.py", "            weights[0] = 0\n", "", PACK),
    Mutant("pack-never-full", "data/pack.py", "full + sizes[i] <= capacity", "full + sizes[i] < capacity", PACK),
    Mutant("pack-unequal-ranks", "data/pack.py", "if len(ranks[r]) < each]", "if True]", PACK),
    Mutant("pack-examples-forgotten", "data/pack.py", "examples=indices,", "examples=(),", LOSS),
    Mutant("pack-order-by-bin", "data/pack.py", "rank = min(open_ranks, key=lambda r: (total[r], "
                                                "r))",
           "rank = open_ranks[0]", PACK),
    # --- attention
    Mutant("attention-window-too-wide", "model/cpu_attention.py", "hidden.tril(rows.start - "
                                                                  "seen.start - window)",
           "hidden.tril(rows.start - seen.start - window - 1)", BLOCKS),
    Mutant("attention-window-too-narrow", "model/cpu_attention.py", "slice(max(0, a - window + 1) "
                                                                    "if window else 0, b)",
           "slice(max(0, a - window + 2) if window else 0, b)", BLOCKS),
    Mutant("attention-sees-next", "model/cpu_attention.py",
           "hidden[:, -count:].triu(1)", "hidden[:, -count:].triu(2)",
           BLOCKS),
    Mutant("attention-softcap-slope", "model/cpu_attention.py", "d_z if slope is None else d_z * "
                                                                "slope", "d_z", BLOCKS),
    Mutant("attention-dropout-without-window", "model/cpu_attention.py", ".triu(1 - (window or b - a))", "",
           BLOCKS),
    Mutant("attention-dropout-without-scale", "model/cpu_attention.py",
           "seen, dropout, scale=scale)", "seen, dropout)",
           BLOCKS),
    Mutant("attention-heads-in-turn", "model/attention.py", "states.repeat_interleave(groups, "
                                                            "dim=1)",
           "states.repeat(1, groups, 1, 1)", BLOCKS),
    Mutant("attention-flash-without-sinks", "model/attention.py", "not softcap and s_aux is None "
                                                                  "and",
           "not softcap and", BLOCKS),
    Mutant("attention-gradient-of-keys-set", "model/cpu_attention.py", "d_k[:, seen] += torch.bmm(d_z.mT, block)",
           "d_k[:, seen] = torch.bmm(d_z.mT, block)", BLOCKS),
    Mutant("sharing-parts-not-weighed", "model/prefix_attention.py", ".mul_(kept).addcmul_(more, added)",
           ".add_(more)", SHARED),
    Mutant("sharing-lse-not-kept", "model/prefix_attention.py", "            lse.index_copy_(0, part.queries, new)\n",
           "", SHARED),
    Mutant("sharing-keys-of-last-part", "model/prefix_attention.py", "total.index_add_(0, rows, more",
           "total.index_copy_(0, rows, more", SHARED),
    Mutant("sharing-window-too-wide", "model/prefix_attention.py", "hidden |= distance >= window",
           "hidden |= distance > window", SHARED),
    Mutant("sharing-sinks-without-share", "model/prefix_attention.py",
           "            out *= (old - lse).exp().to(out.dtype)[..., None]\n", "", SHARED),
    Mutant("sharing-first-depth-alone", "model/prefix_index.py",
           "range(max(map(len, ancestors), default=0))", "range(1)", SHARED),
    Mutant("sharing-check-of-roots", "model/checks/sharing.py", "shared = tree_pack(*chosen, parents)",
           "shared = tree_pack(whole, own, [-1] * len(order))", SHARED),
    Mutant("sharing-check-without-gradients", "model/checks/sharing.py",
           "for a, b in zip(gradients, others, strict=True)", "for a, b in ()", SHARED),
    # --- the cache and its key
    Mutant("key-without-form", "data/dataset.py", "{VERSION} {digest} {form} {fingerprint}",
           "{VERSION} {digest} {fingerprint}", ENCODE),
    Mutant("key-without-digest", "data/dataset.py", "{VERSION} {digest} {form} {fingerprint}",
           "{VERSION} {form} {fingerprint}", ENCODE),
    Mutant("key-without-encoder", "data/dataset.py", "{VERSION} {digest} {form} {fingerprint}",
           "{VERSION} {digest} {form}", ENCODE),
    Mutant("key-without-version", "data/dataset.py", "{VERSION} {digest} {form} {fingerprint}",
           "{digest} {form} {fingerprint}", ENCODE),
    Mutant("key-without-length", "data/encoder.py", '            "max_length": '
                                                    'self.max_length,\n', "", ENCODE),
    Mutant("key-without-tokenizer", "data/encoder.py", '            "tokenizer": '
                                                       'self.tokenizer.fingerprint,\n', "",
           ENCODE),
    Mutant("key-without-template", "data/encoder.py",
           '"template": {name: template.source for name, template in self._templates.items()},',
           '"template": self.data.template,', ENCODE),
    Mutant("key-without-special-tokens", "data/encoder.py",
           '"special_tokens", "lost_reasoning")', '"lost_reasoning")',
           ("test_template.py -k fingerprint",)),
    Mutant("key-without-lost-reasoning", "data/encoder.py",
           '"special_tokens", "lost_reasoning")', '"special_tokens")',
           ("test_template.py -k fingerprint", *ENCODE)),
    Mutant("key-of-table-without-format", "data/sources/tables.py",
           "{to_jsonl.VERSION} {data.format} {data.on_bad_row}",
           "{to_jsonl.VERSION} {data.on_bad_row}", ENCODE),
    Mutant("key-of-table-without-bad-rows", "data/sources/tables.py",
           "{to_jsonl.VERSION} {data.format} {data.on_bad_row}",
           "{to_jsonl.VERSION} {data.format}", ENCODE,
           "equal: with `stop`, a bad row is refused when its format is detected or when it is "
           "encoded"),
    Mutant("key-of-table-without-content", "data/sources/tables.py",
           '{kind_of(file)} {file.suffix} ".encode() + content',
           '{kind_of(file)} {file.suffix} ".encode() + str(file).encode()', ENCODE),
    Mutant("cache-digest-not-compared", "data/store/block.py", '!= int(entry["digest"])', "== -1", ENCODE),
    Mutant("cache-digest-of-ids-alone", "data/store/block.py",
           "    content.update(weights.data if len(weights) else b\"\")\n", "", ENCODE),
    Mutant("cache-block-not-synced", "data/store/cache.py",
           "                os.fsync(file.fileno())\n", "", ENCODE),
    Mutant("cache-written-in-place", "data/store/cache.py",
           "os.replace(temporary, path)", "path.write_bytes(content)",
           ENCODE),
    # --- ranks
    Mutant("ranks-gradients-averaged", "model/shard.py",
           "            module.set_gradient_divide_factor(1.0)\n"
           "            module.set_force_sum_reduction_for_comms(True)\n", "            pass\n", RANKS),
    Mutant("ranks-own-part-from-zero", "model/shard.py",
           "offset[0] * (tensor.numel() // max(len(tensor), 1)) if offset else 0", "0", (*RANKS, "test_weights.py")),
    Mutant("ranks-hsdp-mesh-turned", "model/shard.py",
           "(size // shards, shards)", "(shards, size // shards)", RANKS),
    Mutant("ranks-group-waits-half-an-hour", "model/shard.py",
           "        torch_dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), "
           "group)\n", "        pass\n",
           RANKS),
    Mutant("ranks-reduced-in-bf16", "model/shard.py", "        reduce_dtype=torch.float32,\n      "
                                                      "  cast",
           "        cast", RANKS),
    Mutant("ranks-replicas-not-compared", "model/shard.py",
           "if found != next(other for shard, other in gathered if shard == place):", "if False:",
           (*RANKS, "scorecard 16")),
    Mutant("ranks-signal-of-all", "distributed.py", "torch_dist.ReduceOp.MAX", "torch_dist.ReduceOp.MIN",
           (*RANKS, "scorecard 15")),
    Mutant("ranks-main-not-asked", "distributed.py", "    return holder[0]\n", "    return value\n", RANKS),
    Mutant("ranks-not-told-of-launcher", "distributed.py",
           "prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)", "prctl(1, 0)",
           ("scorecard 18",)),
    Mutant("ranks-without-launcher", "distributed.py", "(rank() or world_size() > 1)", "(rank() > 99)",
           ("test_dist.py -k nobody_started",)),
    Mutant("ranks-hang-for-ever", "distributed.py",
           "        faulthandler.dump_traceback_later(self.timeout + GRACE, exit=True)\n", "",
           (*RANKS, "scorecard 17")),
    Mutant("ranks-barrier-missing", "distributed.py", "        torch_dist.all_reduce(torch.zeros(()), "
                                               "group=_saving if saving",
           "        return\n        torch_dist.all_reduce(torch.zeros(()), group=_saving if "
           "saving", RANKS),
    # --- evaluation
    Mutant("answers-beyond-the-stop", "eval/generate.py", "return ids[: at + 1]", "return ids", ("test_generate.py",)),
    Mutant("answers-as-in-training", "eval/judge.py", "self.loss.use_segments(True)", "pass", ANSWERS),
    Mutant("samples-not-cut", "report/record.py", "self._cut_samples(step + 1 if step else 0)", "pass", ANSWERS),
    Mutant("last-model-for-the-best", "training/finish.py",
           'checkpoint.load_weights(job.checkpoints / f"step-{best:08d}", job.loss)', "pass", ANSWERS),
    Mutant("best-is-not-saved", "training/loop.py", "needed = needed or job.is_best", "pass", ANSWERS),
    Mutant("base-with-its-adapter", "eval/judge.py", "with self.adapted.disable_adapter():", "if True:",
           ANSWERS),
    Mutant("kl-the-other-way", "eval/forgetting.py", "log_p.exp() * (log_p - log_q)", "log_q.exp() * (log_q - log_p)",
           ("test_forgetting.py",)),
    Mutant("eval-mean-of-sources", "eval/loss.py", "loss = sum(sums) / sum(weights)",
           "loss = sum(s / w for s, w in zip(sums, weights)) / len(sums)", ("test_eval.py",)),
    Mutant("eval-own-rank", "eval/loss.py",
           "distributed.all_reduce_sum(both).tolist()", "both.tolist()", RANKS),
    Mutant("eval-accuracy-over-rows", "eval/loss.py", "sum(correct) / sum(weights)",
           "sum(correct) / len(corpus)", ("test_accuracy.py",)),
    Mutant("eval-with-dropout", "eval/loss.py", "with evaluating(model), torch.no_grad():", "with torch.no_grad():",
           ("test_eval.py",)),
    # --- checkpoints
    Mutant("checkpoint-moments-not-loaded", "training/checkpoint.py",
           "in _moments(model, optimizer).items() if name in facts", "in ()", SAVED),
    Mutant("checkpoint-step-of-adamw-lost", "training/checkpoint.py",
           "for kind, moment in optimizer.state.get(parameter, {}).items()\n",
           "for kind, moment in optimizer.state.get(parameter, {}).items()\n        if kind != "
           "'step'\n", SAVED),
    Mutant("checkpoint-keeps-one-fewer", "training/checkpoint.py", "*sound[:keep]", "*sound[: keep - 1]", SAVED),
    Mutant("checkpoint-keeps-worst", "training/checkpoint.py", "sorted(judged)[:1]", "sorted(judged)[-1:]", SAVED),
    Mutant("checkpoint-oldest-first", "training/checkpoint.py", "sorted(folder.glob(_NAME), "
                                                                "reverse=True)",
           "sorted(folder.glob(_NAME))", SAVED),
    Mutant("checkpoint-not-copied", "training/checkpoint.py", 'to("cpu", copy=copied)', 'to("cpu")', SAVED),
    Mutant("checkpoint-sums-not-read", "training/checkpoint.py", "if not same or (read and",
           "if not same or (False and",
           (*SAVED, "test_train.py -k damaged")),
    Mutant("checkpoint-state-not-required", "training/checkpoint.py", 'sorted({"state.json", '
                                                                      '*sums})', "sorted(sums)",
           (*SAVED, "test_train.py -k 'damaged or killed'", "scorecard 12")),
    Mutant("checkpoint-replicas-not-compared", "training/checkpoint.py", '    check_replicas(tensors["weights"])\n', "",
           SAVED),
    # --- what a continued run must have in common
    Mutant("resume-without-seed", "training/run_identity.py", '"adapter", "seed"}', '"adapter"}', SAVED),
    Mutant("resume-without-loss", "training/run_identity.py",
           '"optim", "loss", "adapter"', '"optim", "adapter"', SAVED),
    Mutant("resume-without-adapter", "training/run_identity.py",
           '"loss", "adapter", "seed"', '"loss", "seed"', SAVED),
    Mutant("resume-without-length", "training/run_identity.py", ', "max_length": max_length}', "}", SAVED),
    Mutant("resume-without-precision", "training/run_identity.py",
           '    facts["runtime"] = {"precision": name_of(precision)}  # what `auto` meant '
           'here\n', "", SAVED),
    Mutant("resume-without-data", "training/run_identity.py", '"fingerprint": fingerprint, ', "", SAVED),
    Mutant("resume-one-step-late", "training/run_identity.py", "replace(state, plan=now.plan,",
           "replace(state, step=state.step + 1, plan=now.plan,", CONTINUED),
    Mutant("resume-counts-anew", "training/run_identity.py", "replace(state, plan=now.plan,",
           "replace(state, total_targets=0, plan=now.plan,", CONTINUED),
    # --- the loop
    Mutant("loop-dropout-alike-in-every-step", "training/loop.py",
           "job.loss.noise_seed = (job.config.seed * 1_000_003 + step) % 2**63",
           "job.loss.noise_seed = (job.config.seed * 1_000_003) % 2**63", RANDOM),
    Mutant("loop-dropout-alike-with-every-seed", "training/loop.py",
           "job.loss.noise_seed = (job.config.seed * 1_000_003 + step) % 2**63", "job.loss.noise_seed = step", RANDOM),
    Mutant("loop-dropout-alike-on-every-rank", "training/loop.py",
           "(job.loss.noise_seed + (distributed.rank() << 40)) % 2**63", "job.loss.noise_seed", RANDOM),
    Mutant("loop-rate-of-next-step", "training/loop.py", "job.learning_rate(step)",
           "job.learning_rate(step + 1)", LOOP),
    Mutant("loop-rounding-alike-in-every-step", "training/loop.py", "job.optimizer.seed = "
                                                                    "job.loss.noise_seed",
           "job.optimizer.seed = 0", RANDOM),
    Mutant("loop-saves-every-other", "training/loop.py", "return every > 0 and done % every == 0",
           "return every > 0 and done % every == 1", CONTINUED),
    Mutant("loop-packs-of-rank-0", "training/job.py", "ranks[distributed.rank()]", "ranks[0]", RANKS),
    Mutant("loop-stop-is-not-saved", "training/loop.py", "_save_due(job, record.step) or stopping",
           "_save_due(job, record.step)", ("test_train.py -k whenever_a_signal",)),
    Mutant("loop-bad-steps-for-ever", "training/metrics.py", "state.bad_steps + 1 if bad else 0", "0",
           ("test_train.py -k finite",)),
    Mutant("loop-bad-steps-never-forgiven", "training/metrics.py", "state.bad_steps + 1 if bad else 0",
           "state.bad_steps + bad", ("test_train.py -k bad_steps", "test_run_folder.py -k "
                                                                 "bad_steps")),
    # --- files and folders after a crash
    Mutant("files-never-synced", "files.py", "        os.fsync(descriptor)\n", "        pass\n", CRASH),
    Mutant("files-checkpoint-folder-not-synced", "training/checkpoint.py", "    sync(final.parent)\n", "", CRASH),
    Mutant("files-checkpoint-not-synced", "training/checkpoint.py", "        sync(path)\n    "
                                                                    "(temporary", 
           "    (temporary", CRASH),
    Mutant("files-manifest-not-synced", "training/checkpoint.py", "    sync(temporary / "
                                                                  "MANIFEST)\n", "", CRASH),
    Mutant("files-run-json-not-synced", "files.py", "        sync(temporary)\n", "", CRASH),
    Mutant("files-records-not-carried", "training/run_identity.py",
           "found.carried = checkpoint.records(folder, state.step)", "found.carried = {}", CRASH),
    Mutant("files-model-not-synced", "model/save.py", "            sync(path)\n", "", CRASH),
    Mutant("files-model-folder-not-synced", "model/save.py",
           "            sync(final.parent)\n", "", CRASH),
    Mutant("files-export-not-synced", "training/export.py",
           "        sync(target.parent)\n", "", CRASH),
    Mutant("links-out-of-a-run-followed", "report/lock.py",
           "    _refuse_links_out(folder)\n", "", ("test_links.py",)),
    Mutant("links-out-of-a-model-followed", "model_config.py",
           "if not inside and not any(", "if False and not any(", ("test_links.py",)),
    Mutant("links-of-other-models-refused", "model_config.py",
           "if not inside and not any(target.parent.glob(\"*.safetensors\")):",
           "if not inside:", ("test_links.py",)),
    Mutant("links-of-the-hub-refused", "model_config.py",
           "    root = root.parents[1] if root.parent.name == \"snapshots\" else root\n", "",
           ("test_links.py",)),
    Mutant("lock-not-taken", "report/lock.py", "        lock.acquire()\n", "        pass\n", OWNER),
    Mutant("lock-of-the-dead-holds", "report/lock.py",
           "        if renewed != before:\n", "        if now:\n", OWNER),
    Mutant("lock-elsewhere-not-waited-for", "report/lock.py", "    until = time.monotonic() + "
                                                              "PATIENCE\n",
           "    until = time.monotonic()\n", OWNER),
    Mutant("lock-not-renewed", "report/lock.py", "            os.utime(path)\n", "            pass\n", OWNER),
    # --- the checks before a run
    Mutant("checks-nothing-tried-long", "model/checks/start.py", "measure_isolation(loss.model, "
                                                                 "longest,",
           "measure_isolation(loss.model, min(longest, 32),", LENGTHS),
    Mutant("checks-gradients-not-compared", "model/checks/isolation.py", "<= EQUAL\n\n\ndef _sum",
           "<= 9\n\n\ndef _sum", LENGTHS),
    Mutant("checks-one-order-only", "model/checks/isolation.py", "for numbers in (order, "
                                                                 "order[::-1]):",
           "for numbers in (order,):", LENGTHS,
           "a second look: of no model is it known that one order of segments leaks and the other "
           "does not"),
    Mutant("checks-packed-once", "model/checks/probe.py",
           "        order += range(len(lengths))\n", "        break\n",
           LENGTHS),
    Mutant("checks-segments-up-to-the-reach", "model/checks/probe.py", "max(SHORT, inside + "
                                                                       "inside // 4)",
           "max(SHORT, inside)", LENGTHS),
    Mutant("checks-products-of-lengths-forgotten", "model/checks/probe.py", "max((*found, *products), default=0)",
           "max(found, default=0)", LENGTHS),
    Mutant("checks-state-not-put-back", "model/checks/isolation.py", "        return names\n    "
                                                                     "raise",
           "        return frozenset()\n    raise", LENGTHS),
    Mutant("checks-loss-of-probe-not-compared", "model/checks/start.py", "if abs(fused - own) > "
                                                                         "tolerance * abs(own):",
           "if False:", LENGTHS),
    Mutant("checks-vocabulary-off-by-one", "model/checks/start.py",
           "if largest_id >= rows:", "if largest_id > rows:",
           ("test_loss.py -k embedding", "test_train.py -k mistake")),
    # --- the chat engine: what is a target, and what stands before it
    Mutant("chat-stop-token-not-trained", "data/chat/answer.py",
           "output[: at + len(ending.stop)], True", "output[:at], True", CHAT),
    Mutant("chat-space-after-the-stop-trained", "data/chat/answer.py",
           "output[: at + len(ending.stop)], True", "output, True", CHAT),
    Mutant("chat-cut-at-the-first-stop", "data/chat/answer.py",
           "at = output.find(ending.stop, spoken)", "at = output.find(ending.stop)", CHAT),
    Mutant("chat-space-after-another-stop-trained", "data/chat/answer.py",
           "Turn(prompt, output[: last.end()], True", "Turn(prompt, output, True", CHAT),
    Mutant("chat-late-stop-forgotten", "data/chat/answer.py",
           "output.removesuffix(ending.written) + unwritten",
           "output.removesuffix(ending.written)", CHAT),
    Mutant("chat-late-stop-of-calls-forgotten", "data/chat/answer.py",
           'unwritten = self._traits.unwritten_after_call',
           'pass', CHAT),
    Mutant("chat-prompt-without-header", "data/chat/answer.py",
           'prompt = self._rendered(self._t, generate=True)',
           'prompt = self._rendered(self._t)', CHAT),
    Mutant("chat-header-trained-behind-a-result", "data/chat/answer.py",
           'return rest.removeprefix(self._traits.header)',
           'return rest', CHAT),
    Mutant("chat-header-trained-after-rewriting", "data/chat/answer.py",
           "return None if at < 0 else at + len(header)", "return None if at < 0 else at", CHAT),
    Mutant("chat-two-answers-as-one", "data/chat/answer.py",
           'if at is None or NEXT in other.full[at:]:',
           'if False:', CHAT),
    Mutant("chat-answer-that-nobody-can-ask-for", "data/chat/answer.py",
           'served_without_asking = not asks and',
           'served_without_asking = False and', CHAT),
    Mutant("chat-lost-thought-not-noted", "data/chat/turns.py",
           'if thought in turn.output:',
           'if True:', CHAT),
    Mutant("chat-open-thought-not-closed", "data/chat/answer.py",
           'return tail if begun else self._traits.closed_at_once(opening, tag) + tail',
           'return tail', CHAT),
    Mutant("chat-thought-not-put-back", "data/chat/answer.py",
           'return written + ("" if begun else self._traits.closing(tag)) + tail',
           'return tail', CHAT),
    Mutant("chat-thought-closed-twice", "data/chat/answer.py",
           'return tail.lstrip().removeprefix(closing) if begun else tail',
           'return tail', CHAT),
    Mutant("chat-lost-content-not-noticed", "data/chat/answer.py",
           'if content in output or thought_inside:',
           'if True:', CHAT),
    Mutant("chat-lost-call-not-noticed", "data/chat/calls.py",
           "< needed[text] + spoken", "< 0", CHAT),
    Mutant("chat-calls-not-counted", "data/chat/calls.py",
           "< needed[text] + spoken", "< 1 + spoken", CHAT),
    Mutant("chat-call-taken-from-the-content", "data/chat/calls.py",
           "< needed[text] + spoken", "< needed[text]", CHAT),
    Mutant("chat-doubled-call-not-noticed", "data/chat/calls.py",
           "output.count(whole) > len(alike)", "output.count(whole) > 99", CHAT),
    Mutant("chat-html-escapes-not-noticed", "data/chat/calls.py",
           "return not HTML_ESCAPE.search(json.dumps(message, ensure_ascii=False))", "return False",
           CHAT),
    Mutant("chat-arguments-always-objects", "data/chat/renderer.py",
           "return message is not call", "return False", CHAT),
    Mutant("chat-renderings-mixed-up", "data/chat/renderer.py",
           "(self, end, generate, *switch.items())", "(self, end, generate)", CHAT),
    Mutant("chat-tool-results-trained", "data/chat/conversation.py",
           "if message[\"role\"] in roles]", "if message[\"role\"] in (*roles, \"tool\")]", CHAT),
    Mutant("chat-marks-on-messages-ignored", "data/chat/conversation.py",
           "if message.get(\"train\", t in chosen)", "if t in chosen", CHAT),
    Mutant("weights-prompt-in-an-output", "data/chat/stretches.py",
           "inside = is_output[begin:end] == (stretch.kind in SAID)", "inside = slice(None)", WEIGHTS),
    Mutant("weights-content-in-each-sequence", "data/chat/weighing.py",
           "0.0 if number in counted else shares[number].content", "shares[number].content", WEIGHTS),
    Mutant("weights-content-in-each-piece", "data/shorten.py",
           "._replace(content=0.0) if i in self.held", "._replace(content=0.0) if i is None", WEIGHTS),
    Mutant("weights-prompts-lost-by-a-split", "data/truncation.py",
           "sorted(sequence.spans + sequence.asked)", "sequence.spans", WEIGHTS),
    Mutant("weights-of-rows-ignored", "data/chat/conversation.py",
           'product(float(message.get("weight", 1.0)), row.weight)', 'float(message.get("weight", 1.0))', WEIGHTS),
    Mutant("chat-special-tokens-of-rows-obeyed", "data/encoder.py",
           "if self._escape and spells(", "if False and spells(", CHAT),
    Mutant("chat-rewritten-history-not-noticed", "data/chat/spans.py",
           "and turn.prompt.startswith(text):", "and turn.prompt:", CHAT),
    Mutant("chat-eos-inside-a-conversation", "data/chat/spans.py",
           "if found and not found[-1].eos and", "if found and", CHAT),
    Mutant("chat-cut-one-piece-early", "data/chat/spans.py",
           "borders.append(sizes[k + 1])", "borders.append(sizes[k])", CHAT),
    Mutant("chat-token-across-the-border", "data/chat/spans.py",
           "if not cut.ids[k].startswith(head_ids):", "if False:", CHAT),
    Mutant("chat-output-tokenised-as-a-beginning", "data/chat/spans.py",
           "output = self._ids_of(chunk, sequence.mark, inside=True)",
           "output = self._ids_of(chunk, sequence.mark, inside=False)", CHAT),
    Mutant("chat-space-behind-tokens-counted", "data/chat/spans.py",
           "                head = head.lstrip()\n", "                pass\n", CHAT),
    Mutant("chat-bos-twice", "data/plain.py",
           "text = row.text.removeprefix(bos).removesuffix(eos)", "text = row.text.removesuffix(eos)", CHAT),
    Mutant("chat-skeleton-not-to-the-letter", "data/chat/skeleton.py",
           "return [found[i] for i in trained] if at == len(text) else None",
           "return [found[i] for i in trained]", CHAT),
    Mutant("chat-skeleton-agrees-with-anything", "data/chat/skeleton.py",
           "return skeleton.turns(template, conversation) == turns", "return True", CHAT),
    Mutant("chat-skeleton-of-another-setting", "data/encoder.py",
           'kind = (template, json.dumps(kwargs, sort_keys=True) if kwargs else "")',
           'kind = (template, "")', CHAT),
    Mutant("chat-headers-not-counted", "data/chat/skeleton.py",
           "if len(begins) != len(answers):", "if len(begins) < len(answers):", CHAT),
    Mutant("chat-skeleton-loses-calls", "data/chat/skeleton.py",
           "if lost_call(message, output) or has_new_escapes(output, message):", "if False:", CHAT),
    Mutant("chat-skeleton-does-not-see-thoughts", "data/chat/skeleton.py",
           '            if may_think(content) or not content.strip():\n',
           '            if not content.strip():\n', CHAT),
    # --- templates and their box
    Mutant("sandbox-power-unchecked", "data/chat/sandbox.py",
           "abs(exponent) > 1000", "abs(exponent) > 10**30", BOX),
    Mutant("sandbox-underscores-in-namespaces", "data/chat/sandbox.py", 'str(name).startswith("_")', "False", BOX),
    Mutant("sandbox-text-without-end", "data/chat/sandbox.py",
           "    if len(text) > CHARACTERS:\n", "    if False:\n", BOX),
    Mutant("sandbox-underscores-of-loops", "data/chat/sandbox.py", ' and not attribute.startswith("_"):', ":", BOX),
    Mutant("sandbox-row-can-be-changed", "data/chat/sandbox.py",
           "class _Environment(ImmutableSandboxedEnvironment):",
           "class _Environment(ImmutableSandboxedEnvironment.__base__):", BOX),
    Mutant("sandbox-late-interruption-escapes", "data/chat/limits.py",
           "if fired and not isinstance(sys.exc_info()[1], _Interruption):", "if False:", BOX),
]
# fmt: on
