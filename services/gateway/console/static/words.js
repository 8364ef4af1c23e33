// Words for numbers, times and errors. Pure.

export const number = (n) => (n >= 100 ? Math.round(n).toLocaleString("en") : String(Math.round(n * 10) / 10));
export const age = (s) => (s < 60 ? `${Math.floor(s)} s` : s < 3600 ? `${Math.floor(s / 60)} min` : s < 86400 ? `${Math.floor(s / 3600)} h` : `${Math.floor(s / 86400)} d`);
export const seconds = (s) => (s < 0.0995 ? `${number(1000 * s)} ms` : s < 9.95 ? `${s.toFixed(2)} s` : s < 100 ? `${s.toFixed(1)} s` : age(s));
export const megabytes = (bytes) => `${number(bytes / 1e6)} MB`;
export const count = (n, noun, many = `${noun}s`) => `${n} ${n === 1 ? noun : many}`;

const HEADLINES = {
  0: "The server cannot be reached.",
  400: "The server does not accept this request.",
  401: "This server needs an API key.",
  404: "The server has nothing of this answer any more.",
  408: "The request took too long to reach the server.",
  409: "This request was sent before with other words.",
  413: "The message is too large for the server.",
  429: "The server is busy. Try again in a moment.",
  503: "The server cannot answer now. Try again in a moment.",
  504: "The answer took too long, and the server ended it.",
};

/** What happened, for who has never heard of a status. */
export function headline(status) {
  return HEADLINES[status] ?? (status >= 500 ? "The server failed to answer." : "The server refused the request.");
}
