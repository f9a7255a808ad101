"""Finds the items of a run that lack a line in the output of earlier runs."""

import array
import collections
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from infer.bulk.inputs import Item, Items


def missing_items(
    items: Items | Sequence[Item], earlier: Iterable[Mapping[str, Any]], fields: Sequence[str], prompt: str
) -> Items:
    """Returns the items without a line among the `earlier` ones, where `fields` identify a line.

    Items can share these fields, such as questions about one video. Then their prompts distinguish them, and each line
    counts for one item; a line without a prompt, such as an error, counts for any of them.

    Without earlier lines, the items are not read. Otherwise they are read once; an item and a line take 17 bytes.
    """
    lines = _identities(((line, line.get("prompt")) for line in earlier), fields)
    if not len(lines[0]):
        return items if isinstance(items, Items) else Items(lambda: iter(items), len(items))
    numbered = _identities(((vars(item), item.line.get("prompt") or prompt) for item in items), fields)
    missing = _missing(numbered, lines)
    return Items(lambda: itertools.compress(items, missing), int(missing.sum()))


def _identities(
    contents: Iterable[tuple[Mapping[str, Any], Any]], fields: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a hash of the fields and one of the prompt of each item or line, uint64 (contents,)."""
    names, prompts = array.array("Q"), array.array("Q")
    for content, prompt in contents:
        names.append(_hash([content.get(field) for field in fields]))
        prompts.append(_hash(prompt))
    return np.frombuffer(names, np.uint64), np.frombuffer(prompts, np.uint64)


def _missing(items: tuple[np.ndarray, np.ndarray], lines: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Returns which items lack a line, bool (items,)."""
    names, prompts = items
    missing = ~np.isin(names, lines[0])
    unique, counts = np.unique(names, return_counts=True)
    repeated = unique[counts > 1]
    is_open = np.isin(lines[0], repeated)
    unused = collections.Counter(zip(lines[0][is_open].tolist(), lines[1][is_open].tolist(), strict=True))
    for i in np.flatnonzero(np.isin(names, repeated)):
        name = int(names[i])
        choices = ((name, int(prompts[i])), (name, _hash(None)))
        line = next((choice for choice in choices if unused[choice] > 0), None)
        missing[i] = line is None
        if line is not None:
            unused[line] -= 1
    return missing


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest())
