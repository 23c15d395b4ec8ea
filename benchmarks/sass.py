"""Machine code of CUDA kernels as nvdisasm prints it: instructions, control flow, loops.

A kernel's hot loop is found in the graph of its branches, not in the order of its text: loops that are unrolled,
rotated or pipelined, and cold blocks that the assembler moved to the end, are all the same there.
"""

import re
from typing import NamedTuple

LABEL = re.compile(r"\.L\w+")
LINE = re.compile(r"\s*(?:/\*[0-9a-f]{4,}\*/)?\s*(?:@(!?\w+)\s+)?([A-Z][A-Z0-9a-z_.]*)\s*([^;]*);")
JUMPS = {"BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "CALL"}  # a CALL of a label is how some loops are left
ENDS = {"EXIT", "RET", "KILL"}
FLOATS = re.compile(r"(B?F16|F32|F64)(x\d|_V\d)?$")


class Instruction(NamedTuple):
    """One line of machine code."""

    predicate: str  # "P0", "!P0", or nothing
    opcode: str  # with its modifiers: "LDGSTS.E.BYPASS.128"
    operands: str
    labels: tuple[str, ...] = ()  # that stand in front of it

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    def matches(self, wanted: str) -> bool:
        """Whether it is of this opcode and has at least these modifiers: "STG.128" matches STG.E.128."""
        base, *modifiers = wanted.split(".")
        return self.base == base and set(modifiers) <= set(self.opcode.split("."))


def parse(listing: str) -> list[Instruction]:
    """The instructions of one section of nvdisasm's output; addresses and directives are skipped."""
    code: list[Instruction] = []
    labels: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line.strip()):
            labels.append(label[1])
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


def loops(code: list[Instruction]) -> list[frozenset[int]]:
    """The natural loops, as sets of indices: what reaches a jump back to a dominator without passing the dominator."""
    following = _successors(code)
    reached, todo = set(), [0] if code else []
    while todo:
        i = todo.pop()
        if i not in reached:
            reached.add(i)
            todo += following[i]
    order = sorted(reached)
    before: dict[int, list[int]] = {i: [] for i in order}
    for i in order:
        for target in following[i]:
            before[target].append(i)

    # Bit j of dominators[i]: every path from the entry to i passes j.
    everything = (1 << len(code)) - 1
    dominators = {i: everything for i in order} | {0: 1}
    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            common = everything
            for source in before[i]:
                common &= dominators[source]
            common |= 1 << i
            changed |= common != dominators[i]
            dominators[i] = common

    bodies: dict[int, set[int]] = {}  # by the loop's first instruction
    for i in order:
        for head in following[i]:
            if dominators[i] >> head & 1:
                body = bodies.setdefault(head, {head})
                todo = [i]
                while todo:
                    inside = todo.pop()
                    if inside not in body:
                        body.add(inside)
                        todo += before[inside]
    return [frozenset(body) for body in bodies.values()]


def hot_loops(code: list[Instruction], *wanted: str) -> list[list[Instruction]]:
    """The innermost loops that hold all these opcodes at once: products, copies and stores of one stream.

    Wanted without products they would be any loop; without copies, maybe a walk over a tile in shared memory.
    """

    def holds(loop: frozenset[int]) -> bool:
        return all(any(code[i].matches(opcode) for i in loop) for opcode in wanted)

    found = [loop for loop in loops(code) if holds(loop)]
    return [[code[i] for i in sorted(loop)] for loop in found if not any(other < loop for other in found)]
