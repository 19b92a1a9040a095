"""Run notebooks from top to bottom and store them with their outputs: all, or those named."""

import base64
import io
import resource
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from PIL import Image

HERE = Path(__file__).parent


def main(paths: list[Path]) -> None:
    """Run each in the folder of the notebooks; the first error ends it and changes no file."""
    for path in paths:
        before = _processor_seconds()
        notebook = nbformat.read(path, as_version=4)
        options: dict[str, Any] = dict(resources={"metadata": {"path": str(HERE)}})
        nbclient.NotebookClient(notebook, coalesce_streams=True, **options).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day
            for output in cell.get("outputs", ()):
                _shrink(output.get("data", {}))
        nbformat.write(notebook, path)
        size = path.stat().st_size / 1000
        seconds = _processor_seconds() - before
        print(f"{path.name}: {seconds:.0f} s of processor time, {size:.0f} kB", flush=True)


def _processor_seconds() -> float:
    """Of kernels that have ended, and of what they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _shrink(data: dict[str, Any]) -> None:
    """Keep one picture of an output: of photos a JPEG, of charts the PNG, which is smaller."""
    if "image/png" not in data:
        return
    data.pop("image/jpeg", None)
    png, buffer = data["image/png"].strip(), io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    Image.alpha_composite(ground, picture).convert("RGB").save(buffer, "JPEG", quality=82)
    jpeg = base64.b64encode(buffer.getvalue()).decode()
    data["image/png"] = png
    if len(jpeg) < len(png):
        del data["image/png"]
        data["image/jpeg"] = jpeg


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")))
