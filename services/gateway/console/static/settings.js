// The settings of requests, kept in the tab.

import { $ } from "./dom.js";

const SETTINGS = "millrace.settings";
const parameters = $("parameters");
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed", "top_k", "min_p", "reasoning_max_tokens",
  "repetition_penalty", "presence_penalty", "frequency_penalty"];
const EXAMPLE = [{ type: "function", function: { name: "get_weather", description: "The weather of a city, now.",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } } }];

/** The fields of a request that the settings ask for. Throws where the tools are not JSON. */
export function settingFields() {
  const fields = {};
  for (const name of NUMBERS) {
    const text = parameters.elements[name].value;
    if (text !== "") fields[name] = Number(text);
  }
  if (parameters.elements.thinking.value) fields.enable_thinking = parameters.elements.thinking.value === "on";
  const stop = parameters.elements.stop.value.split("\n").filter((line) => line !== "");
  if (stop.length) fields.stop = stop;
  const tools = readTools();
  if (tools) fields.tools = tools;
  return fields;
}

export const systemPrompt = () => parameters.elements.system.value.trim();

function readTools() {
  const text = $("tools").value.trim();
  if (!text) return null;
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are not JSON: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new Error("The tools must be a JSON list.");
  return tools.length ? tools : null;
}

function checkTools() {
  try {
    readTools();
    $("tools-problem").textContent = "";
  } catch (error) {
    $("tools-problem").textContent = error.message;
  }
}

export function startSettings() {
  parameters.addEventListener("submit", (event) => event.preventDefault());
  parameters.addEventListener("input", () => {
    checkTools();
    sessionStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(new FormData(parameters))));
  });
  parameters.addEventListener("reset", () => {
    sessionStorage.removeItem(SETTINGS);
    $("tools-problem").textContent = "";
  });
  $("tools-example").addEventListener("click", () => {
    $("tools").value = JSON.stringify(EXAMPLE, null, 2);
    $("tools").dispatchEvent(new Event("input", { bubbles: true }));
  });
  for (const [name, value] of Object.entries(JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}"))) {
    if (parameters.elements[name]) parameters.elements[name].value = value;
  }
}
