"""What sparse attention costs in accuracy: answers and next tokens over the share of the context attended to.

The bundled model is told a code at a known place of a long dialogue and asked for it at the end (the recall task of its
card, with filler before the code too, so that no first chunk holds it); and it continues dialogues. Every policy of
`kvstore.selection` answers at every budget:

- recall: share of questions answered word for word by greedy decoding. (Whether each token of the answer is the
  likeliest after those before it tells that, token by token, as decoding goes.)
- agreement: share of next tokens of unseen dialogue, given the same tokens before, that are the full cache's.

The prompt is attended to in full; each token after it attends to the chunks chosen for it. `--runner offload` loads
the model as a user does (`offload.load(…, kv_budget=, kv_policy=)`); `--runner reference` puts the policies straight
into transformers' attention: slow, simple, with chunks of `--chunk` tokens and the `oracle`, which needs all scores.
Speed is not measured here.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common import RESULTS, ROOT, BenchError, machine, run_script, say, today, write_json

MODEL = ROOT / "offload" / "models" / "demo-moe"
SEED = 4_242  # neither training nor the model card's evaluation uses it
BUDGETS = (100.0, 50.0, 25.0, 12.5, 8.0, 4.0, 2.0)  # percent of the context
CONTEXTS = (512, 1024, 2048, 4096)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # where the code is told, as a share of the context
CONTINUED = 48  # tokens of dialogue that are compared to the full cache's
COLOURS = {
    "oracle": "#555555", "bounds": "#3b7dd8", "landmarks": "#2a9d6f", "blend": "#8a5bd0", "h2o": "#d98a2b",
    "snapkv": "#c04f8f", "recent": "#d0453b",
}  # fmt: skip
POLICIES = tuple(COLOURS)


@dataclass(frozen=True)
class Question:
    """Tokens to begin with, and those that should come, or do come, next."""

    context: int
    prompt: list[int]
    after: list[int]
    kind: str  # recall | text


class Runner(Protocol):
    """A model with a budget."""

    def predictions(self, prompt: Sequence[int], after: Sequence[int]) -> list[int]:
        """The likeliest token at the place of each of `after`, given those before it."""
        ...


def questions(tokenizer: Any, contexts: Sequence[int] = CONTEXTS, each: int = 4) -> list[Question]:
    """`each` recall questions for every depth, and as many dialogues to continue, for every context."""
    sys.path.insert(0, str(ROOT / "tools" / "demo_models"))
    from world import END, Writer, build_world, recall_dialogue

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def filler(writer: Any, least: int) -> str:
        text = ""
        while len(ids(text)) < least:
            text += "".join(t for t, _ in writer.filler())
        return text

    world, out = build_world(), []
    for context in contexts:
        rng = random.Random(SEED + context)
        for depth in DEPTHS:
            for _ in range(each):
                front = filler(Writer(world, rng), int(depth * context * 0.9))
                rest = max(context - len(ids(front)), 64)
                dialogue, answer = recall_dialogue(world, rng, lambda t: len(ids(t)), rest)
                out.append(Question(context, ids(front + dialogue), ids(answer + END), "recall"))
        for _ in range(each):
            text = ids(filler(Writer(world, rng), context + CONTINUED))
            out.append(Question(context, text[:context], text[context : context + CONTINUED], "text"))
    return out


class Offload:
    """The model as a user loads it."""

    def __init__(self, folder: Path, policy: str | None, budget: float) -> None:
        import offload

        options = {} if policy is None else {"kv_budget": f"{budget:g}%", "kv_policy": policy}
        self._model = offload.load(folder, context=max(CONTEXTS) + 256, **options)

    def predictions(self, prompt: Sequence[int], after: Sequence[int]) -> list[int]:
        cache = self._model.engine.new_cache(len(prompt) + len(after))
        try:
            return _fed(self._model.hf, cache, prompt, after)
        finally:
            if hasattr(cache, "close"):
                cache.close()

    def close(self) -> None:
        self._model.close()


class Reference:
    """transformers with a policy in its attention. Prompts are computed once, for all policies and budgets."""

    def __init__(self, folder: Path, chunk: int) -> None:
        import torch
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register("sparse_reference", self._attention)
        self._model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sparse_reference")
        self._model.eval()
        torch.set_num_threads(1)  # tiny models gain nothing from a second one
        self._torch, self._chunk = torch, chunk
        self._prompts: dict[tuple[int, ...], tuple[Any, int, dict[int, Any]]] = {}
        self._ends: dict[int, Any] = {}  # layer → attention of the prompt's last queries on each token
        self._policy: str | None = None
        self._share = 1.0
        self._selector: Any = None
        self._layers: dict[int, Any] = {}
        self.attended = [0, 0]  # tokens attended to, tokens there were

    def use(self, policy: str | None, budget: float) -> Reference:
        """From now on this policy, with a budget of so many percent (None: full attention)."""
        self._policy, self._share, self.attended = policy, budget / 100, [0, 0]
        return self

    def predictions(self, prompt: Sequence[int], after: Sequence[int]) -> list[int]:
        from transformers import DynamicCache

        from kvstore.selection import make_selector

        self._selector = None
        held = self._prompts.get(tuple(prompt))
        if held is None:
            self._ends = {}
            cache = DynamicCache(config=self._model.config)
            first = _fed(self._model, cache, prompt, [0])[0]
            held = self._prompts[tuple(prompt)] = (cache, first, self._ends)
        cache, first, ends = held
        if self._policy is not None:
            self._selector, self._layers = make_selector(self._policy), {}
            for number, tokens in ends.items():
                view = self._view(number, cache.layers[number].keys)
                self._selector.prompt_ended(view, self._by_chunk(tokens))
        try:
            return [first, *_fed(self._model, cache, (), after)]
        finally:
            cache.crop(1 - len(after))

    def _view(self, number: int, keys: Any) -> Any:
        """What the selector may know of a layer with these keys [1, kv heads, n, D]."""
        from kvstore.abstracts import Abstracts
        from kvstore.selection import LayerView

        view = self._layers.get(number)
        if view is None:
            view = self._layers[number] = LayerView(number, 0, Abstracts(keys.shape[1], keys.shape[3]))
        whole, have = keys.shape[2] // self._chunk, len(view.abstracts)
        new = keys[0, :, have * self._chunk : whole * self._chunk].unflatten(1, (-1, self._chunk))
        view.abstracts.set_many(have, new)
        view.chunks = -(-keys.shape[2] // self._chunk)
        return view

    def _by_chunk(self, per_token: Any) -> Any:
        """Sums over chunks: [heads, n] → [heads, chunks]."""
        missing = -per_token.shape[1] % self._chunk
        padded = self._torch.nn.functional.pad(per_token, (0, missing))
        return padded.unflatten(1, (-1, self._chunk)).sum(-1)

    def _attention(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **options: Any
    ) -> tuple[Any, None]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        torch = self._torch
        if query.shape[2] > 1:
            last = query[0, :, -16:]  # SnapKV's window of observation
            self._ends[module.layer_idx] = _weights(torch, last, key[0], scaling).sum(1)
        if query.shape[2] > 1 or self._selector is None:
            return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **options)
        n = key.shape[2]
        view = self._view(module.layer_idx, key)
        view.mass = lambda q, scale: self._by_chunk(_weights(torch, q[:, None], key[0], scale)[:, 0])
        budget = math.floor(self._share * view.chunks + 1e-9)
        chosen = self._selector.choose(view, query[0, :, 0], scaling, budget)
        starts = torch.tensor(chosen)[:, None] * self._chunk
        index = (starts + torch.arange(self._chunk)).flatten()
        index = index[index < n]
        self.attended[0] += len(index)
        self.attended[1] += n
        weights = _weights(torch, query[0], key[0, :, index], scaling)  # [heads, 1, m]
        per_chunk = torch.zeros(weights.shape[0], view.chunks).index_add_(1, index // self._chunk, weights[:, 0])
        self._selector.attended(view, chosen, per_chunk[:, chosen])
        values = value[0, :, index].float().repeat_interleave(query.shape[1] // key.shape[1], dim=0)
        out = (weights @ values).to(value.dtype)  # [heads, 1, D]
        return out.transpose(0, 1)[None], None


def _weights(torch: Any, query: Any, keys: Any, scale: float) -> Any:
    """Softmax of query [heads, q, D] over keys [kv heads, n, D], the last query seeing them all: [heads, q, n]."""
    repeated = keys.float().repeat_interleave(query.shape[0] // keys.shape[0], dim=0)
    scores = query.float() @ repeated.transpose(1, 2) * scale
    count, n = scores.shape[1:]
    ahead = torch.ones(count, n, dtype=torch.bool).tril(n - count).logical_not()
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)


def _fed(hf: Any, cache: Any, prompt: Sequence[int], after: Sequence[int]) -> list[int]:
    """The likeliest token after the prompt (if there is one) and after each of `after` but the last, fed one by one."""
    import torch

    out = []
    with torch.inference_mode():
        for tokens in ([list(prompt)] if prompt else []) + [[t] for t in after[:-1]]:
            logits = hf(
                input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
            out.append(int(logits[0, -1].argmax()))
    return out


def score(
    asked: Sequence[Question], full: Sequence[Sequence[int]], got: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Per context: recall of the recall questions, agreement with `full` on the text."""
    rows = []
    for context in sorted({q.context for q in asked}):
        mine = [(q, f, g) for q, f, g in zip(asked, full, got, strict=True) if q.context == context]
        recall = [list(g) == q.after for q, _, g in mine if q.kind == "recall"]
        same = [a == b for q, f, g in mine if q.kind == "text" for a, b in zip(f, g, strict=True)]
        rows.append({
            "context": context, "questions": len(recall), "recall": sum(recall) / len(recall) if recall else None,
            "tokens": len(same), "agreement": sum(same) / len(same) if same else None,
        })  # fmt: skip
    return rows


def curves(rows: Iterable[dict[str, Any]], what: str) -> dict[str, dict[float, float]]:
    """Policy → budget → mean over contexts of `recall` or `agreement`."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row[what] is not None:
            found.setdefault(row["policy"], {}).setdefault(row["budget"], []).append(row[what])
    return {p: {b: sum(v) / len(v) for b, v in sorted(of.items(), reverse=True)} for p, of in found.items()}


def draw(result: dict[str, Any], out: Path) -> None:
    """Recall and agreement over the budget, a line for each policy."""
    width, height, left, gap, top = 380, 300, 50, 70, 44
    budgets = sorted({r["budget"] for r in result["rows"]})
    low, high = math.log(budgets[0]), math.log(budgets[-1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + 2 * width + gap + 120} {top + height + 50}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    drawn: list[str] = []
    for panel, (what, title) in enumerate((("recall", "questions answered"), ("agreement", "next tokens as with all"))):
        x0 = left + panel * (width + gap)
        lines = curves(result["rows"], what)
        drawn = [p for p in POLICIES if p in lines]
        floor = 0.0 if what == "recall" else math.floor(10 * min(min(of.values()) for of in lines.values())) / 10

        def x_of(budget: float, x0: int = x0) -> float:
            return x0 + (math.log(budget) - low) / max(high - low, 1e-9) * width

        def y_of(value: float, floor: float = floor) -> float:
            return top + height - (value - floor) / max(1 - floor, 1e-9) * height

        parts.append(f'<text x="{x0}" y="20" font-size="15">{title}</text>')
        parts.append(f'<rect x="{x0}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        for b in budgets:
            parts.append(f'<text x="{x_of(b):.0f}" y="{top + height + 17}" text-anchor="middle">{b:g}</text>')
        for k in range(6):
            value = floor + k * (1 - floor) / 5
            parts.append(f'<text x="{x0 - 6}" y="{y_of(value) + 4:.0f}" text-anchor="end">{100 * value:.0f}%</text>')
            parts.append(f'<line x1="{x0}" x2="{x0 + width}" y1="{y_of(value):.1f}" y2="{y_of(value):.1f}" '
                         'stroke="#eee"/>')  # fmt: skip
        for policy in drawn:
            points = " ".join(f"{x_of(b):.1f},{y_of(v):.1f}" for b, v in lines[policy].items())
            parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[policy]}" stroke-width="2">'
                         f"<title>{policy}</title></polyline>")  # fmt: skip
        parts.append(f'<text x="{x0 + width / 2:.0f}" y="{top + height + 38}" text-anchor="middle">'
                     "percent of the context attended to</text>")  # fmt: skip
    for i, policy in enumerate(drawn):
        x, y = left + 2 * width + gap + 16, top + 14 + 20 * i
        parts.append(f'<line x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}" stroke="{COLOURS[policy]}" '
                     f'stroke-width="3"/><text x="{x + 24}" y="{y}">{policy}</text>')  # fmt: skip
    parts.append("</svg>")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts) + "\n")


def measure(
    folder: Path, runner: str, asked: Sequence[Question], policies: Sequence[str], budgets: Sequence[float], chunk: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of the full cache, rows of every policy and budget)."""
    reference = Reference(folder, chunk) if runner == "reference" else None

    def ask(policy: str | None, budget: float) -> tuple[list[list[int]], float | None]:
        if reference is not None:
            model: Runner = reference.use(policy, budget)
            got = [model.predictions(q.prompt, q.after) for q in asked]
            return got, reference.attended[0] / max(reference.attended[1], 1)
        loaded = Offload(folder, policy, budget)
        try:
            return [loaded.predictions(q.prompt, q.after) for q in asked], None
        finally:
            loaded.close()

    began = time.monotonic()
    full, _ = ask(None, 100.0)
    rows = []
    for policy in policies:
        for budget in budgets:
            got, attended = ask(policy, budget)
            of = [{"policy": policy, "budget": budget, "attended": attended, **r} for r in score(asked, full, got)]
            rows += of
            recall, agreement = (curves(of, w).get(policy, {}).get(budget) for w in ("recall", "agreement"))
            say(f"{time.monotonic() - began:5.0f} s  {policy:<10}{budget:6g} %  recall {_percent(recall)}  "
                f"agreement {_percent(agreement)}")  # fmt: skip
    return score(asked, full, full), rows


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a bundled model's folder")
    parser.add_argument("--runner", choices=("offload", "reference"), default="offload")
    parser.add_argument("--policies", help="comma-separated (all, the oracle with --runner reference only)")
    parser.add_argument("--budgets", default=",".join(f"{b:g}" for b in BUDGETS), help="percent, comma-separated")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)), help="tokens, comma-separated")
    parser.add_argument("--each", type=int, default=4, help="questions per depth and context")
    parser.add_argument("--chunk", type=int, default=16, help="tokens per chunk, --runner reference")
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse.json")
    parser.add_argument("--svg", type=Path, help="draw recall and agreement over the budget")
    args = parser.parse_args(argv)
    from transformers import AutoTokenizer

    policies = args.policies.split(",") if args.policies else [
        p for p in POLICIES if p != "oracle" or args.runner == "reference"
    ]  # fmt: skip
    unknown = set(policies) - set(POLICIES)
    if unknown:
        raise BenchError(f"--policies {','.join(sorted(unknown))}: there are {', '.join(POLICIES)}")
    asked = questions(AutoTokenizer.from_pretrained(args.model), [int(c) for c in args.contexts.split(",")], args.each)
    budgets = [float(b) for b in args.budgets.split(",")]
    full, rows = measure(args.model, args.runner, asked, policies, budgets, args.chunk)
    result = {
        "kind": "sparse", "name": args.out.stem, "date": today(), "machine": machine(), "model": args.model.name,
        "runner": args.runner, "chunk_tokens": args.chunk if args.runner == "reference" else None,
        "depths": list(DEPTHS), "full": full, "rows": rows,
    }  # fmt: skip
    write_json(args.out, result)
    if args.svg is not None:
        draw(result, args.svg)
    return 0


if __name__ == "__main__":
    run_script(main)
