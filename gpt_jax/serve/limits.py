"""What one request may cost."""

from dataclasses import dataclass

from gpt_jax.serve.errors import Refused


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
      body_bytes: of a request's body.
      prompt_bytes: of all its texts together, counted before they are tokenized.
      choices: texts in one request: prompts times n.
      told: probabilities told of its prompts: tokens times alternatives and one.
      seconds: from its arrival to its last token; then it ends with what there is.
      read_seconds: in which a request must have arrived; then 408.
      connections: requests in progress at once; beyond, 503.
    """

    body_bytes: int
    prompt_bytes: int
    choices: int
    told: int
    seconds: float
    read_seconds: float
    connections: int

    def too_long(self, param: str) -> Refused:
        """Returns the error of a prompt that is longer than `prompt_bytes`."""
        return Refused(
            413,
            f"the prompt is longer than {self.prompt_bytes} bytes; shorten it",
            "prompt_too_long",
            param=param,
        )
