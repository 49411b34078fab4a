// OpenAI's own library: texts, streams, tools, forms, responses, embeddings, errors.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { MESSAGES, PERSON, URL, WEATHER } from "./shared.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: "sesame", maxRetries: 0 });
const ask = { model: "chatty", messages: MESSAGES, max_tokens: 24, temperature: 0 };

const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.deepEqual(models, ["tiny", "chatty"]);

const whole = await client.chat.completions.create(ask);
const said = whole.choices[0].message.content;
let streamed = "";
let usage = null;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const event of await client.chat.completions.create({ ...ask, ...options })) {
  streamed += event.choices[0]?.delta.content ?? "";
  usage = event.usage ?? usage;
}
assert.equal(streamed, said);
assert.deepEqual(usage.total_tokens, whole.usage.total_tokens);

const called = await client.chat.completions.create({
  ...ask,
  max_tokens: 200,
  tools: [WEATHER],
  tool_choice: "required",
});
assert.equal(called.choices[0].finish_reason, "tool_calls");
const call = called.choices[0].message.tool_calls[0];
assert.equal(call.function.name, "weather");
assert.ok(["Bergen", "Oslo"].includes(JSON.parse(call.function.arguments).town));

const formed = await client.chat.completions.create({
  ...ask,
  max_tokens: 200,
  response_format: { type: "json_schema", json_schema: { name: "person", schema: PERSON } },
});
assert.ok(Number.isInteger(JSON.parse(formed.choices[0].message.content).age));

const response = client.responses.stream({
  model: "chatty",
  input: MESSAGES,
  max_output_tokens: 24,
  temperature: 0,
});
let pieces = "";
response.on("response.output_text.delta", (event) => (pieces += event.delta));
assert.equal((await response.finalResponse()).output_text, pieces);
assert.equal(pieces, said);

const vectors = await client.embeddings.create({ model: "tiny", input: ["a", "bc"] });
for (const { embedding } of vectors.data) {
  const square = embedding.reduce((sum, x) => sum + x * x, 0);
  assert.ok(Math.abs(square - 1) < 1e-4);
}

await assert.rejects(
  client.chat.completions.create({ ...ask, temperature: -1 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
);
const wrong = new OpenAI({ baseURL: URL, apiKey: "no", maxRetries: 0 });
await assert.rejects(wrong.models.list(), OpenAI.AuthenticationError);
console.log(said);
