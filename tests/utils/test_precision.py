"""What a context sets, it sets back."""

import warnings

import pytest
import torch

from vit_efficient.utils import precision
from vit_efficient.utils.precision import product_dtype, uses_tf32, without_autocast

matmul = torch.backends.cuda.matmul


def settings():
    """Of both families; an error where they disagree."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return [
            matmul.fp32_precision,
            torch.get_float32_matmul_precision(),
            matmul.allow_tf32,
            torch.backends.mkldnn.matmul.fp32_precision,
        ]


@pytest.fixture
def on_cuda(monkeypatch):
    """As if tensors were on CUDA."""
    monkeypatch.setattr(precision, 'uses_tf32', lambda x: matmul.fp32_precision == 'tf32')
    yield
    torch.set_float32_matmul_precision('highest')


@pytest.mark.filterwarnings('ignore')
class TestTf32:
    x = torch.zeros(1)

    @pytest.mark.parametrize('level', ['highest', 'high', 'medium'])
    def test_older_settings(self, on_cuda, level):
        torch.set_float32_matmul_precision(level)
        before = settings()
        with torch.autocast('cpu', torch.bfloat16):
            for _ in range(2):
                with without_autocast(self.x):
                    assert matmul.fp32_precision != 'tf32' and not torch.is_autocast_enabled('cpu')
                    settings()
            assert torch.is_autocast_enabled('cpu')
        assert settings() == before

    def test_allow_tf32(self, on_cuda):
        matmul.allow_tf32 = True
        before = settings()
        with without_autocast(self.x):
            assert not matmul.allow_tf32
        assert settings() == before

    def test_newer_settings(self, on_cuda):
        matmul.fp32_precision = 'tf32'
        with without_autocast(self.x):
            assert settings()[:3] == ['ieee', 'highest', False]
        assert matmul.fp32_precision == 'tf32'

    def test_errors_pass_through(self, on_cuda):
        torch.set_float32_matmul_precision('high')
        with pytest.raises(KeyError), without_autocast(self.x):
            raise KeyError
        assert matmul.allow_tf32

    def test_threads_leave_in_any_order(self, on_cuda):
        """The last one to leave sets back what was there before the first one came."""
        torch.set_float32_matmul_precision('high')
        first, second = without_autocast(self.x), without_autocast(self.x)
        first.__enter__()
        third = without_autocast(self.x)
        second.__enter__()
        third.__enter__()
        first.__exit__(None, None, None)
        assert not matmul.allow_tf32
        second.__exit__(None, None, None)
        assert not matmul.allow_tf32
        third.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == 'high'

    def test_cpu_is_left_alone(self):
        torch.set_float32_matmul_precision('high')
        try:
            assert not uses_tf32(self.x)
            with without_autocast(self.x):
                assert matmul.allow_tf32
        finally:
            torch.set_float32_matmul_precision('highest')


def test_product_dtype():
    x = torch.zeros(1)
    with torch.autocast('cpu', torch.bfloat16):
        assert product_dtype(x) == torch.bfloat16
        assert product_dtype(x.double()) == torch.float64
        assert product_dtype(x.to('meta')) == torch.float32
    assert product_dtype(x) == torch.float32
