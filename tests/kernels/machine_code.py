"""What holds for the compiled code of a process: run under each instruction set by test_instruction_sets.py.

The code is what the tests before it in this process have made Numba compile.
"""

import re
from typing import Any

import numpy as np
import pytest
from llvmlite import binding as llvm

from pagellm.kernels import activation, attention, kv_cache, matmul, norm, packing, rope, sampling
from pagellm.kernels.simd import host_has
from tests.kernels import test_attention, test_matmul
from tests.kernels.layouts import FORMATS

# Whole lines of assembly that only a processor with the feature understands. LLVM may use anything that a
# feature implies, so each is also allowed by those that come with it.
NEEDED: dict[tuple[str, ...], str] = {
    ("sse3", "avx"): r"(haddp|movshdup|movsldup|movddup|lddqu)",
    ("ssse3", "avx"): r"(pshufb|phadd|pmaddubsw|palignr|psign|pabs|pmulhrsw)",
    (
        "sse4.1",
        "avx",
    ): r"(roundp|rounds|pmulld|p?blend|pmov[sz]x|p(ins|ext)r[bdq]|ptest|p(min|max)(sb|sd|u[wd]))",
    ("popcnt", "avx"): r"popcnt",
    ("avx", "f16c", "fma"): r"(v[a-z0-9]+ .*%[xyz]mm|.*%[yz]mm)",
    ("avx2",): r"v(broadcast\w+ %xmm|perm(d|q|ps|pd) .*%ymm|p(add|sub|mul|s[lr]l|sra|madd|and|or)\w* .*%ymm)",
    ("fma", "avx512f"): r"vfn?m(add|sub)",
    ("f16c", "avx512f"): r"vcvtp[hs]2p[hs]",
    ("avx512f",): r"(.*%zmm|.*%[xyz]mm(1[6-9]|2[0-9]|3[01])|.*%k[0-7])",
    ("avx512vnni", "avxvnni"): r"(\{vex\} )?vpdp",
    ("avx512bf16",): r"vdpbf16ps",
    ("bmi",): r"(andn[lq] |blsi|blsr|blsmsk|bextr)",
    ("bmi2",): r"(shlx|shrx|sarx|rorx|mulx|pdep|pext|bzhi)",
    ("lzcnt",): r"lzcnt",
    ("movbe",): r"movbe",
}
# And what code for it must use, or it is slower than it need be.
USED: dict[str, str] = {
    "avx": r".*%ymm|.*%zmm",
    "fma": r"vfmadd",
    "avx512f": r".*%zmm",
    "avx512vnni": r"vpdpbusd .*%zmm",
    "avxvnni": r"(\{vex\} )?vpdpbusd",
    "avx512bf16": r"vdpbf16ps .*%zmm",
}
ENTRIES = (
    activation.activate.alone,
    attention.attention.alone,
    attention.merge_states.alone,
    kv_cache.store_kv.alone,
    matmul.matmul.alone,
    norm.normalize.alone,
    packing.pack_blocks,
    packing.pack_row.alone,
    packing.unpack_column.alone,
    rope.rotate.alone,
    sampling.has_softmax.alone,
    sampling.log_sum_exp.alone,
    sampling.penalize.alone,
    sampling.sample.alone,
    sampling.top_tokens.alone,
)


def compile_the_two_products() -> None:
    """If the tests before have not."""
    ones = np.ones((1, 1), np.float32)
    for format in FORMATS:
        test_matmul.multiply(format, ones, ones, ones[0])
    heads = test_attention.Heads(1, 1, 4)
    test_attention.alone(heads, test_attention.context(heads, 1))


def instructions(assembly: str) -> set[str]:
    """Lines like "vaddps %zmm0, %zmm1, %zmm2", without comments, directives, labels and locations."""
    lines = (re.sub(r"\s+", " ", line.split("#")[0]).strip() for line in assembly.splitlines())
    return {line for line in lines if re.match(r"[a-z{]", line) and not line.endswith(":")}


def test_code_keeps_to_its_machine() -> None:
    compile_the_two_products()
    for entry in ENTRIES:
        for assembly in entry.inspect_asm().values():
            found = instructions(assembly)
            for features, pattern in NEEDED.items():
                if not any(map(host_has, features)):
                    strange = sorted(line for line in found if re.match(pattern, line))
                    assert not strange, f"{entry.__name__} needs {features}"


def test_code_makes_use_of_its_machine() -> None:
    compile_the_two_products()
    found = {
        line
        for entry in (matmul.matmul.alone, attention.attention.alone)
        for assembly in entry.inspect_asm().values()
        for line in instructions(assembly)
    }
    for feature, pattern in USED.items():
        if host_has(feature):
            assert any(re.match(pattern, line) for line in found), feature


def aarch64() -> Any:
    """A generic 64-bit Arm machine, or the reason why there is none."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError as error:
        pytest.skip(f"LLVM was built without this target: {error}")
    return target.create_target_machine(cpu="generic", features="+neon", opt=2)


@pytest.mark.skipif(not host_has("neon"), reason="only code without another machine's instructions")
def test_code_lowers_to_64_bit_arm() -> None:
    """With fused multiply-adds, and no function of a runtime library that a process may lack."""
    compile_the_two_products()
    machine = aarch64()
    for entry in ENTRIES:
        for text in entry.inspect_llvm().values():
            module = llvm.parse_assembly(text)
            module.triple, module.data_layout = machine.triple, str(machine.target_data)
            module.verify()
            assembly = machine.emit_assembly(module)
            assert re.findall(r"\sbl?\s+(__\w+)", assembly) == []
            if entry in (matmul.matmul.alone, attention.attention.alone):
                assert "fmla" in assembly
