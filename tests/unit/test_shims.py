"""The replaced symbols: every one exists in the installed megatron-core, and in no release outside its range."""

import inspect

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from minitron_train.parallel import shims
from minitron_train.parallel.pipeline import Link


@pytest.mark.parametrize("shim", shims.SHIMS, ids=lambda shim: f"{shim.module}.{shim.name}")
def test_a_symbol_exists_in_the_releases_that_need_it(shim: shims.Shim) -> None:
    try:
        found = hasattr(shim.owner, shim.attribute)
    except (ImportError, AttributeError):  # its module or class
        found = False
    if shim.applies:
        assert found
    elif shim.before <= shims.MEGATRON:
        assert not found, "a release that still has the symbol also needs the replacement"


def test_a_link_between_stages_overrides_what_the_release_calls() -> None:
    """megatron-core's method is private: its name, its arguments and its three results may change."""
    theirs, ours = (inspect.signature(owner._communicate) for owner in (P2PCommunicator, Link))
    assert list(ours.parameters) == list(theirs.parameters)
    assert "tensor_recv_prev, tensor_recv_next, reqs" in inspect.getsource(P2PCommunicator._communicate)


def test_installed_release_is_one_of_the_supported_ones() -> None:
    assert shims.MEGATRON in ((0, 16), (0, 19))


def test_a_block_replaces_what_the_release_has_and_restores_it() -> None:
    old = shims.Shim("torch", "no_such_symbol", "dropped", before=(0, 1))
    here = shims.Shim("torch.cuda", "synchronize", "a test")
    before = torch.cuda.synchronize
    with pytest.raises(KeyError), shims.replaced({old: 1, here: 2}):
        assert torch.cuda.synchronize == 2 and not hasattr(torch, "no_such_symbol")
        raise KeyError
    assert torch.cuda.synchronize is before
