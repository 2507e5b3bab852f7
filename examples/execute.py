"""Run the notebooks of this folder from the start and store what they show.

    python -m examples.execute           # all of them
    python -m examples.execute biases    # examples/biases.ipynb

Each runs in an empty folder and a kernel of its own, with the posenc that is imported
here. What is stored depends on the cells alone: no times, no names of this machine.
"""

# SPDX-License-Identifier: BSD-3-Clause

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

import posenc

FOLDER = Path(__file__).resolve().parent
# Seconds for one cell; the slowest takes half a minute on one core.
TIMEOUT = 300
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}


def notebooks():
    """Return the paths of all notebooks."""
    return sorted(FOLDER.glob("*.ipynb"))


def executed(path):
    """Return the notebook of a path as it looks after a run; raise if a cell fails."""
    notebook = plain(nbformat.read(path, as_version=4))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            coalesce_streams=True,
            record_timing=False,
            # Without advice that says messages are not encrypted; they stay here.
            extra_arguments=["--log-level=ERROR"],
        )
        client.execute(env=environment(folder))
    return plain(notebook, keep_outputs=True)


def environment(folder):
    """Return the variables of a kernel that imports this posenc and no settings."""
    variables = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    paths = [str(Path(posenc.__file__).parent.parent), os.environ.get("PYTHONPATH")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    variables["IPYTHONDIR"] = folder
    # Idle threads that spin are slow where others want the cores.
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # tqdm's advice to install ipywidgets.
    variables["PYTHONWARNINGS"] = "ignore:IProgress not found"
    return variables


def plain(notebook, keep_outputs=False):
    """Return a notebook with its cells, and nothing that changes from run to run."""
    cells = []
    for number, old in enumerate(notebook.cells, start=1):
        cell = {"cell_type": old.cell_type, "id": f"{number:02}", "metadata": {}}
        cell["source"] = old.source
        if old.cell_type == "code":
            cell["execution_count"] = old.execution_count if keep_outputs else None
            cell["outputs"] = old.outputs if keep_outputs else []
        cells.append(cell)
    content = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return nbformat.from_dict(content)


def main():
    """Run and store the notebooks that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [path.stem for path in notebooks()]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    wanted = parser.parse_args().names or names
    for name in wanted:
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(executed(path), path)
        print(path.name)


if __name__ == "__main__":
    main()
