"""The tokenizer that lies beside a model, and messages in the form that its chat template expects.

OpenAI's API and data sets in its format carry the arguments of a tool call as JSON text. Most templates expect an object
and encode it themselves, so text would come out encoded twice; some insert the text as it stands. Which of the two a
template does is found by rendering.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from outsize.errors import DataError

Message = Mapping[str, Any]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)

_PROBE = {"outsize_probe": 0}


def load_tokenizer(model: Path) -> Any:
    """The tokenizer in folder `model`, never from the network; DataError where there is none."""
    hint = f"copy tokenizer.json and tokenizer_config.json of the model's family into {model}"
    if not any((model / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"no tokenizer in {model}", hint=hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for malformed files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")
        raise DataError(f"the tokenizer in {model} cannot be opened: {reason}", hint=hint) from error
    return tokenizer


def messages_for_template(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> list[Message]:
    """`messages` with the arguments of their tool calls as objects, or as JSON text where the template inserts text.

    Messages without tool calls are returned as they are. Raises ValueError, naming the message, for arguments that are
    neither an object nor the JSON text of one.
    """
    parsed = [_with_arguments(message, number, _parsed) for number, message in enumerate(messages, 1)]
    if all(message is given for message, given in zip(parsed, messages, strict=True)):
        return parsed
    if not _inserts_text(tokenizer, parsed, tools):
        return parsed
    return [_with_arguments(message, number, _as_text) for number, message in enumerate(parsed, 1)]


def _with_arguments(message: Message, number: int, change: Callable[[Any], Any]) -> Message:
    """`message` with changed arguments; the same object where no tool call has any."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return message
    changed = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or function.get("arguments") is None:
            changed.append(call)
            continue
        try:
            function = {**function, "arguments": change(function["arguments"])}
        except ValueError as error:
            raise ValueError(
                f"message {number}: the arguments of tool call {len(changed) + 1} {error}"
            ) from error
        changed.append({**call, "function": function} if "function" in call else function)
    if all(call is given for call, given in zip(changed, calls, strict=True)):
        return message
    return {**message, "tool_calls": changed}


def _parsed(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"are not JSON ({error})") from error
    if not isinstance(arguments, Mapping):
        raise ValueError(f"are {type(arguments).__name__}, expected an object")
    return arguments


def _as_text(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _inserts_text(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None) -> bool:
    """Whether the template writes arguments as they stand: an object would appear as Python prints it, or be refused."""

    def rendered(arguments: Any) -> str | None:
        probed = [_with_arguments(message, 0, lambda _: arguments) for message in messages]
        try:
            return str(tokenizer.apply_chat_template(probed, tools=tools, tokenize=False))
        except Exception:  # templates raise errors of any kind; the caller renders again and reports them
            return None

    text = rendered(_PROBE)
    return rendered(_as_text(_PROBE)) is not None if text is None else str(_PROBE) in text
