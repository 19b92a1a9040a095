"""An ONNX graph under construction: nodes named after module paths, sizes known or dynamic.

Feature maps are [B, C, h, w] here, as ONNX convolves them. A padded image is [H, W] pixels, both
multiples of 32, so a map of stride s has exactly H/s rows: sizes need no node where H and W are
given, and one division where they are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET, IR_VERSION = 18, 10
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
Size = tuple[int, int]


class Graph:
    """Nodes and constants of a graph, in the order of computation.

    Args:
      size: (H, W) of the padded image for a graph of that size and of one image; None for any.
    """

    def __init__(self, size: Size | None = None):
        self.size = size
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._path: list[str] = []
        self._names: dict[str, int] = {}
        self._known: dict[Any, str] = {}

    @contextlib.contextmanager
    def scope(self, path: str) -> Iterator[None]:
        """Name the nodes that are added within after a module."""
        self._path.append(path)
        yield
        self._path.pop()

    def _name(self, word: str) -> str:
        name = "/".join([*self._path, word])
        number = self._names[name] = self._names.get(name, 0) + 1
        return name if number == 1 else f"{name}_{number}"

    def add(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """Add a node of one result, whose name is returned; arrays among the inputs are constants.

        Args:
          kind: the operator.
          inputs: names of results, arrays and numbers (float32), or None for one that is left out.
          attributes: of the operator.
        """
        (result,) = self.add_several(kind, *inputs, number=1, **attributes)
        return result

    def add_several(self, kind: str, *inputs: Any, number: int, **attributes: Any) -> list[str]:
        """Add a node with several results; see `add`."""
        name = self._name(kind)
        names = [self.constant(x) if not isinstance(x, str | None) else x or "" for x in inputs]
        results = [name] if number == 1 else [f"{name}.{i}" for i in range(number)]
        self.nodes.append(helper.make_node(kind, names, results, name=name, **attributes))
        return results

    def constant(self, value: Any, word: str = "constant") -> str:
        """Add a constant: floats as float32, whole numbers as int64; small ones only once."""
        array = np.asarray(value)  # np.ascontiguousarray would turn a scalar into a vector
        if array.dtype.kind in "fiu":
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= 64 else None
        if key in self._known:
            return self._known[key]
        name = self._name(word)
        self.constants[name] = numpy_helper.from_array(array, name)
        if key is not None:
            self._known[key] = name
        return name

    def reshape(self, x: str, *shape: int | str) -> str:
        """Reshape; 0 keeps a side, -1 is what is left, a name is a side that the graph computes."""
        return self.add("Reshape", x, self.vector(*shape))

    def vector(self, *sides: int | str) -> str:
        """Join numbers and computed sides, int64 [1] each, to an int64 vector."""
        if all(isinstance(side, int) for side in sides):
            return self.constant(np.array(sides, np.int64))
        parts = [self.constant([side]) if isinstance(side, int) else side for side in sides]
        return self._once(("vector", *parts), lambda: self.add("Concat", *parts, axis=0))

    def transpose(self, x: str, *order: int) -> str:
        """Move the axes."""
        return self.add("Transpose", x, perm=order)

    def as_float(self, x: str) -> str:
        """Numbers, or truth values as 0 and 1, as float32."""
        return self.add("Cast", x, to=FLOAT)

    def _once(self, key: Any, make: Any) -> str:
        """Add what does not depend on the images' content once, and name it after no module."""
        if key not in self._known:
            path, self._path = self._path, ["sizes"]
            self._known[key] = make()
            self._path = path
        return self._known[key]

    def side(self, axis: int, stride: int) -> int | str:
        """Rows (axis 0) or columns (axis 1) of the map of a stride: a number, or int64 [1]."""
        if self.size is not None:
            return self.size[axis] // stride
        whole = self._shape_of_images(axis + 1)
        if stride == 1:
            return whole
        return self._once(("side", axis, stride), lambda: self.add("Div", whole, [stride]))

    @property
    def batch(self) -> int | str:
        """Number of images."""
        return 1 if self.size is not None else self._shape_of_images(0)

    def _shape_of_images(self, axis: int) -> str:
        bounds = {"start": axis, "end": axis + 1}
        return self._once(("images", axis), lambda: self.add("Shape", "images", **bounds))

    def sides(self, stride: int) -> tuple[int | str, int | str]:
        """Rows and columns of the map of a stride."""
        return self.side(0, stride), self.side(1, stride)

    def pixels(self, stride: int) -> int | str:
        """Number of pixels of the map of a stride."""
        height, width = self.sides(stride)
        if isinstance(height, int) and isinstance(width, int):
            return height * width
        return self._once(("pixels", stride), lambda: self.add("Mul", height, width))

    def places(self, axis: int, stride: int) -> str:
        """0, 1, ... along the rows or columns of the map of a stride: float32 [side]."""
        side = self.side(axis, stride)
        if isinstance(side, int):
            return self.constant(np.arange(side, dtype=np.float32))

        def make() -> str:
            last = self.add("Reshape", side, np.zeros(0, np.int64))
            return self.as_float(self.add("Range", np.int64(0), last, np.int64(1)))

        return self._once(("places", axis, stride), make)

    def last_place(self, axis: int, stride: int) -> Any:
        """Side - 1 as float32, a number or a vector of one."""
        side = self.side(axis, stride)
        if isinstance(side, int):
            return np.array([side - 1], np.float32)
        key = "last", axis, stride
        return self._once(key, lambda: self.add("Sub", self.as_float(side), [1.0]))

    def pooling_matrix(self, axis: int, stride: int, target: int) -> str:
        """Windows floor(i s / t) ... ceil((i + 1) s / t) of adaptive pooling: float32 [t, s]."""
        side = self.side(axis, stride)
        starts = np.arange(target)[:, None]
        if isinstance(side, int):
            first, last = starts * side // target, -(-(starts + 1) * side // target)
            places = np.arange(side)
            inside = (places >= first) & (places < last)
            return self.constant((inside / inside.sum(1, keepdims=True)).astype(np.float32))

        def make() -> str:
            # Whole numbers below 2^24 are exact in float32: i s <= t p means that p has begun.
            places = self.add("Mul", self.places(axis, stride), [float(target)])
            whole = self.as_float(side)
            first = self.add("Mul", starts.astype(np.float32), whole)
            after = self.add("Mul", (starts + 1).astype(np.float32), whole)
            # p >= floor(i s / t) is t p > i s - t, and p < ceil((i + 1) s / t) is t p < (i + 1) s.
            begun = self.add("Greater", places, self.add("Sub", first, [float(target)]))
            open_ = self.add("Less", places, after)
            inside = self.as_float(self.add("And", begun, open_))
            return self.add("Div", inside, self.add("ReduceSum", inside, [1], keepdims=1))

        return self._once(("pooling", axis, stride, target), make)

    def model(self, inputs: Any, outputs: Any, metadata: dict[str, str]) -> onnx.ModelProto:
        """Finish: a checked model.

        Args:
          inputs: name to (type, shape); a text in a shape names a side that is free.
          outputs: the same.
          metadata: key to text.
        """

        def infos(described: dict[str, tuple[int, Sequence[Any]]]) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(name, kind, shape)
                for name, (kind, shape) in described.items()
            ]

        graph = helper.make_graph(
            self.nodes,
            "sparseinst_jax",
            infos(inputs),
            infos(outputs),
            list(self.constants.values()),
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
        model.producer_name = "sparseinst_jax"
        helper.set_model_props(model, metadata)
        return model
