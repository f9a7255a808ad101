"""Prompts of judges: our wording of the tasks, and files with other wordings."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.judges.judge import Task
from eval.judges.tasks import TASKS
from tarsier_jax.errors import InputError
from tarsier_jax.processing.jsonl import parse_json

Message = Mapping[str, str]
_ROLES = ("system", "user", "assistant", "developer")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")

EXTRACT_EVENTS = """\
You are given the caption of a video. List its key events in the order of the caption.

Rules:
- List at most 10 events, each in at most 10 words.
- An event needs an action, a motion or a change. Leave out static facts such as looks, places and the background.
- Split the caption until every event is atomic: one subject with one action.
- Name the subject in every event. Replace pronouns by the nouns that they stand for.
- Do not list an event twice.
- Leave out cuts, transitions and movements of the camera.

Reply with one Python dictionary and nothing else, in this form:
{"events": ["first event", "second event"]}
If there are no events, reply with {"events": []}

Caption:
{caption}"""

ENTAILMENT = """\
You are given a description of a video and a Python list of events. Compare every event with the description and \
choose its relationship:
- "entailment": the description states the event, or the event follows from it.
- "contradiction": the description states something that cannot be true together with the event.
- "neutral": neither of the two; the description leaves open whether the event happens.

Description:
{description}

Events:
{events}

Reply with one JSON object and nothing else. It has one entry per event of the list, in the same order, repeated \
events included:
{"events": [{"event": "copy of the event", "relationship": "entailment, neutral or contradiction", "reason": "one \
short sentence"}]}"""

ANSWER_SYSTEM = """\
You grade answers to questions about videos. Decide whether the predicted answer means the same as the correct answer. \
Only the meaning counts: synonyms, paraphrases and additional details that do not change the answer are accepted."""

ANSWER = """\
Question: {question}
Correct answer: {answer}
Predicted answer: {prediction}

Reply with one Python dictionary and nothing else. "pred" is the string 'yes' if the predicted answer is correct, \
otherwise 'no'. "score" is an integer from 0 (no match) to 5 (the same meaning). Example:
{'pred': 'yes', 'score': 4}"""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The messages of every task.

    Attributes:
        templates: Messages per `Task.prompt`. "{caption}" and other placeholders of the task (`Task.placeholders`) are
            replaced by its texts. Braces around anything but one word are kept.
    """

    templates: Mapping[str, tuple[Message, ...]]

    def messages(self, task: Task[Any]) -> list[Message]:
        """Returns the messages of a request. Half surrogates, which UTF-8 cannot represent, become U+FFFD."""
        fields = {name: _without_surrogates(text) for name, text in task.fields.items()}
        return [
            {**message, "content": _PLACEHOLDER.sub(lambda match: fields[match[1]], message["content"])}
            for message in self.templates[task.prompt]
        ]

    @property
    def hash(self) -> str:
        """A short hash of the wording."""
        text = json.dumps({name: list(messages) for name, messages in self.templates.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


DEFAULT_PROMPTS = Prompts(
    {
        "extract_events": (_user(EXTRACT_EVENTS),),
        "entailment": (_user(ENTAILMENT),),
        "answer": ({"role": "system", "content": ANSWER_SYSTEM}, _user(ANSWER)),
    }
)


def read_prompts(path: Path) -> Prompts:
    """Reads prompts from a JSON file, {"extract_events": [{"role": "user", "content": "... {caption}"}], ...}.

    Raises:
        InputError: the file is not JSON, or a prompt or a placeholder is unknown or missing.
        OSError: the file cannot be read.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text. Convert it, or choose another file.") from None
    names = [task.prompt for task in TASKS]
    if not isinstance(value, dict) or set(value) != set(names):
        keys = ", ".join(map(str, value)) if isinstance(value, dict) and value else "none"
        raise InputError(f"{path} must be a JSON object with the keys {', '.join(names)}. Its keys are: {keys}.")
    return Prompts(
        {task.prompt: _check(task.placeholders, value[task.prompt], f"{path}: {task.prompt}") for task in TASKS}
    )


def _check(placeholders: tuple[str, ...], messages: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise InputError(
            f'{where} must be a list of messages {{"role": ..., "content": "text"}} with the roles {", ".join(_ROLES)}.'
        )
    names = {name for message in messages for name in _PLACEHOLDER.findall(message["content"])}
    expected = ", ".join(f"{{{name}}}" for name in placeholders)
    if unknown := sorted(names - set(placeholders)):
        raise InputError(f"{where} has the unknown placeholder {{{unknown[0]}}}. Its placeholders are {expected}.")
    if missing := [name for name in placeholders if name not in names]:
        raise InputError(f"{where} lacks the placeholder {{{missing[0]}}}. Its placeholders are {expected}.")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in _ROLES
        and isinstance(message["content"], str)
    )
