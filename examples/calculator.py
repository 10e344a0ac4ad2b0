"""The tool of calculator.toml: arithmetic, parsed and never evaluated as code."""

import ast
import operator

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}
LARGEST = 10**15


def calculate(expression: str) -> float:
    """Compute an arithmetic expression.

    Args:
        expression: numbers, + - * / and parentheses, such as "12 * (3 + 4)".
    """
    if len(expression) > 200:
        raise ValueError("the expression is longer than 200 characters")
    return value_of(ast.parse(expression, mode="eval").body)


def value_of(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if abs(number) <= LARGEST:
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            result = OPERATORS[type(op)](value_of(left), value_of(right))
            if abs(result) > LARGEST:
                raise ValueError("the result is too large")
            return result
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value_of(operand)
    raise ValueError("only numbers, + - * / and parentheses are understood")
