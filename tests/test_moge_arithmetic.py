"""Arithmetic in strings: values, and the refusal of everything else."""

import math

import pytest

from moge.arithmetic import arithmetic


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("max(0.0, min(1.0, (epoch - 1000) / 1000))", 0.5),
        ("0.5 ** ((epoch - 2000) // 250)", 4.0),
        ("-epoch % 7 + +2", -1500 % 7 + 2),
        ("(epoch >= 1000) * 3", 3.0),
        ("Max(1e-3, exp(log(2)) * cos(pi))", 1e-3),
        ("7", 7.0),
    ],
)
def test_arithmetic(text, value):
    got = arithmetic(text, epoch=1500)
    assert type(got) is float and math.isclose(got, value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "().__class__", "epoch.real", "[1][0]", "lambda: 1", "open('x')", "min", "step + 1",
        "'a' * 9", "9**9**9", "1/0", "(-1) ** 0.5", "1 if epoch else 2", "min()", "True", "1;2", "", "(" * 5000, "min(*[1,2])",
        "f'{epoch}'", "1 << 9999", "1 < 2 < 3", "not 1", "epoch := 3", "min(1, key=2)",
    ],
)  # fmt: skip
def test_arithmetic_refuses(text):
    with pytest.raises(ValueError, match="expression"):
        arithmetic(text, epoch=1)
