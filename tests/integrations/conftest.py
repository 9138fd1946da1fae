"""Runs of other people's training loops. What those loops warn of is theirs; what we warn of stays an error."""

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore")
    config.addinivalue_line("filterwarnings", "error:::optimzoo")


@pytest.fixture(autouse=True)
def one_thread_and_no_network(monkeypatch, tmp_path):
    """Small layers gain nothing by threads, and no run may look for anything elsewhere or write where it stands."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)
