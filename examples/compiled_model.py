"""A compiled model: meta-gradients run it as written, all other forward passes compiled.

`torch.compile` has no second derivative, so a call switches it off for itself; nothing has to be undone or rebuilt.
The default backend needs a C++ compiler.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from imaml import MAML, GradientDescent, Objective
from imaml.data import Sinusoid
from imaml.models import MLP


def main(backend: str = "inductor", steps: int = 80) -> tuple[tuple[float, float], Tensor, Tensor]:
    """Train; returns the query loss before and after, and predictions of an adapted model compiled and as written."""
    torch.manual_seed(0)
    model = MLP()
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.Adam(compiled.parameters(), lr=5e-3)
    objective = Objective(compiled, F.mse_loss)
    engine = MAML(inner=GradientDescent(lr=0.01, steps=3))
    episodes = Sinusoid()
    unseen = episodes.batch("test", 0, 100)
    with torch.no_grad():
        before = engine(objective, unseen).loss.item()
    for step in range(steps):
        optimizer.zero_grad()
        engine(objective, episodes.batch("train", step, 8)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = engine(objective, unseen).loss.item()
        compiled.load_state_dict(engine.adapt(objective, unseen[0].support))
        inputs, _ = unseen[0].query
        return (before, after), compiled(inputs), model(inputs)


if __name__ == "__main__":
    (before, after), compiled, written = main()
    print(f"query loss on unseen sinusoids: {before:.2f} before, {after:.2f} after")
    print(f"predictions compiled and as written agree to {(compiled - written).abs().max():.0e}")
