// How messages look.

export function make(tag, kind, text) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
}

// A file as a content part: images as image_url, sounds as input_audio, videos as video_url.
export async function attachment(file) {
  const url = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(file);
  });
  const kind = file.type.split("/")[0];
  const part = kind === "audio"
    ? { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format: file.name.split(".").pop() } }
    : { type: `${kind}_url`, [`${kind}_url`]: { url } };
  return { name: file.name, kind, url, part };
}

export function userView(text, files) {
  const root = make("section", "user");
  for (const file of files) {
    const shown = make("div", "media");
    if (file.kind === "image") shown.append(Object.assign(make("img"), { src: file.url, alt: file.name }));
    else shown.append(make("span", "quiet", file.name));
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

  add({ thinking, text, call, usage, ending, warnings }) {
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
    if (call) this.addCall(call);
    if (usage) this.usage = usage;
    if (ending === "length") this.note("The reply reached its limit.");
    if (ending === "loop") this.note("The reply repeated itself and was ended.");
    for (const warning of warnings ?? []) this.note(warning);
  }

  addCall(call) {
    this.toolCalls.push({ id: call.id, type: "function", function: call.function });
    const box = make("div", "call");
    box.append(make("b", "", call.function.name), make("pre", "", JSON.stringify(JSON.parse(call.function.arguments), null, 2)));
    box.append(Object.assign(make("input"), { placeholder: "Answer for the tool", ariaLabel: `Answer for ${call.function.name}` }));
    this.calls.append(box);
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
