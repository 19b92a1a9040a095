"""Pure array operations with the exact semantics of the original's PyTorch counterparts, NHWC."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparseinst_jax.data.taps import bilinear_matrix, bilinear_taps
from sparseinst_jax.models import cuda, forms
from sparseinst_jax.models.cpu import attention as cpu_attention
from sparseinst_jax.models.cpu import convolution as cpu_convolution

PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)  # RGB, 0..255
PIXEL_STD = np.array([58.395, 57.12, 57.375], np.float32)


def normalize_images(images: jax.Array, valid_size: jax.Array) -> jax.Array:
    """Return the images with mean 0 and deviation 1 of ImageNet, and 0 outside their content.

    The original normalises first and pads afterwards, so padding has the value 0 (the mean colour),
    not that of a black pixel.

    Args:
      images: uint8 or float [B, H, W, 3], RGB 0..255.
      valid_size: int [B, 2], (height, width) of the content in pixels.

    Returns:
      float32 [B, H, W, 3].
    """
    _, height, width, _ = images.shape
    in_rows = jnp.arange(height)[None, :] < valid_size[:, :1]  # [B, H]
    in_columns = jnp.arange(width)[None, :] < valid_size[:, 1:]  # [B, W]
    inside = (in_rows[:, :, None] & in_columns[:, None, :])[..., None]
    normalized = (images.astype(jnp.float32) - PIXEL_MEAN) / PIXEL_STD
    return jnp.where(inside, normalized, 0.0)


def require_padding(images: jax.Array, stride: int) -> None:
    """Refuse images [B, H, W, ...] whose sides are no multiples of the stride.

    Raises:
      ValueError: with the size to pad to.
    """
    height, width = images.shape[1:3]
    if height % stride or width % stride:
        padded = tuple(-(-n // stride) * stride for n in (height, width))
        raise ValueError(
            f"images must be padded to multiples of {stride}, got {(height, width)}. "
            f"Pad with zeros on the right and at the bottom to {padded}."
        )


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """Return max(x, 0), with the gradient 1 where the result is above 0.

    The gradient needs nothing but the result, which the next layer keeps in any case; that of
    `jax.nn.relu` keeps a mask and an image of zeros, a third of what a ResNet's step keeps.
    """
    return jnp.maximum(x, 0)


def _relu_forward(x):
    y = relu(x)
    return y, y


def _relu_backward(y, cotangent):
    return (jnp.where(y > 0, cotangent, jnp.zeros_like(cotangent)),)


relu.defvjp(_relu_forward, _relu_backward)


@jax.custom_vjp
def relu6(x: jax.Array) -> jax.Array:
    """Return min(max(x, 0), 6), with the gradient 1 where the result is between them."""
    return jnp.clip(x, 0, 6)


def _relu6_forward(x):
    y = relu6(x)
    return y, y


def _relu6_backward(y, cotangent):
    return (jnp.where((y > 0) & (y < 6), cotangent, jnp.zeros_like(cotangent)),)


relu6.defvjp(_relu6_forward, _relu6_backward)


@jax.custom_vjp
def relu_of_sum(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return relu(a + b), to the last bit, as max(a, -b) + b.

    For residual blocks: XLA:CPU makes the last of such relus from the sums of all blocks before it,
    and holds them so long, where a sum as the last operation is made once.
    """
    return jnp.maximum(a, -b) + b


def _relu_of_sum_forward(a, b):
    y = relu_of_sum(a, b)
    return y, y


def _relu_of_sum_backward(y, cotangent):
    return _relu_backward(y, cotangent) * 2


relu_of_sum.defvjp(_relu_of_sum_forward, _relu_of_sum_backward)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    stride: int = 1,
    groups: int = 1,
    shared: jax.Array | None = None,
    same: bool = False,
) -> jax.Array:
    """Return x convolved with a kernel of odd size k, with a border of (k - 1) / 2 zeros.

    For a CPU and a GPU in the form that its shapes are fastest in; for others, and where a size is
    not known when the program is traced, as one convolution.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, C / groups, D], of x's type; with `shared`, [k, k, S + C, D].
      stride: step in pixels.
      groups: group g sees input channels [g * C / groups, (g + 1) * C / groups).
      shared: [1, H, W, S], channels that come before x's and are the same in all images; constants,
        which get no gradient. Not with groups.
      same: whether the border is TensorFlow's; see `forms.borders`. It differs at a stride only.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), D].
    """
    plain, others = forms.convolution(stride, groups, same), {}
    if all(isinstance(size, int) for size in x.shape):
        whole = jax.ShapeDtypeStruct((*x.shape[:3], kernel.shape[2] * groups), x.dtype)
        for platform, choose in (("cpu", cpu_convolution.form), ("cuda", cuda.form)):
            others[platform] = choose(whole, kernel, stride, groups, same) or plain
    if shared is not None:
        plain, others = forms.joined(plain), {name: forms.joined(f) for name, f in others.items()}
        others |= {"cuda": cuda.shared_apart(stride)} if others else {}
        return forms.by_platform(plain, **others)(x, kernel, shared)
    others = {platform: form for platform, form in others.items() if form is not plain}
    return (forms.by_platform(plain, **others) if others else plain.forward)(x, kernel)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_heads: int,
    is_seen: jax.Array | None = None,
) -> jax.Array:
    """Return for each query the mean of the values, weighted by softmax(q k' / sqrt(C / heads)).

    Each head does so on channels of its own. The softmax is float32 in every type. For a CPU in
    blocks of pixels, where one side has many more of them than the other.

    Args:
      query: [B, Q, C].
      key: [B, S, C].
      value: [B, S, C].
      num_heads: C is a multiple of it.
      is_seen: bool [B, Q, S], what each query looks at; everything by default.

    Returns:
      [B, Q, C].
    """
    operands = (query, key, value) if is_seen is None else (query, key, value, is_seen)
    plain, form = _attention(num_heads), None
    if all(isinstance(size, int) for size in (*query.shape, *key.shape)):
        form = cpu_attention.form(query, key, num_heads, is_seen is not None)
    if form is None:
        return plain.forward(*operands)
    return forms.by_platform(plain, cpu=form)(*operands)


@functools.cache
def _attention(num_heads: int) -> forms.Form:
    def forward(
        query: jax.Array, key: jax.Array, value: jax.Array, is_seen: jax.Array | None = None
    ) -> jax.Array:
        heads = (x.reshape(*x.shape[:2], num_heads, -1) for x in (query, key, value))
        mask = None if is_seen is None else is_seen[:, None]
        return jax.nn.dot_product_attention(*heads, mask=mask).reshape(query.shape)

    def backward(cotangent: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, *mask):
        _, pull_back = jax.vjp(lambda *x: forward(*x, *mask), query, key, value)
        return (*pull_back(cotangent), *[None for _ in mask])

    return forms.Form(forward, backward)


def max_pool_3x3_stride_2(x: jax.Array) -> jax.Array:
    """Return the 3x3 maximum with stride 2 and a border of one pixel, [B, H, W, C] to half size.

    As the maximum of nine strided slices: on XLA:CPU six times as fast as a window reduction, and
    exact when exported to ONNX. The gradient goes to the first of equal pixels, as in PyTorch, and
    keeps one byte for each result.
    """
    return _max_pool(x, x.shape[1:3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    return functools.reduce(jnp.maximum, _windows_3x3_stride_2(x))


def _windows_3x3_stride_2(x):
    height, width = -(-x.shape[1] // 2), -(-x.shape[2] // 2)
    border = ((0, 0), (1, 1), (1, 1), (0, 0))
    padded = jnp.pad(x, border, constant_values=jnp.finfo(x.dtype).min)
    return [
        padded[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]


def _max_pool_forward(x, size):
    largest, *others = _windows_3x3_stride_2(x)
    place = jnp.zeros(largest.shape, jnp.uint8)
    for number, window in enumerate(others, start=1):
        place = jnp.where(window > largest, jnp.uint8(number), place)
        largest = jnp.maximum(largest, window)
    return largest, place


def _max_pool_backward(size, place, cotangent):
    batch, height, width, channels = cotangent.shape

    def won(i, j):  # the cotangents of the windows whose maximum is their pixel (i, j)
        return jnp.where(place == 3 * i + j, cotangent, jnp.zeros_like(cotangent))

    def row(i):  # of the windows, spread over the columns of x: odd ones lie in two windows
        right = jnp.pad(won(i, 0), ((0, 0), (0, 0), (0, 1), (0, 0)))[:, :, 1:]
        return jnp.stack([won(i, 1), won(i, 2) + right], axis=3)  # [B, h, w, 2, C]

    below = jnp.pad(row(0), ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))[:, 1:]
    to_x = jnp.stack([row(1), row(2) + below], axis=2)  # [B, h, 2, w, 2, C]
    to_x = to_x.reshape(batch, 2 * height, 2 * width, channels)
    return (to_x[:, : size[0], : size[1]],)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def average_pool_2x2_stride_2(x: jax.Array) -> jax.Array:
    """Return the means of 2x2 blocks, [B, H, W, C] to half size, rounded up.

    An odd last row or column is averaged alone (PyTorch's `AvgPool2d` with `ceil_mode` and
    without `count_include_pad`): repeating it leaves its mean as it is.
    """
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return x.reshape(batch, -(-height // 2), 2, -(-width // 2), 2, channels).mean((2, 4))


def depthwise_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return every channel convolved with a 3x3 kernel of its own, with a border of zeros.

    Args:
      x: [B, H, W, C].
      kernel: [3, 3, 1, C].

    Returns:
      float32 [B, H, W, C].
    """
    return forms.by_platform(_DEPTHWISE, cpu=cpu_convolution.DEPTHWISE)(x, kernel)


def _depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    form = forms.convolution(stride=1, groups=x.shape[-1])
    return form.forward(x, kernel.astype(x.dtype)).astype(jnp.float32)


_DEPTHWISE = forms.bilinear(_depthwise)


def gelu(x: jax.Array) -> jax.Array:
    """Return x times the normal distribution function at x, exactly.

    By `erf`, as PyTorch; `jax.nn.gelu` takes `erfc`, which is more than twice as slow on XLA:CPU.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


def _interpolate(x: jax.Array, axis: int, target: int) -> jax.Array:
    lower, upper, weight = bilinear_taps(x.shape[axis], target)
    shape = [target if a == axis else 1 for a in range(x.ndim)]
    weight = jnp.asarray(weight.reshape(shape), x.dtype)
    return jnp.take(x, lower, axis=axis) * (1 - weight) + jnp.take(x, upper, axis=axis) * weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _resize(x: jax.Array, size: tuple[int, int], axes: tuple[int, int]) -> jax.Array:
    for axis, target in zip(axes, size, strict=True):
        if x.shape[axis] != target:
            x = _interpolate(x, axis, target)
    return x


def _resize_forward(x, size, axes):
    return _resize(x, size, axes), [x.shape[axis] for axis in axes]


def _resize_backward(size, axes, sources, cotangent):
    # The transposed gather would be a slow scatter-add; the transposed matrices are two products.
    for axis, target, source in reversed(list(zip(axes, size, sources, strict=True))):
        if source != target:
            matrix = jnp.asarray(bilinear_matrix(source, target), cotangent.dtype)
            moved = jnp.tensordot(cotangent, matrix, (axis, 0), precision="highest")
            cotangent = jnp.moveaxis(moved, -1, axis)
    return (cotangent,)


_resize.defvjp(_resize_forward, _resize_backward)


def resize_bilinear(x: jax.Array, size: Sequence[int], axes: tuple[int, int] = (1, 2)) -> jax.Array:
    """Return x resized to `size` along two axes: bilinear, half-pixel centres, no antialiasing.

    Equals PyTorch's `interpolate(mode="bilinear", align_corners=False)`, also when shrinking
    (`jax.image.resize` would antialias there). Forward is a gather and a blend, which is 5 to 14
    times faster on a CPU than a matrix product; the gradient is two matrix products.

    Args:
      x: any rank.
      size: (height, width) in pixels.
      axes: the positions of height and width in x.
    """
    return _resize(x, (int(size[0]), int(size[1])), axes)


def upsample_nearest_x2(x: jax.Array) -> jax.Array:
    """Return [B, H, W, C] with every pixel repeated twice along height and width."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def _adaptive_matrix(source: int, target: int) -> np.ndarray:
    """Return [target, source]: row i averages the inputs floor(i*s/t) .. ceil((i+1)*s/t)."""
    matrix = np.zeros((target, source), np.float32)
    for row in range(target):
        start, stop = row * source // target, -(-(row + 1) * source // target)
        matrix[row, start:stop] = 1.0 / (stop - start)
    return matrix


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Return [B, size, size, C]: means over windows that overlap when `size` does not divide.

    Equals PyTorch's `AdaptiveAvgPool2d`, also on maps smaller than `size`.
    """
    rows = jnp.asarray(_adaptive_matrix(x.shape[1], size), x.dtype)
    columns = jnp.asarray(_adaptive_matrix(x.shape[2], size), x.dtype)
    return jnp.einsum("oh,pw,bhwc->bopc", rows, columns, x, precision="highest")


def coordinates(height: int, width: int) -> np.ndarray:
    """Return float32 [height, width, 2]: x, then y, each from -1 to exactly 1 over the grid."""

    def axis(n: int) -> np.ndarray:
        return np.float32(-1) + np.float32(2) * np.arange(n, dtype=np.float32) / np.float32(n - 1)

    x, y = np.meshgrid(axis(width), axis(height))
    return np.stack([x, y], axis=-1)
