"""Pictures of a partition: what is analog, what is digital, and what crosses between them."""

from ffebm_compiler.drawing.exchange import dot_text, model_explorer_text
from ffebm_compiler.drawing.files import html_text, notebook_html, save_html, save_side_by_side, save_svg
from ffebm_compiler.drawing.formats import save_picture
from ffebm_compiler.drawing.loop_gains import loop_gain_points
from ffebm_compiler.drawing.measurements import GainPoint
from ffebm_compiler.drawing.overlay import (
    Overlay,
    deviation_overlay,
    gradient_overlay,
    loop_gain_overlay,
    relaxation_overlay,
)
from ffebm_compiler.drawing.plots import (
    feedback_sweep,
    plot_deviation,
    plot_feedback,
    plot_gradients,
    plot_hardware,
    plot_relaxation,
)
from ffebm_compiler.drawing.raster import save_image
from ffebm_compiler.drawing.svg import svg_text

__all__ = [
    "GainPoint",
    "Overlay",
    "deviation_overlay",
    "dot_text",
    "feedback_sweep",
    "gradient_overlay",
    "html_text",
    "loop_gain_overlay",
    "loop_gain_points",
    "model_explorer_text",
    "notebook_html",
    "plot_deviation",
    "plot_feedback",
    "plot_gradients",
    "plot_hardware",
    "plot_relaxation",
    "relaxation_overlay",
    "save_html",
    "save_image",
    "save_picture",
    "save_side_by_side",
    "save_svg",
    "svg_text",
]
