// openai-node with zod: parse, streams, strict tools and runTools.
import assert from "node:assert/strict";
import test from "node:test";

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";

import { API_KEY, BASE_URL, City, FACT, FACT_QUESTION, MODEL, Report, WEATHER_QUESTION } from "./asks.mjs";

const chat = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0 }).chat.completions;
const ask = (content, fields = {}) => ({ model: MODEL, messages: [{ role: "user", content }], max_tokens: 400, ...fields });
const named = { type: "function", function: { name: "get_weather" } };
const tools = () => [zodFunction({ name: "get_weather", description: "Current weather", parameters: City })];

test("an answer and its reasoning", async () => {
  const { message } = (await chat.create(ask(FACT_QUESTION))).choices[0];
  assert.equal(message.content, FACT);
  assert.ok(message.reasoning_content);
});

test("a stream", async () => {
  let text = "", last;
  for await (last of await chat.create(ask(FACT_QUESTION, { stream: true, stream_options: { include_usage: true } })))
    text += last.choices[0]?.delta.content ?? "";
  assert.equal(text, FACT);
  assert.ok(last.usage.completion_tokens > 0);
});

test("the stream helper", async () => {
  assert.equal(await chat.stream(ask(FACT_QUESTION)).finalContent(), FACT);
});

test("parse gives the type", async () => {
  const reply = await chat.parse(ask(WEATHER_QUESTION, { response_format: zodResponseFormat(Report, "report") }));
  Report.parse(reply.choices[0].message.parsed);
});

test("the stream helper parses", async () => {
  const stream = chat.stream(ask(WEATHER_QUESTION, { response_format: zodResponseFormat(Report, "report") }));
  Report.parse((await stream.finalChatCompletion()).choices[0].message.parsed);
});

for (const tool_choice of ["auto", "required", named])
  test(`a strict tool, ${JSON.stringify(tool_choice)}`, async () => {
    const reply = await chat.parse(ask(WEATHER_QUESTION, { tools: tools(), tool_choice }));
    const calls = reply.choices[0].message.tool_calls.map((call) => call.function.parsed_arguments);
    assert.deepEqual(calls, [{ city: "Paris" }]);
  });

test("runTools", async () => {
  const asked = [];
  const get_weather = zodFunction({ name: "get_weather", description: "Current weather", parameters: City,
    function: ({ city }) => (asked.push(city), `It is sunny in ${city}.`) });
  const final = await chat.runTools(ask(WEATHER_QUESTION, { tools: [get_weather] }), { maxChatCompletions: 3 }).finalContent();
  assert.equal(asked[0], "Paris");
  assert.ok(final !== null);
});

test("an error has its status and field", async () => {
  await assert.rejects(chat.create(ask(FACT_QUESTION, { temperature: -1 })), { status: 400, param: "temperature" });
});
