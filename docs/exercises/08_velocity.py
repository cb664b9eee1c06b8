"""Exercise 8, B: a network that predicts v beside one that predicts x_0. Check: python lesson.py --check 8

Salimans and Ho 2022 (arXiv 2202.00512):   v = sqrt(abar) eps - sqrt(1 - abar) x_0
"""


def velocity(x0, eps, t):
    """v of x0 and eps.   x0, eps: (B,C,D,H,W)   t: (B,)   -> (B,C,D,H,W)"""
    raise NotImplementedError


def x0_of(v, xt, t):
    """The x_0 that v and x_t imply (xt is q_sample's).   v, xt: (B,C,D,H,W)   t: (B,)   -> (B,C,D,H,W)"""
    raise NotImplementedError


def v_loss(net, x0, t, eps):
    """Mean of || net(x_t, t) - v ||^2 over everything; net(xt, t) -> v_hat.   -> scalar"""
    raise NotImplementedError
