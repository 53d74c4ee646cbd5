"""Run learn_bone.ipynb, and give learn_bone.zh.ipynb its code and outputs: `make notebooks`.

One need not read this to understand Bone. The texts of the Chinese notebook are its own; as many
cells of the same kinds stand in both.
"""

import pathlib

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ROOT / "learn_bone.ipynb", ROOT / "learn_bone.zh.ipynb"


def run(path: pathlib.Path) -> NotebookNode:
    """Return a notebook with the outputs of a new run. CellExecutionError if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        record_timing=False,  # or every run would write another file
        coalesce_streams=True,
        resources={"metadata": {"path": str(ROOT)}},
    )
    return client.execute()


def main() -> None:
    """Write both notebooks."""
    english = run(ENGLISH)
    chinese = nbformat.read(CHINESE, as_version=4)
    for source, copy in zip(english.cells, chinese.cells, strict=True):
        if source.cell_type == "code":
            copy.update(source)
    for path, notebook in ((ENGLISH, english), (CHINESE, chinese)):
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
