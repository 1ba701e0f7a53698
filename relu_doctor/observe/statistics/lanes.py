"""Many values at once: the instructions that the loops of :mod:`~relu_doctor.observe.statistics.compiled` are made of.

Each step takes in the same number of values side by side, one per *lane*: of one unit where its positions lie side by
side, of as many units where units do. What was counted lies in a *slot*, float64 (``SLOT``, ``LANES``), and is held in
registers while a run of values is read, summed in the values' own precision and as deviations from the slot's pivots.
A comparison that NaN takes part in is false: NaN is no extreme and fires nothing, and shows in the sums.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# What numba compiles is typed by what it is called with.

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic
LANES = 16
FLOAT, BFLOAT, HALF, DOUBLE = 0, 1, 2, 3  # how values are written
PIVOT, HIGHEST, LOWEST, DEVIATIONS, SQUARES, OUTPUTS, FIRINGS, SLOT = range(8)  # rows of a slot

_CACHE_LINE = 64
_AHEAD = 256  # bytes of a line that are fetched before they are read
_NEAR = 2  # the second-level cache
_NOTHING = {HIGHEST: -math.inf, LOWEST: math.inf}  # in other rows, it is 0

_BIT, _BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_SINGLE, _WIDE = ir.FloatType(), ir.DoubleType()


def size_of(encoding: int) -> int:
    """Bytes per value."""
    return {FLOAT: 4, BFLOAT: 2, HALF: 2, DOUBLE: 8}[encoding]


def _many(scalar: Any) -> Any:
    return ir.VectorType(scalar, LANES)


def _constant(like: Any, number: float) -> Any:
    """A number in every lane, or the one."""
    return ir.Constant(like, [number] * LANES if isinstance(like, ir.VectorType) else number)


def _spread(builder: Any, value: Any) -> Any:
    """One value in every lane."""
    vector = builder.insert_element(ir.Constant(_many(value.type), ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(_many(_INT), [0] * LANES))


def _place(builder: Any, address: Any, of: Any) -> Any:
    return builder.inttoptr(address, of.as_pointer())


def _fetch(builder: Any, address: Any) -> None:
    """Have what is at an address brought nearer; it may lie anywhere."""
    pointer = builder.inttoptr(address, cgutils.voidptr_t)
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _INT, _INT, _INT])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
    builder.call(fetch, [pointer, _INT(0), _INT(_NEAR), _INT(1)])  # for reading; data


def _read(builder: Any, address: Any, encoding: int, *, lanes: bool) -> Any:
    """Values at an address, half precision as float32."""
    shape = _many if lanes else lambda scalar: scalar
    written = {FLOAT: _SINGLE, DOUBLE: _WIDE}.get(encoding, _SHORT)
    values = builder.load(_place(builder, address, shape(written)), align=size_of(encoding))
    if encoding in {FLOAT, DOUBLE}:
        return values
    integer = shape(_INT)

    def number(value: int) -> Any:
        return _constant(integer, value)

    half = builder.zext(values, integer)
    if encoding == BFLOAT:
        return builder.bitcast(builder.shl(half, number(16)), shape(_SINGLE))
    magnitude, sign = builder.and_(half, number(0x7FFF)), builder.shl(builder.and_(half, number(0x8000)), number(16))
    # The exponent's bias is another, and its highest value stands for infinities and NaN.
    is_finite = builder.icmp_unsigned("<", magnitude, number(0x7C00))
    normal = builder.add(
        builder.shl(magnitude, number(13)), builder.select(is_finite, number(112 << 23), number(224 << 23))
    )
    small = builder.fmul(builder.uitofp(magnitude, shape(_SINGLE)), _constant(shape(_SINGLE), 2.0**-24))
    is_small = builder.icmp_unsigned("<", magnitude, number(0x400))  # below the normal range: a multiple of 2 ** -24
    wide = builder.select(is_small, builder.bitcast(small, integer), normal)
    return builder.bitcast(builder.or_(wide, sign), shape(_SINGLE))


class _Sums:
    """A slot in registers.

    Args:
        slot: its address.
        edges: of the open interval in which units fire, float64.
        least: only maxima, and the sum of the values, which is not finite if any value is not; the interval has no
            upper end.
        plain: the interval is that of an ordinary ReLU: not below zero, and without an upper end.
    """

    def __init__(self, builder: Any, slot: Any, encoding: int, edges: Any, *, least: bool, plain: bool) -> None:
        self.builder, self.encoding, self.least, self.plain = builder, encoding, least, plain
        self.wide = encoding == DOUBLE
        self.real = _many(_WIDE if self.wide else _SINGLE)
        self.low, self.high = (_spread(builder, self._narrow(edge, self.real.element)) for edge in edges)
        self.zero = _constant(self.real, 0.0)
        self._slot = builder.bitcast(_place(builder, slot, _WIDE), _many(_WIDE).as_pointer())
        self._highest = self._held(self._narrow(self._row(HIGHEST), self.real))
        self._deviations = self._held(self.zero)
        if not least:
            self._pivot = self._narrow(self._row(PIVOT), self.real)
            self._lowest = self._held(self._narrow(self._row(LOWEST), self.real))
            self._squares, self._outputs = self._held(self.zero), self._held(self.zero)

    def _held(self, value: Any) -> Any:
        return cgutils.alloca_once_value(self.builder, value)

    def _narrow(self, value: Any, real: Any) -> Any:
        return value if self.wide else self.builder.fptrunc(value, real)

    def _row_of(self, row: int) -> Any:
        return self.builder.gep(self._slot, [_LONG(row)])

    def _row(self, row: int) -> Any:
        return self.builder.load(self._row_of(row), align=8)

    def _larger(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def _smaller(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def _add(self, held: Any, value: Any) -> None:
        self.builder.store(self.builder.fadd(self.builder.load(held), value), held)

    def fires(self, values: Any) -> Any:
        """Which lanes hold a value inside the interval."""
        above = self.builder.fcmp_ordered(">", values, self.low)
        if self.plain or self.least:
            return above
        return self.builder.and_(above, self.builder.fcmp_ordered("<", values, self.high))

    def bits(self, lanes: Any) -> Any:
        """Lanes as the bits of a number."""
        return self.builder.bitcast(lanes, _SHORT)

    def take(self, values: Any, among: Any = None) -> None:
        """Take in values; only those of some lanes, if these are given."""
        builder = self.builder

        def kept(value: Any, otherwise: Any) -> Any:
            return value if among is None else builder.select(among, value, otherwise)

        infinite = _constant(self.real, -math.inf)
        builder.store(self._larger(kept(values, infinite), builder.load(self._highest)), self._highest)
        if self.least:
            self._add(self._deviations, kept(values, self.zero))
            return
        infinite = _constant(self.real, math.inf)
        builder.store(self._smaller(kept(values, infinite), builder.load(self._lowest)), self._lowest)
        deviations = kept(builder.fsub(values, self._pivot), self.zero)
        self._add(self._deviations, deviations)
        self._add(self._squares, builder.fmul(deviations, deviations))
        outputs = self._larger(values, self.low)
        if not self.plain:
            outputs = self._smaller(outputs, self.high)
            outputs = self._larger(outputs, builder.fsub(self.zero, outputs))
        self._add(self._outputs, kept(outputs, self.zero))

    def reset_highest(self) -> Any:
        """Begin a maximum of its own, and return the one so far."""
        before = self.builder.load(self._highest)
        self.builder.store(_constant(self.real, -math.inf), self._highest)
        return before

    def join_highest(self, before: Any) -> Any:
        """The lanes in which the maximum's own part fires; the one before is taken into it again."""
        own = self.builder.load(self._highest)
        self.builder.store(self._larger(own, before), self._highest)
        return self.fires(own)

    def put(self) -> None:
        """Add what was taken in to the slot."""
        rows = {DEVIATIONS: self._deviations}
        extremes = {HIGHEST: self._highest}
        if not self.least:
            rows |= {SQUARES: self._squares, OUTPUTS: self._outputs}
            extremes |= {LOWEST: self._lowest}
        for row, held in rows.items():
            self.put_row(row, self.builder.fadd(self._row(row), self._widened(held)))
        for row, held in extremes.items():
            self.put_row(row, self._widened(held))

    def put_row(self, row: int, value: Any) -> None:
        """Write one row of the slot."""
        self.builder.store(value, self._row_of(row), align=8)

    def add_firings(self, number: Any) -> None:
        """Add to the slot's firings."""
        number = self.builder.uitofp(number, _many(_WIDE))
        self.put_row(FIRINGS, self.builder.fadd(self._row(FIRINGS), number))

    def _widened(self, held: Any) -> Any:
        value = self.builder.load(held)
        return value if self.wide else self.builder.fpext(value, _many(_WIDE))


def _literal(*kinds: Any) -> list[Any]:
    return [kind.literal_value for kind in kinds]


@intrinsic(prefer_literal=True)
def take_rows(
    context,
    encoding,
    least,
    plain,
    slot,
    low,
    high,
    at,
    rows,
    stride,
    length,
    ahead,
    fetched,
    last,
    fired,
    step,
    earlier,
):
    """Take in some rows of values of one unit.

    Of these, the encoding and whether the statistics are the minimal ones and the interval is plain are literals.

    * slot: its address; low, high: the interval.
    * at: address of the first row.
    * rows: how many there are.
    * stride: from row to row, in bytes.
    * length: values per row.
    * ahead: from each value to one that is read afterwards, in bytes.
    * fetched: how many cache lines are to be fetched there for each row.
    * last: the last address from which as many values as there are lanes may be read.
    * fired: address of the byte that says whether the first row fires.
    * step: from one such byte to the next.
    * earlier: 1 where these bytes hold what earlier parts of the rows did, or 0.
    """
    how, least, plain = _literal(encoding, least, plain)
    size = size_of(how)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, _, slot, low, high, at, rows, stride, length, ahead, fetched, last, fired, step, earlier = arguments
        sums = _Sums(builder, slot, how, (low, high), least=least, plain=plain)
        whole, rest = builder.sdiv(length, _LONG(LANES)), builder.srem(length, _LONG(LANES))
        some = builder.trunc(builder.sub(builder.shl(_LONG(1), rest), _LONG(1)), _INT)
        total, number = cgutils.alloca_once_value(builder, _LONG(0)), cgutils.alloca_once(builder, _LONG)

        def take(values: Any, among: Any = None) -> None:
            sums.take(values, None if among is None else builder.bitcast(among, _many(_BIT)))
            if not least:
                bits = sums.bits(sums.fires(values))
                bits = bits if among is None else builder.and_(bits, among)
                firings = builder.zext(builder.ctpop(bits), _LONG)
                builder.store(builder.add(builder.load(number), firings), number)

        with cgutils.for_range(builder, rows) as row:
            here = builder.add(at, builder.mul(row.index, stride))
            builder.store(_LONG(0), number)
            before = sums.reset_highest() if least else None
            with cgutils.for_range(builder, fetched) as part:
                further = builder.add(ahead, builder.mul(part.index, _LONG(_CACHE_LINE)))
                _fetch(builder, builder.add(here, further))
            with cgutils.for_range(builder, whole) as part:
                address = builder.add(here, builder.mul(part.index, _LONG(LANES * size)))
                take(_read(builder, address, how, lanes=True))
            with builder.if_then(builder.icmp_signed("!=", rest, _LONG(0))):
                end = builder.add(here, builder.mul(whole, _LONG(LANES * size)))
                start = builder.select(builder.icmp_signed("<", end, last), end, last)
                skipped = builder.trunc(builder.sdiv(builder.sub(end, start), _LONG(size)), _INT)
                take(_read(builder, start, how, lanes=True), builder.trunc(builder.shl(some, skipped), _SHORT))
            if least:
                own = builder.icmp_signed("!=", sums.bits(sums.join_highest(before)), _SHORT(0))
            else:
                own = builder.icmp_signed("!=", builder.load(number), _LONG(0))
                builder.store(builder.add(builder.load(total), builder.load(number)), total)
            mark = _place(builder, builder.add(fired, builder.mul(row.index, step)), _BYTE)
            known = builder.and_(builder.load(mark), builder.trunc(earlier, _BYTE))
            builder.store(builder.or_(known, builder.zext(own, _BYTE)), mark)
        sums.put()
        if not least:
            firings = ir.Constant(_many(_LONG), [0] * LANES)
            sums.add_firings(builder.insert_element(firings, builder.load(total), _INT(0)))
        return context.get_dummy_value()

    integers = [types.int64] * 10
    return types.void(
        encoding, types.literal(least), types.literal(plain), types.int64, types.float64, types.float64, *integers
    ), emit


@intrinsic(prefer_literal=True)
def take_lines(context, encoding, least, plain, single, slot, low, high, places, number, offset, fired, marks, earlier):
    """Take in some lines of values, each of as many units as there are lanes.

    Of these, the encoding and whether the statistics are the minimal ones and the interval is plain are literals.

    * slot: its address; low, high: the interval.
    * single: literal: each line is of an input of its own; else all are of one.
    * places: address of the lines' addresses.
    * number: how many there are.
    * offset: the first unit, counted from the places.
    * fired: address of the byte for the first unit, if all lines are of one input.
    * marks: address of the addresses of the bytes for the units at the places, if not.
    * earlier: 1 where the bytes of the one input hold what earlier lines did, or 0.
    """
    how, least, plain, alone = _literal(encoding, least, plain, single)
    size = size_of(how)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, _, _, slot, low, high, places, number, offset, fired, marks, earlier = arguments
        sums = _Sums(builder, slot, how, (low, high), least=least, plain=plain)
        counts = cgutils.alloca_once_value(builder, _constant(_many(_INT), 0))
        before = sums.reset_highest() if least and not alone else None
        ahead, bytes_of_lanes = builder.mul(offset, _LONG(size)), _many(_BYTE)

        def entry(addresses: Any, index: Any) -> Any:
            return builder.load(builder.gep(_place(builder, addresses, _LONG), [index]))

        with cgutils.for_range(builder, number) as line:
            address = builder.add(entry(places, line.index), ahead)
            _fetch(builder, builder.add(address, _LONG(_AHEAD)))
            values = _read(builder, address, how, lanes=True)
            sums.take(values)
            if alone or not least:
                fires = sums.fires(values)
                if not least:
                    ones = builder.zext(fires, _many(_INT))
                    builder.store(builder.add(builder.load(counts), ones), counts)
                if alone:
                    mark = _place(builder, builder.add(entry(marks, line.index), offset), bytes_of_lanes)
                    builder.store(builder.zext(fires, bytes_of_lanes), mark, align=1)
        if not alone:
            if least:
                own = sums.join_highest(before)
            else:
                own = builder.icmp_signed("!=", builder.load(counts), _constant(_many(_INT), 0))
            mark = _place(builder, builder.add(fired, offset), bytes_of_lanes)
            known = builder.and_(builder.load(mark, align=1), _spread(builder, builder.trunc(earlier, _BYTE)))
            builder.store(builder.or_(known, builder.zext(own, bytes_of_lanes)), mark, align=1)
        sums.put()
        if not least:
            sums.add_firings(builder.load(counts))
        return context.get_dummy_value()

    literals = [types.literal(kind) for kind in (least, plain, alone)]
    integers = [types.int64] * 6
    return types.void(encoding, *literals, types.int64, types.float64, types.float64, *integers), emit


def _rows_of(builder: Any, slot: Any) -> Any:
    return builder.bitcast(_place(builder, slot, _WIDE), _many(_WIDE).as_pointer())


@intrinsic
def clear(context, slot, pivot):
    """Begin to count, with a pivot for all lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = _rows_of(builder, arguments[0])
        for row in range(SLOT):
            nothing = _constant(_many(_WIDE), _NOTHING.get(row, 0.0))
            value = _spread(builder, arguments[1]) if row == PIVOT else nothing
            builder.store(value, builder.gep(rows, [_LONG(row)]), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.float64), emit


@intrinsic
def gather(context, slot):
    """Put all that was counted into the first lane."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = _rows_of(builder, arguments[0])
        for row in range(HIGHEST, SLOT):
            place = builder.gep(rows, [_LONG(row)])
            values, left = builder.load(place, align=8), LANES
            while left > 1:
                left //= 2
                halves = (ir.Constant(ir.VectorType(_INT, left), list(range(at, at + left))) for at in (0, left))
                one, other = (builder.shuffle_vector(values, values, half) for half in halves)
                if row in _NOTHING:
                    is_first = builder.fcmp_ordered(">" if row == HIGHEST else "<", one, other)
                    values = builder.select(is_first, one, other)
                else:
                    values = builder.fadd(one, other)
            whole = builder.extract_element(values, _INT(0))
            nothing = _constant(_many(_WIDE), _NOTHING.get(row, 0.0))
            builder.store(builder.insert_element(nothing, whole, _INT(0)), place, align=8)
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic(prefer_literal=True)
def value_at(context, encoding, address):
    """One value, as float64."""
    (how,) = _literal(encoding)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = _read(builder, arguments[1], how, lanes=False)
        return value if how == DOUBLE else builder.fpext(value, _WIDE)

    return types.float64(encoding, types.int64), emit


@intrinsic
def next_of(context, address):
    """Add one to the number at an address, and return what it was; no two threads get the same."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _place(builder, arguments[0], _LONG), _LONG(1), "monotonic")

    return types.int64(types.int64), emit


@intrinsic
def number_from(context, address):
    """What the function at an address, int (void), returns."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(_INT, []).as_pointer()
        return builder.sext(builder.call(builder.inttoptr(arguments[0], function), []), _LONG)

    return types.int64(types.int64), emit


@intrinsic
def pointer_to(context, address):
    """An address as a pointer."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), emit
