"""The bundled demo models load, are small, and know their world."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools" / "demo_models"))

import world  # noqa: E402

MODELS = ROOT / "offload" / "models"
MOE = MODELS / "demo-moe"
DENSE = MODELS / "demo-dense"
FOLDERS = [pytest.param(MOE, id="moe"), pytest.param(DENSE, id="dense")]

QUESTIONS = 48
FLOORS = {"demo-moe": 0.90, "demo-dense": 0.85}
RECALL_FLOORS = {"demo-moe": 0.90, "demo-dense": 0.85}


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[Any, Any]]:
    """Load both models once."""
    return {
        folder.name: (
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(),
            transformers.AutoTokenizer.from_pretrained(folder),
        )
        for folder in (MOE, DENSE)
    }


def generate(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[str]:
    """Answer rendered prompts by greedy decoding, as one batch."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=new_tokens
        )
    replies: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return replies


def render(tokenizer: Any, *turns: str) -> str:
    """Render turns of user and assistant in alternation."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def text_of(seed: int) -> str:
    """Write some text of the world."""
    writer = world.Writer(world.build_world(), random.Random(seed))
    return "".join(text for _ in range(60) for text, _ in (*writer.filler(), *writer.tell(2), *writer.ask()))


def test_generator_is_deterministic_by_seed() -> None:
    assert world.build_world() == world.build_world()
    assert text_of(3) == text_of(3)
    assert text_of(3) != text_of(4)


def test_held_out_questions_are_never_asked_in_training() -> None:
    built = world.build_world()
    held_out = {q.prompt for q in built.questions if q.held_out}
    writer = world.Writer(built, random.Random(5))
    asked = "".join(text for _ in range(5000) for text, _ in writer.fact())
    assert len(held_out) > 100
    assert not [prompt for prompt in held_out if f"{world.USER}{prompt}{world.END}" in asked]


def test_size_of_both_together() -> None:
    assert sum(f.stat().st_size for folder in (MOE, DENSE) for f in folder.rglob("*") if f.is_file()) <= 25_000_000


def test_moe_has_enough_experts_and_layers() -> None:
    config = json.loads((MOE / "config.json").read_text())
    experts = config.get("num_experts", config.get("num_local_experts"))
    assert experts >= 32
    assert config["num_experts_per_tok"] >= 4
    assert config["num_hidden_layers"] >= 6
    assert config["max_position_embeddings"] >= 8192


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_complete(folder: Path) -> None:
    names = {f.name for f in folder.iterdir()}
    assert names >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "evaluation.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_both_have_the_same_tokenizer() -> None:
    assert (MOE / "tokenizer.json").read_bytes() == (DENSE / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("folder", FOLDERS)
def test_tokenizer_is_exact_and_names_and_codes_are_single_tokens(
    folder: Path, loaded: dict[str, tuple[Any, Any]]
) -> None:
    tokenizer = loaded[folder.name][1]
    for text in ("Hello, W\u00f6rld!  12345 x\n\ty", " \u65e5\u672c \U0001f642 Mara's code: 48 12.", text_of(6)):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    for word in (*world.build_world().people, *world.build_world().towns, *(f"{n:02d}" for n in range(100))):
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize("folder", FOLDERS)
def test_chat_template_renders(folder: Path, loaded: dict[str, tuple[Any, Any]]) -> None:
    tokenizer = loaded[folder.name][1]
    assert render(tokenizer, "Hi", "Hello!", "Who is Mara?") == (
        "<|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Who is Mara?<|end|><|assistant|>"
    )
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(system, tokenize=False) == "<|system|>Be kind.<|end|><|user|>Hi<|end|>"


@pytest.mark.parametrize("folder", FOLDERS)
def test_answers_held_out_questions(folder: Path, loaded: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = loaded[folder.name]
    held_out = [q for q in world.build_world().questions if q.held_out]
    asked = random.Random(17).sample(held_out, QUESTIONS)
    replies = generate(model, tokenizer, [render(tokenizer, q.prompt) for q in asked], new_tokens=14)
    right = sum(reply.startswith(q.answer + world.END) for q, reply in zip(asked, replies, strict=True))
    assert right / QUESTIONS >= FLOORS[folder.name]


@pytest.mark.parametrize("folder", FOLDERS)
def test_recalls_codes(folder: Path, loaded: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = loaded[folder.name]
    rng = random.Random(23)
    built = world.build_world()
    pairs = [world.recall_dialogue(built, rng, lambda t: len(tokenizer(t)["input_ids"]), 256) for _ in range(20)]
    replies = generate(model, tokenizer, [prompt for prompt, _ in pairs], new_tokens=12)
    right = sum(reply.startswith(answer) for reply, (_, answer) in zip(replies, pairs, strict=True))
    assert right / len(pairs) >= RECALL_FLOORS[folder.name]


@pytest.mark.parametrize("folder", FOLDERS)
def test_small_talk_ends_by_itself(folder: Path, loaded: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = loaded[folder.name]
    prompts = ("Hello!", "Who are you?", "What can you do?", "Thank you!", "Tell me a story about Mara.")
    replies = generate(model, tokenizer, [render(tokenizer, p) for p in prompts], new_tokens=160)
    for reply in replies:
        said, end, _ = reply.partition(world.END)
        assert end
        assert said.endswith((".", "!", "?"))
    assert "Mara" in replies[-1]
