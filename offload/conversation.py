"""A chat that goes on: each turn computes only what is new, and with a session it outlives the process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvstore import Session, Sessions
from offload.history import History
from tiers import DamagedError, Interrupted, StoreError, UsageError

if TYPE_CHECKING:
    from offload.model import Generation, Model

Message = dict[str, str]


class Conversation:
    """A chat that keeps its KV.

    `say` adds the user's words and answers; an answer that was interrupted stays, as far as it got. With a `session`
    all of it is kept under that name, and goes on from where it was: `notes` say what could not be. Close it.
    Raises `StoreError` if the session is in use elsewhere, `UsageError` for a name that is none.
    """

    def __init__(self, model: Model, system: str | None = None, session: str | None = None) -> None:
        self._model = model
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.notes: list[str] = []
        self._sessions: Sessions | None = None
        self._session: Session | None = None
        self._held = contextlib.ExitStack()
        self._history: History
        if session is None:
            self._history = model.history()
        else:
            self._sessions = Sessions()
            self._held.enter_context(self._sessions.hold(session))
            self._open(session)

    @property
    def reused_tokens(self) -> int:
        """Tokens of the last prompt that did not have to be computed."""
        return self._history.reused

    @property
    def session(self) -> str | None:
        """The name that the conversation is kept under."""
        return self._session.name if self._session is not None else None

    def say(self, text: str, on_text: Callable[[str], object], **options: Any) -> Generation | None:
        """Answer `text`; pieces go to `on_text` as they come. None if it was interrupted."""
        if not text.strip():
            raise UsageError("the message is empty")
        return self._answer([*self.messages, {"role": "user", "content": text}], on_text, **options)

    def retry(self, on_text: Callable[[str], object], **options: Any) -> Generation | None:
        """Answer the user's last message anew. Raises `UsageError` if there is none."""
        messages = self._before(self.messages)
        if messages is None:
            raise UsageError("nothing has been said yet")
        return self._answer([*messages, self.messages[len(messages)]], on_text, **options)

    def undo(self) -> str:
        """Take the user's last message and its answer back; returns the message. Raises `UsageError`."""
        messages = self._before(self.messages)
        if messages is None:
            raise UsageError("nothing has been said yet")
        taken = self.messages[len(messages)]["content"]
        self.messages = messages
        self._save()
        return taken

    def branch(self, name: str) -> None:
        """Go on under another name; what is kept under the present one stays as it is. Raises `UsageError`."""
        if self._sessions is None or self._session is None:
            raise UsageError("only a conversation with --session can branch")
        if self._sessions.load(name) is not None:
            raise UsageError(f"there is a session {name} already; name another, or remove it")
        held = contextlib.ExitStack()
        held.enter_context(self._sessions.hold(name))
        self._held.close()
        self._held = held
        self._session = Session(name, self._session.model, self._session.fingerprint, self._session.arithmetic)
        self._save()

    def clear(self) -> None:
        """Start anew; a system message stays."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._history.forget()
        self._save()

    def close(self) -> None:
        """Let another process have the session."""
        self._held.close()

    def _answer(self, messages: list[Message], on_text: Callable[[str], object], **options: Any) -> Generation | None:
        ids = self._model.render(messages)
        context = self._model.plan.context
        options = {"max_new_tokens": max(1, context - len(ids)), **self._model.chat_defaults(), **options}
        spoken: list[str] = []

        def tell(piece: str) -> None:
            spoken.append(piece)
            on_text(piece)

        def stored() -> None:
            # what has been said so far, so that a crash loses little
            self._save([*messages, {"role": "assistant", "content": "".join(spoken)}])

        if len(ids) >= context:
            raise UsageError(
                f"the conversation has {len(ids)} tokens, the context holds {context}; shorten it or give a larger "
                "--context"
            )
        self._save(messages)
        self._history.on_stored = stored if self._session is not None else lambda: None
        result: Generation | None = None
        try:
            result = self._model.run([ids], on_text=tell, history=self._history, **options)
            answer = result.text[0] or ""
        except Interrupted:
            answer = "".join(spoken)
        except BaseException:
            self._history.forget()
            raise
        finally:
            self.notes += self._history.notes
            self._history.notes.clear()
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self._save()
        return result

    @staticmethod
    def _before(messages: list[Message]) -> list[Message] | None:
        """What was said before the user's last message; None if there is none."""
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
        return None if last is None else messages[:last]

    def _open(self, name: str) -> None:
        """Go on with the session of that name, as far as it is there."""
        assert self._sessions is not None
        model = self._model
        fingerprint, arithmetic = model.fingerprint, model.arithmetic
        known: Session | None = None
        try:
            known = self._sessions.load(name)
        except DamagedError as e:
            moved = self._sessions.set_aside(name)
            self.notes.append(f"{e}; it is kept as {moved.name}, and a new conversation begins")
        if known is not None:
            if known.fingerprint != fingerprint:
                self.notes.append(
                    f"session {name} was held with {known.model or 'another model'}: what was said is kept, and is "
                    "computed again with this one"
                )
            elif known.arithmetic != arithmetic:
                self.notes.append(f"session {name} was computed as {known.arithmetic}: it is computed again")
            system = [m for m in self.messages if m["role"] == "system"]
            self.messages = system + [m for m in known.messages if not system or m["role"] != "system"]
            if self.messages and self.messages[-1]["role"] == "user":
                self.notes.append("the last message was not answered; /retry answers it")
        self._session = Session(name, model.name, fingerprint, arithmetic, created=known.created if known else "")
        if known is not None and (known.fingerprint, known.arithmetic) == (fingerprint, arithmetic):
            self._session.head, self._session.tokens = known.head, known.tokens
        self._history = model.history(self._sessions)

    def _save(self, messages: list[Message] | None = None) -> None:
        """Write the session down. A disk that is full ends that, with a note; the conversation goes on."""
        if self._session is None or self._sessions is None:
            return
        self._session.messages = self.messages if messages is None else messages
        if self._history.head is not None:
            self._session.head, self._session.tokens = self._history.head, list(self._history.stored)
        try:
            self._sessions.save(self._session)
        except StoreError as e:
            self.notes.append(f"the session is not kept any more: {e}")
            self._session = None
