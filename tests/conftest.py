"""Shared by all tests: the repository on the path, one thread, real data where it is at hand."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

# In torchvision's layout: $ADVCNN_DATA, or shared/data beside the repository.
REAL_DATA = Path(os.environ.get('ADVCNN_DATA', ROOT.parent / 'shared' / 'data'))

@pytest.fixture
def real_data():
    if not REAL_DATA.is_dir():
        pytest.skip('no real data here')
    return REAL_DATA

@pytest.fixture(autouse=True)
def seeded():
    """For what a test draws without a generator."""
    torch.manual_seed(0)

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the long tests as well')

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: left out unless --slow is given')

def pytest_collection_modifyitems(config, items):
    if not config.getoption('--slow'):
        for item in items:
            if 'slow' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='needs --slow'))
