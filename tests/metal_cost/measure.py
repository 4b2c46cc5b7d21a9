"""Reads what Mesa's compiler says about a kernel, and counts what is in its loop over K."""

import re
from collections import Counter
from dataclasses import dataclass, field

STATISTICS = re.compile(
    r"SHADER-DB: .*: (?P<instructions>\d+) inst, .* (?P<registers>\d+) regs, .* (?P<scratch>\d+) scratch, "
    r"(?P<threads>\d+) threads, .* (?P<spills>\d+):(?P<fills>\d+) spills:fills"
)
# Cycles by unit, as far as Mesa models them. What is on neither list (memory, control) is not in its model.
FLOAT = {
    **dict.fromkeys(
        ["ffma", "fadd", "fmul", "hfma", "hadd", "hmul", "mov_imm", "iadd", "icmpsel", "fcmpsel"], 1
    ),
    **dict.fromkeys(
        ["bitop", "and", "or", "xor", "nor", "nand", "xnor", "andn1", "andn2", "orn1", "orn2"], 1
    ),
    **dict.fromkeys(["get_sr", "shuffle", "ballot", "icmp_ballot", "fcmp_ballot"], 2),
    "simd_reduce": 24,
    "simd_prefix": 18,
}
# An instruction of this unit takes a cycle of the other as well. `convert` is not in Mesa's model: as long as
# the others, by published measurements of an M1.
INTEGER = {
    **dict.fromkeys(["imad", "bfi", "bfeil", "extr", "asr", "floor", "log2", "exp2", "convert"], 4),
    "rcp": 6,
    "rsqrt": 8,
}
BRANCH = re.compile(r"(?:if|while|break_if)_[if]cmp")
MULTIPLY_ADDS = ("ffma", "fmul", "hfma", "hmul")


@dataclass
class Block:
    index: int
    instructions: list = field(default_factory=list)  # (name, text)
    successors: list = field(default_factory=list)


def statistics(errors):
    """Of the kernel as a whole."""
    found = {name: int(value) for name, value in STATISTICS.search(errors).groupdict().items()}
    return found | {"spills": found["spills"] + found.pop("fills")}


def listing(output, instructions):
    """The blocks of the final code, which has so many instructions; the compiler prints earlier forms too."""
    listings, block = [], None
    for line in output.split("\n"):
        if begin := re.fullmatch(r"block(\d+) \{", line):
            block = Block(int(begin[1]))
            if block.index == 0:
                listings.append([])
            listings[-1].append(block)
        elif line.startswith("}") and block:
            arrow = re.match(r"\} -> ((?:block\d+ )+)", line)
            block.successors = [int(i) for i in re.findall(r"\d+", arrow[1])] if arrow else []
            block = None
        elif block and (text := line.strip()):
            block.instructions.append((re.sub(r"^.* = ", "", text).split()[0], text))
    found = [blocks for blocks in listings if sum(len(b.instructions) for b in blocks) == instructions]
    found = [blocks for blocks in found if _is_final(blocks)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} of {len(listings)} listings have {instructions} instructions")
    return found[0]


def _is_final(blocks):
    return any(re.match(r"r\d", text) for b in blocks for _, text in b.instructions)


def loops(blocks):
    """The blocks of each loop: those between a jump back and where it leads."""
    by_index = {b.index: b for b in blocks}
    before = {b.index: [p.index for p in blocks if b.index in p.successors] for b in blocks}
    for b in blocks:
        for head in b.successors:
            if head <= b.index:
                body, pending = {head}, [b.index]
                while pending:
                    if (i := pending.pop()) not in body:
                        body.add(i)
                        pending += before[i]
                yield [by_index[i] for i in sorted(body)]


def inner_loop(blocks):
    """That over K: the smallest with at least half as many multiply-adds as any has."""
    found = [(loop, multiply_adds(loop), sum(len(b.instructions) for b in loop)) for loop in loops(blocks)]
    most = max((number for _, number, _ in found), default=0)
    if not most:
        raise ValueError("no loop multiplies")
    return min((f for f in found if 2 * f[1] >= most), key=lambda f: f[2])[0]


def multiply_adds(blocks):
    return sum(name in MULTIPLY_ADDS for b in blocks for name, _ in b.instructions)


def step(loop):
    """The blocks that a step goes through: of the ways that load the most, the shortest.

    So guards let all rows pass, and where whole steps are told from a last part, the step is a whole one.
    """
    best = {loop[0].index: (0, 0, [])}  # bits loaded, instructions as a negative number, the blocks before
    ends = []
    for b in loop:  # a jump forward leads to a higher index
        if b.index not in best:
            continue
        bits, length, path = best[b.index]
        bits += sum(int(_bits(text)) for name, text in b.instructions if name == "device_load")
        way = (bits, length - len(b.instructions), [*path, b])
        for after in b.successors:
            if after == loop[0].index:
                ends.append(way)
            elif after > b.index and way[:2] > best.get(after, (-1,))[:2]:
                best[after] = way
    return max(ends, key=lambda way: way[:2])[2]


def counts(blocks):
    """What these blocks issue."""
    instructions = [i for b in blocks for i in b.instructions]
    names = Counter(name for name, _ in instructions)
    integer = sum(INTEGER.get(name, 0) * n for name, n in names.items())
    float_ = sum((FLOAT.get(name, 0) + (name in INTEGER)) * n for name, n in names.items())
    return {
        "instructions": len(instructions),
        "branches": sum(n for name, n in names.items() if BRANCH.fullmatch(name)),
        "float": float_,
        "integer": integer,
        "cycles": max(float_, integer),
        "converts": names["convert"],
        "multiplies_64": sum(
            name == "imad" and bool(re.match(r"r\d+:r\d+ =", t)) for name, t in instructions
        ),
        "multiply_adds": multiply_adds(blocks),
        "loads": dict(sorted(Counter(_bits(t) for name, t in instructions if name == "device_load").items())),
        "local_loads": names["local_load"],
        "local_stores": names["local_store"],
    }


def _bits(load):
    """How many a load brings: registers end in h or l when they are halves. A byte fills a half."""
    register, channels = re.match(r"(\S+) = .*?\b([xyzw]+)\b", load).groups()
    return str(len(channels) * (16 if register[-1] in "hl" else 32))


def measure(output, errors, work, has_norm=False):
    """All of it, given how many multiply-adds a lane does in a step; of a norm the cycles of a column."""
    whole = statistics(errors)
    blocks = listing(output, whole["instructions"])
    loop = inner_loop(blocks)
    whole |= {"work": work, "blocks": len(loop), "step": counts(step(loop))}
    return whole | ({"norm": norm_cycles(blocks, loop)} if has_norm else {})


def norm_cycles(blocks, inner):
    """Of the loops before that over K which multiply: each goes over the columns once."""
    before = [loop for loop in loops(blocks) if loop[-1].index < inner[0].index and multiply_adds(loop)]
    if not before:
        raise ValueError("no loop norms")
    return sum(counts(step(loop))["cycles"] for loop in before)
