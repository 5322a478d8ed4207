"""What Hopper's kernels of `na2d` call on the GPU, in Gluon: layouts, copies of rows, strips, masks, products."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from hdit_kernels.neighborhood_attention import hopper_plan

TILE = gl.constexpr(hopper_plan.TILE)
TOKENS = gl.constexpr(hopper_plan.TILE**2)  # of a tile
COLUMNS = gl.constexpr(16)  # of a row of keys
NOWHERE = gl.constexpr(2**30)  # a row or column that no window reaches


@gluon.constexpr_function
def product_layout(columns):
    """Of a product of a tile of 64 rows with as many columns: a warp has 16 rows, a row lies in four lanes."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def row_layout(head_dim):
    """Of tokens read 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def store_layout(head_dim):
    """Of a tile as it is written, each row by the four lanes that have it in product_layout(head_dim): 16 bytes a
    thread at head_dim 64. Else 8, whose exchange Triton makes of shuffles: faster at 32, and at 128 shared memory has
    no room.
    """
    third, lane = (4, 16) if head_dim == 64 else (16, 4)
    registers = [[0, 1], [0, 2], [0, third], *([0, n] for n in (32, 64) if n < head_dim), [8, 0]]
    lanes, warps = [[0, 8], [0, lane], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [hopper_plan.TILE**2, head_dim])


@gluon.constexpr_function
def shared_layout(head_dim):
    """Of tokens in shared memory as products read them, swizzled."""
    return gl.NVMMASharedLayout(min(2 * head_dim, 128), 16, 2)


@gluon.jit
def copy_rows(
    target, pointer, row, top, bottom, columns, stride_h, stride_w, ROWS: gl.constexpr, WIDTH: gl.constexpr,
    D: gl.constexpr, column=0,
):  # fmt: skip
    """Starts copying ROWS x WIDTH tokens from `row` and `column` on. What is outside (rows before top or after bottom,
    columns from `columns` on) repeats the nearest token inside: always finite, masked later, and no traffic of its own.
    """
    ROW: gl.constexpr = row_layout(D)
    place = gl.arange(0, ROWS * WIDTH, gl.SliceLayout(1, ROW))
    dim = gl.arange(0, D, gl.SliceLayout(0, ROW))
    y = gl.minimum(gl.maximum(row + place // WIDTH, top), bottom)
    x = gl.minimum(column + place % WIDTH, columns - 1)
    # One 32-bit offset to each address, of which only the row's part changes from copy to copy.
    at = (y * (stride_h * 8))[:, None] + ((x * (stride_w * 8))[:, None] + dim[None, :])
    async_copy.async_copy_global_to_shared(target, pointer + at)


@gluon.jit
def copy_slot(
    slot, pointer, row, top, bottom, columns, stride_h, stride_w, whole, MORE: gl.constexpr, LAST: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """A slot of eight rows, or of the last tile's next slot the rows that it sees."""
    if whole:
        copy_rows(slot, pointer, row, top, bottom, columns, stride_h, stride_w, TILE, COLUMNS, D)
    else:
        copy_rows(
            slot.slice(0, MORE * COLUMNS), pointer, row, top, bottom, columns, stride_h, stride_w, MORE, COLUMNS, D
        )
        if LAST:
            copy_rows(
                slot.slice(MORE * COLUMNS, LAST * COLUMNS), pointer, row + MORE, top, bottom, columns, stride_h,
                stride_w, LAST, COLUMNS, D,
            )  # fmt: skip


@gluon.jit
def strip_of_program(heads, strips, length, longer):
    """batch, head, first row, column and number of tiles: `strips` of `length` tiles, the first `longer` of them
    one longer, and one of what is left of the height.
    """
    strip = gl.program_id(1)
    tile = strip * length + gl.minimum(strip, longer)
    count = length + (strip < longer).to(gl.int32)
    if strip == strips:
        count = 1
    x = gl.program_id(0) // heads
    head = gl.program_id(0) - x * heads  # neighbours in memory run side by side
    return gl.program_id(2).to(gl.int64), head.to(gl.int64), tile * TILE, x * TILE, count


@gluon.jit
def direction(origin, count, strips, height, serpentine):
    """Of a strip: the row that it starts from, the step to the next (1, or −1 where it is walked upwards), and the
    image's first and last row, counted from there in steps.
    """
    step = 1 - 2 * (serpentine & (gl.program_id(1) % 2) & (gl.program_id(1) < strips).to(gl.int32))
    if step < 0:
        origin += count * TILE - 1
        top, bottom = origin + 1 - height, origin
    else:
        top, bottom = -origin, height - 1 - origin
    return origin, step, top, bottom


@gluon.jit
def window_start(query, window, first, last):
    """First key of the query's window on an axis that goes from first to last."""
    return gl.minimum(gl.maximum(query - window // 2, first), last + 1 - window)


@gluon.jit
def is_within(offset, length):
    """0 <= offset < length in one comparison: a negative offset is a large unsigned number."""
    return offset.to(gl.uint32, bitcast=True) < length.to(gl.uint32)


@gluon.jit
def mask_bias(
    key_y, key_x, y, x, top, bottom, width, window_y, window_x, ROWS: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """[TOKENS, ROWS * COLUMNS]: 0 where the query sees the key, else minus infinity. A product starts from it, so that
    masking costs one addition a logit.
    """
    place = gl.arange(0, TOKENS, gl.SliceLayout(1, LAYOUT))
    key = gl.arange(0, ROWS * COLUMNS, gl.SliceLayout(0, LAYOUT))
    start_y = window_start(y + place // TILE, window_y, top, bottom)
    start_x = window_start(x + place % TILE, window_x, 0, width - 1)
    by_row = gl.where(is_within((key_y + key // COLUMNS)[None, :] - start_y[:, None], window_y), 0.0, float("-inf"))
    by_column = gl.where(is_within((key_x + key % COLUMNS)[None, :] - start_x[:, None], window_x), 0.0, float("-inf"))
    return by_row + by_column


@gluon.jit
def in_registers(number, like):
    """A float argument, once for each row: as an argument it would be fetched anew for every use."""
    zero = gl.zeros_like(like).to(gl.float32)
    return gl.fma(like.to(gl.float32), zero, zero + number)


@gluon.jit
def own_max(logits):
    """[TOKENS, 8] of a product's [TOKENS, multiple of 8]: of what each thread has, so that lanes exchange it once."""
    FOLDED: gl.constexpr = product_layout(8)
    return gl.convert_layout(gl.max(gl.reshape(logits, [TOKENS, logits.shape[1] // 8, 8]), 1), FOLDED)


@gluon.jit
def row_max(logits, ACC: gl.constexpr):
    return gl.convert_layout(gl.max(logits, 1), gl.SliceLayout(1, ACC))


@gluon.jit
def exponentials(logits, scale, reference, LAYOUT: gl.constexpr):
    """exp2(logits · scale − reference), both by row."""
    logits, scale = gl.broadcast(logits, gl.convert_layout(scale, gl.SliceLayout(1, LAYOUT))[:, None])
    logits, reference = gl.broadcast(logits, -gl.convert_layout(reference, gl.SliceLayout(1, LAYOUT))[:, None])
    return gl.exp2(gl.fma(logits, scale, reference))


@gluon.jit
def row_sum(numbers, ACC: gl.constexpr):
    return gl.convert_layout(gl.sum(numbers, 1), gl.SliceLayout(1, ACC))


@gluon.jit
def operand(numbers, dtype: gl.constexpr, ACC: gl.constexpr):
    """Left factor of a product that accumulates in ACC."""
    return gl.convert_layout(numbers.to(dtype), gl.DotOperandLayout(0, ACC, 2))


@gluon.jit
def store_tile(
    pointer, tile, y, x, bottom, width, stride_h, stride_w, dtype: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Stores [TOKENS, D] at pointer, 16 bytes a thread: threads that share rows of a product exchange them."""
    WIDE: gl.constexpr = store_layout(D)
    place = gl.arange(0, TOKENS, gl.SliceLayout(1, WIDE))
    dim = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    inside = (y + place // TILE <= bottom) & (x + place % TILE < width)
    at = (place // TILE * stride_h + place % TILE * stride_w) * 8
    gl.store(pointer + at[:, None] + dim[None, :], gl.convert_layout(tile.to(dtype), WIDE), mask=inside[:, None])


@gluon.jit
def first_query(key, window):
    """The first query whose window reaches the key, along one axis."""
    return gl.where(key < window, 0, key - window + 1 + window // 2)


@gluon.jit
def last_query(key, window, length):
    """The last query whose window reaches the key: everyone clamped at the end sees the last `window` keys."""
    return gl.where(key >= length - window, length - 1, key + window // 2)


@gluon.jit
def copy_numbers(
    target, pointer, bottom, columns, width, heads, row, ROWS: gl.constexpr, WIDTH: gl.constexpr = COLUMNS, column=0
):
    """Starts copying one number of each of ROWS x WIDTH tokens, as copy_rows copies tokens."""
    place = gl.arange(0, ROWS * WIDTH, gl.BlockedLayout([1], [32], [4], [0]))
    y, x = gl.minimum(row + place // WIDTH, bottom), gl.minimum(column + place % WIDTH, columns - 1)
    async_copy.async_copy_global_to_shared(target, pointer + (y * width + x) * heads)


@gluon.jit
def dkdv_block(
    dk, dv, k, v, q, dout, lse, delta, scale, query_y, query_x, bottom, columns, y, x, height, width, window_y,
    window_x, ROWS: gl.constexpr, ACC: gl.constexpr, dtype: gl.constexpr, WIDTH: gl.constexpr = COLUMNS,
):  # fmt: skip
    """Adds what ROWS rows of WIDTH queries give to dk and dv; the last products are still under way. Logits are keys by
    queries: a column is a query, so lse and delta come from shared memory.
    """
    LOGITS: gl.constexpr = product_layout(ROWS * WIDTH)
    BY_QUERY: gl.constexpr = gl.SliceLayout(0, LOGITS)
    key = gl.arange(0, TOKENS, gl.SliceLayout(1, LOGITS))
    place = gl.arange(0, ROWS * WIDTH, BY_QUERY)
    row, column = place // WIDTH, place % WIDTH
    start_y = gl.where(row <= bottom, window_start(query_y + row, window_y, 0, height - 1), NOWHERE)
    start_x = gl.where(column < columns, window_start(query_x + column, window_x, 0, width - 1), NOWHERE)
    by_row = gl.where(is_within((y + key // TILE)[:, None] - start_y[None, :], window_y), 0.0, float("-inf"))
    by_column = gl.where(is_within((x + key % TILE)[:, None] - start_x[None, :], window_x), 0.0, float("-inf"))
    logits = by_row + by_column
    logits, scale = gl.broadcast(logits, gl.convert_layout(scale, gl.SliceLayout(1, LOGITS))[:, None])
    logits, centred = gl.broadcast(logits, -delta.load(BY_QUERY)[None, :])
    logits = warpgroup_mma(k, q.permute((1, 0)), logits, is_async=True)
    centred = warpgroup_mma(v, dout.permute((1, 0)), centred, is_async=True)
    lse = -lse.load(BY_QUERY)[None, :]
    logits, centred, dk, dv = warpgroup_mma_wait(0, deps=[logits, centred, dk, dv])
    logits, lse = gl.broadcast(logits, lse)
    probability = gl.exp2(gl.fma(logits, scale, lse))
    dv = warpgroup_mma(operand(probability, dtype, ACC), dout, dv, is_async=True)
    dk = warpgroup_mma(operand(probability * centred, dtype, ACC), q, dk, is_async=True)
    return dk, dv
