"""Every error that this package raises on purpose.

A message says what was given, what was expected and what to do. It names the
module path, the block or the file.
"""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "ConvergenceError",
    "ConvergenceWarning",
    "ExportError",
    "FFEBMDeprecationWarning",
    "FFEBMError",
    "FFEBMWarning",
    "FabricError",
    "GradientError",
    "HardwareError",
    "InputError",
    "NotYetError",
    "PlanError",
    "UnsupportedError",
]


class FFEBMError(Exception):
    """Base class of all errors raised on purpose by ffebm-compiler."""


class InputError(FFEBMError, ValueError):
    """An argument that does not fit: its type, shape, range or content."""


class CaptureError(FFEBMError):
    """The model could not be turned into a graph."""


class UnsupportedError(FFEBMError):
    """The model holds something that cannot be converted as asked."""


class HardwareError(FFEBMError, ValueError):
    """A hardware description that describes no hardware."""


class PlanError(FFEBMError, ValueError):
    """A partition plan that is malformed, cyclic, over capacity or of another model."""


class ConvergenceError(FFEBMError, ArithmeticError):
    """An energy block did not settle."""


class GradientError(FFEBMError, ArithmeticError):
    """A gradient estimator could not produce a gradient."""


class ExportError(FFEBMError):
    """An export could not be written or did not verify."""


class FabricError(FFEBMError, RuntimeError):
    """A fabric that measures equilibria failed, or its answer is no set of states."""


class NotYetError(FFEBMError, NotImplementedError):
    """A part of the public interface that was announced and not built. Nothing raises it any more."""


class FFEBMWarning(UserWarning):
    """Base class of all warnings issued on purpose by ffebm-compiler."""


class FFEBMDeprecationWarning(FFEBMWarning, DeprecationWarning):
    """A name or argument that a later version will not have. The message says what to use instead, and until when."""


class ConvergenceWarning(FFEBMWarning):
    """An energy block stopped before it reached its tolerance."""
