import numpy as np
import torch

from imaml.data import Sinusoid


def _amplitude_and_phase(x, y):
    """Least squares for y = A sin(x - p) = A cos(p) sin(x) - A sin(p) cos(x)."""
    basis = torch.cat((torch.sin(x), torch.cos(x)), dim=-1).double()
    a, b = torch.linalg.lstsq(basis, y.double()).solution.squeeze(-1)
    return torch.hypot(a, b), torch.atan2(-b, a)


def test_shapes_and_dtypes():
    batch = Sinusoid(shots=5, queries=7).batch("train", 0, 3)
    assert [tuple(t.shape) for t in (*batch.support, *batch.query)] == [(3, 5, 1)] * 2 + [(3, 7, 1)] * 2
    assert {t.dtype for t in (*batch.support, *batch.query)} == {torch.float32}


def test_support_and_query_lie_on_one_sinusoid_of_the_paper():
    batch = Sinusoid(shots=10, queries=10).batch("train", 0, 300)
    found = []
    for task in batch:
        amplitude, phase = _amplitude_and_phase(*task.support)
        x, y = (tensor.double() for tensor in task.query)
        torch.testing.assert_close(amplitude * torch.sin(x - phase), y, atol=1e-3, rtol=0)
        found.append((amplitude, phase))
    amplitudes, phases = torch.tensor(found).T
    x = torch.cat((batch.support[0], batch.query[0]), dim=1)
    # Uniform on their ranges: inside, close to both ends, and centred.
    for values, low, high in ((amplitudes, 0.1, 5.0), (phases, 0.0, np.pi), (x, -5.0, 5.0)):
        width = high - low
        assert low - 1e-3 < values.min() < low + 0.05 * width
        assert high - 0.05 * width < values.max() < high + 1e-3
        assert abs(values.mean() - (low + high) / 2) < 0.06 * width


def test_the_splits_are_separate_streams():
    first = {split: Sinusoid().batch(split, 0, 50).support[0] for split in ("train", "val", "test")}
    assert len(torch.cat(list(first.values())).unique()) == 3 * 50 * 10
