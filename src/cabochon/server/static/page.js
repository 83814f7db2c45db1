// The page: what was said so far, the form, the settings. Text from the model only ever becomes text nodes.

import { chat, Fault, firstModel } from "./api.js";
import { hearing, watching } from "./media.js";
import { chip, ReplyView, userView } from "./views.js";

const at = (id) => document.getElementById(id);
const talk = at("talk"), words = at("words"), options = at("options");
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

let history = []; // messages as the server wants them
let running = null; // the AbortController of the reply in progress
let attached = [];
let model = null;

// Settings ------------------------------------------------------------------------------------------------------------

function dress(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
}
dress(localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
at("theme").onclick = () => dress(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

at("open-settings").onclick = () => {
  at("settings").hidden = !at("settings").hidden;
  at("open-settings").setAttribute("aria-expanded", String(!at("settings").hidden));
};

for (const [name, value] of Object.entries(JSON.parse(sessionStorage.getItem("options") ?? "{}"))) {
  const field = options.elements[name];
  if (field?.type === "checkbox") field.checked = value; else if (field) field.value = value;
}
options.oninput = () => {
  const kept = [...options.elements].map((field) => [field.name, field.type === "checkbox" ? field.checked : field.value]);
  sessionStorage.setItem("options", JSON.stringify(Object.fromEntries(kept)));
  if (!model) greet();
};
options.onsubmit = (event) => event.preventDefault();

// What the settings come to in a request. Throws a Fault for tools that are no JSON.
function asked() {
  const fields = options.elements;
  const body = { model: model?.id, messages: history, chat_template_kwargs: { enable_thinking: fields.thinking.checked } };
  if (fields.system.value.trim()) body.messages = [{ role: "system", content: fields.system.value }, ...history];
  if (fields.thinking.checked && Number(fields.budget.value) > 0) body.thinking_token_budget = Number(fields.budget.value);
  for (const name of NUMBERS) if (fields[name].value !== "") body[name] = Number(fields[name].value);
  if (fields.tools.value.trim()) {
    try { body.tools = JSON.parse(fields.tools.value); } catch (error) { throw new Fault(`The tools are not JSON: ${error.message}`); }
  }
  return body;
}

async function greet() {
  try {
    model = await firstModel(options.elements.key.value);
    at("model").textContent = model.id;
    const kinds = model.modalities.filter((kind) => kind !== "text");
    at("attach").hidden = !kinds.length;
    at("attach").querySelector("input").accept = kinds.map((kind) => `${kind}/*`).join();
    at("record").hidden = !kinds.includes("audio") || !navigator.mediaDevices;
  } catch (error) {
    at("model").textContent = error.message;
  }
}
greet();

// Saying something ----------------------------------------------------------------------------------------------------

at("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = words.value.trim();
  if (running || (!text && !attached.length)) return;
  const content = attached.length ? [...attached.map((file) => file.part), { type: "text", text }] : text;
  talk.append(userView(text, attached));
  history.push({ role: "user", content });
  attached = [];
  at("attached").replaceChildren();
  complain("");
  words.value = "";
  fit();
  answer();
};

async function answer() {
  const view = new ReplyView({ retry, answerCall });
  const before = history.length;
  talk.append(view.root);
  running = new AbortController();
  at("send").hidden = true;
  at("stop").hidden = false;
  try {
    for await (const piece of chat(asked(), options.elements.key.value, running.signal)) {
      const near = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
      view.add(piece);
      if (near) talk.scrollTop = talk.scrollHeight;
    }
  } catch (error) {
    if (error.name === "AbortError") view.note("Stopped.");
    else view.fault(error instanceof Fault ? error.message : "The connection to the server broke.");
  }
  running = null;
  at("send").hidden = false;
  at("stop").hidden = true;
  history.push(view.message());
  view.end(before);
}

// Take back everything from a reply on, and ask for it once more.
function retry(before) {
  if (running) return;
  history = history.slice(0, before);
  for (const view of [...talk.children].reverse()) {
    const last = view.dataset.before === String(before);
    view.remove();
    if (last) break;
  }
  answer();
}

// The page runs no tools; a person may answer for them.
function answerCall(results) {
  if (running) return;
  history.push(...results.map(({ id, content }) => ({ role: "tool", tool_call_id: id, content })));
  answer();
}

at("stop").onclick = () => running?.abort();
at("fresh").onclick = () => {
  running?.abort();
  history = [];
  talk.replaceChildren();
  words.focus();
};

function fit() {
  words.style.height = "auto";
  words.style.height = `${words.scrollHeight + 2}px`;
}
words.oninput = fit;
words.onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
};

// Images, sounds and videos --------------------------------------------------------------------------------------------

function attach(file) {
  if (!model?.modalities.includes(file.kind)) return complain(`${model?.id ?? "The model"} takes no ${file.kind}.`);
  attached.push(file);
  at("attached").append(chip(file, () => { attached = attached.filter((one) => one !== file); }));
}

function complain(text) {
  at("complaint").textContent = text;
}

watching({ input: at("attach").querySelector("input"), words, zone: document.body, attach });
hearing({ button: at("record"), attach, complain });
