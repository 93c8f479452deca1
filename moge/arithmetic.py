"""Arithmetic in strings, as learning-rate schedules of a config hold it, without `eval`."""

import ast
import math
import operator as op

_BINARY = {ast.Add: op.add, ast.Sub: op.sub, ast.Mult: op.mul, ast.Div: op.truediv, ast.FloorDiv: op.floordiv, ast.Mod: op.mod}
_BINARY |= {ast.Pow: op.pow, ast.Lt: op.lt, ast.LtE: op.le, ast.Gt: op.gt, ast.GtE: op.ge}
_CALLS = {"min": min, "max": max, "Min": min, "Max": max, "abs": abs, "ceiling": math.ceil}
_CALLS |= {name: getattr(math, name) for name in ("floor", "exp", "log", "sqrt", "sin", "cos", "tan")}


def arithmetic(expression: str, **names: float) -> float:
    """Value of an arithmetic expression in the given names (and pi, E); everything else in it is refused with ValueError.

    Numbers are floats, so that 9**9**9 overflows at once where integers would fill the memory.
    """
    names = {"pi": math.pi, "E": math.e, **names}

    def value(node):
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return float(number)
            case ast.Name(id=name) if name in names:
                return float(names[name])
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=x):
                return -value(x) if isinstance(sign, ast.USub) else value(x)
            case ast.BinOp(left=x, op=sign, right=y) | ast.Compare(left=x, ops=[sign], comparators=[y]) if type(sign) in _BINARY:
                return float(_BINARY[type(sign)](value(x), value(y)))
            case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if name in _CALLS:
                return float(_CALLS[name](*map(value, args)))
        raise ValueError(f"'{ast.unparse(node)}' is not allowed, only numbers, + - * / // % **, {', '.join([*_CALLS, *names])}")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"expression '{expression[:200]}': {error}") from None
