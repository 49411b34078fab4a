"""Downloads: what one survives, and what is never taken for it."""

import functools
import hashlib
import http.server
import json
import threading
import types

import pytest

from gpt_jax import downloads
from gpt_jax.downloads import Download

PAGE = b"".join(b"line %d\n" % i for i in range(20_000))


class Server(http.server.ThreadingHTTPServer):
    """One page on a free loopback port, and what its clients asked for."""

    page, etag, resumes = PAGE, '"1"', True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.drops: list[int] = []
        self.ranges: list[str | None] = []


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.page`, or its Range; `server.drops` says when to hang up."""

    def do_GET(self):
        server = self.server
        assert isinstance(server, Server)
        wanted, start = self.headers.get("Range"), 0
        server.ranges.append(wanted)
        fresh = self.headers.get("If-Range") in (None, server.etag)
        if wanted and server.resumes and fresh:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.page):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.page)}")
            self.end_headers()
            return
        body = server.page[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        drop = server.drops.pop(0) if server.drops else len(body)
        self.wfile.write(body[:drop])

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fetch(server, tmp_path, monkeypatch):
    """Returns fetch("page"), with one download in the table, served on loopback."""
    monkeypatch.setattr(downloads, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    item = Download(
        urls=(f"http://127.0.0.1:{server.server_port}/page.txt",),
        names=("page.txt", "other.txt"),
        sha256=hashlib.sha256(PAGE).hexdigest(),
    )

    def use(**changes):
        monkeypatch.setitem(downloads.DOWNLOADS, "page", item._replace(**changes))

    use()
    run = functools.partial(downloads.fetch, "page", tmp_path, progress=False)
    return types.SimpleNamespace(run=run, use=use)


def test_a_download_arrives_whole_and_the_second_fetch_asks_nobody(server, fetch):
    path = fetch.run()
    assert path.read_bytes() == PAGE
    assert fetch.run() == path and len(server.ranges) == 1
    assert [p.name for p in path.parent.iterdir()] == ["page.txt"]


def test_a_file_under_another_known_name_is_used_instead_of_the_network(
    server, fetch, tmp_path
):
    (tmp_path / "other.txt").write_bytes(PAGE)
    assert fetch.run() == tmp_path / "other.txt" and not server.ranges


def test_a_dropped_connection_goes_on_where_it_stopped(server, fetch):
    server.drops = [70_000, 0, 50_000]
    assert fetch.run().read_bytes() == PAGE
    starts = [int(r[6:-1]) if r else 0 for r in server.ranges]
    assert starts == [0, 70_000, 70_000, 120_000]


def test_a_later_process_goes_on_where_an_earlier_one_gave_up(server, fetch):
    server.drops = [10_000] * downloads.TRIES
    with pytest.raises(FileNotFoundError, match="connection closed at 50000 bytes"):
        fetch.run()
    assert fetch.run().read_bytes() == PAGE
    assert server.ranges[-1] == "bytes=50000-"


def test_a_part_that_had_arrived_whole_is_not_downloaded_again(server, fetch, tmp_path):
    (tmp_path / "page.txt.0.part").write_bytes(PAGE)
    assert fetch.run().read_bytes() == PAGE
    assert server.ranges == [f"bytes={len(PAGE)}-"]


def test_a_file_that_changed_meanwhile_is_downloaded_from_its_start(server, fetch):
    server.page = PAGE[::-1]
    server.drops = [10_000] * downloads.TRIES
    with pytest.raises(FileNotFoundError):
        fetch.run()
    server.page, server.etag = PAGE, '"2"'
    assert fetch.run().read_bytes() == PAGE


def test_a_server_that_cannot_resume_is_asked_from_the_start(server, fetch):
    server.resumes, server.drops = False, [70_000]
    assert fetch.run().read_bytes() == PAGE


def test_a_wrong_download_is_refused_and_kept_aside(server, fetch, tmp_path):
    server.page = PAGE[:-1] + b"x"
    with pytest.raises(
        ValueError, match=r"the download of page has sha256 .*page.txt.bad"
    ):
        fetch.run()
    assert (tmp_path / "page.txt.bad").read_bytes() == server.page
    assert not (tmp_path / "page.txt").exists()


def test_a_damaged_cache_file_is_downloaded_again(server, fetch, tmp_path):
    (tmp_path / "page.txt").write_bytes(PAGE[:-1])
    assert fetch.run().read_bytes() == PAGE and len(server.ranges) == 1


def test_a_download_that_changes_is_pinned_at_first_use_and_checked_after(
    server, fetch, tmp_path
):
    fetch.use(sha256=None, changes=True)
    path = fetch.run()
    pins = json.loads((tmp_path / "pins.json").read_text())
    assert pins == {"page": hashlib.sha256(PAGE).hexdigest()}
    path.write_bytes(b"edited")
    assert fetch.run().read_bytes() == PAGE
    path.unlink()
    server.page, server.etag = b"another edition", '"2"'
    with pytest.raises(ValueError, match=r"delete page from .*pins.json to accept it"):
        fetch.run()


def test_a_download_of_several_parts_is_put_together(server, fetch):
    whole = b"[" + PAGE + b"|" + PAGE + b"]"
    fetch.use(
        urls=downloads.DOWNLOADS["page"].urls * 2,
        sha256=hashlib.sha256(whole).hexdigest(),
        finish=lambda parts: b"[" + b"|".join(parts) + b"]",
    )
    path = fetch.run()
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == ["page.txt"]


def test_what_is_no_archive_is_told_and_does_not_stand_in_the_way(server, fetch):
    fetch.use(finish=downloads._member("a.txt"))
    for _ in range(2):  # a second try begins anew
        with pytest.raises(ValueError, match=r"downloaded as page .*not a zip file"):
            fetch.run()


def test_an_unreachable_server_is_told_with_what_to_do(server, fetch, tmp_path):
    fetch.use(urls=("http://127.0.0.1:9/page.txt",))
    with pytest.raises(FileNotFoundError, match=r"put the file at .*page.txt"):
        fetch.run()


def test_the_text_of_a_gutenberg_book_stands_between_its_marks():
    page = (
        "\ufeffThe Project Gutenberg eBook of Emma\r\n\r\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\r\n\r\nCHAPTER I\r\n\r\n"
        "Emma ***\r\n\r\n*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***\r\nLicence"
    ).encode()
    assert downloads._gutenberg([page, page]) == b"CHAPTER I\n\nEmma ***\n" + (
        b"\n\nCHAPTER I\n\nEmma ***\n"
    )
    with pytest.raises(ValueError, match="lacks its START and END lines"):
        downloads._gutenberg([b"<html>"])


def test_a_name_that_no_download_has_is_told_with_those_that_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"'austin' is not one of: .*did you mean aus"):
        downloads.fetch("austin", tmp_path)
