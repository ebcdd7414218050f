"use strict";
// One conversation with each model: the same messages, each with its own answers.
const talks = data.models.map(name => ({ name, history: [], side: null }));
let running = null; // what stops the answers that are being written

function begin() {
  if (running) running.abort();
  $("sides").replaceChildren();
  for (const talk of talks) {
    talk.history = [];
    talk.side = make("section", undefined, talk === talks[0] ? "card now" : "card");
    talk.side.append(make("h4", talk.name));
    $("sides").append(talk.side);
  }
}

function request(talk) {
  const messages = [...talk.history];
  if ($("system").value) messages.unshift({ role: "system", content: $("system").value });
  const body = { model: talk.name, messages, stream: true, stream_options: { include_usage: true } };
  if ($("temperature").value) body.temperature = Number($("temperature").value);
  if ($("most").value) body.max_tokens = Number($("most").value);
  const headers = { "Content-Type": "application/json" };
  if (data.needsToken) headers.Authorization = `Bearer ${$("token").value}`;
  return { method: "POST", headers, body: JSON.stringify(body), signal: running.signal };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      const text = line.replace(/^data: /, "");
      if (text !== "[DONE]") yield JSON.parse(text);
    }
  }
}

async function answer(talk) {
  const began = performance.now();
  const response = await fetch("/v1/chat/completions", request(talk));
  if (!response.ok) throw new Error((await response.json()).error.message);
  let thought = null;
  let content = null;
  let told = "";
  for await (const event of events(response)) {
    const choice = event.choices[0];
    const delta = choice ? choice.delta : {};
    if (delta.reasoning_content) {
      thought = thought || talk.side.appendChild(make("p", "", "turn thought"));
      thought.textContent += delta.reasoning_content;
    }
    if (delta.content) {
      content = content || talk.side.appendChild(make("p", "", "turn"));
      content.textContent += delta.content;
    }
    if (choice && choice.finish_reason === "length") told = ", cut at the limit";
    if (event.usage) {
      const tokens = event.usage.completion_tokens;
      const speed = (tokens / (performance.now() - began)) * 1000;
      talk.side.append(make("p", `${tokens} tokens, ${speed.toFixed(1)} a second${told}`, "facts"));
    }
  }
  const message = { role: "assistant", content: content ? content.textContent : "" };
  if (thought) message.reasoning_content = thought.textContent;
  talk.history.push(message);
}

async function send() {
  const said = $("said").value;
  if (!said.trim() || running) return;
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("said").value = "";
  let wrong = false;
  for (const talk of talks) {
    talk.history.push({ role: "user", content: said });
    talk.side.append(make("p", said, "turn user"));
  }
  for (const talk of talks) {
    try {
      if (running.signal.aborted) throw new Error("stopped");
      await answer(talk);
    } catch (error) {
      wrong = true;
      talk.history.pop(); // the message: it has no answer
      const stopped = running.signal.aborted;
      talk.side.append(make("p", stopped ? "stopped; not kept" : error.message, "turn wrong"));
    }
  }
  if (wrong) $("said").value = said;
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  $("said").focus();
}

$("sub").textContent = `${data.models.join(" beside ")}: answers as a server of the folder gives them`;
$("token-label").hidden = !data.needsToken;
$("ask").addEventListener("submit", event => { event.preventDefault(); send(); });
$("said").addEventListener("keydown", event => {
  if (event.key === "Enter" && event.ctrlKey) { event.preventDefault(); send(); }
});
$("stop").addEventListener("click", () => running && running.abort());
$("reset").addEventListener("click", begin);
begin();
