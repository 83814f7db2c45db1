// The endpoints, written from /openapi.json: what each takes, field by field, and how it answers.

import { make } from "./views.js";

const described = await (await fetch("/openapi.json")).json();
document.getElementById("version").textContent = described.info.version;

function named(schema) {
  return schema.$ref ? described.components.schemas[schema.$ref.split("/").pop()] : schema;
}

// A type in few words: `string | null`, `list of ChatMessage`, `"auto" | "none"`.
function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  const either = schema.anyOf ?? schema.oneOf;
  if (either) return either.map(kind).join(" | ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${kind(schema.items ?? {})}`;
  return schema.type ?? "anything";
}

function bounds(schema) {
  const inner = (schema.anyOf ?? []).find((one) => one.type !== "null") ?? schema;
  const spelt = { minimum: "≥", exclusiveMinimum: ">", maximum: "≤", exclusiveMaximum: "<", minLength: "length ≥", maxLength: "length ≤", minItems: "items ≥" };
  return Object.entries(spelt).filter(([key]) => key in inner).map(([key, sign]) => `${sign} ${inner[key]}`).join(", ");
}

function table(rows) {
  const body = make("table");
  for (const cells of rows) {
    const row = make("tr");
    row.append(...cells.map((text, place) => {
      const cell = make("td");
      cell.append(make(place === 0 ? "code" : "span", "", text));
      return cell;
    }));
    body.append(row);
  }
  return body;
}

// The fields of a body, and under it those of every object that it names.
function fields(schema, seen) {
  const rows = [], inner = new Set();
  const { properties = {}, required = [] } = named(schema);
  for (const [name, field] of Object.entries(properties)) {
    const more = [bounds(field), field.description, required.includes(name) ? "required" : ""].filter(Boolean).join("; ");
    rows.push([name, kind(field), more]);
    for (const found of JSON.stringify(field).matchAll(/"\$ref":"([^"]+)"/g)) inner.add(found[1]);
  }
  const parts = [table(rows)];
  for (const $ref of inner) {
    if (seen.has($ref)) continue;
    seen.add($ref);
    parts.push(make("div", "quiet", $ref.split("/").pop()), ...fields({ $ref }, seen));
  }
  return parts;
}

function endpoint(verb, path, operation) {
  const box = make("details"), head = make("summary");
  head.append(make("span", "verb", verb.toUpperCase()), make("code", "", path), make("span", "quiet", ` ${operation.summary ?? ""}`));
  box.append(head);
  box.ontoggle = () => {
    if (!box.open || box.children.length > 1) return;
    const asked = Object.values(operation.requestBody?.content ?? {})[0]?.schema;
    if (operation.parameters) box.append(table(operation.parameters.map((one) => [one.name, kind(one.schema), one.in])));
    if (asked) box.append(...fields(asked, new Set()));
    box.append(make("div", "quiet", "Answers"), table(Object.entries(operation.responses).map(([status, one]) => [status, one.description])));
  };
  return box;
}

const groups = new Map();
for (const [path, operations] of Object.entries(described.paths)) {
  for (const [verb, operation] of Object.entries(operations)) {
    const group = operation.tags?.[0] ?? "Other";
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(endpoint(verb, path, operation));
  }
}
for (const [group, boxes] of groups) document.getElementById("endpoints").append(make("h2", "", group), ...boxes);
