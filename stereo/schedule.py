"""Learning rates as pure functions of the step, from the expressions of the users' configs.

An expression is arithmetic in `epoch`, which means the number of finished updates, and `steps`, the number of all: numbers,
+ - * / **, comparisons, min, max, exp, log, sqrt, cos, pi, and Piecewise((value, condition), ..., (value, True)). It is walked as
a syntax tree, never run.
"""

import ast
import math
import operator

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.USub: operator.neg, ast.UAdd: operator.pos,
}
FUNCTIONS = {"min": min, "max": max, "exp": math.exp, "log": math.log, "sqrt": math.sqrt, "cos": math.cos}


def evaluate(expression: str | float, epoch: float, steps: float = math.inf) -> float:
    """Value of a schedule expression; ValueError names what is not allowed."""
    if not isinstance(expression, str):
        return float(expression)
    names = {"epoch": epoch, "steps": steps, "pi": math.pi, "True": True, "False": False}

    def value(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > 1e9:
                raise ValueError(f"schedule {expression!r}: exponent {right} is out of range")
            return OPERATORS[type(node.op)](left, float(right) if isinstance(node.op, ast.Pow) else right)
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        if isinstance(node, ast.Compare) and all(type(op) in OPERATORS for op in node.ops):
            sides = [value(n) for n in (node.left, *node.comparators)]
            return all(OPERATORS[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            if node.func.id in FUNCTIONS:
                return FUNCTIONS[node.func.id](*map(value, node.args))
            if node.func.id == "Piecewise":
                for pair in node.args:
                    if isinstance(pair, ast.Tuple) and len(pair.elts) == 2 and value(pair.elts[1]):
                        return value(pair.elts[0])
        raise ValueError(f"schedule {expression!r}: {ast.unparse(node)!r} is not allowed, or no case of it applies")

    try:
        return float(value(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"schedule {expression!r} at epoch {epoch}: {error}") from error


def one_cycle(
    step: int,
    max_lr: float,
    total_steps: int,
    pct_start: float = 0.01,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    anneal_strategy: str = "linear",
) -> float:
    """Learning rate of torch's OneCycleLR at `step`: up to max_lr over the first part, then down (RAFT-Stereo's recipe)."""
    start = max_lr / div_factor
    peak, end = pct_start * total_steps - 1, total_steps - 1
    rising = step <= peak
    low, high, t = (start, max_lr, step / peak) if rising else (max_lr, start / final_div_factor, (step - peak) / (end - peak))
    if anneal_strategy == "cos":
        t = 0.5 - 0.5 * math.cos(math.pi * t)
    return low + (high - low) * t
