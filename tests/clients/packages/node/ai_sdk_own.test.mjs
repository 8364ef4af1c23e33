// The AI SDK's own models of OpenAI (the Responses API) and of Anthropic: text, reasoning, objects, tools, an image.
import assert from "node:assert/strict";
import test from "node:test";

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, streamText } from "ai";

import { runToolLoop } from "./ai_sdk_tools.mjs";
import { API_KEY, BASE_URL, FACT, FACT_QUESTION, MODEL, Report, WEATHER_QUESTION } from "./asks.mjs";

const options = { baseURL: BASE_URL, apiKey: API_KEY };
const models = { responses: createOpenAI(options)(MODEL), messages: createAnthropic(options)(MODEL) };
// A small white picture.
const WHITE = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR4nGP8//8/AzbAhFV00EoAAFbUAw037MyjAAAAAElFTkSuQmCC";

for (const store of [true, false]) {
  const openai = { forceReasoning: true, reasoningSummary: "auto", store };

  test(`responses: reasoning by its summary, and the next turn, ${store ? "stored" : "not stored"}`, async () => {
    const asked = { model: models.responses, maxRetries: 0, maxOutputTokens: 400, providerOptions: { openai } };
    const question = { role: "user", content: FACT_QUESTION };
    const whole = await generateText({ ...asked, messages: [question] });
    assert.ok(whole.reasoningText);
    const streamed = streamText({ ...asked, messages: [question] });
    let told = "";
    for await (const part of streamed.fullStream) if (part.type === "reasoning-delta") told += part.text;
    assert.ok(told.length > 0);
    assert.equal(await streamed.reasoningText, told);
    const { messages } = await streamed.response;
    const next = await generateText({ ...asked, messages: [question, ...messages, question] });
    assert.ok(next.text);
  });
}

for (const [name, model] of Object.entries(models)) {
  const ask = (prompt, fields = {}) => ({ model, prompt, maxRetries: 0, maxOutputTokens: 400, ...fields });

  test(`${name}: text`, async () => {
    const { text, usage, warnings } = await generateText(ask(FACT_QUESTION));
    assert.equal(text, FACT);
    assert.ok(usage.outputTokens > 0);
    assert.deepEqual(warnings, []);
  });

  test(`${name}: streamed text`, async () => {
    const kinds = new Set(), result = streamText(ask(FACT_QUESTION));
    for await (const part of result.fullStream) kinds.add(part.type);
    assert.equal(await result.text, FACT);
    for (const kind of ["reasoning-start", "text-delta", "finish"]) assert.ok(kinds.has(kind), kind);
    assert.ok(!kinds.has("error"));
  });

  test(`${name}: an object`, async () => {
    const { object } = await generateObject(ask(WEATHER_QUESTION, { schema: Report }));
    Report.parse(object);
  });

  test(`${name}: a tool's loop, streamed`, () => runToolLoop(ask));

  test(`${name}: an image and a file`, async () => {
    const content = [{ type: "text", text: "What is this?" }, { type: "image", image: WHITE },
      { type: "file", data: WHITE, mediaType: "image/png", filename: "a.png" }];
    const plain = await generateText(ask("What is this?", { maxOutputTokens: 32 }));
    const { usage } = await generateText(ask(undefined, { messages: [{ role: "user", content }], maxOutputTokens: 32 }));
    assert.ok(usage.inputTokens > plain.usage.inputTokens);
  });
}
