"""What our kernels once did worse, put back one at a time: the report must see each."""

from dataclasses import dataclass, replace

from .cells import CELLS, KERNELS, Cell, Kernel, rows_kernel


@dataclass(frozen=True)
class Mistake:
    """A kernel with the mistake in it, where `right` has the one without."""

    right: Cell
    kernel: Kernel
    passes: int = 1

    @property
    def cell(self):
        return replace(self.right, ours=self.kernel.name, our_passes=self.passes)


def _edited(what, cell, now, before):
    kernel = KERNELS[CELLS[cell].ours]
    kernel = replace(kernel, name=f"{kernel.name}, {what}", edits=(*kernel.edits, (now, before)))
    return what, Mistake(CELLS[cell], kernel)


def _eight_rows(form):
    what = "eight rows are taken at a time"
    kernel = replace(rows_kernel(form, 8), function=f"projection_rows<half, {form}, 8, false>")
    return what, Mistake(CELLS[f"{form}, rows 8"], kernel)


MISTAKES = dict(
    (
        _edited(
            "codes are shifted down, not masked where they lie",
            "affine_3, rows 1",
            "static_cast<float>(ushort(word & (((1 << bits) - 1) << shift)))",
            "static_cast<float>(ushort((word >> shift) & ((1 << bits) - 1))) * (1 << shift)",
        ),
        _edited(
            "the loop finds rows of the weight by 64-bit products",
            "affine_3, rows 1",
            "weight.from_near_row(f)",
            "weight.from_row(f)",
        ),
        _edited(
            "the loop asks whether a row of the weight exists",
            "dense, rows 1",
            "chunks[f] = its_weight.chunk(0, depth);",
            "if (f < weight.segment->features) { chunks[f] = its_weight.chunk(0, depth); }",
        ),
        _edited(
            "the loop takes the last part of a row as well",
            "dense, rows 1",
            "accumulate<T, Format, M>(weight, row, chunk_size, sums);",
            "accumulate<T, Format, M>(weight, row, in_features - column, sums);",
        ),
        _edited(
            "a tile's operands share one bound",
            "projection_32_dense, ragged rows",
            "load_block(b, extent_b, block_b);",
            "if (extent_a.y == block_a.y) { load_block(b, extent_b, block_b); } "
            "else { b.load_safe(extent_b); }",
        ),
        _eight_rows("dense"),
    )
)
