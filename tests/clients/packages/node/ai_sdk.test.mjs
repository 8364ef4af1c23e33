// The AI SDK: text, reasoning, objects, tools; whole and streamed.
import assert from "node:assert/strict";
import test from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateObject, generateText, streamObject, streamText } from "ai";
import { z } from "zod";

import { runToolLoop, weather } from "./ai_sdk_tools.mjs";
import { API_KEY, BASE_URL, FACT, FACT_QUESTION, MODEL, Report, WEATHER_QUESTION } from "./asks.mjs";

const provider = createOpenAICompatible({ name: "millrace", baseURL: BASE_URL, apiKey: API_KEY, includeUsage: true,
  supportsStructuredOutputs: true });
const ask = (prompt, fields = {}) => ({ model: provider(MODEL), prompt, maxRetries: 0, maxOutputTokens: 400, ...fields });

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

test("generateObject by zod's patterns with look-around", async () => {
  const schema = z.object({ host: z.hostname().max(12), lasts: z.iso.duration().max(8) });
  assert.match(JSON.stringify(z.toJSONSchema(schema)), /\(\?=.*\(\?!/);
  const { object } = await generateObject(ask(WEATHER_QUESTION, { schema }));
  schema.parse(object);
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

test("a tool's loop, streamed", () => runToolLoop(ask));
