"""The model of scaling: its all-reduce, and where communication dominates."""

import pytest

from benchmarks.scaling import Model, Network, page


def test_the_all_reduce_is_the_cheaper_of_a_ring_and_a_tree():
    network = Network(bandwidth=1e9, latency=1e-5)
    assert network.all_reduce(4e6, 1) == 0
    assert network.all_reduce(1e9, 4) == pytest.approx(6 * (1e-5 + 0.25))
    assert network.all_reduce(0, 1000) == pytest.approx(20 * 1e-5)


def test_a_step_is_the_busiest_ranks_compute_and_the_all_reduce():
    network, model = Network(bandwidth=1e9, latency=0.0), Model(parameters=2.5e8, task=1.0, source="")
    assert model.step(5, 2, network) == pytest.approx(3.0 + 1.0)
    assert model.dominated_from(8, network) == 8
    assert model.dominated_from(8000, network) is None


def test_the_page_states_where_communication_dominates():
    networks = {"gloo, loopback": Network(1e9, 0.0)}
    text = page({"Conv4": Model(2.5e8, 1.0, "given")}, networks, 8)
    assert "| Conv4 | gloo, loopback | 8 |" in text and "from 8 ranks" in text
