"""Exercise 5, B: guidance that fades with t. The form to imitate: diffusion.guided.

    python lesson.py --check 5
"""


def fading(net, context, scale):
    """Classifier-free guidance whose scale is `scale` at t = 1 and falls in a straight line to 1 at t = 0:
    null + w(t) (text - null),   w(t) = 1 + (scale - 1) t.   Two calls of the network at every t.

    net(xt, t, context) -> x0_hat, and the null text's with context None   context: (B,N,width)   scale: number
    -> denoise(xt, t), clamped to [-1,1];   xt (B,C,D,H,W)   t (B,), samples of one batch may have different times
    """
    raise NotImplementedError
