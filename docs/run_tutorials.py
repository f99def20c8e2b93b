"""Runs the tutorials again and writes their outputs into them.

    python docs/run_tutorials.py [NAME ...]

Each notebook runs in a folder of its own that is removed afterwards, with tables of 80 columns.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from ffebm_compiler.errors import FFEBMError
from ffebm_compiler.files.whole_files import write_whole

TUTORIALS = Path(__file__).parent / "tutorials"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main(names: list[str]) -> None:
    """Run the command line."""
    os.environ["COLUMNS"] = "80"
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        book = nbformat.read(path, 4)
        with tempfile.TemporaryDirectory() as folder:
            resources = {"metadata": {"path": folder}}
            NotebookClient(book, timeout=300, kernel_name="python3", resources=resources).execute()
        for cell in book.cells:
            cell.metadata.pop("execution", None)
        book.metadata = nbformat.from_dict(METADATA)
        write_whole(path, nbformat.writes(book) + "\n", failure=f"{path} cannot be written", error=FFEBMError)


if __name__ == "__main__":
    main(sys.argv[1:])
