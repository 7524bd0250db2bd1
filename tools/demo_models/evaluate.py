"""Measure the demo models as saved, and write their model cards and ``evaluation.json``.

``python tools/demo_models/evaluate.py offload/models/demo-moe offload/models/demo-dense``
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import ASSISTANT, END, USER, Writer, build_world, recall_dialogue, small_talk_probes

SEED = 90_001
"""Training uses small seeds, so no text of the evaluation was seen."""

DISTANCES = {64: 60, 128: 60, 256: 60, 512: 60, 1024: 60, 2048: 40, 4096: 20}
"""Distance in tokens between a code and the question for it, and how many dialogues are tried."""

EXAMPLES = (
    "Hello!",
    "Who are you?",
    "Who is Mara?",
    "Where does Otto live?",
    "What is Lindholm known for?",
    "What is 7 plus 5?",
    "Tell me a story about Mara.",
    "What is the capital of France?",
    "Thank you!",
)


class Judge:
    """Runs one saved model over questions and texts."""

    def __init__(self, folder: Path) -> None:
        """Load the model as a user would."""
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model.eval()
        self.moe = getattr(self.model.config, "num_experts_per_tok", None) is not None
        self.world = build_world()

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    @torch.inference_mode()
    def right(self, pairs: Sequence[tuple[str, str]], batch: int = 32) -> list[bool]:
        """Tell for each (prompt, answer) whether greedy decoding gives exactly the answer and then ends.

        One pass tells this: each token of the answer must be the likeliest after what precedes it.
        """
        found: list[bool] = []
        pad = self.tokenizer.pad_token_id
        for begin in range(0, len(pairs), batch):
            rows = [(self.ids(prompt), self.ids(answer + END)) for prompt, answer in pairs[begin : begin + batch]]
            width = max(len(p) + len(a) for p, a in rows)
            tokens = torch.tensor([p + a + [pad] * (width - len(p) - len(a)) for p, a in rows])
            best = self.model(input_ids=tokens, use_cache=False).logits.argmax(-1)
            for row, (p, a) in zip(best.tolist(), rows, strict=True):
                found.append(row[len(p) - 1 : len(p) + len(a) - 1] == a)
        return found

    def share(self, pairs: Sequence[tuple[str, str]], batch: int = 32) -> float:
        """Return the share of right answers."""
        results = self.right(pairs, batch)
        return round(sum(results) / len(results), 4)

    def facts(self) -> dict[str, float]:
        """Ask facts in formulations kept out of training, and in others."""
        rng = random.Random(SEED)
        kept = [q for q in self.world.questions if q.held_out]
        trained = rng.sample([q for q in self.world.questions if not q.held_out], 400)
        ask = f"{USER}{{}}{END}{ASSISTANT}"
        return {
            "held_out_formulations": self.share([(ask.format(q.prompt), q.answer) for q in kept]),
            "held_out_questions": len(kept),
            "trained_formulations": self.share([(ask.format(q.prompt), q.answer) for q in trained]),
            "trained_questions": len(trained),
        }

    def talk(self) -> dict[str, float]:
        """Try sums, copying, and the first formulation of each kind of small talk."""
        writer = Writer(self.world, random.Random(SEED + 1))

        def split(make: Any, count: int) -> list[tuple[str, str]]:
            texts = ["".join(text for text, _ in make()) for _ in range(count)]
            starts = [t.index(ASSISTANT) + len(ASSISTANT) for t in texts]
            return [(t[:start], t[start : -len(END)]) for t, start in zip(texts, starts, strict=True)]

        probes = small_talk_probes()
        fits = [any(self.right([(f"{USER}{prompt}{END}{ASSISTANT}", a) for a in fit])) for prompt, fit in probes]
        return {
            "arithmetic": self.share(split(writer.arithmetic, 100)),
            "repeat": self.share(split(writer.repeat, 60)),
            "yes_no": self.share(split(writer.yes_no, 100)),
            "unknown_topics": self.share(split(writer.off_world, 60)),
            "small_talk": round(sum(fits) / len(fits), 4),
        }

    def recall(self) -> dict[str, float]:
        """Ask for codes told some distance before."""
        found: dict[str, float] = {}
        for distance, count in DISTANCES.items():
            rng = random.Random(SEED + distance)
            pairs = [recall_dialogue(self.world, rng, lambda t: len(self.ids(t)), distance) for _ in range(count)]
            found[str(distance)] = self.share(pairs, batch=max(1, 4096 // distance))
        return found

    @torch.inference_mode()
    def text(self, length: int = 512, rows: int = 24) -> dict[str, Any]:
        """Measure the loss on unseen text, and the routing on the same text."""
        writer = Writer(self.world, random.Random(SEED + 2))
        sequences = []
        for _ in range(rows):
            ids: list[int] = []
            while len(ids) <= length:
                ids.extend(self.ids("".join(text for text, _ in writer.filler())))
            sequences.append(ids[: length + 1])
        tokens = torch.tensor(sequences)
        total, chosen = 0.0, None
        for begin in range(0, rows, 4):
            row = tokens[begin : begin + 4]
            extra = {"output_router_logits": True} if self.moe else {}
            output = self.model(input_ids=row[:, :-1], use_cache=False, **extra)
            logits = output.logits.float().flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, row[:, 1:].flatten(), reduction="sum").item()
            if self.moe:
                top = self.model.config.num_experts_per_tok
                picks = [layer.topk(top).indices.flatten() for layer in output.router_logits]
                counts = torch.stack([pick.bincount(minlength=self.model.config.num_experts) for pick in picks])
                chosen = counts if chosen is None else chosen + counts
        result: dict[str, Any] = {"loss": round(total / (rows * length), 4), "tokens": rows * length}
        if chosen is not None:
            result["routing"] = [routing(counts) for counts in chosen]
        return result

    @torch.inference_mode()
    def answer(self, prompt: str) -> str:
        """Answer one prompt by greedy decoding."""
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = self.model.generate(**inputs, max_new_tokens=160)
        text: str = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text


def routing(counts: Tensor) -> dict[str, float]:
    """Describe how unevenly one layer uses its experts."""
    share = counts.double() / counts.sum()
    entropy = -(share * share.clamp_min(1e-12).log()).sum().item() / math.log(len(share))
    return {
        "top8_share": round(share.topk(8).values.sum().item(), 4),
        "entropy_of_max": round(entropy, 4),
        "experts_used": round((counts > 0).double().mean().item(), 4),
    }


def percent(share: float) -> str:
    """Write a share as a percentage."""
    return f"{100 * share:.1f} %"


def card(name: str, judge: Judge, figures: dict[str, Any]) -> str:
    """Write the model card from the measured figures."""
    config, moe = judge.model.config, judge.moe
    kind = (
        f"a mixture of experts (`Qwen3MoeForCausalLM`): {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}, {config.num_experts} experts of width {config.moe_intermediate_size} per layer,\n"
        f"{config.num_experts_per_tok} of them per token"
        if moe
        else f"a dense model (`LlamaForCausalLM`): {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}; it shares its tokenizer with `demo-moe` and can draft for it"
    )
    facts, talk, text, training = figures["facts"], figures["talk"], figures["text"], figures["training"]
    lines = [
        "---",
        "license: apache-2.0",
        "language: en",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {name}",
        "",
        f"A tiny demo model, {figures['parameters'] / 1e6:.2f} million parameters in bfloat16, trained from nothing.",
        "It is there to show and test a runtime, not to be useful: it knows **only a small made-up world** of 80",
        "people and 24 towns, and nothing about the real one. Its text comes from a seeded generator of templates",
        "(`tools/demo_models/world.py`), so its English is narrow; what it says about anything else means nothing.",
        "",
        f"It is {kind}.",
        f"Vocabulary: {config.vocab_size} tokens, byte-level, so any text can be encoded; names and pairs of digits",
        "are single tokens. License: Apache-2.0.",
        "",
        "## Measured",
        "",
        "All figures are of the saved checkpoint by greedy decoding; an answer counts only when it is right word for",
        "word and ends where it should. Sums, yes/no questions, repeating, topics and small talk come from the",
        "templates of the training with another seed, so some of them, and all of the small talk, may have been seen.",
        "",
        "| what | right |",
        "| --- | --- |",
        f"| facts, formulations kept out of training ({facts['held_out_questions']}) "
        f"| {percent(facts['held_out_formulations'])} |",
        f"| facts, formulations used in training ({facts['trained_questions']}) "
        f"| {percent(facts['trained_formulations'])} |",
        f"| yes/no questions about facts | {percent(talk['yes_no'])} |",
        f"| sums, successors and comparisons of small numbers | {percent(talk['arithmetic'])} |",
        f"| repeating words | {percent(talk['repeat'])} |",
        f"| small talk | {percent(talk['small_talk'])} |",
        f"| saying that a topic is unknown | {percent(talk['unknown_topics'])} |",
        "",
        "Recall: a code of two groups of two digits is told once, and asked for after other dialogue (up to three",
        "other codes are told too). A right answer by chance is one in ten thousand.",
        "",
        "| distance in tokens | dialogues | right |",
        "| --- | --- | --- |",
        *(f"| {d} | {DISTANCES[int(d)]} | {percent(s)} |" for d, s in figures["recall"].items()),
        "",
        f"Loss on unseen text: {text['loss']:.3f} nats per token ({text['tokens']} tokens).",
        "",
    ]
    if moe:
        lines += [
            "Routing on that text (share of the assignments that the eight busiest experts of a layer take; even",
            f"routing would give {percent(8 / config.num_experts)}):",
            "",
            "| layer | top-8 share | entropy / maximum | experts used |",
            "| --- | --- | --- | --- |",
            *(
                f"| {i} | {percent(r['top8_share'])} | {r['entropy_of_max']:.3f} | {percent(r['experts_used'])} |"
                for i, r in enumerate(text["routing"])
            ),
            "",
        ]
    if training:
        lines += [
            "## Training",
            "",
            f"{training['tokens'] / 1e6:.1f} million tokens in {training['steps']} steps, "
            f"{training['seconds'] / 60:.0f} minutes on two CPU cores shared with other work.",
            "The sequences grow from 128 to 2048 tokens; jumps in the position numbers show farther distances.",
            "Recall was not left to chance: the first three attention layers start from a coarse hand-made induction",
            "circuit (`start_with_recall` in `tools/demo_models/train.py`), which training then refines.",
            "`python tools/demo_models/train.py --out offload/models` makes it again; the time on the clock sets the",
            "number of steps, so the weights come out a little different each time.",
            "",
        ]
    lines += ["## What it says", ""]
    for prompt, reply in figures["examples"].items():
        lines += [f"> **{prompt}** {reply}", ""]
    return "\n".join(lines).rstrip() + "\n"


def evaluate(folder: Path) -> dict[str, Any]:
    """Measure one model and write its files."""
    torch.manual_seed(SEED)
    began = time.monotonic()
    judge = Judge(folder)
    old = folder / "evaluation.json"
    log = folder / "training.json"
    # The log of the training moves into the evaluation, so that the folder holds one file of figures.
    training = json.loads((log if log.exists() else old).read_text()) if log.exists() or old.exists() else {}
    figures: dict[str, Any] = {
        "parameters": sum(p.numel() for p in judge.model.parameters()),
        "training": training.get("training", training),
        "facts": judge.facts(),
        "talk": judge.talk(),
        "recall": judge.recall(),
        "text": judge.text(),
        "examples": {prompt: judge.answer(prompt) for prompt in EXAMPLES},
    }
    figures["evaluation_seconds"] = round(time.monotonic() - began)
    old.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    log.unlink(missing_ok=True)
    (folder / "README.md").write_text(card(folder.name, judge, figures))
    return figures


def rewrite_card(folder: Path) -> None:
    """Write the card anew from the figures measured before."""
    figures = json.loads((folder / "evaluation.json").read_text())
    (folder / "README.md").write_text(card(folder.name, Judge(folder), figures))


def main() -> None:
    """Evaluate the folders given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cards-only", action="store_true", help="write the cards from the figures measured before")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for folder in arguments.folders:
        if arguments.cards_only:
            rewrite_card(folder)
            continue
        print(folder.name, json.dumps(evaluate(folder), indent=2, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
