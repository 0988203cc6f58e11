from torch import nn

from bitscape.models.calls import code_of_forward, stored_attributes


def helper(x):
    return deeper(x)


def deeper(x):
    return x.mark_of_function


class Base(nn.Module):
    def forward(self, x):
        return x.mark_of_base


class Network(Base):
    def forward(self, x):
        self.remembered = x
        return super().forward(self._helped(x)) + self.ready + self._fixed(x)

    def _helped(self, x):
        return [helper(part) for part in x]

    @property
    def ready(self):
        return self.mark_of_property

    @staticmethod
    def _fixed(x):
        return (lambda: x.mark_of_lambda)()

    def elsewhere(self, x):
        self.never = x.mark_of_no_call


def test_methods_and_functions_that_the_forward_calls_are_read():
    codes = code_of_forward(Network)
    marks = {name for code in codes for name in code.co_names if name.startswith("mark_of")}
    assert marks == {"mark_of_function", "mark_of_base", "mark_of_property", "mark_of_lambda"}
    assert stored_attributes(codes) == {"remembered"}
