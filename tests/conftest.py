"""Fixtures shared by the suite."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from moe import kernels
from tiers.folders import cache_folder

# before transformers is imported anywhere: tests never reach for the network, and keep quiet
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# the same examples in every run, so that a commit that passed here passes anywhere; look for new ones with
# `HYPOTHESIS_PROFILE=explore make test` and keep what they find as an @example
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("explore", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
# tiny models gain nothing from a second thread, and lose a great deal when another process wants the core
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The suite leaves the user's cache and conversations alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLOAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OFFLOAD_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own: nothing in it but the compiled kernels, which take seconds to compile."""
    folder = tmp_path / "cache"
    if kernels.load() is not None:
        shutil.copytree(cache_folder() / "kernels", folder / "kernels", copy_function=shutil.copy2)
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("OFFLOAD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixture-of-Experts checkpoint without a tokenizer."""
    from families import build

    folder = tmp_path_factory.mktemp("tiny-moe")
    build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is nearly all vocabulary: an output head of 160 MB."""
    from families import build

    folder = tmp_path_factory.mktemp("wide-head")
    build("llama", hidden_size=512, vocab_size=80_000, num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of some 200 MB, large enough for memory figures to mean something."""
    from families import build

    folder = tmp_path_factory.mktemp("wide-dense")
    build("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8,
          num_key_value_heads=4, max_position_embeddings=4096).save_pretrained(folder)  # fmt: skip
    return folder
