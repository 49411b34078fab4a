"""The templates that are known by name: the texts between messages."""

from typing import NamedTuple


class Template(NamedTuple):
    """How the turns of a conversation are written one after the other.

    Attributes:
      system: what stands before a system message.
      user: what stands before a user's message.
      assistant: what stands before an answer.
      close: what stands behind a system or user message.
      end: the special token behind an answer; "" = the tokenizer's end of text.
      between: what separates two turns.
      preamble: the system message of a conversation that has none; "" = nothing.
      input: what joins an instruction and its input.
    """

    system: str
    user: str
    assistant: str
    close: str
    end: str
    between: str
    preamble: str
    input: str


TEMPLATES = {
    # Stanford Alpaca's prompt (Taori et al. 2023), in Raschka's one form of it
    # (Build a Large Language Model (From Scratch), section 7.2).
    "alpaca": Template(
        system="",
        user="### Instruction:\n",
        assistant="### Response:\n",
        close="",
        end="",
        between="\n\n",
        preamble="Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.",
        input="\n\n### Input:\n",
    ),
    # Abdin et al. 2024, "Phi-3 Technical Report", section 2.
    "phi3": Template(
        system="<|system|>\n",
        user="<|user|>\n",
        assistant="<|assistant|>\n",
        close="<|end|>",
        end="<|end|>",
        between="\n",
        preamble="",
        input="\n",
    ),
    # OpenAI's Chat Markup Language, which many open models took over.
    "chatml": Template(
        system="<|im_start|>system\n",
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        close="<|im_end|>",
        end="<|im_end|>",
        between="\n",
        preamble="",
        input="\n",
    ),
    # Nothing but the texts, one a line.
    "plain": Template(
        system="",
        user="",
        assistant="",
        close="",
        end="",
        between="\n",
        preamble="",
        input="\n",
    ),
}
