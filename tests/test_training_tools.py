"""transformers' Trainer, Lightning and accelerate train a hybrid unchanged, and resume it where it stopped."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ffebm_compiler as ffebm

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from zoo_models import load_torchvision

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::Warning")]


@pytest.fixture(autouse=True)
def _tools_import() -> None:
    load_torchvision()  # transformers and Lightning import torchvision where it is installed


def hybrid() -> ffebm.HybridModel:
    """A block of one layer, batch norm, and a block with feedback."""
    net = seeded(
        lambda: nn.Sequential(
            nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
        )
    )
    return ffebm.convert(net, torch.zeros(2, 8), feedback=0.3)


def data() -> TensorDataset:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs[:, :4].argmax(1))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


# -- Lightning -------------------------------------------------------------------------------------


def lightning_module() -> Any:
    import pytorch_lightning

    class Classifier(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = hybrid()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 3e-2)

    return Classifier()


def lightning_fit(folder: Path, epochs: int, precision: str, checkpoint: str | None = None) -> tuple[Any, Any]:
    import pytorch_lightning

    trainer = pytorch_lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision=precision,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    module = lightning_module()
    trainer.fit(module, DataLoader(data(), batch_size=16), ckpt_path=checkpoint)
    return trainer, module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_lightning_trains_and_resumes(precision: str, tmp_path: Path) -> None:
    trainer, module = lightning_fit(tmp_path / "first", 2, precision)
    first = F.cross_entropy(hybrid().to(module.dtype)(data()[:][0].to(module.dtype)), data()[:][1])
    assert trainer.callback_metrics["loss"] < 0.8 * first
    checkpoint = trainer.checkpoint_callback.best_model_path
    _, resumed = lightning_fit(tmp_path / "second", 4, precision, checkpoint)
    _, whole = lightning_fit(tmp_path / "whole", 4, precision)
    assert_same(state(resumed.net), state(whole.net))
    gains = [block.loop_gain for block in resumed.net.blocks]
    assert gains == pytest.approx([block.loop_gain for block in whole.net.blocks], rel=1e-3)
    assert 0.25 < max(gains) < 0.35


# -- accelerate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_and_resumes(precision: str, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def train(epochs: int, resume: bool = False, save: bool = False) -> dict[str, Tensor]:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        model = hybrid().train()
        model, optimizer, loader = accelerator.prepare(
            model, torch.optim.Adam(model.parameters(), 1e-2), DataLoader(data(), batch_size=16)
        )
        if resume:
            accelerator.load_state(str(tmp_path / "state"))
        for _ in range(epochs):
            for inputs, labels in loader:
                optimizer.zero_grad()
                outputs = model(inputs)
                assert outputs.dtype is torch.float32
                accelerator.backward(F.cross_entropy(outputs, labels))
                optimizer.step()
        if save:
            accelerator.save_state(str(tmp_path / "state"))
        return state(accelerator.unwrap_model(model))

    train(2, save=True)
    assert_same(train(1, resume=True), train(3))


# -- transformers ----------------------------------------------------------------------------------


class Sentences(Dataset):  # type: ignore[type-arg]
    """Token sequences in which the next token is the last one plus one; with a column that no forward takes."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = 3 + (torch.arange(6) + index) % 20
        return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens), "extra": tokens}


@pytest.fixture
def language_model() -> ffebm.HybridModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = seeded(lambda: GPT2LMHeadModel(config))
    tokens = torch.randint(3, 20, (2, 6))
    example = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    # The Trainer's safetensors file has no place for γ: with feedback, a resumed run measures it anew (within 5 %).
    return ffebm.convert(model, (), example, hardware=ffebm.Hardware(layers_per_block=1))


def test_the_trainer_of_transformers_trains_and_resumes(language_model: ffebm.HybridModel, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def train(epochs: int, folder: str, checkpoint: str | None = None) -> tuple[Any, ffebm.HybridModel]:
        model = copy.deepcopy(language_model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), num_train_epochs=epochs, per_device_train_batch_size=8, use_cpu=True,
            learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], disable_tqdm=True, save_strategy="epoch",
            logging_steps=1, seed=0,
            label_names=["labels"],  # the Trainer looks for them at the class, which knows of no source
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences())
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, model

    trainer, _ = train(2, "first")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.85 * losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    checkpoint = str(tmp_path / "first" / f"checkpoint-{trainer.state.global_step}")
    _, resumed = train(3, "second", checkpoint)
    _, whole = train(3, "whole")
    assert_same(state(resumed), state(whole))
    assert language_model.config.model_type == "gpt2"
    assert language_model.device == torch.device("cpu")
