"""Which layers a module calls with the same tensor is read from the source of its forward."""

import pytest
import torch

from align_ext.adapters.siblings import called_together


class Module:
    """Forwards whose calls are known."""

    def in_a_row(self, x):
        q = self.q(x)
        k, v = self.k(x), self.v(x)
        return q, k, v

    def in_one_expression(self, x, y):
        return self.down(self.act(self.gate(x)) * self.up(x)) + self.other(y)

    def assigned_between(self, x):
        q = self.q(x)
        x = self.norm(x)
        return q, self.k(x), self.v(x)

    def added_between(self, x):
        q = self.q(x)
        x += 1
        return q, self.k(x)

    def assigned_in_a_block_between(self, x, flag):
        q = self.q(x)
        if flag:
            x = x + 1
        return q, self.k(x)

    def conditional(self, x, flag):
        return self.q(x), self.k(x) if flag else None, flag and self.v(x), [self.o(x) for _ in range(2)]

    def in_blocks(self, x, other):
        q = self.q(x)
        if other is None:
            k, v = self.k(x), self.v(x)
        else:
            k, v = self.k(other), self.v(other)
        return q, k, v

    def in_other_company(self, x, other):
        if other is None:
            q, k = self.q(x), self.k(x)
        else:
            q, k = self.q(other), None
        return q, k

    def out_between(self, x, flag):
        q = self.q(x)
        if flag:
            return q
        k, v = self.k(x), self.v(x)
        return q, k, v

    def in_cases(self, x, flag):
        match flag:
            case 1:
                return self.q(x)
            case _:
                return self.k(x)

    def twice(self, x):
        return self.q(x), self.q(x)

    def otherwise(self, x, other):
        return self.q(x, 1), self.k(input=x), other.v(x), self.o(x[0]), self.p(x)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("in_a_row", (("q", "k", "v"),)),
        ("in_one_expression", (("gate", "up"),)),
        ("assigned_between", (("k", "v"),)),
        ("added_between", ()),
        ("assigned_in_a_block_between", ()),
        ("conditional", ()),
        ("in_blocks", (("k", "v"),)),
        ("in_other_company", ()),
        ("out_between", (("k", "v"),)),
        ("in_cases", ()),
        ("twice", ()),
        ("otherwise", ()),
    ],
)
def test_what_a_forward_always_calls_with_one_variable_is_found(name, groups):
    found = called_together(getattr(Module, name))
    assert tuple(group for group in found if "norm" not in group) == groups


def test_of_a_forward_without_a_source_nothing_is_known():
    assert called_together(eval("lambda self, x: (self.q(x), self.k(x))")) == ()
    assert called_together(torch.nn.functional.linear) == ()
