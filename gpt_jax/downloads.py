"""Files that are downloaded once, checked by their sha256, and kept in a cache.

`fetch(name)` returns a downloaded file out of the cache folder, downloading it when
it is not there. Files that never change are checked against the sha256 in DOWNLOADS.
Three sources publish none: Project Gutenberg (austen) builds its files anew from time
to time, and of TinyStories and Alpaca none is known here. These are trusted at their
first use: their sha256 goes into `pins.json` in the cache and is checked from then on.
"""

import io
import json
import os
import re
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from gpt_jax import names, screen
from gpt_jax.files import digest_of, expand, sync, write

READ_BYTES = 1 << 17
UNPACKED_BYTES = 1 << 26  # the most that a file in an archive may have

TRIES = 5  # of a download, each going on where the last one stopped
RETRY_SECONDS = 0.5  # before the second try; doubled for each further one
TIMEOUT_SECONDS = 60.0  # the longest silence of a server


class Download(NamedTuple):
    """What can be downloaded.

    Attributes:
      urls: the addresses of its parts, most often one.
      names: how its file may be called in a cache; a download takes the first.
      sha256: of the finished file; None where none is known.
      finish: makes the file's bytes out of those of its parts, where that is needed.
      changes: the download need not have that sha256; it is pinned at its first use.
    """

    urls: tuple[str, ...]
    names: tuple[str, ...]
    sha256: str | None
    finish: Callable[[list[bytes]], bytes] | None = None
    changes: bool = False


def fetch(name: str, cache: str | Path, progress: bool = True) -> Path:
    """Returns the file of a download; see DOWNLOADS for the names.

    A file in the cache with the right sha256 is used as it is. An interrupted download
    goes on where it stopped, if the server can do that.

    Args:
      name: a key of DOWNLOADS.
      cache: the folder where downloads are kept; made when missing.
      progress: show how far the download is.

    Raises:
      ValueError: the name is unknown, or what arrived is not the expected file, which
        is then kept beside the cache's own under a name that ends in .bad.
      FileNotFoundError: it is not in the cache and cannot be downloaded.
    """
    item = names.choose("the download", name, DOWNLOADS)
    cache = expand(cache)
    pinned = _pins(cache).get(name) if item.changes else None
    right = {item.sha256, pinned} - {None}
    for path in filter(Path.is_file, (cache / file for file in item.names)):
        digest = digest_of(path)
        if not right:
            _pin(cache, name, digest, progress)
        if not right or digest in right:
            return path
    path = cache / item.names[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [path.with_name(f"{path.name}.{i}.part") for i in range(len(item.urls))]
    for url, part in zip(item.urls, parts, strict=True):
        _download(url, part, name=name, path=path, progress=progress)
    whole = path.with_name(f"{path.name}.whole") if item.finish else parts[0]
    if item.finish:
        try:
            whole.write_bytes(item.finish([part.read_bytes() for part in parts]))
        except (ValueError, zipfile.BadZipFile) as error:
            _remove(parts)  # else the next try would go on with what is wrong
            raise ValueError(
                f"what was downloaded as {name} from {', '.join(item.urls)} is not "
                f"what was expected: {error}; try again, or put the right file at "
                f"{path}"
            ) from error
    digest = digest_of(whole)
    if item.changes and not pinned:
        _pin(cache, name, digest, progress)
    elif digest not in right:
        aside = path.with_name(f"{path.name}.bad")
        os.replace(whole, aside)
        _remove(parts)
        cure = f"delete {name} from {cache / 'pins.json'} to accept it"
        raise ValueError(
            f"the download of {name} has sha256 {digest} instead of "
            f"{pinned or item.sha256} and is kept as {aside}; look at it, then "
            f"{cure if item.changes else 'try again, or put the right file there'}"
        )
    if path.exists():
        os.replace(path, path.with_name(f"{path.name}.bad"))
    sync(whole)
    os.replace(whole, path)
    sync(path.parent)
    _remove(parts)
    return path


def _download(url: str, part: Path, *, name: str, path: Path, progress: bool) -> None:
    """Downloads a URL to `part`, going on after interruptions."""
    failure: Exception | None = None
    for attempt in range(TRIES):
        if attempt:
            time.sleep(RETRY_SECONDS * 2**attempt)
        try:
            return _resume(url, part, progress)
        except (
            urllib.error.URLError,
            HTTPException,
            ConnectionError,
            TimeoutError,
        ) as e:
            failure = e
            if isinstance(e, urllib.error.HTTPError) and e.code < 500:
                break
    raise FileNotFoundError(
        f"{name} is not in the cache and {url} cannot be downloaded ({failure}); check "
        f"the connection, or put the file at {path}"
    )


def _resume(url: str, part: Path, progress: bool) -> None:
    """Downloads what is missing of `part`.

    The server's ETag is kept beside it, so that a file which changed meanwhile is
    downloaded from its start and never put together from two versions.
    """
    have = part.stat().st_size if part.exists() else 0
    tag = part.with_suffix(".etag")
    headers = {"User-Agent": "gpt_jax"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if have and tag.exists():
        headers["If-Range"] = tag.read_text(encoding="utf-8")
    request = urllib.request.Request(url, headers=headers)
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # it had arrived whole
        part.unlink()
        raise ConnectionError("the server has a shorter file now") from None
    with reply:
        start = have if reply.status == 206 else 0
        length = reply.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        etag = reply.headers.get("ETag", "")
        write(tag, etag) if etag[:1] == '"' else tag.unlink(missing_ok=True)
        show = screen.Show(progress)
        show.say(f"downloading {url}")
        what = url.rsplit("/", 1)[-1]
        with part.open("ab" if start else "wb") as file, show.bar(what, total) as bar:
            bar(start)
            while data := reply.read(READ_BYTES):
                file.write(data)
                bar(len(data))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"the connection closed at {part.stat().st_size} bytes")


def _pins(cache: Path) -> dict[str, str]:
    path = cache / "pins.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise ValueError(f"{path} is not JSON; repair or delete it") from None


def _pin(cache: Path, name: str, digest: str, progress: bool) -> None:
    pins = json.dumps({**_pins(cache), name: digest}, indent=1)
    write(cache / "pins.json", pins + "\n")
    screen.Show(progress).say(
        f"{name} has no known sha256: this copy is trusted and pinned from now on "
        f"({digest}, {cache / 'pins.json'})"
    )


def _remove(parts: Iterable[Path]) -> None:
    for part in parts:
        part.unlink(missing_ok=True)
        part.with_suffix(".etag").unlink(missing_ok=True)


def _gutenberg(books: list[bytes]) -> bytes:
    """Joins books of Project Gutenberg, without what stands around the text itself."""
    texts = []
    for data in books:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
        match = re.search(
            r"\*\*\* ?START OF TH[^\n]*\n(.*)\*\*\* ?END OF TH", text, flags=re.DOTALL
        )
        if not match:
            raise ValueError(
                f"a Project Gutenberg book lacks its START and END lines; it begins "
                f"with {text[:60]!r}"
            )
        texts.append(match[1].strip("\n") + "\n")
    return "\n\n".join(texts).encode()


def _member(name: str) -> Callable[[list[bytes]], bytes]:
    """Returns what takes one file out of a zip archive."""

    def finish(parts: list[bytes]) -> bytes:
        with zipfile.ZipFile(io.BytesIO(parts[0])) as archive:
            if name not in archive.namelist():
                raise ValueError(f"{name} is not in the archive")
            size = archive.getinfo(name).file_size
            if size > UNPACKED_BYTES:  # an archive from a stranger may be a bomb
                raise ValueError(f"{name} would unpack to {size:,} bytes")
            return archive.read(name)

    return finish


_BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main"
_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/models/124M"
_HUB = "https://huggingface.co/datasets"
# Sense and Sensibility, Pride and Prejudice, Mansfield Park, Emma, Northanger Abbey,
# Persuasion.
_AUSTEN = (161, 1342, 141, 158, 121, 105)

DOWNLOADS = {
    "tinyshakespeare": Download(
        urls=(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
            "tinyshakespeare/input.txt",
        ),
        names=("tinyshakespeare.txt", "input.txt"),
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "the_verdict": Download(
        urls=(f"{_BOOK}/ch02/01_main-chapter-code/the-verdict.txt",),
        names=("the-verdict.txt", "the_verdict.txt"),
        sha256="b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
    ),
    # The sha256 is that of the texts as packed in the R package janeaustenr.
    "austen": Download(
        urls=tuple(
            f"https://www.gutenberg.org/cache/epub/{i}/pg{i}.txt" for i in _AUSTEN
        ),
        names=("austen.txt",),
        sha256="32432b75ad045648fc586b923f9d38cddee6ecfa14cfe8968b9a028c36a19c23",
        finish=_gutenberg,
        changes=True,
    ),
    "tinystories": Download(
        urls=(
            f"{_HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
        ),
        names=("TinyStoriesV2-GPT4-train.txt", "tinystories.txt"),
        sha256=None,
        changes=True,
    ),
    "gpt2_encoder": Download(
        urls=(f"{_GPT2}/encoder.json",),
        names=("gpt2_tokenizer/encoder.json", "encoder.json"),
        sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    "gpt2_bpe": Download(
        urls=(f"{_GPT2}/vocab.bpe",),
        names=("gpt2_tokenizer/vocab.bpe", "vocab.bpe"),
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    "sms_spam": Download(
        urls=("https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",),
        names=("sms_spam.tsv", "SMSSpamCollection"),
        sha256="7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
        finish=_member("SMSSpamCollection"),
    ),
    "instructions": Download(
        urls=(f"{_BOOK}/ch07/01_main-chapter-code/instruction-data.json",),
        names=("instruction-data.json",),
        sha256="7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
    ),
    # Stanford's 52,002 instructions (Taori et al. 2023).
    "alpaca": Download(
        urls=(
            "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/"
            "alpaca_data.json",
        ),
        names=("alpaca_data.json",),
        sha256=None,
        changes=True,
    ),
    "preferences": Download(
        urls=(
            f"{_BOOK}/ch07/04_preference-tuning-with-dpo/"
            "instruction-data-with-preference.json",
        ),
        names=("instruction-data-with-preference.json",),
        sha256="305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
    ),
}
