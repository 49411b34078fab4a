"""LangChain: texts, streams, objects of a schema, tools, embeddings."""

import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, Field

WHERE = {"base_url": sys.argv[1], "api_key": "sesame", "max_retries": 0}
HOW = {**WHERE, "model": "chatty", "temperature": 0}


class Person(BaseModel):
    """Somebody; of what else there may be, an untrained model finds no end."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=9)
    age: int = Field(ge=0, le=150)


class Place(BaseModel):
    """Where the weather is."""

    far: bool


@tool(args_schema=Place)
def weather(far: bool) -> str:
    """Tells it."""
    return f"rain {far}"


short, long = ChatOpenAI(**HOW, max_tokens=24), ChatOpenAI(**HOW, max_tokens=200)
said = short.invoke("you").content
assert "".join(piece.content for piece in short.stream("you")) == said
assert [answer.content for answer in short.batch(["you", "you"])] == [said, said]
responses = ChatOpenAI(**HOW, max_tokens=24, use_responses_api=True)
assert responses.invoke("you").text == said

for method in ("json_schema", "function_calling"):
    found = long.with_structured_output(Person, method=method).invoke("you")
    assert 0 <= found.age <= 150, found

called = long.bind_tools([weather], tool_choice="any", strict=True).invoke("you")
(call,) = called.tool_calls
assert weather.invoke(call).content in ("rain True", "rain False")
talk = [("user", "you"), called, weather.invoke(call)]
assert short.invoke(talk).response_metadata["finish_reason"] in ("stop", "length")

text = OpenAI(**WHERE, model="tiny", temperature=0, max_tokens=12).invoke("Once")
assert isinstance(text, str)
# It sends ids of OpenAI's own tokens unless it is told not to.
embed = OpenAIEmbeddings(**WHERE, model="tiny", check_embedding_ctx_length=False)
assert len(embed.embed_documents(["a", "bc"])) == 2
print(said)
