"""Seeds of torch's generators."""
import numpy as np


def mixed(*numbers):
    """One seed of several numbers, each of which changes it. A CPU generator keeps 32 bits of its seed, so numbers put
    side by side in 64 would be lost."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
