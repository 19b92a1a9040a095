"""Run notebooks from top to bottom and store them with their outputs: all, or those named."""

import sys
import time
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).parent


def main(paths: list[Path]) -> None:
    """Run each in the folder of the notebooks; the first error ends it and changes no file."""
    for path in paths:
        started = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(HERE)}})
        client.execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day
        nbformat.write(notebook, path)
        size = path.stat().st_size / 1000
        print(f"{path.name}: {time.monotonic() - started:.1f} s, {size:.0f} kB", flush=True)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")))
