"""A user's own op joins everything: reverse mode, forward mode, Hessian-vector products, the gradient check.

    python examples/my_op.py

softplus(x) = log(1 + exp(x)), with a forward that does not overflow. An op needs no registration: it is a value.
"""

import numpy as np

from dtrain.gradcheck import gradcheck
from dtrain.op import Op, elementwise
from dtrain.tensor import Tensor, apply
from dtrain.transforms import hvp, jacobian, jvp

SOFTPLUS = Op(
    name="softplus",
    # arrays in; the output and what the vjp will need out
    forward=lambda x: (np.logaddexp(x, 0), x),
    # the gradient of the output in, one gradient per input out
    vjp=lambda node, g: (g / (1 + np.exp(-node.saved)),),
    # written with tensors, so that it can be differentiated once more
    jvp=lambda inputs, tangents, output: tangents[0] * inputs[0].sigmoid(),
    flops=elementwise(20),
)


def softplus(x: Tensor) -> Tensor:
    return apply(SOFTPLUS, x)


def main() -> None:
    x = np.array([-800.0, -1.0, 0.5, 800.0])
    leaf = Tensor(x, requires_grad=True)
    with np.errstate(over="ignore"):
        softplus(leaf).sum().backward()
    print("value and gradient  ", softplus(Tensor(x)).data, leaf.grad)

    x = np.array([-1.0, 0.5, 2.0])
    print("largest error       ", gradcheck(softplus, x, second_order=True))
    print("J v, forward mode   ", jvp(softplus, x, np.ones(3))[1].data)
    print("Jacobian            ", jacobian(softplus, x).round(3).tolist())
    print("Hessian times ones  ", hvp(lambda t: softplus(t).sum(), x, np.ones(3)))


if __name__ == "__main__":
    main()
