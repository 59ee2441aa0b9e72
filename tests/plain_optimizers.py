"""The optimizers that PyTorch lacks, written plainly after their papers, for comparison."""

from __future__ import annotations

import math

import torch


class PlainLion(torch.optim.Optimizer):
    """Algorithm 2 of the paper."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p))
                direction = torch.sign(beta1 * m + (1 - beta1) * p.grad)
                p -= group["lr"] * (direction + group["weight_decay"] * p)
                state["m"] = beta2 * m + (1 - beta2) * p.grad


class PlainAdan(torch.optim.Optimizer):
    """Equations of the paper, whose betas are one minus those given, with the usual bias corrections."""

    def __init__(self, params, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2, b3 = (1 - beta for beta in group["betas"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = p.grad.clone(), self.state[p]
                if not state:
                    state.update(
                        k=0, m=torch.zeros_like(p), v=torch.zeros_like(p), n=torch.zeros_like(p), g=g
                    )
                change = g - state["g"]
                state["k"] += 1
                state["m"] = (1 - b1) * state["m"] + b1 * g
                state["v"] = (1 - b2) * state["v"] + b2 * change
                state["n"] = (1 - b3) * state["n"] + b3 * (g + (1 - b2) * change) ** 2
                state["g"] = g
                m, v, n = (
                    state[name] / (1 - (1 - b) ** state["k"]) for name, b in (("m", b1), ("v", b2), ("n", b3))
                )
                step = group["lr"] / (n.sqrt() + group["eps"])
                p.copy_((p - step * (m + (1 - b2) * v)) / (1 + group["weight_decay"] * group["lr"]))


def g_snr(gradient, eps=1e-8):
    """The signal-to-noise ratio of one tensor's gradient, in double precision."""
    gradient = gradient.double()
    noise = gradient.std(correction=0)
    if noise == 0:
        return math.sqrt(gradient.numel())
    return float(gradient.norm() / (noise + eps))


class PlainSGDSaI(torch.optim.Optimizer):
    """SGD with momentum, learning rates scaled by the first gradients; `scales` takes the place of measuring."""

    def __init__(self, params, lr=1e-3, momentum=0.9, eps=1e-8, weight_decay=0.0, scales=None):
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})
        self.scales = {} if scales is None else scales

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                scale = self.scales.setdefault(p, g_snr(p.grad, group["eps"]))
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_((1 - group["momentum"]) * p.grad)
                p *= 1 - group["lr"] * group["weight_decay"]
                p -= group["lr"] * scale * m


def coded(values, num_levels, root):
    """`values` as 8 bits keep them: rounded to evenly spaced levels of each 64 elements, of roots where asked for."""
    flat = values.double().flatten()
    groups = torch.cat([flat, flat.new_zeros(-flat.numel() % 64)]).view(-1, 64)
    if root:
        groups = groups.sqrt()
    step = groups.abs().amax(1, keepdim=True) / num_levels
    levels = torch.where(step > 0, groups / step, 0.0).round()
    if root:
        levels[(levels == 0) & (groups > 0)] = 1.0
    kept = levels * step
    return (kept.square() if root else kept).flatten()[: flat.numel()].view_as(values).float()


class PlainAdamW8bit(torch.optim.AdamW):
    """AdamW of PyTorch, whose moments are rounded after every step."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["exp_avg"].copy_(coded(state["exp_avg"], 127, False))
                    state["exp_avg_sq"].copy_(coded(state["exp_avg_sq"], 255, True))


def assert_mostly_close(values, expected, share, *, rtol, atol):
    """All but a `share` of the elements are close: where a code is rounded elsewhere, a step differs by a little."""
    far = ~torch.isclose(values, expected, rtol=rtol, atol=atol)
    assert far.float().mean() <= share, f"{int(far.sum())} of {far.numel()} elements differ"
