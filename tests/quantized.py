"""MLX's quantized weights in NumPy float64, decoded from the packed words by the formats' definitions."""

import mlx.core as mx
import numpy as np

# (mode, group_size, bits)
AFFINE = [("affine", group_size, bits) for bits in (2, 3, 4, 5, 6, 8) for group_size in (32, 64, 128)]
FLOATS = [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]
FORMATS = AFFINE + FLOATS
# That MLX knows and our kernels do not.
FOREIGN = [("affine", group_size, 1) for group_size in (32, 64, 128)]


def dequantize(weight, scales, biases, group_size, bits, mode):
    """The weights that the arrays of `mx.quantize` stand for, exactly.

    A row's values follow one another as bits, the lowest first. Affine values are integers, scaled and
    shifted by group; the others are small floats times a power of two (mx) or a small float (nv).
    """
    codes = unpack(np.array(weight), bits)
    if mode == "affine":
        values, scale, shift = codes.astype(np.float64), exact(scales), exact(biases)
    else:
        values, shift = (e2m1 if bits == 4 else e4m3)(codes), np.zeros(1)
        scale = (e4m3 if mode == "nvfp4" else e8m0)(np.array(scales))
    groups = values.reshape(*values.shape[:-1], values.shape[-1] // group_size, group_size)
    return (groups * scale[..., None] + shift[..., None]).reshape(values.shape)


def quantize(weight, group_size, bits, mode):
    """(weight, scales, biases), biases None where the mode has none."""
    arrays = mx.quantize(weight, group_size, bits, mode)
    return (*arrays, None)[:3]


def in_tiles(operands, dtype):
    """A formula's operands as Metal's tiles hold them: the weights rounded to the dtype, as MLX's do."""
    x, weights, *rest = operands
    rounded = (mx.array(w.sum(0), dtype=mx.float64).astype(dtype, stream=mx.cpu) for w in weights)
    return x, tuple(exact(w)[None] for w in rounded), *rest


def unpack(words, bits):
    """The codes in little-endian words of 32 bits."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return stream.reshape(*stream.shape[:-1], stream.shape[-1] // bits, bits) @ (1 << np.arange(bits))


def e2m1(codes):
    return small_float(codes, exponent_bits=2, mantissa_bits=1, bias=1)


def e4m3(codes):
    values = small_float(codes, exponent_bits=4, mantissa_bits=3, bias=7)
    return np.where(codes & 0x7F == 0x7F, np.nan, values)


def e8m0(codes):
    """With an infinity, as MLX has it, where the definition has NaN."""
    return np.where(codes == 0xFF, np.inf, np.ldexp(1.0, codes.astype(int) - 127))


def small_float(codes, exponent_bits, mantissa_bits, bias):
    """Sign, exponent and mantissa, subnormal where the exponent is 0."""
    codes = codes.astype(int)
    mantissa = codes & (1 << mantissa_bits) - 1
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    sign = 1 - 2 * (codes >> (mantissa_bits + exponent_bits))
    normal = exponent > 0
    mantissa = mantissa + (normal << mantissa_bits)
    return np.ldexp(sign * mantissa.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)


# (mode, whether of its scales or of its codes)
TABLES = [(mode, of_scales) for mode, _, _ in FLOATS for of_scales in (False, True)]


def every_byte(mode, of_scales):
    """(weight, scales, group_size, bits): a row of two groups for every byte, the rest of what it takes 1."""
    group_size, bits = next(form[1:] for form in FLOATS if form[0] == mode)
    one, scale_of_one = (0x22 if bits == 4 else 0x38), (0x38 if mode == "nvfp4" else 127)
    rows = np.arange(256 if of_scales or bits == 8 else 16, dtype=np.uint8)[:, None]
    codes = np.full_like(rows, one) if of_scales else rows * (17 if bits == 4 else 1)
    scales = rows if of_scales else np.full_like(rows, scale_of_one)
    weight = np.repeat(codes, 2 * group_size * bits // 8, -1).view(np.uint32)
    return mx.array(weight), mx.array(np.repeat(scales, 2, -1)), group_size, bits


def exact(array):
    return np.array(array.astype(mx.float64, stream=mx.cpu))
