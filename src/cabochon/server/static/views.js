// How messages look.

export function make(tag, kind, text) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
}

// A file that waits to be sent, and a way to take it back.
export function chip(file, remove) {
  const root = make("span", "chip", file.name);
  root.append(Object.assign(make("button", "", "×"), { type: "button", ariaLabel: `Remove ${file.name}`, onclick: () => { root.remove(); remove(); } }));
  return root;
}

export function userView(text, files) {
  const root = make("section", "user");
  for (const file of files) {
    const shown = make("div", "media");
    if (file.kind === "image") shown.append(Object.assign(make("img"), { src: file.url, alt: file.name }));
    else shown.append(Object.assign(make(file.kind), { src: file.url, controls: true, title: file.name }));
    root.append(shown);
  }
  if (text) root.append(make("div", "said", text));
  return root;
}

// Fenced code stands in its own box; everything else is plain text.
function spell(node, text) {
  node.replaceChildren(...text.split(/^```[^\n]*\n?/m).map((part, place) =>
    place % 2 ? make("pre", "", part) : document.createTextNode(part)));
}

// JSON over several lines once it is whole, as it is until then.
function laidOut(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

export class ReplyView {
  constructor({ retry, answerCall }) {
    this.root = make("section", "assistant");
    this.thought = make("details", "thought");
    this.thought.hidden = true;
    this.thought.append(make("summary", "", "Thinking"), make("div"));
    this.said = make("div", "said");
    this.calls = make("div");
    this.foot = make("div", "foot quiet");
    this.root.append(this.thought, this.said, this.calls, this.foot);
    this.text = "";
    this.thinking = "";
    this.toolCalls = [];
    this.retry = retry;
    this.answerCall = answerCall;
    this.began = performance.now();
    this.firstAt = null;
  }

  add({ thinking, text, call, place, usage, ending, warnings }) {
    this.firstAt ??= performance.now();
    if (thinking) {
      this.thinking += thinking;
      this.thought.hidden = false;
      this.thought.lastChild.textContent = this.thinking;
    }
    if (text) {
      this.text += text;
      spell(this.said, this.text);
    }
    if (call) this.showCall(call, place);
    if (usage) this.usage = usage;
    if (ending === "length") this.note("The reply reached its limit.");
    if (ending && ending !== "tool_calls") this.dropCalls();
    if (ending === "loop") this.note("The reply repeated itself and was ended.");
    for (const warning of warnings ?? []) this.note(warning);
  }

  showCall(call, place) {
    if (!this.toolCalls[place]) {
      const box = make("div", "call");
      box.append(make("b", "", call.function.name), make("pre"));
      box.append(Object.assign(make("input"), { placeholder: "Answer for the tool", ariaLabel: `Answer for ${call.function.name}` }));
      this.calls.append(box);
    }
    this.toolCalls[place] = call;
    this.calls.querySelectorAll(".call pre")[place].textContent = laidOut(call.function.arguments);
  }

  // A reply that doesn't end in calls has made none, whatever was begun.
  dropCalls() {
    this.toolCalls = [];
    for (const box of this.calls.querySelectorAll(".call")) box.remove();
  }

  note(text) { this.calls.append(make("p", "quiet", text)); }

  fault(text) { this.calls.append(make("p", "fault", text)); }

  // The reply as the next request repeats it.
  message() {
    const plain = { role: "assistant", content: this.text };
    if (this.thinking) plain.reasoning = this.thinking;
    if (this.toolCalls.length) plain.tool_calls = this.toolCalls;
    return plain;
  }

  end(before) {
    this.root.dataset.before = before;
    const copy = make("button", "copy", "Copy");
    copy.onclick = () => navigator.clipboard.writeText(this.text).then(() => { copy.textContent = "Copied"; });
    const again = make("button", "retry", "Retry");
    again.onclick = () => this.retry(before);
    this.foot.replaceChildren(copy, again, make("span", "speed", this.speed()));
    if (this.toolCalls.length) {
      const send = make("button", "", "Send answers");
      send.onclick = () => {
        send.remove();
        const fields = [...this.calls.querySelectorAll("input")];
        this.answerCall(this.toolCalls.map((call, place) => ({ id: call.id, content: fields[place].value })));
      };
      this.calls.append(send);
    }
  }

  speed() {
    if (!this.usage) return "";
    const seconds = (performance.now() - this.began) / 1000;
    const tokens = this.usage.completion_tokens;
    return `${(tokens / seconds).toFixed(1)} tokens/s, ${tokens} tokens, first after ${((this.firstAt - this.began) / 1000).toFixed(2)} s`;
  }
}
