"""litellm: texts, streams, at once and one after the other, tools, embeddings."""

import asyncio
import json
import sys

import litellm

litellm.suppress_debug_info = True
WHERE = {"api_base": sys.argv[1], "api_key": "sesame", "num_retries": 0}
YOU = [{"role": "user", "content": "you"}]
ASK = {**WHERE, "model": "openai/chatty", "messages": YOU, "temperature": 0}
TOWN = {
    "type": "object",
    "properties": {"town": {"enum": ["Bergen", "Oslo"]}},
    "required": ["town"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": TOWN}}

said = litellm.completion(**ASK, max_tokens=24).choices[0].message.content
stream = litellm.completion(**ASK, max_tokens=24, stream=True)
assert "".join(event.choices[0].delta.content or "" for event in stream) == said


async def several():
    """Asks three at once."""
    asked = [litellm.acompletion(**ASK, max_tokens=24) for _ in range(3)]
    return [done.choices[0].message.content for done in await asyncio.gather(*asked)]


assert asyncio.run(several()) == [said] * 3
done = litellm.completion(
    **ASK, max_tokens=200, tools=[WEATHER], tool_choice="required"
)
(call,) = done.choices[0].message.tool_calls
assert json.loads(call.function.arguments)["town"] in ("Bergen", "Oslo")
text = litellm.text_completion(
    **{**WHERE, "model": "text-completion-openai/tiny", "prompt": "Once"},
    **{"max_tokens": 12, "temperature": 0},
)
assert text.usage.completion_tokens > 0
vectors = litellm.embedding(
    **WHERE, model="openai/tiny", input=["a", "bc"], encoding_format="float"
)
assert len(vectors.data) == 2
try:
    litellm.completion(**ASK, max_tokens=-3)
except litellm.BadRequestError as error:
    assert "max_tokens" in str(error), error
else:
    raise AssertionError("a request that cannot be was answered")
print(said)
