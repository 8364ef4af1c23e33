// The AI SDK: text, reasoning, objects, tools; whole and streamed.
import assert from "node:assert/strict";
import test from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";

import { API_KEY, BASE_URL, City, FACT, FACT_QUESTION, MODEL, Report, WEATHER_QUESTION } from "./asks.mjs";

const provider = createOpenAICompatible({ name: "millrace", baseURL: BASE_URL, apiKey: API_KEY, includeUsage: true,
  supportsStructuredOutputs: true });
const ask = (prompt, fields = {}) => ({ model: provider(MODEL), prompt, maxRetries: 0, maxOutputTokens: 400, ...fields });
const weather = (asked) => ({ get_weather: tool({ description: "Current weather", inputSchema: City,
  execute: async ({ city }) => (asked.push(city), `It is sunny in ${city}.`) }) });

test("generateText and its reasoning", async () => {
  const { text, reasoningText, usage } = await generateText(ask(FACT_QUESTION));
  assert.equal(text, FACT);
  assert.ok(reasoningText);
  assert.ok(usage.outputTokens > 0);
});

test("streamText", async () => {
  const kinds = new Set(), result = streamText(ask(FACT_QUESTION));
  for await (const part of result.fullStream) kinds.add(part.type);
  assert.equal(await result.text, FACT);
  for (const kind of ["reasoning-delta", "text-delta", "finish"]) assert.ok(kinds.has(kind), kind);
  assert.ok((await result.usage).outputTokens > 0);
});

test("generateObject", async () => {
  const { object } = await generateObject(ask(WEATHER_QUESTION, { schema: Report }));
  Report.parse(object);
});

test("generateObject of a choice", async () => {
  const { object } = await generateObject(ask(WEATHER_QUESTION, { output: "enum", enum: ["sunny", "rainy"] }));
  assert.ok(["sunny", "rainy"].includes(object));
});

test("streamObject", async () => {
  const result = streamObject(ask(WEATHER_QUESTION, { schema: Report }));
  for await (const part of result.partialObjectStream) assert.equal(typeof part, "object");
  Report.parse(await result.object);
});

test("an object as a text's output", async () => {
  const { output } = await generateText(ask(WEATHER_QUESTION, { output: Output.object({ schema: Report }) }));
  Report.parse(output);
});

for (const toolChoice of ["auto", "required", { type: "tool", toolName: "get_weather" }])
  test(`a tool, ${JSON.stringify(toolChoice)}`, async () => {
    const asked = [];
    const { toolCalls } = await generateText(ask(WEATHER_QUESTION, { tools: weather(asked), toolChoice }));
    assert.deepEqual(toolCalls.map((call) => call.input), [{ city: "Paris" }]);
    assert.deepEqual(asked, ["Paris"]);
  });

test("a tool's loop, streamed", async () => {
  const asked = [], errors = [];
  const result = streamText(ask(WEATHER_QUESTION, { tools: weather(asked), stopWhen: stepCountIs(3), onError: ({ error }) => errors.push(error) }));
  await result.consumeStream();
  assert.deepEqual(errors, []);
  assert.equal(asked[0], "Paris");
  assert.ok((await result.steps).length >= 2);
});
