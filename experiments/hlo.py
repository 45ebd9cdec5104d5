"""What the text of a program compiled for TPUs tells: collectives, Pallas kernels, arrays.

XLA's own cost analysis counts the body of a loop once; here loops are multiplied out.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices, as often as a step runs it."""

  kind: str  # "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"
  count: int  # loops multiplied out
  bytes: int  # of the whole array on each device, once: the larger of operand and result
  shapes: tuple[str, ...]
  source: str  # where in the program


@dataclasses.dataclass(frozen=True)
class Analysis:
  """What the text of a compiled TPU program tells."""

  collectives: tuple[Collective, ...]
  kernels: dict[str, int]  # name of a Pallas kernel -> calls, loops multiplied out
  largest_array: tuple[str, int]  # (shape, bytes) of the largest one on a device
  unknown_loops: int  # whose number of turns is not in the text; counted once

  def totals(self) -> dict[str, dict[str, int]]:
    """Kind -> count and bytes of all its collectives."""
    table: dict[str, dict[str, int]] = {}
    for one in self.collectives:
      row = table.setdefault(one.kind, dict(count=0, bytes=0))
      row["count"] += one.count
      row["bytes"] += one.count * one.bytes
    return dict(sorted(table.items()))


class _Line(NamedTuple):
  """One instruction."""

  result: str  # type
  op: str
  operands: str
  rest: str  # attributes


class _Visit(NamedTuple):
  """An instruction that runs, and how often."""

  line: _Line
  count: int
  computation: str


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s16=2, u16=2, f32=4, s32=4, u32=4, s64=8, u64=8)
_ARRAY = re.compile(rf"\b({'|'.join(_SIZES)})\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_OP = re.compile(r"(?:^|[)\]}] )([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


def analyse(text: str) -> Analysis:
  """Reads `compiled.as_text()` of a program for TPUs."""
  computations, entry = _parse(text)
  loops = [0]
  whole: list[Collective] = []
  chained: dict[str, Collective] = {}
  kernels: dict[str, int] = {}
  arrays: dict[str, int] = {}
  for line, count, computation in _walk(computations, entry, 1, loops):
    for found in _ARRAY.finditer(line.result):
      arrays[found[0]] = _bytes(found[0])
    kind = line.op.removesuffix("-start")
    if 'custom_call_target="tpu_custom_call"' in line.rest:
      name = _kernel_name(line)
      kernels[name] = kernels.get(name, 0) + count
    elif kind in _KINDS:
      one = _collective(line, kind, count, computation)
      # One that overlaps with computation appears in pieces that are chained together. Where it is
      # spread over a loop, the piece that starts it outside tells how often it runs.
      chain = re.search(r'chain_id="?(\d+)', line.rest)
      if chain is None:
        whole.append(one)
        continue
      channel = re.search(r"channel_id=(\d+)", line.rest)
      name = f"{channel and channel[1]} {chain[1]}"
      if name not in chained or count < chained[name].count:
        chained[name] = one
  largest = max(arrays.items(), key=lambda item: item[1], default=("", 0))
  ordered = sorted((*whole, *chained.values()), key=lambda one: -one.count * one.bytes)
  return Analysis(tuple(ordered), kernels, largest, loops[0])


def _parse(text: str) -> tuple[dict[str, list[_Line]], str]:
  computations: dict[str, list[_Line]] = {}
  current, entry = None, ""
  for raw in text.splitlines():
    if header := _HEADER.match(raw):
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif raw.startswith("}"):
      current = None
    elif current is not None and " = " in raw:
      right = raw.split(" = ", 1)[1]
      if op := _OP.search(right):
        operands, _, rest = right[op.end() :].partition("), ")
        current.append(_Line(right[: op.start() + 1], op[1], operands, rest))
  return computations, entry


def _walk(computations, name: str, count: int, loops: list[int]) -> Iterator[_Visit]:
  for line in computations[name]:
    yield _Visit(line, count, name)
    if line.op == "while":
      turns = _turns(computations, re.search(r"condition=%?([\w.\-]+)", line.rest)[1])
      loops[0] += turns is None
      body = re.search(r"body=%?([\w.\-]+)", line.rest)[1]
      yield from _walk(computations, body, count * (turns or 1), loops)
    elif line.op in ("call", "conditional", "fusion") or line.op.startswith("async-"):
      for called in _CALLED.findall(line.rest):
        if called in computations:
          yield from _walk(computations, called, count, loops)


def _turns(computations, condition: str) -> int | None:
  """Turns of a loop that counts from 0: the one integer that its condition compares with."""
  limits = {
    int(line.operands.partition(")")[0])
    for line in computations.get(condition, ())
    if line.op == "constant" and line.result.startswith(("s32[]", "u32[]"))
  }
  return limits.pop() if len(limits) == 1 else None


def _collective(line: _Line, kind: str, count: int, computation: str) -> Collective:
  # The compiler writes a reduce-scatter as one fused all-reduce and slice.
  if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"
  arrays = [found[0] for found in _ARRAY.finditer(line.result)]
  if line.op in ("all-gather-start", "collective-permute-start"):  # (operands, results, ...)
    arrays = arrays[: 2 * (len(arrays) // 2)] if line.op[0] == "a" else arrays[:2]
    arrays = arrays[len(arrays) // 2 :]
  size = sum(map(_bytes, arrays))
  if kind == "reduce-scatter" and line.op == "reduce-scatter":
    size *= _group_size(line.rest)
  source = re.search(r'op_name="([^"]*)"', line.rest)
  return Collective(kind, count, size, tuple(arrays), source[1] if source else "")


def _group_size(rest: str) -> int:
  """Devices that exchange with each other, in the three ways the compiler writes them."""
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
    return listed[1].count(",") + 1
  if shaped := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
    return int(shaped[1])
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", named[2]))
  return 1


def _kernel_name(line: _Line) -> str:
  path = re.search(r'op_name="([^"]*)"', line.rest)
  steps = path[1].split("/") if path else []
  return next((step for step in reversed(steps) if step != "pallas_call"), "unnamed")


def _bytes(array: str) -> int:
  kind, sides = _ARRAY.fullmatch(array).groups()
  return _SIZES[kind] * math.prod(int(side) for side in sides.split(",") if side)
