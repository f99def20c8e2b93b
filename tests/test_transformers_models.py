"""transformers models as they come: default cache, the source's own output classes, inputs by the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.cli.libraries import _transformers_inputs
from ffebm_compiler.cli.models import random_inputs
from ffebm_compiler.passes.containers import leaves_of

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from zoo_models import load_torchvision

pytestmark = pytest.mark.slow
ONE = ffebm.Hardware(layers_per_block=1)


def tokens(batch: int) -> Tensor:
    return torch.randint(3, 40, (batch, 5), generator=torch.Generator().manual_seed(batch))


def small(name: str) -> nn.Module:
    load_torchvision()
    import transformers as t

    special = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    build: dict[str, Callable[[], nn.Module]] = {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, **special)),
        "llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                **special,
            )
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, **special)
        ),
        "whisper": lambda: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                num_mel_bins=4,
                max_source_positions=10,
                max_target_positions=16,
                decoder_start_token_id=1,
                **heads,
                **special,
            )
        ),
    }
    return seeded(build[name]).eval()


def example(name: str, batch: int) -> dict[str, Any]:
    if name == "whisper":
        return {"input_features": noise(batch, 4, 20, seed=batch), "decoder_input_ids": tokens(batch)}
    return {"input_ids": tokens(batch)} | ({"decoder_input_ids": tokens(batch)} if name == "t5" else {})


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "whisper"])
def test_models_with_a_cache_are_captured_without_it(name: str) -> None:
    model = small(name)
    hybrid = ffebm.convert(model, (), example(name, 2), hardware=ONE)
    found, expected = hybrid(**example(name, 3)), model(**example(name, 3))
    assert type(found) is type(expected)
    assert list(found) == [key for key in expected if key != "past_key_values"]
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert any("without its key-value cache: pass use_cache=True" in note for note in hybrid.plan.notes)
    assert (model.config.use_cache, hybrid.config.use_cache) == (True, False)
    assert (hybrid.dtype, hybrid.device) == (torch.float32, torch.device("cpu"))


def test_the_cache_is_there_for_those_who_ask() -> None:
    model = small("gpt2")
    asked = example("gpt2", 2) | {"use_cache": True, "output_hidden_states": True}
    hybrid = ffebm.convert(model, (), asked, hardware=ONE)
    call = example("gpt2", 3) | {"use_cache": True, "output_hidden_states": True}
    found, expected = hybrid(**call), model(**call)
    assert list(found) == list(expected)
    assert type(found.past_key_values) is type(expected.past_key_values)
    for have, want in zip(leaves_of(found), leaves_of(expected), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert found.past_key_values.get_seq_length() == 5


@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper"])
def test_the_command_line_knows_what_a_model_takes(name: str) -> None:
    model = small(name)
    args, kwargs = random_inputs(_transformers_inputs(model), 0)
    if name != "gpt2":
        assert "decoder_input_ids" in kwargs
    with torch.no_grad():
        assert model(*args, **kwargs).logits.isfinite().all()
