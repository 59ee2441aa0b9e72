"""What kernels take beside planes, made from an optimizer's settings without a model."""

import inspect

import outsize
from outsize.optim import ALGORITHMS


def hyper(optimizer="AdamW", *, step=1, gradient_scale=1.0, **settings):
    """The numbers of one update; settings that are not given are the optimizer's defaults."""
    parameters = inspect.signature(getattr(outsize, optimizer)).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return ALGORITHMS[optimizer].hyper({**defaults, **settings}, step, gradient_scale)
