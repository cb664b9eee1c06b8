"""What a network costs, part by part, counted from shapes: under FakeTensorMode nothing is computed or held."""
from functools import partial

from torch import nn

COUNTED = "parameters, M", "TFLOP a call", "activations, GB in bfloat16"


def count(net, part_of, inputs):
    """Parameters, multiplications and additions of convolutions and linear layers, and what they write, in one call.
    part_of: name of a module or parameter -> the part that it counts to   -> {part: {of COUNTED: number}}"""
    rows = {}
    for name, p in net.named_parameters():
        rows.setdefault(part_of(name), dict.fromkeys(COUNTED, 0))[COUNTED[0]] += p.numel() / 1e6

    def add(name, module, inputs, out):
        row, channels = rows[part_of(name)], len(module.weight) if module.weight.dim() == 2 else out.shape[1]
        numbers = out.numel() // channels * module.weight.numel()        # of a transposed convolution: of its input
        if getattr(module, "transposed", False):
            numbers = inputs[0].numel() // inputs[0].shape[1] * module.weight.numel()
        row[COUNTED[1]] += 2e-12 * numbers
        row[COUNTED[2]] += 2e-9 * out.numel()

    for name, module in net.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            module.register_forward_hook(partial(add, name))
    net(*inputs)
    return rows
