"""From a flattened .metal source to C++: finds the kernels, rewrites what C++ cannot say, keeps the lines."""

import re
from dataclasses import dataclass

BUILTINS = (
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "threads_per_threadgroup",
    "threads_per_grid",
    "thread_position_in_threadgroup",
    "thread_position_in_grid",
    "thread_index_in_threadgroup",
    "simdgroup_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
)
# Wrappers around the Metal compiler's builtins: msl.h has these functions itself.
REPLACED = ("/bf16_math.h", "/logging.h")

KERNEL = re.compile(r"(?:\[\[\s*kernel\b([^\]]*)\]\]|\bkernel\b)\s*void\s+(\w+)\s*\(")
INSTANTIATION = re.compile(
    r"\btemplate\s*\[\[\s*host_name\(\s*((?:\"[^\"]*\"\s*)+)\)\s*\]\]\s*\[\[\s*kernel\s*\]\]\s*"
    r"decltype\s*\((.*?)\)\s*(\w+\s*<[^;]*>)\s*;",
    re.S,
)
CONSTANT = re.compile(r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\(\s*([\w:]+)\s*\)\s*\]\]\s*;")
THREADGROUP = re.compile(r"\bthreadgroup\s+([^;(){}*&=\[\]]+?)\s+(\w+)((?:\s*\[[^;]*?\])*)\s*;")
# Members and functions that differ from an earlier one in an address space only.
OVERLOADS = [
    re.compile(r"\)\s*(?:const\s+)?(?:threadgroup|device|constant)\b(?=\s*(?:noexcept\s*)?[{:;])"),
    re.compile(r"\b(?:threadgroup|device)\s+complex_t<T>&\s*operator"),
    re.compile(r"\bstruct\s+pointer_element<(?:device|threadgroup)\s+T\*>"),
]


@dataclass(frozen=True)
class Kernel:
    name: str
    function: str  # as C++ names it, template arguments included
    parameters: tuple  # of "{is_buffer, index}" in C++


def closing(text, start):
    """The index of the bracket that closes the one at `start`."""
    pairs = {"(": ")", "[": "]", "{": "}"}
    depth, opener, closer = 0, text[start], pairs[text[start]]
    for i in range(start, len(text)):
        depth += (text[i] == opener) - (text[i] == closer)
        if not depth:
            return i
    raise ValueError(f"{opener} is never closed")


def split(text):
    """Splits at the commas that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and not depth:
            parts.append(text[begin:i])
            begin = i + 1
    return [p for p in [*parts, text[begin:]] if p.strip()]


def blank(text):
    """As many lines, line markers kept, nothing else."""
    return "\n".join(line if line.startswith("# ") else "" for line in text.split("\n"))


def lines(text):
    """Yields (file, line number, text) for a flattened source."""
    file, number = "", 0
    for line in text.split("\n"):
        if marker := re.match(r'# (\d+) "([^"]*)"', line):
            number, file = int(marker[1]), marker[2]
            continue
        yield file, number, line
        number += 1


def without(files, text):
    """The text without the lines of files whose paths end so."""
    out, file = [], ""
    for line in text.split("\n"):
        if marker := re.match(r'# \d+ "([^"]*)"', line):
            file = marker[1]
        out.append("" if file.endswith(files) and not line.startswith("# ") else line)
    return "\n".join(out)


def _drop_overloads(text):
    for pattern in OVERLOADS:
        while found := pattern.search(text):
            begin = max(text.rfind(c, 0, found.start()) for c in ";{}") + 1
            end = found.end()
            while text[end] not in "{;":
                end += 1
            if text[end] == "{":
                end = closing(text, end)
                end += text[end + 1 : end + 2] == ";"
            text = text[:begin] + blank(text[begin : end + 1]) + text[end + 1 :]
    return text


def _parameter(text):
    if buffer := re.search(r"\bbuffer\(([^()]*)\)", text):
        return f"{{true, {buffer[1]}}}"
    for name in BUILTINS:
        if re.search(rf"\b{name}\b", text):
            return f"{{false, MSL_{name}}}"
    raise ValueError(f"a kernel parameter without an attribute that the simulator knows: {text.strip()}")


def _entry(kernel):
    # A comment in the place of each kernel's entry point, inside the kernel's own namespaces.
    return f"/* entry of {kernel} */"


class Source:
    """A flattened source, its kernels, and the C++ of each."""

    def __init__(self, flattened):
        text = _drop_overloads(without(REPLACED, flattened))
        self.kernels, functions, edits = {}, {}, []
        for k in KERNEL.finditer(text):
            parameters = closing(text, k.end() - 1)
            body = text.index("{", parameters)
            functions[k[2]] = tuple(_parameter(p) for p in split(text[k.end() : parameters]))
            if limit := re.search(r"max_total_threads_per_threadgroup\(", text[k.start() : k.end()]):
                at = k.start() + limit.end() - 1
                edits.append((body + 1, f" msl_max_threads({text[at + 1 : closing(text, at)]});"))
            if not text[: k.start()].rstrip().endswith(">"):  # of template <...>
                self.kernels[k[2]] = Kernel(k[2], k[2], functions[k[2]])
                edits.append(
                    (k.start() + k[0].rindex("void"), "static ")
                )  # compiled only if it is the one run
                edits.append((closing(text, body) + 1, _entry(k[2])))
        for at, insertion in sorted(edits, reverse=True):
            text = text[:at] + insertion + text[at:]

        def instantiate(m):
            name = "".join(re.findall(r'"([^"]*)"', m[1]))
            function = " ".join(m[3].split())
            self.kernels[name] = Kernel(name, function, functions[re.match(r"\w+", function)[0]])
            return _entry(name) + blank(m[0])

        text = INSTANTIATION.sub(instantiate, text)
        text = CONSTANT.sub(r"static msl::FunctionConstant<\1> \2{\3};", text)
        text = re.sub(r"\[\[\s*threadgroup\(\s*\d+\s*\)\s*\]\]", "", text)
        ids = iter(range(10**6))

        def variable(m):
            array = f"msl_array_{m[2]}"
            # `using T = float [4]` is an array type, of as many dimensions as there are.
            return (
                f"using {array} = {m[1]} {m[3]}; "
                f"auto& {m[2]} = msl::threadgroup_variable<{array}, {next(ids)}>();"
            )

        self.text = THREADGROUP.sub(variable, text)

    def cpp(self, kernel):
        """The C++ of one kernel, with its entry point."""
        k = self.kernels[kernel]
        call = f"msl::call({k.function}, {{{', '.join(k.parameters)}}});"
        entry = f'extern "C" void msl_entry() {{ {call} }}'
        return f'#include "msl.h"\n{self.text.replace(_entry(kernel), entry)}'
