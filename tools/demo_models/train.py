"""Make the bundled demo models: tokenizer, a small mixture of experts, and a smaller dense model.

``python tools/demo_models/train.py --out offload/models`` remakes everything on two CPU cores in about half an hour;
more minutes make better models.  Lengths of training are given in minutes because CPUs differ; a run on a faster
machine sees more tokens.
"""

# ruff: noqa: SIM905 - long lists of words are easier to read and to change as text

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]
import torch
from evaluate import evaluate
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from world import ASSISTANT, COPY, END, PAD, RECALL, SPECIAL_TOKENS, SYSTEM, USER, Mix, Writer, build_world, pieces

POSITIONS = 32768
REACH = 6000
"""Furthest position that training shows; gaps in the position numbers stand in for long texts."""

SPLIT = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Words, groups of at most two digits, runs of signs, blanks; a leading space belongs to what follows."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ '" + SYSTEM + "' + message['content'] + '" + END + "' }}"
    "{%- elif message['role'] == 'user' -%}{{ '" + USER + "' + message['content'] + '" + END + "' }}"
    "{%- else -%}{{ '" + ASSISTANT + "' + message['content'] + '" + END + "' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + ASSISTANT + "' }}{%- endif -%}"
)

# Pieces for words from outside the world come from these; they only have to be encoded, not understood.
_ENGLISH = (
    "about after again against all also always another answer any around away because been before being below "
    "between both bring build call came cannot change children city close come could country course different "
    "does done down during each early earth end enough even every example eye face family far father feel few "
    "find first follow form found four from general give going good government great group grow hand hard have "
    "head hear help here high home house how important increase information into just keep kind know large last "
    "late later lead learn leave left life light like line little live long look made make many mean might money "
    "more most mother move much must name national near never next night nothing now number often only open order "
    "other over part people person place plan play point possible power present problem program public question "
    "quick read really right room same school second seem sentence should show side since small some something "
    "sound start state still story study such system take tell than that their them then there these they thing "
    "think this those though thought three through time together too turn under until use very want water way "
    "well were what when where which while white who why will with without woman word work world would write year "
    "young your nation station action mission tion ment ness able ible ing ful less ous ive est"
).split()


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def _world_text(seed: int, count: int) -> Iterator[str]:
    writer = Writer(build_world(), random.Random(seed))
    for _ in range(count):
        writer.forget()
        for piece in (writer.filler(), writer.tell(2), writer.ask()):
            yield "".join(text for text, _ in piece)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE in which each frequent word, each name and each pair of digits is one token."""
    specials = regex.compile("|".join(regex.escape(token) for token in SPECIAL_TOKENS))
    counts: Counter[str] = Counter()
    for text in _world_text(seed=1, count=12_000):
        for plain in specials.split(text):
            counts.update(regex.findall(SPLIT, plain))
    # Subwords are learned from words outside the world: the world's own words become whole tokens below.
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator([f"{word} {word}" for word in _ENGLISH + sorted(counts)], trainer)
    bpe = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = dict(bpe["vocab"])
    wanted = {word for word, count in counts.items() if count >= 25 and regex.fullmatch(r" ?\p{L}+", word)}
    world = build_world()
    for name in (*world.people, *world.towns):
        wanted |= {name, f" {name}"}
    for number in range(100):
        wanted |= {f"{number:02d}", f" {number:02d}"}
    wanted |= {f" {digit}" for digit in range(10)}
    for word in sorted(wanted):
        token = "".join(part for part, _ in byte_level.pre_tokenize_str(word))
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in bpe["merges"]]
    # With ignore_merges a whole word in the vocabulary is taken as it is, so it needs no chain of merges.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    make: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# -- models ------------------------------------------------------------------------------------------------------------


class Dispatch(torch.autograd.Function):
    """Copies rows into slots, each row into ``top_k`` of them; written by hand since autograd's way is slow here."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slot: Tensor, size: int) -> Tensor:
        """Lay the rows out."""
        ctx.save_for_backward(slot)
        ctx.rows = rows.shape[0]
        padded = rows.new_zeros(size, rows.shape[1])
        return padded.index_copy_(0, slot, rows.repeat_interleave(slot.numel() // rows.shape[0], 0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Add up what came back to each row."""
        (slot,) = ctx.saved_tensors
        return grad.index_select(0, slot).view(ctx.rows, -1, grad.shape[1]).sum(1), None, None


class Collect(torch.autograd.Function):
    """Takes rows from slots that are all different."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, slot: Tensor) -> Tensor:
        """Take the rows."""
        ctx.save_for_backward(slot)
        ctx.size = padded.shape[0]
        return padded.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Put the gradients of the rows into their slots."""
        (slot,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, grad.shape[1]).index_copy_(0, slot, grad), None


dispatch: Any = Dispatch.apply
collect: Any = Collect.apply


def padded_experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Run all experts as one batched product over padded groups of tokens; the fastest way on a CPU with bf16."""
    tokens, top_k = chosen.shape
    experts = module.num_experts
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    capacity = -(-int(counts.max()) // 16) * 16
    of_expert = flat[order]
    slot = torch.empty_like(order)
    slot[order] = of_expert * capacity + torch.arange(flat.numel()) - (counts.cumsum(0) - counts)[of_expert]
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden.dtype
    with torch.autocast("cpu", enabled=False):
        padded: Tensor = dispatch(hidden.to(dtype), slot, experts * capacity).view(experts, capacity, -1)
        gate, up = torch.bmm(padded, module.gate_up_proj.to(dtype).transpose(1, 2)).chunk(2, -1)
        out = torch.bmm(F.silu(gate) * up, module.down_proj.to(dtype).transpose(1, 2)).view(experts * capacity, -1)
        out = collect(out, slot).view(tokens, top_k, -1)
        mixed: Tensor = (out * weights.to(dtype).unsqueeze(-1)).sum(1).to(hidden.dtype)
        return mixed


def make_moe(vocab_size: int, eos: int, pad: int) -> Qwen3MoeForCausalLM:
    """Make the untrained mixture of experts."""
    settings: Any = Qwen3MoeConfig  # its declared fields lack head_dim, which it takes
    config = settings(
        vocab_size=vocab_size,
        hidden_size=224,
        intermediate_size=448,
        moe_intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        router_aux_loss_coef=0.02,
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=None,
    )
    return Qwen3MoeForCausalLM(config)


def make_dense(vocab_size: int, eos: int, pad: int) -> LlamaForCausalLM:
    """Make the untrained dense model."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=160,
        intermediate_size=416,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def start_with_recall(model: Any, seed: int) -> None:
    """Lay a coarse induction circuit into the first three attention layers of an untrained model.

    Training alone finds it only after more tokens than a few CPU minutes allow.  Two heads of layer 0 look one and two
    tokens back and copy a projection of what stands there.  In layers 1 and 2 one head looks for places that come
    right after the present token ("48 12"), another for places two after the token before the present one
    ("Mara is 48"), and both write what stands there into the prediction.  Training is free to change all of it.
    """
    config, random_ = model.config, torch.Generator().manual_seed(seed)
    width, head, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    group = heads // config.num_key_value_heads
    deviation = 0.25
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, deviation, generator=random_)
    # Column 0 is a constant to steer heads by place; the next columns are where layer 0 puts what it copies.
    embedding[:, 0] = 4 * deviation
    embedding[:, 1 : 1 + 2 * head] = 0.0
    model.model.norm.weight.fill_(0.25)
    free = width - 1 - 2 * head
    spread = torch.zeros(2 * head, width)
    spread[:, 1 + 2 * head :] = torch.linalg.qr(torch.randn(free, min(free, 2 * head), generator=random_)).Q.T
    tokens, values = spread[:head], spread[head:]
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(head // 2) / (head // 2))
    far = torch.nonzero(frequency < 1 / 4000).flatten()
    slow = torch.cat([far, far + head // 2])
    normed = hasattr(model.model.layers[0].self_attn, "q_norm")
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        attention.o_proj.weight.zero_()
        if normed:
            gain = 2.2 if number < 3 else 1.4
            attention.q_norm.weight.fill_(gain)
            attention.k_norm.weight.fill_(gain)
        if number > 2:
            continue
        for kind in (0, 1):
            to_q = attention.q_proj.weight[kind * group * head :][:head]
            to_k = attention.k_proj.weight[kind * head :][:head]
            to_v = attention.v_proj.weight[kind * head :][:head]
            from_v = attention.o_proj.weight[:, kind * group * head :][:, :head]
            to_q.zero_()
            to_k.zero_()
            if number == 0:
                strength = torch.tensor([0.5, 0.3, 0.2]).sqrt() * (1.0 if normed else 2.5)
                turn = frequency[:3] * (1 + kind)
                to_k[:3, 0] = strength
                to_q[:3, 0] = strength * turn.cos()
                to_q[head // 2 : head // 2 + 3, 0] = -strength * turn.sin()
                to_v.copy_(tokens)
                from_v[1 + kind * head : 1 + (kind + 1) * head] = 0.25 * torch.eye(head)
                continue
            size = 1.0 if normed else 2.0
            count = len(slow)
            rows = torch.arange(count) + (number - 1) * (head - count)
            before = torch.eye(width)[1 : 1 + head][rows]
            before_that = torch.eye(width)[1 + head : 1 + 2 * head][rows]
            to_q[slow] = size * (tokens[rows] if kind == 0 else before)
            to_k[slow] = size * (before if kind == 0 else before_that)
            to_v.copy_(values)
            from_v.copy_(0.25 * values.T)


# -- optimizer ---------------------------------------------------------------------------------------------------------


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest (batch of) semi-orthogonal matrices by the quintic Newton-Schulz iteration."""
    x: Tensor = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates, for matrices and stacks of matrices (experts)."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        """Keep the settings; buffers are made at the first step."""
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalized(p.grad.lerp(buffer, group["momentum"]))
                # This factor gives updates the size that AdamW would give, whatever the shape.
                scale = 0.2 * math.sqrt(max(p.shape[-2:]))
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"] * scale)


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum."""

    lengths: tuple[int, ...]
    """Lengths of sequences, drawn anew for each batch."""
    mix: Mix
    until: float
    """Share of the time by which the stage ends even when recall is not there yet."""
    gate: float = 0.9
    """Share of recalled values that must be right for the next stage to begin."""
    tokens: int = 2048
    """Tokens of a batch; small ones, for in a short training the number of steps counts most."""
    gaps: bool = True
    """Whether position numbers jump, to show far distances at the cost of short texts."""


CURRICULUM = (
    Stage(
        (128,),
        Mix(table=0.25, drill=0.35, recall=0.15, groups=(1,), pairs=(3, 8), crowd=6),
        0.35,
        gaps=False,
        tokens=2048,
    ),
    Stage((128, 256), Mix(table=0.2, drill=0.1, recall=0.4, groups=(1, 2), pairs=(4, 12)), until=0.5),
    Stage((256, 512), Mix(table=0.1, drill=0.03, recall=0.45, groups=(1, 2, 3), untold=0.02, crowd=20), until=0.68),
    Stage(
        (256, 512, 1024),
        Mix(table=0.05, drill=0.02, recall=0.45, groups=(1, 2, 2, 3), untold=0.03, crowd=30),
        until=0.85,
    ),
    Stage(
        (256, 512, 1024, 2048),
        Mix(table=0.0, drill=0.0, recall=0.5, groups=(1, 2, 2, 3, 4), untold=0.04, crowd=40),
        until=1,
    ),
)


class Batches:
    """Makes batches of token ids, loss weights and position numbers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Keep the tokenizer; all draws come from the seed."""
        self.backend = tokenizer.backend_tokenizer
        self.rng = random.Random(seed)
        self.writer = Writer(build_world(), self.rng)

    def sequence(self, length: int, stage: Stage) -> tuple[list[int], list[float], list[int]]:
        """Make one sequence of ``length`` + 1 tokens."""
        ids: list[int] = []
        weights: list[float] = []
        bounds: list[int] = []
        for piece in pieces(self.writer, stage.mix):
            bounds.append(len(ids))
            for encoded, (_, weight) in zip(self.backend.encode_batch([t for t, _ in piece]), piece, strict=True):
                ids.extend(encoded.ids)
                weights.extend([weight] * len(encoded.ids))
            if len(ids) > length:
                break
        positions = list(range(length + 1))
        if stage.gaps and self.rng.random() < 0.5:
            for bound in self.rng.sample(bounds, min(len(bounds), self.rng.randint(1, 3))):
                jump = int(math.exp(self.rng.uniform(math.log(16), math.log(REACH / 3))))
                for i in range(bound, length + 1):
                    positions[i] += jump
        return ids[: length + 1], weights[: length + 1], positions

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Make one batch."""
        length = self.rng.choice(stage.lengths)
        rows = [self.sequence(length, stage) for _ in range(max(1, stage.tokens // length))]
        ids, weights, positions = zip(*rows, strict=True)
        return torch.tensor(ids), torch.tensor(weights), torch.tensor(positions)


# -- training ----------------------------------------------------------------------------------------------------------


class Pace:
    """Gives way to other programs: two threads of which one waits for a core are slower than one alone."""

    def __init__(self, most: int) -> None:
        """Begin with one thread."""
        self.most, self.quiet = most, 0
        self.when, self.used = time.monotonic(), self.time_of_others()
        torch.set_num_threads(1)

    @staticmethod
    def time_of_others() -> float:
        """Return the processor time, in seconds, that the other programs have used so far."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if stat.parent.name != str(os.getpid()):
                ticks += int(fields[11]) + int(fields[12])
        return ticks / 100

    def adapt(self) -> None:
        """Choose the number of threads, every few seconds."""
        now = time.monotonic()
        if now - self.when > 2.0:
            used = self.time_of_others()
            taken = (used - self.used) / (now - self.when)
            self.when, self.used = now, used
            count = max(1, self.most - math.ceil(taken - 0.2))
            self.quiet = self.quiet + 1 if count == self.most else 0
            # One slow step with too many threads costs more than many with too few, so quiet must last for a while.
            if count < self.most or self.quiet >= 6:
                torch.set_num_threads(count)


def balance_loss(router_logits: Iterable[Tensor], top_k: int) -> Tensor:
    """Return the mean over layers of how uneven the routing is; 1 means even."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k).indices, 1.0 / top_k)
        losses.append(logits.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def rate(progress: float, step: int) -> float:
    """Return the factor of the learning rate: warm up, stay, fall over the last two fifths of the time."""
    return min(1.0, (step + 1) / 60) * min(1.0, max(0.0, 1.0 - progress) / 0.4)


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    minutes: float,
    seed: int,
    lr: float,
    adam_lr: float,
    threads: int,
) -> dict[str, float]:
    """Train a model for some minutes and save it; return what the training took."""
    moe = isinstance(model, Qwen3MoeForCausalLM)
    if moe:
        model.set_experts_implementation("padded")
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n and "gate.weight" not in n]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    optimizers = [
        Muon(matrices, lr=lr, decay=0.02),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    peaks = [lr, adam_lr]
    batches = Batches(tokenizer, seed)
    pace = Pace(threads)
    start, step, seen, number, recall, copied, calm = time.monotonic(), 0, 0, 0, 0.0, 0.0, 0
    saved = shown = start
    model.train()
    while (progress := (time.monotonic() - start) / (minutes * 60)) < 1.0:
        pace.adapt()
        stage = CURRICULUM[number]
        ids, weights, positions = batches.batch(stage)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # An explicit mask keeps the jumps in the position numbers from being read as borders of documents.
            output = model(
                input_ids=ids[:, :-1],
                attention_mask=torch.ones_like(ids[:, :-1]),
                position_ids=positions[:, :-1],
                use_cache=False,
                **({"output_router_logits": True} if moe else {}),
            )
        logits = output.logits.flatten(0, 1)
        target, weight = ids[:, 1:].flatten(), weights[:, 1:].flatten()
        losses = F.cross_entropy(logits.float(), target, reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        total = loss
        if moe:
            balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
            total = loss + model.config.router_aux_loss_coef * balance
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(progress, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        asked = weight >= RECALL
        if asked.any():
            right = (logits[asked].argmax(-1) == target[asked]).float().mean().item()
            recall = 0.97 * recall + 0.03 * right
        asked = weight == COPY
        if asked.any():
            right = (logits[asked].argmax(-1) == target[asked]).float().mean().item()
            copied = 0.97 * copied + 0.03 * right
        step, seen, calm = step + 1, seen + target.numel(), calm + 1
        if number + 1 < len(CURRICULUM) and (progress > stage.until or (recall > stage.gate and calm > 60)):
            number, calm = number + 1, 0
            print(f"stage {number} begins: step {step} recall {recall:.3f} progress {progress:.3f}", flush=True)
        now = time.monotonic()
        if now - shown > 15:
            shown = now
            print(
                f"step {step} tokens {seen / 1e6:.2f}M {seen / (now - start):.0f}/s loss {loss.item():.3f} "
                f"recall {recall:.3f} copy {copied:.3f}"
                + (f" balance {balance.item():.3f}" if moe else "")
                + f" at {progress:.3f} threads {torch.get_num_threads()}",
                flush=True,
            )
        if now - saved > 300:
            saved = now
            save(model, tokenizer, out)
    save(model, tokenizer, out)
    seconds = round(time.monotonic() - start)
    taken: dict[str, float] = {"tokens": seen, "steps": step, "seconds": seconds}
    (out / "training.json").write_text(json.dumps(taken, indent=2) + "\n")
    return taken


def save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bfloat16, with tokenizer and generation settings."""
    out.mkdir(parents=True, exist_ok=True)
    clone = type(model)(model.config)
    clone.load_state_dict(model.state_dict())
    clone = clone.to(torch.bfloat16)
    clone.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    clone.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Make both models, measure them, and write their cards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("offload/models"))
    parser.add_argument("--moe-minutes", type=float, default=24.0)
    parser.add_argument("--dense-minutes", type=float, default=8.0)
    parser.add_argument("--only", choices=("moe", "dense"))
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    ALL_EXPERTS_FUNCTIONS.register("padded", padded_experts)
    tokenizer = make_tokenizer()
    size = -(-len(tokenizer) // 8) * 8
    eos, pad = tokenizer.vocab[END], tokenizer.vocab[PAD]
    for name, make, minutes in (
        ("moe", make_moe, arguments.moe_minutes),
        ("dense", make_dense, arguments.dense_minutes),
    ):
        if arguments.only in (None, name):
            model = make(size, eos, pad)
            start_with_recall(model, arguments.seed)
            print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {size}", flush=True)
            taken = train(
                model,
                tokenizer,
                arguments.out / f"demo-{name}",
                minutes,
                arguments.seed,
                arguments.lr,
                arguments.adam_lr,
                arguments.threads,
            )
            print(name, taken, json.dumps(evaluate(arguments.out / f"demo-{name}"), indent=2), flush=True)


if __name__ == "__main__":
    main()
