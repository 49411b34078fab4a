"""Another model as the judge of answers, behind an OpenAI-compatible endpoint.

Works with Ollama, llama.cpp, vLLM, OpenAI and our own server: one POST to
URL/chat/completions for each answer. Replies are kept on disk by the hash of the
request, so that a second run asks only what is new.
"""

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import files

REPLY_BYTES = 1 << 20  # the most that is read of a reply
FIELDS = ("question", "reference", "answer")
# A number from 0 to 100 alone, or as "Score: 85/100." says it; no other prose.
NUMBER = re.compile(r"(?:score|rating)?\s*[:=]?\s*(\d+(?:\.\d+)?)\s*(?:/\s*100)?\.?")


class Judge(NamedTuple):
    """Who judges and how it is asked.

    Attributes:
      url: up to and with /v1.
      model: the name that the endpoint knows it by.
      prompt: a text with {question}, {reference} and {answer} in it, which asks for a
        number from 0 to 100.
      key: the API key, or "" for none. It is sent and never written anywhere.
      cache: the folder of replies; None keeps none.
      tries: how often a request is sent before the judge counts as down.
      wait_s: before the second try; doubled for each one after.
      timeout_s: the longest wait for a reply.
    """

    url: str
    model: str
    prompt: str
    key: str
    cache: Path | None
    tries: int
    wait_s: float
    timeout_s: float


class Verdict(NamedTuple):
    """A judge's number, None where it wrote prose instead; and what it wrote."""

    score: float | None
    text: str


def check(judge: Judge) -> None:
    """Raises ValueError when a judge cannot be asked as described."""
    if not judge.url.startswith(("http://", "https://")):
        raise ValueError(
            f"the judge's address is {judge.url!r}: it begins with http:// or https:// "
            "and usually ends with /v1, e.g. http://localhost:11434/v1"
        )
    if "@" in judge.url.split("//", 1)[1].split("/")[0]:
        raise ValueError(
            "the judge's address holds a name or password, which would stand in "
            "messages and in the cache; see --judge_key_env"
        )
    if "{answer}" not in judge.prompt:
        raise ValueError("the judge's prompt has no {answer} in it")
    if judge.tries < 1 or judge.wait_s < 0 or judge.timeout_s <= 0:
        raise ValueError("the judge needs one try or more and a time limit above 0")


def verdicts(
    judge: Judge, answered: Sequence[dict[str, Any]], *, show: Callable[[int], None]
) -> list[Verdict]:
    """Returns the judge's verdict on every answer.

    Args:
      judge: who is asked.
      answered: for each answer its question, reference and answer.
      show: is told how many more are judged.

    Raises:
      ValueError: the judge is down or refuses the request, told in one sentence. What
        it said before is in the cache.
    """
    check(judge)
    found = []
    for row in answered:
        text = _reply(judge, _filled(judge.prompt, row))
        found.append(Verdict(number(text), text))
        show(1)
    return found


def number(text: str) -> float | None:
    """Returns the number from 0 to 100 that a reply is, or None for prose."""
    match = NUMBER.fullmatch(text.strip().strip("*").lower())
    value = float(match[1]) if match else -1.0
    return value if 0 <= value <= 100 else None


def _filled(prompt: str, row: dict[str, Any]) -> str:
    """Returns the prompt with its fields filled, in one pass: texts may hold braces."""
    names = "|".join(FIELDS)
    return re.sub(rf"{{({names})}}", lambda match: row[match[1]], prompt)


def _reply(judge: Judge, prompt: str) -> str:
    """Returns what the judge wrote, from the cache where it is there."""
    body = {
        "model": judge.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "seed": 1,
    }
    url = judge.url.rstrip("/") + "/chat/completions"
    digest = files.digest(json.dumps([url, body]))
    kept = judge.cache / f"{digest}.json" if judge.cache else None
    if kept and kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))["reply"]
    reply = _content(_post(judge, url, body), url)
    if kept:
        files.write_json(kept, {"url": url, "request": body, "reply": reply})
    return reply


def _post(judge: Judge, url: str, body: dict) -> bytes:
    """Sends a request until it is answered: 429, 5xx and no reply are tried again."""
    asked_s, failure = 0.0, ""
    for attempt in range(judge.tries):
        if attempt:
            time.sleep(max(judge.wait_s * 2 ** (attempt - 1), asked_s))
        try:
            return _send(judge, url, body)
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            if judge.key:  # some repeat what they were sent
                said = said.replace(judge.key, "(the key)")
            failure = f"answered {error.code} ({' '.join(said.split())})"
            if error.code != 429 and error.code < 500:
                raise ValueError(f"the judge at {url} {failure}") from None
            asked_s = _retry_after(error)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            failure = f"does not answer ({reason})"
    raise ValueError(
        f"the judge at {url} {failure}, {judge.tries} times; start it or check "
        "--judge, then run the same command again: what it said so far is kept"
    )


def _send(judge: Judge, url: str, body: dict) -> bytes:
    headers = {"Content-Type": "application/json"}
    if judge.key:
        headers["Authorization"] = f"Bearer {judge.key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(_NoRedirect)
    with opener.open(request, timeout=judge.timeout_s) as response:
        return response.read(REPLY_BYTES)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would hand the key to another host."""

    def redirect_request(self, *args, **kwargs):
        return None


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Returns the seconds that a refusal asks to wait, at most a minute."""
    said = error.headers.get("Retry-After", "")
    return min(float(said), 60.0) if said.isdecimal() else 0.0


def _content(reply: bytes, url: str) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        said = reply[:60].decode(errors="replace")
        raise ValueError(f"{url} is no chat endpoint: it sent {said!r}")
    return content
