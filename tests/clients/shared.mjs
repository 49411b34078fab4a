// What the clients in JavaScript ask with; `node FILE http://HOST:PORT/v1`.
export const URL = process.argv[2];
export const MESSAGES = [{ role: "user", content: "you" }];
const object = (properties) => ({
  type: "object",
  properties,
  required: Object.keys(properties),
  additionalProperties: false,
});
export const TOWN = object({ town: { enum: ["Bergen", "Oslo"] } });
export const PERSON = object({
  name: { type: "string", maxLength: 9 },
  age: { type: "integer", minimum: 0, maximum: 150 },
});
export const WEATHER = {
  type: "function",
  function: { name: "weather", description: "Tells it.", parameters: TOWN },
};
