"""Exercise 11, B: the random step of eq. 2 and 3, which DDIM replaces. The form to imitate: diffusion.ddim_step.

    python lesson.py --check 11
"""


def ancestral_step(xt, x0_hat, t, s, z):
    """A draw from q(x_s | x_t, x_0) with x0_hat in the place of x_0, for an earlier time s:
    a normal distribution, whose mean is linear in xt and x0_hat, and whose variance is a number. Derive both from
    x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps   and   x_t = r x_s + sqrt(1 - r^2) eps',   r^2 = abar_t / abar_s

    xt, x0_hat: (B,C,D,H,W)   t, s: (B,), s < t   z: (B,C,D,H,W), standard normal   -> (B,C,D,H,W)
    """
    raise NotImplementedError
