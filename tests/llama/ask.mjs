// llama.cpp on a GGUF file: `node ask.mjs FILE QUESTIONS`, a JSON file; answers as JSON.
//
// lines: texts, answered by their tokens. prompts: token ids, answered by the `most`
// likeliest tokens behind them, up to one of `ends`. windows: token ids, answered by the
// sum of the log-likelihoods of all but the first.
import fs from "node:fs";
import { getLlama } from "node-llama-cpp";

const { lines, prompts, most, ends, windows } = JSON.parse(fs.readFileSync(process.argv[3]));
const llama = await getLlama({ gpu: false, build: "never", maxThreads: 2, logLevel: "error" });
const model = await llama.loadModel({ modelPath: process.argv[2] });

async function fresh(size, work) {
  const exact = { experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32" };
  const shape = { contextSize: size, batchSize: size, threads: 2 };
  const context = await model.createContext({ ...shape, ...exact });
  const found = await work(context.getSequence());
  await context.dispose();
  return found;
}

async function likeliest(ids) {
  const found = [];
  return fresh(ids.length + most + 8, async (sequence) => {
    for await (const token of sequence.evaluate(ids, { temperature: 0 })) {
      if (ends.includes(token)) break;
      if (found.push(token) === most) break;
    }
    return found;
  });
}

async function likelihood(ids) {
  const plain = { temperature: 1, topK: 0, topP: 1, minP: 0 };
  const ask = { generateNext: { probabilities: true, options: plain } };
  return fresh(ids.length + 8, async (sequence) => {
    const told = await sequence.controlledEvaluate(ids.slice(0, -1).map((id) => [id, ask]));
    const logp = told.map(({ next }, i) => Math.log(next.probabilities.get(ids[i + 1])));
    return logp.reduce((sum, x) => sum + x, 0);
  });
}

const answer = { tokens: lines.map((line) => model.tokenize(line, false)), texts: [], logp: [] };
for (const ids of prompts) answer.texts.push(await likeliest(ids));
for (const ids of windows) answer.logp.push(await likelihood(ids));
process.stdout.write(JSON.stringify(answer), () => process.exit(0));
