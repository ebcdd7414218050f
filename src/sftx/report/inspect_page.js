"use strict";
const STEP = 40;  // rows that are shown at once

function tokens(row) {
  const box = make("div", undefined, "tokens"), special = new Set(row.special), spelled = new Set(row.spelled);
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", `tokens of ${row.place}`);
  let run = 0;
  row.texts.forEach((text, i) => {
    while (run + 1 < row.runs.length && row.runs[run + 1][0] <= i) run++;
    const weight = row.runs[run][1], kind = weight === 0 ? "c" : weight === 1 ? "t" : "p";
    const span = make("span", undefined, `${kind}${i % 2}${special.has(i) ? " s" : spelled.has(i) ? " e" : ""}`);
    if (kind === "p" && i === row.runs[run][0]) span.append(make("small", `${weight}:`, "weight"));
    span.title = `position ${row.start + i} · id ${row.ids[i]} · weight ${weight}`;
    text.split("\n").forEach((piece, k) => {
      if (k) span.append(make("span", "↵", "nl"), "\n");
      span.append(piece);
    });
    box.append(span);
  });
  return box;
}

function card(row) {
  const node = make("section", undefined, "card row"), head = make("header");
  const share = (100 * row.targets / Math.max(row.texts.length, 1)).toFixed(1);
  if (row.depth) node.style.marginLeft = `${1.5 * row.depth}rem`;
  const part = row.part && row.examples === 1 ? ` · example ${row.part + 1} of its row` : "";
  head.append(make("b", row.place), make("span", `${number(row.texts.length)} tokens · ${number(row.targets)} targets (${share} %)${part}`, "facts"));
  if (row.note) head.append(make("span", row.note, "note"));
  node.append(head, tokens(row));
  if (row.prompt) node.append(folded("What a server would send for the last answer", () => make("pre", row.prompt)));
  return node;
}

let wanted = STEP;
function show() {
  const search = $("search").value.toLowerCase(), cut = $("cut").ariaPressed === "true";
  let rows = data.rows.filter(row => (!cut || row.cut) && (!search || row.all.includes(search)));
  if ($("longest").ariaPressed === "true") rows = [...rows].sort((a, b) => b.texts.length - a.texts.length);
  $("rows").replaceChildren(...rows.slice(0, wanted).map(card));
  $("count").textContent = `${number(Math.min(wanted, rows.length))} of ${number(rows.length)} chosen examples; the data has ${number(data.examples)}`;
  if (rows.length > wanted) {
    const more = make("button", "Show more");
    more.type = "button";
    more.onclick = () => { wanted += STEP; show(); };
    $("rows").append(more);
  }
}

function charts() {
  bars($("charts"), "Length of examples", "tokens", "examples", data.lengths.edges, data.lengths.counts);
  const box = make("figure", null, "card chart");
  box.append(make("h3", "Share of targets, by source"));
  shares(box, data.shares.map(source => {
    const share = source.tokens ? source.targets / source.tokens : 0;
    return { label: source.source, share, colour: "var(--target)",
      text: `${(100 * share).toFixed(1)} % of ${number(source.tokens)} tokens in ${number(source.rows)} rows` };
  }));
  $("charts").append(box);
  const { count, step, tokens, targets } = data.steps;
  chart($("charts"), { title: `Targets and tokens per step (${number(count)} steps)`, wide: true }, [
    { label: "targets", steps: step, values: targets, colour: 2 },
    { label: "tokens", steps: step, values: tokens, colour: 0 }]);
}

for (const row of data.rows) {
  row.all = `${row.place}\n${row.note}\n${row.texts.join("")}`.toLowerCase();
  row.cut = /split|cut|truncat/.test(row.note);
}
$("title").textContent = `${data.title} · ${number(data.examples)} examples of at most ${number(data.maxLength)} tokens`;
for (const [name, text] of Object.entries(data.ledgers)) $("ledgers").append(make("li", `${name}: ${text}`));
for (const [note, count] of Object.entries(data.notes)) $("ledgers").append(make("li", `${note}: ${number(count)} rows`));
if (data.dropped.length) $("dropped").append(folded("Dropped rows", () => table("Dropped rows", ["place", "reason"], data.dropped.map(row => [row.place, row.reason]))));
charts();
for (const id of ["cut", "longest"]) $(id).onclick = event => {
  event.target.ariaPressed = String(event.target.ariaPressed !== "true");
  wanted = STEP;
  show();
};
$("search").oninput = () => { wanted = STEP; show(); };
show();
