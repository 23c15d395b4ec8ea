"""Machine code of CUDA kernels as nvdisasm prints it: instructions, control flow, loops.

A kernel's hot loop is found in the graph of its branches, not in the order of its text: loops that are unrolled,
rotated or pipelined, and cold blocks that the assembler moved to the end, are all the same there.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

LABEL = re.compile(r"\.L\w+")
LINE = re.compile(r"\s*(?:/\*[0-9a-f]{4,}\*/)?\s*(?:@(!?\w+)\s+)?([A-Z][A-Z0-9a-z_.]*)\s*([^;]*);")
JUMPS = {"BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "CALL"}  # a CALL of a label is how some loops are left
CONTROL = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")  # the upper half of an instruction, on a line of its own
STALL = 41, 0xF  # bits of it: by how much to shift, and their mask
ENDS = {"EXIT", "RET", "KILL"}
FLOATS = re.compile(r"(B?F16|F32|F64)(x\d|_V\d)?$")


class Instruction(NamedTuple):
    """One line of machine code."""

    predicate: str  # "P0", "!P0", or nothing
    opcode: str  # with its modifiers: "LDGSTS.E.BYPASS.128"
    operands: str
    labels: tuple[str, ...] = ()  # that stand in front of it
    stall: int = 1  # cycles after which its warp may issue the next one, if nothing else holds it up

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    def matches(self, wanted: str) -> bool:
        """Whether it is of this opcode and has at least these modifiers: "STG.128" matches STG.E.128."""
        base, *modifiers = wanted.split(".")
        return self.base == base and set(modifiers) <= set(self.opcode.split("."))


def parse(listing: str) -> list[Instruction]:
    """The instructions of one section of nvdisasm's output (stalls with -hex); addresses, directives are skipped."""
    code: list[Instruction] = []
    labels: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line.strip()):
            labels.append(label[1])
        elif control := CONTROL.match(line):
            code[-1] = code[-1]._replace(stall=max(int(control[1], 16) >> STALL[0] & STALL[1], 1))
        elif instruction := LINE.match(line):
            predicate, opcode, operands = instruction.groups()
            code.append(Instruction(predicate or "", opcode, operands.strip(), tuple(labels)))
            labels = []
    return code


def is_local_memory(instruction: Instruction) -> bool:
    """Whether it touches the thread's stack: spilled registers, arrays with computed indices."""
    return instruction.base in {"LDL", "STL"}


def is_float_atomic(instruction: Instruction) -> bool:
    """Whether it adds floats in memory, in an order that changes; compare-and-swap is what others are made of."""
    if not re.match(r"ATOM|RED(G|S|AS)?$|UBLKRED|UTMARED", instruction.base):
        return False
    return any(m in {"CAS", "CAST"} or FLOATS.match(m) for m in instruction.opcode.split("."))


def _successors(code: list[Instruction]) -> list[list[int]]:
    where = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
    following = []
    for i, instruction in enumerate(code):
        jumps = instruction.base in JUMPS
        targets = [where[name] for name in LABEL.findall(instruction.operands) if name in where] if jumps else []
        maybe = instruction.predicate or re.match(r"!?U?P[\dT]", instruction.operands) or ".DIV" in instruction.opcode
        leaves = instruction.base in ENDS or (jumps and (bool(targets) or instruction.base != "CALL"))
        if (maybe or not leaves) and i + 1 < len(code):
            targets.append(i + 1)
        following.append(targets)
    return following


class Flow:
    """The graph of a kernel's branches.

    Attributes:
        code: the instructions.
        following: for each of them those that may come next, as indices.
        loops: the natural loops by their first instruction, as sets of indices: what reaches a jump back to a dominator
            without passing the dominator.
    """

    def __init__(self, code: list[Instruction]) -> None:
        """code: a kernel, as parse has read it."""
        self.code, self.following = code, _successors(code)
        self._before: dict[int, list[int]] = {}
        self._dominators = self._find_dominators()
        self.loops = self._find_loops()

    def dominated(self, by: int) -> frozenset[int]:
        """What no path reaches without passing one instruction, and this instruction."""
        return frozenset(i for i, dominators in self._dominators.items() if dominators >> by & 1)

    def dominators(self, of: int) -> list[int]:
        """What every path to an instruction passes, in order, the instruction last."""
        passed = self._dominators[of]
        return sorted(
            (i for i in range(len(self.code)) if passed >> i & 1), key=lambda i: self._dominators[i].bit_count()
        )

    def _find_dominators(self) -> dict[int, int]:
        """By reachable instruction; bit j: every path from the entry passes j."""
        reached, todo = set(), [0] if self.code else []
        while todo:
            i = todo.pop()
            if i not in reached:
                reached.add(i)
                todo += self.following[i]
        order = sorted(reached)
        self._before = {i: [] for i in order}
        for i in order:
            for target in self.following[i]:
                self._before[target].append(i)
        everything = (1 << len(self.code)) - 1
        dominators = {i: everything for i in order} | ({0: 1} if order else {})
        changed = True
        while changed:
            changed = False
            for i in order[1:]:
                common = everything
                for source in self._before[i]:
                    common &= dominators[source]
                common |= 1 << i
                changed |= common != dominators[i]
                dominators[i] = common
        return dominators

    def _find_loops(self) -> dict[int, frozenset[int]]:
        bodies: dict[int, set[int]] = {}
        for i, dominators in self._dominators.items():
            for head in self.following[i]:
                if dominators >> head & 1:
                    body = bodies.setdefault(head, {head})
                    todo = [i]
                    while todo:
                        inside = todo.pop()
                        if inside not in body:
                            body.add(inside)
                            todo += self._before[inside]
        return {head: frozenset(body) for head, body in bodies.items()}

    def executed(
        self, head: int, trips: Callable[[frozenset[int]], float], cold: Callable[[int], bool] = lambda _: False
    ) -> Counter[int]:
        """How often each instruction is executed in one turn of the loop that begins at head, by index.

        Of the paths from the head back to it the one with most instructions is taken, among those without a cold
        instruction: a bound from above. An inner loop counts whole, trips(loop) times; one that cannot be run without
        a cold instruction is cold. A predicated instruction takes its slot whether it acts or not.

        Returns: nothing where there is no such path.
        """
        loop = self.loops[head]
        inner = {first: body for first, body in self.loops.items() if body < loop}
        children = {first: body for first, body in inner.items() if not any(body < other for other in inner.values())}
        node_of = {i: i for i in loop} | {i: first for first, body in children.items() for i in body}
        work = {i: Counter({i: 1.0}) for i in loop if node_of[i] == i and i not in children and not cold(i)}
        for first, body in children.items():
            if turn := self.executed(first, trips, cold):
                turns = trips(body)
                work[first] = Counter({i: times * turns for i, times in turn.items()})
        after: dict[int, set[int]] = {node: set() for node in work}
        for i in loop:
            source, targets = node_of[i], {node_of[target] for target in self.following[i] if target in loop}
            if source in work:
                after[source] |= {target for target in targets if target == head or target != source}
        return _longest(work, after, head)


def _longest(work: dict[int, Counter[int]], after: dict[int, set[int]], head: int) -> Counter[int]:
    """The work of the longest path from the head back to it, which every cycle passes."""
    longest: dict[int, tuple[float, int]] = {}  # from a node on, and which one is next
    todo = [head] if head in work else []
    while todo:
        node = todo[-1]
        onward = [target for target in after[node] if target != head and target in work]
        waiting = [target for target in onward if target not in longest]
        todo += waiting
        if not waiting:
            ways = [(longest[target][0], target) for target in onward] + [(0.0, head)] * (head in after[node])
            size, target = max(ways, default=(-math.inf, head))
            longest[node] = size + work[node].total(), target
            todo.pop()
    total: Counter[int] = Counter()
    if longest.get(head, (-math.inf, head))[0] > 0:
        node = head
        while not total or node != head:
            total.update(work[node])
            node = longest[node][1]
    return total


def hot_loops(flow: Flow, *wanted: str) -> list[list[Instruction]]:
    """The innermost loops that hold all these opcodes at once: products, copies and stores of one stream.

    Wanted without products they would be any loop; without copies, maybe a walk over a tile in shared memory.
    """

    def holds(loop: frozenset[int]) -> bool:
        return all(any(flow.code[i].matches(opcode) for i in loop) for opcode in wanted)

    found = [loop for loop in flow.loops.values() if holds(loop)]
    return [[flow.code[i] for i in sorted(loop)] for loop in found if not any(other < loop for other in found)]
