"""Run an exported file in TensorRT beside onnxruntime: do they agree, and how fast is each?

Needs `pip install tensorrt cuda-python`, an NVIDIA GPU and a file of `sparseinst export`. It was
written after TensorRT's documentation and has not been run by us, who have no such machine.

  python examples/tensorrt.py model.onnx photo.jpg
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.data.images import as_rgb
from sparseinst_jax.export import verify
from sparseinst_jax.runner.file_predictor import FilePredictor, GraphPredictor
from sparseinst_jax.runner.onnx_file import read_metadata

LEAST, MOST, MOST_IMAGES = 64, 1344, 4  # of the profile
WORKSPACE = 4 << 30


def build(path: Path, usual: tuple[int, int]) -> Any:
    """Build an engine from a file."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        faults = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise ValueError(f"TensorRT cannot read {path}:\n  " + "\n  ".join(faults))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 as the package's
    if read_metadata(path).fixed_size is None:
        profile = builder.create_optimization_profile()
        sizes = ((1, LEAST, LEAST), (1, *usual), (MOST_IMAGES, MOST, MOST))
        profile.set_shape("images", *((*size, 3) for size in sizes))
        profile.set_shape("valid_size", *((size[0], 2) for size in sizes))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return trt.Runtime(logger).deserialize_cuda_engine(plan)


def runner(engine: Any) -> Any:
    """Make a function from (images, valid_size) to named outputs."""
    import tensorrt as trt
    from cuda.bindings import runtime as cuda

    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]

    def checked(result: Any) -> Any:
        error, *values = result
        if error != cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"CUDA: {error}")
        return values[0] if values else None

    stream = checked(cuda.cudaStreamCreate())

    def run(images: np.ndarray, valid_size: np.ndarray) -> dict[str, np.ndarray]:
        arrays = {"images": np.ascontiguousarray(images), "valid_size": valid_size}
        for name, value in arrays.items():
            context.set_input_shape(name, value.shape)
        for name in outputs:
            kind = trt.nptype(engine.get_tensor_dtype(name))
            arrays[name] = np.empty(tuple(context.get_tensor_shape(name)), kind)
        places = {name: checked(cuda.cudaMalloc(value.nbytes)) for name, value in arrays.items()}
        kinds = cuda.cudaMemcpyKind
        for name in ("images", "valid_size"):
            value = arrays[name]
            to = kinds.cudaMemcpyHostToDevice
            checked(cuda.cudaMemcpy(places[name], value.ctypes.data, value.nbytes, to))
        for name, place in places.items():
            context.set_tensor_address(name, int(place))
        if not context.execute_async_v3(stream):
            raise RuntimeError("TensorRT did not run the engine")
        checked(cuda.cudaStreamSynchronize(stream))
        for name in outputs:
            value, to = arrays[name], kinds.cudaMemcpyDeviceToHost
            checked(cuda.cudaMemcpy(value.ctypes.data, places[name], value.nbytes, to))
        for place in places.values():
            checked(cuda.cudaFree(place))
        return {name: arrays[name] for name in outputs}

    return run


def main() -> int:
    """Print the agreement and the times; returns 1 where they disagree."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--runs", type=int, default=50)
    arguments = parser.parse_args()
    here = FilePredictor(arguments.model)
    photos = [as_rgb(path) for path in arguments.photos]
    item = here.prepare(photos[0])
    run = runner(build(arguments.model, here.padded_size(item)))
    there = GraphPredictor("the engine", here.metadata, run)
    agreement = verify.compare(here, there, photos)
    print("; ".join(agreement.faults()) or "agrees", agreement, sep=": ")
    for name, predictor in (("onnxruntime, CPU", here), ("TensorRT", there)):
        samples = []
        for _ in range(arguments.runs if predictor is there else 3):
            start = time.perf_counter()
            predictor.select([item], here.padded_size(item))
            samples.append(1e3 * (time.perf_counter() - start))
        print(f"{name}: {statistics.median(samples):.1f} ms, network and scores, with both copies")
    return int(bool(agreement.faults()))


if __name__ == "__main__":
    raise SystemExit(main())
