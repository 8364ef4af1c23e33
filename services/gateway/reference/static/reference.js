// Shows /openapi.json: each route, and each type with its fields. Everything is text; nothing becomes markup.
"use strict";

const BASE = "#/components/schemas/";
const by = (id) => document.getElementById(id);

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function link(name) {
  return element("a", { href: `#${name}`, textContent: name });
}

// A schema as nodes: the names of types lead to them.
function typed(schema) {
  if (schema.$ref) return [link(schema.$ref.slice(BASE.length))];
  const choices = schema.anyOf || schema.oneOf;
  if (choices) return choices.flatMap((each, index) => [...(index ? [" or "] : []), ...typed(each)]);
  if (schema.enum) return [schema.enum.map((each) => JSON.stringify(each)).join(" or ")];
  if (schema.const !== undefined) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...(schema.items ? typed(schema.items) : ["anything"])];
  if (schema.type === "object" && schema.additionalProperties && schema.additionalProperties !== true) {
    return ["object of ", ...typed(schema.additionalProperties)];
  }
  return [schema.type || "anything"];
}

function bounds(schema) {
  const names = { minimum: "at least", maximum: "at most", exclusiveMinimum: "above", maxLength: "characters at most" };
  return Object.entries(names).filter(([key]) => key in schema).map(([key, words]) => `${words} ${schema[key]}`).join(", ");
}

function row(name, schema, required) {
  const fallback = "default" in schema ? JSON.stringify(schema.default) : required ? "required" : "";
  return element("tr", {},
    element("th", { scope: "row" }, element("code", { textContent: name })),
    element("td", {}, ...typed(schema)),
    element("td", { textContent: fallback }),
    element("td", { textContent: [bounds(schema), schema.description].filter(Boolean).join("; ") }));
}

function type(name, schema) {
  const required = new Set(schema.required);
  const head = ["field", "type", "default", ""].map((text) => element("th", { scope: "col", textContent: text }));
  const rows = Object.entries(schema.properties || {}).map(([field, each]) => row(field, each, required.has(field)));
  const body = rows.length
    ? element("div", { className: "scroll", tabIndex: 0 },
        element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)))
    : element("p", {}, ...typed(schema));
  return element("article", { id: name }, element("h3", { textContent: name }),
    element("p", { className: "soft", textContent: schema.description || "" }), body);
}

function curl(method, path, takesBody) {
  const body = takesBody ? " -H 'Content-Type: application/json' -d '{...}'" : "";
  return `curl -X ${method.toUpperCase()} ${location.origin}${path}${body}`;
}

function operation(path, method, described) {
  const schema = described.requestBody?.content?.["application/json"]?.schema;
  return element("article", {},
    element("h3", {}, element("span", { className: "method", textContent: method }), " ", element("code", { textContent: path })),
    element("p", { className: "soft", textContent: described.description || described.summary || "" }),
    ...(schema ? [element("p", {}, "Body: ", ...typed(schema))] : []),
    element("pre", { textContent: curl(method, path, Boolean(schema)) }));
}

function show(api) {
  const operations = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, described]) => operation(path, method, described)));
  const types = Object.entries(api.components?.schemas || {}).map(([name, schema]) => type(name, schema));
  by("operations").replaceChildren(element("h2", { textContent: "Routes" }), ...operations);
  by("schemas").replaceChildren(element("h2", { textContent: "Types" }), ...types);
  by("status").hidden = by("sign-in").hidden = true;
  if (location.hash) by(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

async function load(key) {
  const reply = await fetch("/openapi.json", key ? { headers: { Authorization: `Bearer ${key}` } } : {});
  if (reply.status === 401) {
    by("sign-in").hidden = false;
    by("status").textContent = key ? "That key is not valid." : "";
  } else if (!reply.ok) {
    by("status").textContent = `The server answered ${reply.status}.`;
  } else {
    show(await reply.json());
  }
}

function begin(key) {
  load(key).catch((error) => { by("status").textContent = `The server cannot be reached: ${error.message}`; });
}

by("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(by("key").value.trim());
});
begin("");
