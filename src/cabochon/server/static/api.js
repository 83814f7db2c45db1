// Speaks to the server: the list of models, and one streamed chat completion.

export class Fault extends Error {}

function headers(key) {
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function checked(answer) {
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Fault(body?.error?.message ?? `The server answered with status ${answer.status}.`);
}

export async function firstModel(key) {
  const answer = await checked(await fetch("/v1/models", { headers: headers(key) }));
  return (await answer.json()).data[0];
}

// Yields { thinking, text, call, place, ending, usage, warnings } as they come; a call again with every piece of it.
export async function* chat(body, key, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await checked(await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(key), body: JSON.stringify(asked), signal,
  }));
  const calls = [];
  for await (const event of events(answer.body)) {
    if (event.error) throw new Fault(event.error.message);
    if (event.usage) yield { usage: event.usage };
    const choice = event.choices[0];
    if (!choice) continue;
    if (choice.delta.reasoning) yield { thinking: choice.delta.reasoning };
    if (choice.delta.content) yield { text: choice.delta.content };
    for (const piece of choice.delta.tool_calls ?? []) {
      const place = piece.index;
      calls[place] ??= { id: piece.id, type: "function", function: { name: piece.function.name, arguments: "" } };
      calls[place].function.arguments += piece.function.arguments;
      yield { call: calls[place], place };
    }
    if (choice.finish_reason) yield { ending: choice.stop_reason ?? choice.finish_reason, warnings: choice.warnings ?? [] };
  }
}

async function* events(stream) {
  const decoder = new TextDecoder();
  let held = "";
  for (const reader = stream.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
