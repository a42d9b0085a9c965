"""Amounts of memory, and what stages hold."""

import pytest
import torch

from imaml.planning._account import Account, Use
from imaml.planning._bytes import parse, written


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 GB", 1_500_000_000),
        (" 2 tib ", 2 * 2**40),
        ("10kb", 10_000),
        ("3 KiB", 3072),
        ("12345", 12345),
        ("7 B", 7),
        (98765, 98765),
    ],
)
def test_amounts_are_read(text, size):
    assert parse(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 gigs", "-1GB", "1..5GB", "1e9", "4GiB!", "0", 0, -5, "0.1B"])
def test_what_is_no_amount(text):
    with pytest.raises(ValueError, match="`memory` must be"):
        parse(text)


@pytest.mark.parametrize("value", [1.5, True, [4], torch.tensor(4)])
def test_what_is_neither_a_number_nor_text(value):
    with pytest.raises(TypeError, match="`memory` must be an amount"):
        parse(value)


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 B"), (1500, "1.5 kB"), (999_600, "1 MB"), (2.5e9, "2.5 GB"), (4e13, "40 TB")]
)
def test_amounts_are_written(size, text):
    assert written(size) == text


def test_an_account_sees_peaks_and_what_is_left_stage_by_stage():
    account = Account(torch.device("cpu"))
    with account.recording():
        with account.stage("first"):
            kept = torch.zeros(1000)
            torch.zeros(500)
        with account.stage("second"):
            del kept
            again = torch.zeros(250)
    del again
    assert account.uses == {"first": Use(6000, 4000), "second": Use(0, -3000)}
