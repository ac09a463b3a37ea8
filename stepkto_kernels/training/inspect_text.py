"""Text of unknown origin, for HTML."""

from __future__ import annotations

import re
from html import escape

# Control characters, those that turn or hide what is beside them, and halves of surrogate pairs:
# what inspect_page.js spells out too.
_ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff]"
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def as_html(text: str) -> str:
    """Text for an element or a quoted attribute, with what cannot be seen spelled out."""
    return escape(_ODD.sub(lambda match: f"[U+{ord(match[0]):04X}]", text))


def without_surrogates(text: str) -> str:
    """With halves of surrogate pairs as JSON spells them: no tokenizer takes them as they are."""
    return _LONE_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
