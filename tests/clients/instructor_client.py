"""instructor: objects of a class, by tools, by a schema, in a text, and streamed."""

import sys

import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field


class Person(BaseModel):
    """Somebody; of what else there may be, an untrained model finds no end."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=9)
    age: int = Field(ge=0, le=150)


client = openai.OpenAI(base_url=sys.argv[1], api_key="sesame", max_retries=0)
you = [{"role": "user", "content": "you"}]
ask = {"model": "chatty", "messages": you, "max_tokens": 200, "max_retries": 0}
Mode = instructor.Mode
for mode in (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA):
    ours = instructor.from_openai(client, mode=mode)
    person = ours.chat.completions.create(**ask, response_model=Person)
    assert 0 <= person.age <= 150, (mode, person)
    grown = [*ours.chat.completions.create_partial(**ask, response_model=Person)]
    assert 0 <= grown[-1].age <= 150, (mode, grown)
assert len(grown) > 1  # what stands in a text grows; calls come whole
done = client.chat.completions.create(
    model="chatty", messages=you, max_tokens=24, temperature=0
)
print(done.choices[0].message.content)
