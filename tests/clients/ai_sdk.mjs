// The AI SDK: texts, streams, objects of a schema, tools, embeddings, by two providers.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import * as ai from "ai";
import { MESSAGES, PERSON, TOWN, URL } from "./shared.mjs";

const compatible = createOpenAICompatible({
  name: "ours",
  baseURL: URL,
  apiKey: "sesame",
  supportsStructuredOutputs: true,
  includeUsage: true,
});
const official = createOpenAI({ baseURL: URL, apiKey: "sesame" });
const common = { maxRetries: 0, temperature: 0, messages: MESSAGES };
let said = null;
for (const model of [compatible("chatty"), official.chat("chatty"), official("chatty")]) {
  const short = { ...common, model, maxOutputTokens: 24 };
  const whole = await ai.generateText(short);
  said ??= whole.text;
  assert.equal(whole.text, said);
  const stream = ai.streamText({ ...short, onError: ({ error }) => { throw error; } });
  let pieces = "";
  for await (const piece of stream.textStream) pieces += piece;
  assert.equal(pieces, said);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);

  const long = { ...common, model, maxOutputTokens: 200 };
  const output = ai.Output.object({ schema: ai.jsonSchema(PERSON) });
  const person = (await ai.generateText({ ...long, output })).output;
  assert.ok(Number.isInteger(person.age));

  const tool = ai.tool({
    description: "Tells it.",
    inputSchema: ai.jsonSchema(TOWN),
    execute: async ({ town }) => `rain in ${town}`,
  });
  const called = await ai.generateText({
    ...long,
    tools: { weather: tool },
    toolChoice: "required",
  });
  assert.equal(called.toolCalls[0].toolName, "weather");
  assert.match(called.toolResults[0].output, /^rain in (Bergen|Oslo)$/);
}

const embedding = compatible.textEmbeddingModel("tiny");
const { embeddings } = await ai.embedMany({ model: embedding, values: ["a", "bc"] });
assert.equal(embeddings.length, 2);
console.log(said);
