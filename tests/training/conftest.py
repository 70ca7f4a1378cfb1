import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from helpers import trl_runs
from rpsa.reference import ReferenceDataset


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return trl_runs.word_tokenizer()


@pytest.fixture(scope="module")
def safety_data() -> Dataset:
    return trl_runs.safety_rows()


@pytest.fixture(scope="module")
def reference() -> ReferenceDataset:
    return trl_runs.reference_traces()
