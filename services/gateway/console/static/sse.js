// Server-sent events, and what the chunks in them add to a turn. Pure.

/** Each event as {id, data}; `id` is null where it has none. A line that begins with a colon is a sign of life. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const event = read(part);
      if (event.data) yield event;
    }
  }
}

function read(part) {
  const lines = part.split("\n");
  const field = (name) => lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trimStart());
  return { id: field("id").at(-1) ?? null, data: field("data").join("\n") };
}

/** A turn that an answer will fill. `asked`: how it was asked for, from which the same request can be made again. */
export function emptyAnswer(asked) {
  return { role: "assistant", reasoning: "", content: "", calls: [], failure: null, stopped: false, ended: false, asked, stats: emptyStats() };
}

export function emptyStats() {
  return { prompt: null, cached: 0, tokens: null, thought: 0, first: null, last: null, total: null, reason: null };
}

/** Adds a chunk to a turn, `since` seconds after the request was sent. */
export function addChunk(turn, chunk, since) {
  if (chunk.usage) addUsage(turn.stats, chunk.usage);
  for (const { delta, finish_reason: reason } of chunk.choices) {
    turn.reasoning += delta.reasoning_content ?? "";
    turn.content += delta.content ?? "";
    for (const piece of delta.tool_calls ?? []) addCall(turn.calls, piece);
    if (delta.reasoning_content || delta.content || delta.tool_calls) {
      turn.stats.first ??= since;
      turn.stats.last = since;
    }
    if (reason) turn.stats.reason = reason;
  }
}

function addUsage(stats, usage) {
  const { prompt_tokens: prompt, completion_tokens: tokens } = usage;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  Object.assign(stats, { prompt, tokens, cached, thought: usage.completion_tokens_details?.reasoning_tokens ?? 0 });
}

function addCall(calls, piece) {
  const call = (calls[piece.index] ??= { id: piece.id, name: piece.function.name, args: "" });
  call.args += piece.function.arguments ?? "";
}

/** Takes back what a request has added, so that its stream can be read from its beginning. */
export function rewind(turn) {
  const { reasoning, content } = turn.asked.base;
  Object.assign(turn, { reasoning: turn.reasoning.slice(0, reasoning), content: turn.content.slice(0, content), calls: [] });
  Object.assign(turn.stats, { first: null, last: null, reason: null });
  turn.asked.last = null;
}
