"""`attend` against the formula, for every combination that decoding uses."""

import pytest
import torch

from worldline.nn.attention import attend, attend_partially


def formula(q, k, v, visible):  # type: ignore[no-untyped-def]
    groups = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_causal_attention_over_a_cached_prefix(length: int, key_heads: int) -> None:
    q = torch.randn(2, 4, length, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, key_heads, 7, 8, dtype=torch.float64)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()[7 - length :]
    assert torch.allclose(attend(q, k, v, causal=True), formula(q, k, v, visible))


def test_a_mask_hides_keys() -> None:
    q = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 7, 8, dtype=torch.float64)
    mask = torch.arange(7) < 4
    mask = mask.view(1, 1, 1, 7)
    assert torch.allclose(attend(q, k, v, mask=mask), formula(q, k, v, mask))


@pytest.mark.parametrize("size", [8, 10])  # by a kernel, by the formula
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_partial_attention_has_the_weight_of_its_part(size: int, dtype: torch.dtype) -> None:
    q = torch.randn(2, 3, 5, size, dtype=dtype)
    k, v = torch.randn(2, 2, 3, 9, size, dtype=dtype)
    parts = [attend_partially(q, k[:, :, part], v[:, :, part]) for part in (slice(4), slice(4, 9))]
    sums = torch.stack([total for _, total in parts])
    assert sums.dtype == torch.promote_types(dtype, torch.float32)
    weights = sums.softmax(0).unsqueeze(-1)
    joined = sum(weight * part for weight, (part, _) in zip(weights, parts, strict=True))
    bound = 1e-12 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(joined.to(dtype), attend(q, k, v), atol=bound, rtol=bound)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [70, 5003])  # by FlashAttention, by cuDNN
def test_partial_attention_by_kernels(length: int, dtype: torch.dtype) -> None:
    # as heads of a projection lie, and as they arrive together from other processes
    q = torch.randn(2, length, 4, 128, device="cuda", dtype=dtype).transpose(1, 2)
    k, v = torch.randn(length + 5, 2, 2, 4, 128, device="cuda", dtype=dtype).permute(2, 1, 3, 0, 4)
    found, sums = attend_partially(q, k, v)
    assert sums.shape == q.shape[:3]
    scores = q.double() @ k.double().transpose(-1, -2) / 128**0.5
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(sums.double(), scores.logsumexp(-1), atol=bound, rtol=bound)
    expected = scores.softmax(-1) @ v.double()
    torch.testing.assert_close(found.double(), expected, atol=bound, rtol=bound)
