"""Bubblewrap's filter and the container engines' profile: that both refuse the same."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_pocket.sandbox import seccomp

MACHINES = sorted(seccomp.REFUSED)
RULES = json.loads(seccomp.profile())["syscalls"]


def numbers(machine: str) -> dict[str, int]:
    """The calls that a filter speaks of, and three that it does not."""
    common = {
        "x86_64": {"read": 0, "openat": 257, "kill": 62},
        "aarch64": {"read": 63, "openat": 56, "kill": 129},
    }
    return {
        **seccomp.REFUSED[machine],
        **seccomp.OWN[machine],
        **seccomp.SOCKETS[machine],
        "clone": seccomp.CLONE[machine],
        "clone3": seccomp.CLONE3,
        **common[machine],
    }


def filtered(machine: str, number: int, first: int, architecture: int | None = None) -> int:
    """What classic BPF, run step by step, returns for a call with this first argument."""
    architecture = seccomp.AUDIT_ARCHITECTURES[machine] if architecture is None else architecture
    data = {seccomp.NUMBER: number, seccomp.ARCHITECTURE: architecture, seccomp.FIRST: first}
    steps = list(struct.iter_unpack("=HBBI", seccomp.program(machine)))
    at = held = 0
    while True:
        code, then, otherwise, value = steps[at]
        at += 1
        if code == seccomp.RETURN:
            return int(value)
        if code == seccomp.LOAD:
            held = data[value]
            continue
        holds = {
            seccomp.EQUAL: held == value,
            seccomp.AT_LEAST: held >= value,
            seccomp.ANY_BIT: bool(held & value),
        }[code]
        at += then if holds else otherwise


def profiled(name: str, first: int) -> int:
    """What an engine's profile says of the same call, in BPF's terms."""

    def holds(rule: dict[str, Any]) -> bool:
        return name in rule["names"] and all(
            {
                "SCMP_CMP_EQ": first == each["value"],
                "SCMP_CMP_NE": first != each["value"],
                "SCMP_CMP_GT": first > each["value"],
                "SCMP_CMP_MASKED_EQ": first & each["value"] == each.get("valueTwo", 0),
            }[each["op"]]
            for each in rule.get("args", ())
        )

    refusing = [rule["errnoRet"] for rule in RULES if holds(rule)]
    return 0x00050000 | refusing[0] if refusing else seccomp.ALLOW


@pytest.mark.parametrize("machine", MACHINES)
@given(data=st.data())
def test_the_filter_and_the_profile_say_the_same_of_every_call(machine: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(numbers(machine))))
    flag = st.integers(0, 31).map(lambda bit: 1 << bit)
    first = data.draw(st.integers(0, 50) | flag | st.integers(0, 2**32 - 1))
    assert filtered(machine, numbers(machine)[name], first) == profiled(name, first)


@pytest.mark.parametrize("machine", MACHINES)
def test_what_programs_need_is_allowed_and_what_would_lead_out_is_not(machine: str) -> None:
    known = numbers(machine)
    allowed = [("read", 0), ("socket", 1), ("socket", 10), ("clone", 17), ("prlimit64", 0)]
    refused = [("mount", 0), ("socket", 40), ("clone", 17 | 0x10000000), ("prlimit64", 1), ("ptrace", 0)]
    assert {filtered(machine, known[name], first) for name, first in allowed} == {seccomp.ALLOW}
    assert {filtered(machine, known[name], first) for name, first in refused} == {seccomp.EPERM}
    assert filtered(machine, known["clone3"], 0) == seccomp.ENOSYS
    assert filtered(machine, known["read"], 0, architecture=0x40000003) == seccomp.KILL_PROCESS


def test_the_profile_goes_on_refusing_what_the_engines_own_refuse() -> None:
    assert {profiled(name, 0) for name in seccomp.ENGINES_REFUSED} == {seccomp.EPERM}


def test_a_machine_whose_numbers_are_not_known_has_no_filter() -> None:
    assert seccomp.program("riscv64") == b""
