"""Pictures of a partition: what is analog, what is digital, and what crosses between them."""

from ffebm_compiler.drawing.files import save_html, save_svg
from ffebm_compiler.drawing.svg import svg_text

__all__ = ["save_html", "save_svg", "svg_text"]
