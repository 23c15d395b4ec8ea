"""Writes conversations by the tokenizer's chat template, and finds the assistant's turns in what it writes."""

import json
from collections.abc import Sequence
from typing import Any

from align_ext.data.conversation import Turn, left_out, messages_of, tool_names, visible_text
from align_ext.system.messages import reason_of, shown

NO_TEMPLATE = (
    "a conversation, or the column system, needs a chat template, and this tokenizer has none: take an "
    "instruction-tuned model, or write prompt and completion as text"
)


def written(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """Returns the text of a conversation up to the start of the assistant's next turn.

    Raises:
        ValueError: there is no chat template, or it refuses the conversation or leaves out text, a tool or a call.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(NO_TEMPLATE)
    messages, tools = messages_of(turns)
    text = _render(tokenizer, messages, tools, opened=True)
    missing = next((message["role"] for message in messages if left_out(message, text)), None)
    if missing is not None:
        raise ValueError(f"the tokenizer's chat template leaves out text of the {missing}'s turn")
    tool = next((name for name in tool_names(tools or ()) if name not in text), None)
    if tool is not None:
        raise ValueError(f"the tokenizer's chat template leaves out the tool {shown(tool)}: it knows no tools")
    return text


def written_calls(tokenizer: Any, turns: Sequence[Turn], answer: str, calls: str) -> str:
    """Returns the text of an answer with tool calls after `written`, without its end token.

    Raises:
        ValueError: as in `written`, or the template writes the answer otherwise than by going on.
    """
    messages, tools = messages_of(turns)
    content = "" if answer == calls else answer
    message = {"role": "assistant", "content": content, "tool_calls": json.loads(calls)}
    before, text = (_render(tokenizer, m, tools, opened=m is messages) for m in (messages, [*messages, message]))
    if not text.startswith(before) or left_out(message, text[len(before) :]):
        raise ValueError(
            "the tokenizer's chat template does not go on with the assistant's tool call: leave the row out"
        )
    end = tokenizer.eos_token
    text = text[len(before) :].rstrip()
    return text.removesuffix(end) if end else text


def assistant_spans(tokenizer: Any, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
    """Returns where the assistant's turns are in what `written` returns: start and end in letters.

    A turn begins where the template would have let the assistant begin, and ends with its end mark. If the template
    does not write the earlier turns as it writes the last, such as without thinking, it begins with its text, and ends
    with the end token behind it.

    Raises:
        ValueError: a turn cannot be found.
    """
    messages, tools = messages_of(turns)
    spans: list[tuple[int, int]] = []
    least = 0  # where the turn can begin at the earliest
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            least = max(text.find(message["content"].strip(), least) + len(message["content"].strip()), least)
            continue
        opened, plain, after = (
            _render(tokenizer, messages[:count], tools, opened=opened) if count else ""
            for count, opened in ((number, True), (number, False), (number + 1, False))
        )
        plain, after = plain.rstrip(), after.rstrip()
        least = max(least, len(plain) if text.startswith(plain) else 0)
        said = message["content"].strip() if message["content"].strip() in text else visible_text(message)
        begins = len(opened) if opened and text.startswith(opened) else None
        at = text.find(said, least if begins is None else begins) if said else begins
        if at is None or at < 0:
            raise _not_found(number)
        ends = at + len(said)
        end = text.find(tokenizer.eos_token, ends) if tokenizer.eos_token else -1
        if text.startswith(after) and len(after) >= ends:
            ends = len(after)
        elif end == ends or (end > ends and "tool_calls" in message):
            ends = end + len(tokenizer.eos_token)
        elif "tool_calls" in message:
            raise _not_found(number)
        spans.append((at if begins is None else begins, ends))
        least = ends
    return spans


def _not_found(number: int) -> ValueError:
    return ValueError(
        f"the assistant's turn {number + 1} cannot be found in what the tokenizer's chat template writes: give "
        "--trained-turns last"
    )


def _render(tokenizer: Any, messages: list[Any], tools: list[Any] | None, *, opened: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=opened, tokenize=False)
    except Exception as error:  # a template is a program of the model's, which may raise anything
        raise ValueError(f"the tokenizer's chat template refuses the prompt: {reason_of(error)}") from error
