// A tool of the AI SDK, and a loop in which the model calls it.
import assert from "node:assert/strict";

import { stepCountIs, streamText, tool } from "ai";

import { City, WEATHER_QUESTION } from "./asks.mjs";

export const weather = (asked) => ({ get_weather: tool({ description: "Current weather", inputSchema: City,
  execute: async ({ city }) => (asked.push(city), `It is sunny in ${city}.`) }) });

export async function runToolLoop(ask) {
  const asked = [], errors = [];
  const result = streamText(ask(WEATHER_QUESTION, { tools: weather(asked), stopWhen: stepCountIs(3), onError: ({ error }) => errors.push(error) }));
  await result.consumeStream();
  assert.deepEqual(errors, []);
  assert.equal(asked[0], "Paris");
  assert.ok((await result.steps).length >= 2);
}
