// Requests, made from turns. `asked` is what a turn keeps of its request: all but the conversation, which is in the turns
// before it, so that the same request can be made again.

const LEFT_OUT = { image: "[picture left out]", video: "[video left out]" };

/** The body of the request that `asked` describes, with `turns` before its answer, and what that has said so far. */
export async function bodyOf(asked, turns, answer = null) {
  const messages = (await Promise.all(turns.map(messageOf))).flat();
  if (asked.system) messages.unshift({ role: "system", content: asked.system });
  const body = { model: asked.model, messages, stream: true, stream_options: { include_usage: true }, ...asked.fields };
  if (!asked.base.reasoning && !asked.base.content) return body;
  const reasoning = answer.reasoning.slice(0, asked.base.reasoning), content = answer.content.slice(0, asked.base.content);
  messages.push({ role: "assistant", content, ...(reasoning ? { reasoning_content: reasoning } : {}) });
  return { ...body, continue_final_message: true };
}

/** A turn in the API's terms, as a list: an answer that failed before its first word is left out. */
async function messageOf(turn) {
  if (turn.role === "tool") return [{ role: "tool", tool_call_id: turn.call, name: turn.name, content: turn.text }];
  if (turn.role === "assistant") return answerMessage(turn);
  if (!turn.media.length) return [{ role: "user", content: turn.text }];
  const parts = await Promise.all(turn.media.map(partOf));
  return [{ role: "user", content: [...parts, ...(turn.text ? [{ type: "text", text: turn.text }] : [])] }];
}

function answerMessage({ content, calls }) {
  if (!content && !calls.length) return [];
  const made = calls.map(({ id, name, args }) => ({ id, type: "function", function: { name, arguments: args } }));
  return [{ role: "assistant", content, ...(made.length ? { tool_calls: made } : {}) }];
}

async function partOf({ kind, blob, out }) {
  if (out || !blob) return { type: "text", text: LEFT_OUT[kind] };
  return { type: `${kind}_url`, [`${kind}_url`]: { url: await dataUrl(blob) } };
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

export function curl(url, body, needsKey) {
  const key = needsKey ? ` \\\n  -H "Authorization: Bearer $MILLRACE_API_KEY"` : "";
  return `curl -N ${url} \\\n  -H 'Content-Type: application/json'${key} \\\n  --data-binary @- <<'JSON'\n${JSON.stringify(body, null, 2)}\nJSON\n`;
}
