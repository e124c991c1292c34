"""Whether a check may look at the numbers of a tensor, as those of the compiled ops do on a CPU."""

import torch
from torch import Tensor


def readable(x: Tensor) -> bool:
    """Return whether there are numbers, and reading them waits for no stream."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)  # not a fake one
        and x.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
    )
