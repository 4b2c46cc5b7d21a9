"""A flattened Metal source as C++ for OpenCL, which compilers on Linux know, address spaces included."""

import re

from msl_sim.source import (
    BUILTINS,
    CONSTANT,
    INSTANTIATION,
    KERNEL,
    THREADGROUP,
    blank,
    closing,
    split,
    without,
)

ATTRIBUTE = re.compile(r"\[\[(?:[^\]]|\](?!\]))*\]\]")
VECTOR = re.compile(r"\b((?:u?(?:char|short|int|long)|half|float)[234]|(?:metal::)?vec<[^<>]*>)\(")
# A reference to one of another type binds a temporary.
NUMBER = re.compile(r"\b(?:const\s+thread|thread\s+const)\s+(u?(?:char|short|int)|half|float|bool)\s*&")
STRUCT = re.compile(r"\b(?:struct|class)\s+(\w+)")
OF_THIS = re.compile(r"\s*\bthread\b(?=\s*[:{;])")
# A method with a twin that is not const; here `const` means nothing (see the end of metal.h).
CONST_METHOD = re.compile(
    r"(?:METAL_FUNC\s+)?(?:constexpr\s+)?\bconst\s+thread\s+[\w:]+\s*[&*]\s*\w+\([^()]*\)\s*"
    r"const\s+thread\s*\{"
)
# metal.h has these itself.
REPLACED = ("/kernels/utils.h", "/bf16_math.h", "/logging.h", "/complex.h")
VALUES = {
    "threadgroup_position_in_grid": "uint3{get_group_id(0), get_group_id(1), get_group_id(2)}",
    "threadgroups_per_grid": "uint3{uint(groups), uint(groups), uint(groups)}",
    "thread_position_in_threadgroup": "uint3{get_local_id(0), get_local_id(1), get_local_id(2)}",
    "thread_index_in_threadgroup": "get_local_id(0)",
    "simdgroup_index_in_threadgroup": "get_sub_group_id()",
    "thread_index_in_simdgroup": "get_sub_group_local_id()",
}


def translate(text, constants=()):
    """Line by line as it was.

    Args:
        text: of msl_sim.toolchain.flatten.
        constants: names of the function constants that are true; all are bool.
    """
    text = without(REPLACED, text)
    text = CONSTANT.sub(lambda m: f"constant {m[1]} {m[2]} = {int(m[2] in constants)};", text)
    text = INSTANTIATION.sub(lambda m: blank(m[0]), text)
    text = ATTRIBUTE.sub(lambda m: blank(m[0]), text)
    text = NUMBER.sub(r"\1 ", text)
    text = _constructors(_without_const_methods(text))
    ids = iter(range(1, 1000))
    text = THREADGROUP.sub(lambda m: _threadgroup(m, next(ids)), text)
    return '#include "metal.h"\n' + _vectors(text)


def kernels(text):
    """The kernels that a flattened source makes of its templates, by name, as C++ names them."""
    return {
        "".join(re.findall(r'"([^"]*)"', m[1])): " ".join(m[3].split()) for m in INSTANTIATION.finditer(text)
    }


def entry(text, function, threads, work, name="entry"):
    """An OpenCL kernel that calls one of the flattened source. Its hint of a size says `work`, a constant."""
    kernel = re.match(r"\w+", function)[0]
    declaration = next(m for m in KERNEL.finditer(text) if m[2] == kernel)
    parameters = split(text[declaration.end() : closing(text, declaration.end() - 1)])
    values = []
    for i, parameter in enumerate(parameters):
        attributes = "".join(ATTRIBUTE.findall(parameter))
        builtin = next((b for b in BUILTINS if re.search(rf"\b{b}\b", attributes)), None)
        values.append(VALUES[builtin] if builtin else f"Buffer{{a{i}}}")
    addresses = ", ".join(f"ulong {name}" for name in [*(f"a{i}" for i in range(len(parameters))), "groups"])
    size = f"__attribute__((reqd_work_group_size({threads}, 1, 1), work_group_size_hint(({work}), 1, 1)))"
    call = f"{function}({', '.join(values)});"
    return f"\nusing namespace mlx_fused;\n__kernel {size} void {name}({addresses}) {{ {call} }}\n"


def _without_const_methods(text):
    while m := CONST_METHOD.search(text):
        end = closing(text, m.end() - 1) + 1
        text = text[: m.start()] + blank(text[m.start() : end]) + text[end:]
    return text


def _constructors(text):
    """Constructors in no address space, as OpenCL's temporaries are."""
    names = "|".join(set(STRUCT.findall(text)))
    for m in reversed(list(re.finditer(rf"\b(?:{names})\s*\(", text))):
        end = closing(text, m.end() - 1) + 1
        if qualifier := OF_THIS.match(text, end):
            text = text[:end] + blank(qualifier[0]) + text[qualifier.end() :]
    return text


def _threadgroup(m, number):
    """OpenCL has no such variables in functions: a reference to an address of its own."""
    array = f"array_of_{m[2]}"
    address = f"*(threadgroup {array}*)({number}ul << 16)"
    return f"using {array} = {m[1]} {m[3]}; threadgroup {array}& {m[2]} = {address};"


def _vectors(text):
    """Vectors are made with braces of several values, by a function of one."""
    for m in reversed(list(VECTOR.finditer(text))):
        end = closing(text, m.end() - 1)
        values = text[m.end() : end]
        made = f"{m[1]}{{{values}}}" if len(split(values)) > 1 else f"to_vector<{m[1]}>({values})"
        text = text[: m.start()] + made + text[end + 1 :]
    return text
