// The server: asked as any OpenAI client asks it.

import { settings } from "./settings.js";

function headers() {
  const { key } = settings;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try { ({ message } = (await response.json()).error); } catch { /* no JSON */ }
  if (response.status === 401) message += ": put it into the settings";
  const after = response.headers.get("Retry-After");
  throw new Error(after ? `${message} (again in ${after} s)` : message);
}

export async function models() {
  const response = await checked(await fetch("v1/models", { headers: headers() }));
  return (await response.json()).data;
}

async function send(path, body, signal) {
  const sent = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  return checked(await fetch(path, sent));
}

export async function post(path, body, signal) {
  return (await send(path, body, signal)).json();
}

// Calls `hear` with the choice of every event until the stream ends; returns its usage.
export async function stream(path, body, signal, hear) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send(path, asked, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", usage = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server ended the answer in the middle");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return usage;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      if (event.choices.length) hear(event.choices[0]);
    }
  }
}
