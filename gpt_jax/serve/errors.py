"""Answers that are errors: what each status means, and how it is told."""

from collections.abc import Mapping

STATUSES: Mapping[int, str] = {
    400: "A request that cannot be.",
    401: "The API key is missing or wrong.",
    403: "Another host's name on loopback.",
    404: "No such model or path.",
    405: "Another method than this path has.",
    408: "The request came too slowly.",
    413: "Too long.",
    415: "Not application/json.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "A mistake of the server.",
    503: "Starting, leaving or overrun; Retry-After says when to come back.",
    504: "Not begun in time.",
}


class Refused(Exception):
    """An answer that is an error: status, sentence and what OpenAI's clients read.

    Attributes:
      status: of STATUSES.
      code: one word for programs.
      param: the field that is to blame, as in stream_options.include_usage, or None.
      headers: that go with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        seconds: int | None = None,
        *,
        param: str | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {} if seconds is None else {"Retry-After": str(seconds)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict:
        """Returns the error as JSON's objects."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        told = {"message": str(self), "type": kind}
        return {"error": {**told, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None) -> Refused:
    """Returns the error of a request that cannot be."""
    return Refused(400, message, "invalid_request", param=param)
