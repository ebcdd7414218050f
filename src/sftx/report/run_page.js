"use strict";
const runs = data.runs, several = runs.length > 1, all = [];
const label = (run, text) => several ? `${run.name}: ${text}` : text;
const NONE = { steps: [], values: [] };
const percent = share => `${Number((100 * share).toPrecision(3))} %`;
const evaluated = (run, name) => run.held[name] || NONE;

/** Tokens a second that the machine would reach, by the layer that was timed before the first step. */
function limit(run) {
  const seconds = run.facts.predicted?.seconds, tokens = run.series.tokens.values;
  if (!seconds || !tokens.length || !run.facts.num_steps) return null;
  const mean = (run.series.tokens.means?.values || tokens).reduce((a, b) => a + b, 0) / (run.series.tokens.means?.values || tokens).length;
  return run.facts.num_steps * mean / seconds;
}

function scaled(series, by) {
  const each = one => ({ steps: one.steps, values: one.values.map(y => y * by) });
  return { ...series, ...each(series), means: series.means && each(series.means) };
}

/** How the n-th of several lines of a run is drawn: in a colour of its own, or, where a run has one colour, dashed. */
const nth = i => several ? { dash: i } : { colour: i };
const held = several ? { dash: 1 } : { dash: 1, colour: 1 };

/** The marks of spikes on a curve: at the value there, or the last one before. */
function marks(run, series) {
  const steps = [], values = [];
  for (const spike of run.spikes) {
    let i = series.steps.findLastIndex(step => step <= spike.step);
    if (i < 0) continue;
    steps.push(spike.step);
    values.push(series.values[i]);
  }
  return { steps, values, dots: true, warn: true, label: label(run, "stands out") };
}

function toSpike(step) {
  const node = document.getElementById(`step-${step}`);
  if (!node) return;
  node.open = true;
  node.scrollIntoView({ block: "center" });
  node.querySelector("summary").focus({ preventScroll: true });
}

/** A chart over the steps of all runs: `parts(run)` gives its series of one run. */
function overSteps(title, parts, options = {}) {
  const series = runs.flatMap((run, i) => parts(run).map(one => ({ ...one, colour: one.colour ?? i, label: label(run, one.label) })));
  if (!series.some(one => one.steps.length)) return;
  const one = chart($("charts"), { title, group: "steps", ...options }, series);
  if (one) all.push(one);
}

function curves() {
  overSteps("Loss, in nats per unit of weight", run => [
    { ...run.series.loss, label: "training", smoothed: true },
    { ...evaluated(run, "loss"), label: "held out", dots: true, ...held },
    ...(several ? [] : [marks(run, run.series.loss)]),
  ], { wide: true, warning: "stands out: click or press Enter for its rows", onPick: toSpike });
  overSteps("Accuracy: share of targets that are right", run => [
    { ...run.series.accuracy, label: "training", smoothed: true },
    { ...evaluated(run, "accuracy"), label: "held out", dots: true, ...held },
  ], { say: percent });
  const named = prefix => run => Object.keys(run.held).filter(name => name.startsWith(prefix)).map((name, i) =>
    ({ ...run.held[name], label: name.slice(prefix.length), dots: true, ...nth(i) }));
  overSteps("Held-out loss by source", named("loss of "));
  overSteps("Held-out accuracy by source", named("accuracy of "), { say: percent });
  answers();
  overSteps("Learning rate", run => [{ ...run.series.learning_rate, label: "learning rate" }]);
  overSteps("Gradient norm", run => [{ ...run.series.grad_norm, label: "gradient norm", smoothed: true },
    ...(several ? [] : [marks(run, run.series.grad_norm)])], { warning: "stands out: click or press Enter for its rows", onPick: toSpike });
  overSteps("Balance of the experts (even: the number of experts per token)", run =>
    [{ ...(run.series.router_balance || NONE), label: "balance", smoothed: true }]);
  overSteps("Share of a layer's tokens that one expert gets", run => [
    { ...(run.series.router_largest_load || NONE), label: "largest", smoothed: true },
    { ...(run.series.router_smallest_load || NONE), label: "smallest", ...nth(1) },
  ], { say: percent });
  if (runs.some(run => run.series.router_unused?.values.some(count => count)))
    overSteps("Experts without a token", run => [{ ...(run.series.router_unused || NONE), label: "experts" }]);
  overSteps("Tokens per second", run => [{ ...run.series.tokens_per_second, label: "tokens/s", smoothed: true }]);
  overSteps("Targets per second", run => [{ ...run.series.targets_per_second, label: "targets/s", smoothed: true }]);
  overSteps("Share of the machine's measured limit", run => limit(run)
    ? [{ ...scaled(run.series.tokens_per_second, 1 / limit(run)), label: "share", smoothed: true }] : [], { say: percent });
  overSteps("Peak memory, in GiB", run => [{ ...scaled(run.series.memory, 2 ** -30), label: "measured" },
    ...predictedMemory(run)]);
}

function predictedMemory(run) {
  const peak = run.facts.predicted?.memory?.peak, steps = run.series.memory.steps;
  if (!peak || !steps.length) return [];
  return [{ steps: [steps[0], steps.at(-1)], values: [peak, peak].map(y => y / 2 ** 30), label: "predicted", ...held }];
}

/** Charts of what answers scored, and of the distance from the base. */
function answers() {
  const known = name => ["loss", "perplexity", "targets", "accuracy"].includes(name) || /^(loss|accuracy) of /.test(name);
  const forgetting = ["kl", "general loss"];
  const names = [...new Set(runs.flatMap(run => Object.keys(run.held)))].filter(name => !known(name));
  const drawnOf = list => run => list.map((name, i) => ({ ...evaluated(run, name), label: name, dots: true, ...nth(i) }));
  const metrics = names.filter(name => !forgetting.includes(name));
  const isShare = name => runs.every(run => evaluated(run, name).values.every(y => y >= 0 && y <= 1));
  overSteps("Answers to held-out prompts", drawnOf(metrics.filter(isShare)), { say: percent });
  for (const name of metrics.filter(name => !isShare(name))) overSteps(`Answers to held-out prompts: ${name}`, drawnOf([name]));
  overSteps("Distance from the base (KL), in nats per token", drawnOf(names.filter(name => name === "kl")));
  overSteps("Loss on a general text, in nats per token", drawnOf(names.filter(name => name === "general loss")));
}

function tile(name, value, more) {
  const box = make("div"), text = make("dd", value);
  if (more) text.append(make("small", more));
  box.append(make("dt", name), text);
  $("tiles").append(box);
}

function summary(run) {
  const { facts, series } = run, last = series.loss.values.at(-1);
  tile("Status", facts.status || "unknown", `${number(run.steps)} of ${number(facts.num_steps || run.steps)} steps`);
  if (facts.stopped_early) tile("Stopped early", facts.stopped_early);
  if (last !== undefined) tile("Training loss", short(last), `first step ${short(series.loss.values[0])}`);
  const [before, after] = [Object.values(run.evaluations)[0], Object.values(run.evaluations).at(-1)];
  if (after?.loss !== undefined) tile("Held-out loss", short(after.loss), before !== after ? `before training ${short(before.loss)}` : "");
  if (after?.accuracy !== undefined) tile("Held-out accuracy", percent(after.accuracy), before !== after && before.accuracy !== undefined ? `before training ${percent(before.accuracy)}` : "");
  if (facts.best) tile(`Best ${facts.best.metric}`, short(facts.best.value), `step ${number(facts.best.step)}`);
  const { measured, predicted } = facts;
  if (measured?.seconds) tile("Time in steps", duration(measured.seconds), predicted?.seconds ? `predicted ${duration(predicted.seconds)}` : "");
  const peak = measured?.memory || series.memory.values.at(-1);
  if (peak) tile("Peak memory", bytes(peak), predicted?.memory ? `predicted ${bytes(predicted.memory.peak)}` : "");
  if (facts.total_targets && measured?.seconds) tile("Targets per second", short(Math.round(facts.total_targets / measured.seconds)), `${number(Math.round(facts.total_tokens / measured.seconds))} tokens/s`);
  if (limit(run) && facts.total_tokens && measured?.seconds) tile("Of the machine's limit", percent(facts.total_tokens / measured.seconds / limit(run)), `a layer timed alone: ${number(Math.round(limit(run)))} tokens/s`);
}

/** The outcome of each run, a line for each. */
function overview() {
  const box = make("section", null, "card");
  box.append(table("Runs", ["run", "status", "steps", "training loss", "held out, before", "held out, after", "best", "targets/s", "peak memory"], runs.map(run => {
    const { facts, series } = run, evaluations = Object.values(run.evaluations), { measured, best } = facts;
    return [run.name, facts.stopped_early || facts.status || null, run.steps, series.loss.values.at(-1) ?? null, evaluations[0]?.loss ?? null, evaluations.at(-1)?.loss ?? null,
      best ? `${best.metric} ${short(best.value)}, step ${number(best.step)}` : null,
      measured?.seconds && facts.total_targets ? Math.round(facts.total_targets / measured.seconds) : null, measured?.memory ? bytes(measured.memory) : null];
  })));
  $("tiles").replaceWith(box);
}

function section(target, title) {
  const node = make("section", null, "card");
  target.append(make("h2", title), node);
  return node;
}

const words = value => value === null || value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value) : typeof value === "number" ? value : String(value);

/** What the settings (and the machines) of the runs do not share. */
function differences() {
  if (!several) return;
  const own = run => ({ ...run.settings, "(device)": run.facts.device, "(precision)": run.facts.precision, "(steps)": run.facts.num_steps,
    ...Object.fromEntries(Object.entries(run.facts.versions || {}).map(([name, version]) => [`(version of ${name})`, version])) });
  const every = runs.map(own), names = [...new Set(every.flatMap(Object.keys))];
  const rows = names.filter(name => new Set(every.map(one => JSON.stringify(one[name] ?? null))).size > 1)
    .map(name => [name, ...every.map(one => words(one[name]))]);
  section($("differences"), "What differs").append(rows.length
    ? table("Settings that differ between the runs", ["setting", ...runs.map(run => run.name)], rows) : make("p", "The settings of these runs are the same."));
}

function evaluations() {
  const columns = runs.flatMap(run => Object.entries(run.evaluations).map(([when, numbers]) => [label(run, when), numbers]));
  if (!columns.length) return;
  const names = [...new Set(columns.flatMap(([, numbers]) => Object.keys(numbers)))];
  section($("evaluations"), "Evaluation").append(table("Held-out numbers; losses in nats", ["", ...columns.map(([when]) => when)],
    names.map(name => [name, ...columns.map(([, numbers]) => numbers[name] ?? null)])));
}

function samples(target, run) {
  const { steps, prompts, evaluations } = run.samples;
  if (!prompts.length) return;
  const node = section(target, "Answers, before and after");
  node.append(make("p", `${number(prompts.length)} prompts; answers of ${number(steps.length)} of ${number(evaluations)} evaluations are kept on this page.`, "facts"));
  const picked = make("select"), caption = make("label", "Between them: ");
  const between = steps.slice(1, -1), list = make("div");
  for (const step of between) picked.append(new Option(`after step ${number(step)}`, step));
  picked.selectedIndex = Math.floor((between.length - 1) / 2);
  caption.append(picked);
  if (between.length) node.append(caption);
  node.append(list);
  const show = () => list.replaceChildren(...prompts.map((prompt, i) => asked(prompt, i, steps, picked.value)));
  picked.onchange = show;
  show();
}

function asked(prompt, i, steps, middle) {
  const node = make("details"), sides = make("div", null, "sides");
  node.open = i < 3;
  node.append(make("summary", `prompt ${i + 1}`), text(prompt.prompt), sides);
  const shown = [...new Set([steps[0], ...(middle ? [Number(middle)] : []), steps.at(-1)])];
  for (const step of shown) {
    const answer = prompt.answers[step];
    if (!answer) continue;
    const side = make("section", null, step === steps.at(-1) ? "now" : "");
    const scores = Object.entries(answer.scores || {}).map(([name, value]) => `${name} ${short(value)}`).join(" · ");
    side.append(make("h4", step === 0 ? "before training" : `after step ${number(step)}`), text(answer.output));
    if (answer.ended === false) side.append(make("p", `cut at ${short(answer.tokens)} tokens: no stop token`, "note"));
    if (scores) side.append(make("p", scores, "facts"));
    sides.append(side);
  }
  const side = make("section");
  side.append(make("h4", "reference"), text(prompt.reference));
  sides.append(side);
  return node;
}

function text(value) {
  const node = make("pre", value);
  node.dir = "auto";
  return node;
}

function ledger(target, run) {
  const counts = run.ledger;
  if (!counts) return;
  const node = section(target, "Where every row went"), sources = Object.entries(counts.sources || {});
  node.append(make("p", counts.summary));
  const columns = ["read", "trained", "split", "dropped", "truncated", "examples", "tokens", "targets"];
  node.append(table("Rows and tokens by source", ["source", ...columns],
    [...sources.map(([name, one]) => [name, ...columns.map(c => one[c] ?? null)]),
      ...(sources.length > 1 ? [["all", ...columns.map(c => counts.all?.[c] ?? null)]] : [])]));
  const kinds = Object.entries(counts.all?.kinds || {});
  if (kinds.length) node.append(table("Tokens by kind of text", ["kind", "tokens", "targets", "weight"], kinds.map(([name, one]) => [name, one.tokens, one.targets, one.weight])));
  const notes = Object.entries(counts.all?.notes || {});
  if (notes.length) node.append(table("What was noted of rows", ["note", "rows"], notes));
  if (run.dropped.length) node.append(folded(`Dropped rows${counts.all.dropped > run.dropped.length ? `: the first ${number(run.dropped.length)} of ${number(counts.all.dropped)}` : ""}`,
    () => table("Dropped rows", ["place", "reason"], run.dropped.map(row => [`${row.file}:${row.line}`, row.reason]))));
}

function histograms(target, run) {
  const { lengths, weights, weights_of: looked } = run.noted || {};
  if (!lengths) return;
  const box = make("div", null, "charts");
  target.append(make("h2", "Lengths and weights"), box);
  bars(box, "Length of examples", "tokens", "examples", lengths.edges, lengths.counts);
  const card = make("figure", null, "card chart"), total = weights.reduce((sum, one) => sum + one.tokens, 0);
  card.append(make("h3", "Weight of tokens"));
  shares(card, weights.map(one => ({ label: `weight ${one.weight}${one.weight === "0" ? " (context)" : ""}`, share: one.tokens / Math.max(total, 1),
    text: `${number(one.tokens)} tokens, ${percent(one.tokens / Math.max(total, 1))}`, colour: one.weight === "0" ? "" : "var(--target)" })));
  card.append(make("p", `Counted over ${number(looked)} examples, evenly spaced.`, "facts"));
  box.append(card);
}

function spikes(target, run, i) {
  if (!run.spikes.length) return;
  const node = section(target, "Steps that stand out");
  node.append(make("p", "Marked on the curves of loss and gradient norm; the largest are listed, with the rows they trained on.", "facts"));
  for (const spike of run.spikes) {
    const known = run.noted?.rows?.[spike.step], one = make("details");
    one.id = `step-${spike.step}`;
    one.append(make("summary", `step ${number(spike.step)}: ${spike.why}`));
    if (!several) {
      const button = make("button", "Show it on the curves");
      button.type = "button";
      button.onclick = () => { all[0].zoom(Math.max(spike.step - 50, 0), spike.step + 50); all[0].card.scrollIntoView({ block: "center" }); };
      one.append(button);
    }
    if (known) one.append(table(`Rows of step ${number(spike.step)}${known.of > known.rows.length ? `: the first ${number(known.rows.length)} of ${number(known.of)}` : ""}`,
      ["place", "tokens", "targets", "weight", "begins"], known.rows.map(row => [row.place, row.tokens, row.targets, row.weight, row.text])));
    one.append(text(`sftx inspect ${run.folder}/config.yaml step=${spike.step}`));
    node.append(one);
  }
}

function made(target, run) {
  const node = section(target, "How it was made"), { facts } = run;
  const rows = [["device", facts.device], ["precision", facts.precision], ["parameters", facts.parameters && Object.entries(facts.parameters).map(([k, v]) => `${k} ${number(v)}`).join(", ")],
    ["tokens per pack", facts.tokens_per_pack], ["peak learning rate", facts.peak_learning_rate], ["plan", facts.plan], ["started", (facts.started || []).join(", ")],
    ...Object.entries(facts.versions || {}).map(([name, version]) => [name, version])].filter(([, value]) => value);
  node.append(table("Machine and versions", ["", ""], rows.map(([name, value]) => [name, String(value)])));
  const memory = Object.entries(facts.predicted?.memory || {}).filter(([, value]) => value);
  const seconds = [["time in steps", facts.predicted?.seconds && duration(facts.predicted.seconds), facts.measured?.seconds && duration(facts.measured.seconds)],
    ...memory.map(([name, value]) => [name === "peak" ? "peak memory" : `memory: ${name}`, bytes(value), name === "peak" && facts.measured?.memory ? bytes(facts.measured.memory) : ""])];
  if (facts.predicted) node.append(table("Predicted and measured", ["", "predicted", "measured"], seconds.map(row => row.map(value => value || "–"))));
  for (const note of facts.notes || []) node.append(make("p", note, "facts"));
  node.append(folded("All settings", () => table("All settings", ["setting", "value"], Object.entries(run.settings).map(([name, value]) => [name, words(value)]))));
  node.append(make("h3", "Once more"), text(`sftx train ${run.folder}/config.yaml output=ANOTHER`));
}

function details(run, i) {
  const target = $("details");
  target.replaceChildren();
  if (several) target.append(make("h2", run.name));
  spikes(target, run, i);
  samples(target, run);
  histograms(target, run);
  ledger(target, run);
  made(target, run);
}

$("title").textContent = several ? `${number(runs.length)} runs` : runs[0].name;
$("sub").textContent = several ? runs.map(run => run.name).join(" · ") : [runs[0].settings["model.path"], runs[0].folder].filter(Boolean).join(" · ");
if (several) overview(); else summary(runs[0]);
curves();
differences();
evaluations();
if (several) {
  const picked = make("select"), caption = make("label", "One run in detail: ");
  runs.forEach((run, i) => picked.append(new Option(run.name, i)));
  picked.onchange = () => details(runs[picked.value], Number(picked.value));
  caption.append(picked);
  $("which").append(caption);
}
details(runs[0], 0);
const smoothing = () => {
  const over = Math.round(10 ** Number($("smoothing").value));
  $("smoothed").textContent = over > 1 ? `over about ${number(over)} steps` : "off";
  for (const one of all) one.smooth(1 - 1 / over);
};
$("smoothing").value = Math.log10(Math.min(Math.max(Math.max(...runs.map(run => run.steps)) / 30, 2), 300));
$("smoothing").oninput = smoothing;
$("reset").onclick = () => all[0]?.reset();
smoothing();
$("written").textContent = `Written ${data.written}. Everything on this page is in this file; nothing is loaded from elsewhere.`;
