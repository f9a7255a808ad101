"""The score sheet: one HTML file per run that needs no other file and no network, rendered from sheet.html."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import tarsier_jax
from eval.texts import digits_of, figure_text, flatten_settings, interval_text

_TEMPLATE = "sheet.html"
# In a script element, "</script>" would end the JSON, and "<!--" would change how the rest is read.
_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


@dataclasses.dataclass(frozen=True)
class Page:
    """The part of one benchmark.

    Attributes:
        summary: Content of NAME.json.
        samples: Records of the samples, each a JSON text.
        plot: A PNG file.
    """

    summary: Mapping[str, Any]
    samples: Sequence[str]
    plot: bytes


def render(pages: Sequence[Page]) -> str:
    """Returns the score sheet of a run."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=_figure, interval=_interval, flatten=flatten_settings, json=_embedded, png=_data_url
    )
    return environment.get_template(_TEMPLATE).render(pages=pages, version=tarsier_jax.__version__)


def _figure(value: float | None, name: str) -> str:
    return "nan" if value is None else figure_text(value, digits_of(name))


def _interval(interval: Sequence[float | None], name: str) -> str:
    low, high = interval
    return "" if low is None or high is None else interval_text((low, high), digits_of(name))


def _embedded(samples: Sequence[str]) -> Markup:
    """Returns the records as one JSON list that a script element can contain."""
    return Markup(f"[{','.join(samples)}]".translate(_ESCAPES))


def _data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
