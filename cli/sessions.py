"""`offload sessions`: the conversations that are kept, and the room that their keys and values take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from kvstore import Session, Sessions, Summary
from offload.sizes import format_size, parse_size


def command(args: argparse.Namespace) -> int:
    """List, show, remove or prune. Raises an `OffloadError` with one line."""
    if args.action == "prune":
        limit = parse_size(args.limit, flag="--limit") if args.limit is not None else 0
        return _prune(Sessions(), limit, args.json)
    sessions = Sessions()
    if args.action == "list":
        found = sessions.list()
        print(json.dumps([asdict(s) for s in found]) if args.json else _table(found))
    elif args.action == "show":
        session = sessions.get(args.name)
        print(json.dumps(asdict(session)) if args.json else _text(session))
    else:
        sessions.remove(args.name)
        if args.json:
            print(json.dumps({"removed": args.name}))
        else:
            print(f"removed {args.name}; `offload sessions prune` frees what it kept")
    return 0


def _prune(sessions: Sessions, limit: int, as_json: bool) -> int:
    done = sessions.prune(limit)
    if as_json:
        print(json.dumps({**asdict(done), "limit": limit}))
        return 0
    print(f"freed {format_size(done.freed)} ({done.freed} bytes); {format_size(done.kept)} of keys and values stay")
    if done.kept > limit > 0:
        print(f"(conversations need {format_size(done.needed)}; `offload sessions rm NAME` gives one up)")
    return 0


def _table(found: Sequence[Summary]) -> str:
    if not found:
        return "no conversations yet; `offload chat --session NAME` keeps one"
    rows = [("name", "updated", "messages", "tokens", "model")]
    for s in found:
        rows.append(
            (s.name, s.updated.removesuffix("+00:00").replace("T", " "), str(s.messages), str(s.tokens),
             _plain(s.model).replace("\n", " "))
            if s.damaged is None else (s.name, "damaged", "", "", "")
        )  # fmt: skip
    wide = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{r[0]:{wide[0]}}  {r[1]:{wide[1]}}  {r[2]:>{wide[2]}}  {r[3]:>{wide[3]}}  {r[4]}".rstrip() for r in rows
    )


def _text(session: Session) -> str:
    lines = [
        f"{session.name}: {len(session.messages)} messages, {len(session.tokens)} tokens, with {session.model}",
        f"begun {session.created}, last used {session.updated}",
        *(f"\n{m['role']}: {m['content']}" for m in session.messages),
    ]
    return "\n".join(_plain(line) for line in lines)


def _plain(text: str) -> str:
    """What a model said must not command the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
