"""What Apple's compiler would refuse and clang, with the address spaces taken away, cannot see."""

import re
from pathlib import Path

from .source import KERNEL, THREADGROUP, closing, lines, split

SPACES = re.compile(r"\b(?:device|constant|thread|threadgroup)\b")
ATTRIBUTE = re.compile(r"\[\[.*?\]\]", re.S)
FUNCTION = re.compile(r"(\w+|operator\s*\S{1,3})\s*\(")
BODY = re.compile(r"\s*(?:(?:const|thread|device|constant|threadgroup|noexcept)\s*)*\{")
NOT_FUNCTIONS = {"if", "for", "while", "switch", "catch", "return"}
# A statement that begins with `Type* name` or `Type& name`: no expression does.
DECLARATION = re.compile(
    r"(?<=[;{}])\s*((?:(?:const|constexpr|static|typename)\s+)*[A-Za-z_][\w:]*(?:<[^;{}()]*>)?(?:\s+const)?)"
    r"\s*[*&]\s*(?:const\s+)?[A-Za-z_]\w*\s*(?=[=;{\[(])"
)
SEVERAL = re.compile(r"\bthreadgroup\s+\w[^;(){}*&=]*?,[^;(){}]*;")
INITIALISED = re.compile(r"\bthreadgroup\s+[^;(){}*&=]+=")
LITERAL = re.compile(r"(?<![\w.])(?:(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![\w.])")
DERIVED = re.compile(r"\b(?:struct|class)\s+\w+\s*(?:<[^;{}()]*>)?\s*:(?!:)")
# What is outside functions: variables, and the beginnings of functions.
VARIABLE = re.compile(
    r"(?<=[;{}])\s*([^;{}()]*\bconstexpr\b[^;{}()]*=|[^;{}()]*(?=\[\[\s*function_constant\b))"
)
STRUCT = re.compile(r"\b(?:struct|class)\s+\w[^;{}()]*\{")
METHOD = re.compile(r"(?<=[;{}])([^;{}()]*\w(?:\(\)|\[\])?)\([^;{}]*?\)([\w\s]*)(?=[:{])")
WORDS = re.compile(
    r"\b(?:double|long\s+long|new|delete|try|catch|throw|virtual|dynamic_cast|typeid|goto|thread_local)\b"
    r"|\bstd\s*::"
)


def check(flattened):
    """Returns (file:line, what) for each thing wrong in the sources of the file's own folder."""
    own = [(f, n, text) for f, n, text in lines(flattened) if f.startswith("own/")]
    # The leading semicolon lets the first declaration be found like the others.
    text = ";" + "\n".join(re.sub(r'"[^"\n]*"', lambda m: " " * len(m[0]), line) for _, _, line in own)
    found = []

    def report(position, what):
        file, number, _ = own[text.count("\n", 0, position)]
        found.append((f"{Path(file).name}:{number}", what))

    for f in FUNCTION.finditer(text):
        opening = f.end() - 1
        end = closing(text, opening)
        if f[1].startswith("operator") and text[opening : end + 1] == "()":  # operator()
            opening = text.index("(", end + 1)
            end = closing(text, opening)
        if f[1] in NOT_FUNCTIONS or not BODY.match(text, end + 1):
            continue
        at = opening + 1
        for parameter in split(text[opening + 1 : end]):
            bare = ATTRIBUTE.sub("", parameter)
            if re.search(r"[*&]", bare.split("=")[0]) and not SPACES.search(bare):
                place = text.index(parameter, at)
                report(place + len(parameter) - len(parameter.lstrip()), f"no address space: {bare.strip()}")
            at += len(parameter)
    for d in DECLARATION.finditer(text):
        if d[1] not in ("return", "else"):
            report(d.start(1), f"no address space: {d[0].strip()}")
    bodies = []
    for k in KERNEL.finditer(text):
        begin = text.index("{", closing(text, k.end() - 1))
        bodies.append((begin, closing(text, begin)))
    for v in THREADGROUP.finditer(text):
        inside = [text[b : v.start()] for b, e in bodies if b < v.start() < e]
        if not inside or inside[0].count("{") - inside[0].count("}") != 1:
            report(v.start(), f"threadgroup variable outside a kernel's outermost scope: {v[2]}")
    plain = re.sub(r"<[^;{}()]*>", lambda m: " " * len(m[0]), text)
    for v in SEVERAL.finditer(plain):
        report(v.start(), "several threadgroup variables in one declaration")
    for v in INITIALISED.finditer(plain):
        report(v.start(), "a threadgroup variable with an initialiser")
    for d in DERIVED.finditer(text):
        report(d.start(), "a derived class")
    outside = _without_bodies(text)
    for v in VARIABLE.finditer(outside):
        if not re.search(r"\bconstant\b", v[1]):
            report(v.start(1), "a variable outside functions that is not constant")
    for s in STRUCT.finditer(outside):
        for m in METHOD.finditer(outside, s.end() - 1, closing(outside, s.end() - 1)):
            if not re.search(r"\bstatic\b", m[1]) and not SPACES.search(m[2]):
                report(m.start(2), "a method without an address space")
    for w in WORDS.finditer(text):
        report(w.start(), f"not in MSL: {w[0]}")
    for n in LITERAL.finditer(text):
        report(n.start(), f"a literal without suffix, thus a double: {n[0]}")
    return found


def _without_bodies(text):
    """With the bodies of functions blank."""
    for f in FUNCTION.finditer(text):
        begin = text.find("{", f.end())
        if (
            text[f.end() - 1] == "("
            and f[1] not in NOT_FUNCTIONS
            and BODY.match(text, closing(text, f.end() - 1) + 1)
        ):
            end = closing(text, begin)
            text = text[: begin + 1] + re.sub(r"[^\n]", " ", text[begin + 1 : end]) + text[end:]
    return text
