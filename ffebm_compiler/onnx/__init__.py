"""ONNX: export of the digital parts or of a whole hybrid, and execution of what was exported.

    hybrid.export_onnx("hybrid.onnx")
    hybrid.export_onnx("out/", parts="digital")
    outputs = ffebm_compiler.onnx.run("out/", x)
    ffebm_compiler.onnx.verify(hybrid, "hybrid.onnx", (x,))
    ffebm_compiler.onnx.quantise("out/", x, into="int8/")

Exporting needs the extra `ffebm-compiler[onnx]`. Importing this module does not.
"""

from ffebm_compiler.onnx.digital import export_digital
from ffebm_compiler.onnx.execute import Exported, load, run
from ffebm_compiler.onnx.quantise import ARITHMETIC, Quantised, QuantisedPart, quantise
from ffebm_compiler.onnx.verify import verify
from ffebm_compiler.onnx.whole import export_whole

__all__ = [
    "ARITHMETIC",
    "Exported",
    "Quantised",
    "QuantisedPart",
    "export_digital",
    "export_whole",
    "load",
    "quantise",
    "run",
    "verify",
]
