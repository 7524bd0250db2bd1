"""A tokenizer as answers need it: text of tokens, each token's own bytes, and where a stop string ends an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# tokens looked at beyond what a stop string can span: some may have no text of their own
SLACK = 8
# of a UTF-8 character that a window of tokens begins within
PARTIAL = 3
REPLACEMENT = "�"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """One model's tokens. Shared by all its sequences; `tokenizer` is transformers'."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): str(t) for i, t in tokenizer.added_tokens_decoder.items()}
        special = {int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special = special | {int(i) for i in tokenizer.all_special_ids}
        self._decoders = _decoders(tokenizer)
        self._bytes = byte_alphabet()
        self._size = len(tokenizer)
        self._pieces: dict[int, tuple[str, bytes | None]] = {}

    def text(self, tokens: Sequence[int]) -> str:
        """What `tokens` say, special ones left out. Bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def special(self, text: str) -> int | None:
        """The special token that is written `text`."""
        return next((i for i in self._special if self._added.get(i) == text), None)

    def visible(self, token: int) -> bool:
        """Whether the token has a part in the text."""
        return token not in self._special and token < self._size

    def piece(self, token: int) -> tuple[str, bytes | None]:
        """The token by itself, as text and as bytes.

        One that holds a part of a character is written "bytes:\\xe2\\x82", as OpenAI's API has it; one that the
        tokenizer does not know "token_id:7", without bytes.
        """
        known = self._pieces.get(token)
        if known is None:
            data = self._data(token)
            known = self._pieces[token] = (f"token_id:{token}", None) if data is None else (_written(data), data)
        return known

    def find(self, tokens: Sequence[int], stops: Sequence[str]) -> int | None:
        """Where in the text of `tokens` a stop string begins, if the last token completes one; else None.

        Of several it is the one that ends first, then the longest: the same however the text is cut into tokens.
        Only as many tokens are decoded as a stop string can span: each has a byte at least. The whole text is only
        where one was found, and has the last word.
        """
        need = max((len(s.encode("utf-8", "replace")) for s in stops), default=0) + SLACK
        start = len(tokens)
        while start and need:
            start -= 1
            need -= self.visible(tokens[start])
        for at in range(start, max(-1, start - PARTIAL - 1), -1):
            tail = self.text(tokens[at:])
            if not tail.startswith(REPLACEMENT):
                break
        if not any(s in tail for s in stops):
            return None
        whole = tail if at == 0 else self.text(tokens)
        found = ((whole.find(s), len(s)) for s in stops)
        return min(((i + size, i) for i, size in found if i >= 0), default=(0, None))[1]

    def _data(self, token: int) -> bytes | None:
        if token in self._added:
            return self._added[token].encode("utf-8", "replace")
        piece = self._tokenizer.convert_ids_to_tokens(token) if token < self._size else None
        if piece is None:
            return None
        if "ByteLevel" in self._decoders and all(c in self._bytes for c in piece):
            return bytes(self._bytes[c] for c in piece)
        if "ByteFallback" in self._decoders and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if "▁" in piece:  # SentencePiece's space; decoded by itself, a leading one would be lost
            return str(piece.replace("▁", " ")).encode("utf-8", "replace")
        return str(self._tokenizer.decode([token])).encode("utf-8", "replace")


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2, Radford et al. 2019): printable ones
    for themselves, the others in order from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(0x100) if b not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _decoders(tokenizer: Any) -> set[str]:
    """The kinds of decoder in a fast tokenizer; none of another."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return set()
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return {str(d.get("type")) for d in [decoder, *decoder.get("decoders", [])]}


def _written(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data)
