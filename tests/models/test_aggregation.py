"""Pooling by attention: against a loop in float64, timm's block of CaiT, and what has to hold of its weights."""

import pytest
import timm
import torch
from timm.models.cait import LayerScaleBlockClassAttn
from torch.nn import functional as F

from vit_efficient import convert_pool, save_model
from vit_efficient.attention_maps import recorded_weights
from vit_efficient.models.aggregation import Aggregation, AggregationBlock, ClassHead
from vit_efficient.utils.errors import UserError

DIM = 12


def pooling(queries=1, heads=1, init=0.5):
    torch.manual_seed(0)
    module = Aggregation(DIM, heads, queries, init, dtype=torch.float64).eval()
    for parameter in module.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return module


def weights_of(module, x):
    (weights,) = recorded_weights(module, [module.block.attn], x)
    return weights


def slow(module, x):
    """The equations, a query token and a head at a time, of one image (N, C): the tokens and their weights."""
    block, s = module.block, {name: value.detach() for name, value in module.block.state_dict().items()}

    def norm(tokens, name):
        mean, var = tokens.mean(-1, keepdim=True), tokens.var(-1, keepdim=True, unbiased=False)
        return (tokens - mean) / (var + 1e-6).sqrt() * s[f'{name}.weight'] + s[f'{name}.bias']

    def linear(tokens, name):
        return tokens @ s[f'{name}.weight'].T + s[f'{name}.bias']

    tokens, heads = module.cls_token[0].detach(), block.attn.num_heads
    u = norm(torch.cat([tokens, x]), 'norm1')
    asked = u if len(tokens) == 1 else u[len(tokens) :]
    outputs, weights = [], []
    for number, c in enumerate(tokens):
        q, k, v = linear(u[number], 'attn.q'), linear(asked, 'attn.k'), linear(asked, 'attn.v')
        parts, rows = [], []
        for head in range(heads):
            own = slice(head * DIM // heads, (head + 1) * DIM // heads)
            scores = k[:, own] @ q[own] / (DIM / heads) ** 0.5
            alpha = scores.exp() / scores.exp().sum()
            parts.append(alpha @ v[:, own])
            rows.append(alpha)
        c = c + s['gamma_1'] * linear(torch.cat(parts), 'attn.proj')
        c = c + s['gamma_2'] * linear(F.gelu(linear(norm(c, 'norm2'), 'mlp.fc1')), 'mlp.fc2')
        outputs.append(c)
        weights.append(torch.stack(rows))
    return torch.stack(outputs), torch.stack(weights, 1)


@pytest.mark.parametrize('heads', [1, 3])
@pytest.mark.parametrize('queries', [1, 4])
@pytest.mark.parametrize('count', [1, 7 * 13])
def test_it_is_what_the_equations_say(queries, heads, count):
    module = pooling(queries, heads)
    x = torch.randn(2, count, DIM, dtype=torch.float64, requires_grad=True)
    found, weights = module(x), weights_of(module, x)
    for image in range(2):
        tokens, alpha = slow(module, x[image].detach())
        torch.testing.assert_close(found[image], tokens[0] if queries == 1 else tokens)
        torch.testing.assert_close(weights[image], alpha)
    assert torch.autograd.gradcheck(module, (x[:1, :5],))


def test_it_is_timms_block_bit_for_bit(monkeypatch):
    block = AggregationBlock(DIM, 3, init_values=0.5).eval()
    timms = LayerScaleBlockClassAttn(DIM, 3, mlp_ratio=3.0, qkv_bias=True, init_values=0.5).eval()
    timms.load_state_dict(block.state_dict())
    for norm in (timms.norm1, timms.norm2):
        norm.eps = 1e-6
    x, token = torch.randn(2, 10, DIM), torch.randn(2, 1, DIM)
    assert torch.equal(block(x, token), timms(x, token))
    timms.attn.fused_attn = False
    torch.testing.assert_close(block(x, token), timms(x, token))


def test_of_queries_that_say_nothing_the_mean_comes():
    module = pooling()
    module.block.attn.q.weight.data.zero_()
    module.block.attn.q.bias.data.zero_()
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    torch.testing.assert_close(weights_of(module, x), torch.full((1, 1, 1, 10), 0.1, dtype=torch.float64))
    attention = module.block.attn
    u = module.block.norm1(torch.cat([module.cls_token, x], 1))
    torch.testing.assert_close(attention(u)[:, 0], attention.proj(attention.v(u).mean(1)))


@pytest.mark.parametrize('queries', [1, 4])
def test_the_order_of_patches_is_that_of_weights_alone(queries):
    module, order = pooling(queries, 2), torch.randperm(9)
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    torch.testing.assert_close(module(x[:, order]), module(x))
    before, after = weights_of(module, x)[..., -9:], weights_of(module, x[:, order])[..., -9:]
    torch.testing.assert_close(after, before[..., order])
    torch.testing.assert_close(weights_of(module, x).sum(-1), torch.ones(1, 2, queries, dtype=torch.float64))


def test_a_patch_that_nobody_looks_at_has_no_gradient():
    """Its first channel stands out, as that of the token itself, which its key turns into a score of -1e5."""
    module = pooling()
    attention = module.block.attn
    attention.q.weight.data.zero_()
    attention.q.bias.data.fill_(1.0)
    attention.k.weight.data.zero_()
    attention.k.weight.data[:, 0] = -1e5
    module.block.norm1.weight.data.fill_(1.0)
    module.cls_token.data[..., 0] = 5.0
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    x[0, :, 0], x[0, 2, 0] = -5.0, 5.0
    x.requires_grad_()
    module(x).sum().backward()
    assert weights_of(module, x)[0, 0, 0, 3] == 0 and x.grad[0, 2].eq(0).all() and x.grad.abs().sum() > 0


def vit(**options):
    torch.manual_seed(0)
    small = dict(img_size=(32, 64), depth=2, embed_dim=24, num_heads=2, num_classes=5, patch_size=8)
    options = dict(attention_kwargs=dict(keep_ratio=0.5), global_pool='aggregate') | small | options
    return timm.create_model('vit_dct_tiny', **options).eval()


@pytest.mark.parametrize(
    'options',
    [{}, {'pool_heads': 3}, {'pool_tokens': 'class'}, dict(class_token=False, reg_tokens=4)],
)
def test_models_pool_their_patches_and_come_back_from_a_folder(options, tmp_path):
    model, images = vit(**options), torch.randn(2, 3, 32, 64)
    assert isinstance(model.norm, torch.nn.Identity)  # the final norm is of what is pooled
    tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
    pooled = model.fc_norm(model.attn_pool(tokens))
    torch.testing.assert_close(model(images), model.head(pooled))
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, 24)
    save_model(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(images), model(images))
    of_several = model([images[0], torch.randn(3, 32, 64)]) if options.get('class_token', True) else None
    assert of_several is None or torch.allclose(of_several[0], model(images)[0], atol=1e-5)


def test_a_classifier_may_be_another():
    model, images = vit(pool_tokens='class'), torch.randn(1, 3, 32, 64)
    assert isinstance(model.head, ClassHead) and model.attn_pool.cls_token.shape == (1, 5, 24)
    model.reset_classifier(7)
    assert model(images).shape == (1, 7) and model.attn_pool.cls_token.shape == (1, 7, 24)
    model.reset_classifier(0)
    assert model(images).shape == (1, 24)
    model.reset_classifier(3, 'avg')
    assert model(images).shape == (1, 3) and model.attn_pool is None
    model.reset_classifier(4, 'aggregate')
    assert model(images).shape == (1, 4) and model.attn_pool.num_queries == 4


@pytest.mark.parametrize('tokens', ['one', 'class'])
@pytest.mark.parametrize('pool', ['token', 'map'])
def test_weights_of_a_model_that_pooled_otherwise_are_taken_as_by_convert_pool(pool, tokens, caplog):
    torch.manual_seed(0)
    plain = timm.create_model('vit_full_tiny', img_size=32, depth=2, embed_dim=24, num_heads=2, global_pool=pool)
    config = dict(state_dict=plain.state_dict(), num_classes=1000)
    options = dict(img_size=32, depth=2, embed_dim=24, num_heads=2, global_pool='aggregate', pool_tokens=tokens)
    with caplog.at_level('INFO', 'vit_efficient'):
        model = timm.create_model('vit_full_tiny', pretrained=True, pretrained_cfg_overlay=config, **options).eval()
    assert 'not in the weights, so as it begins: attn_pool' in caplog.text
    expected = convert_pool(plain.eval(), tokens=tokens)
    fresh = {key: value for key, value in model.attn_pool.state_dict().items() if key != 'cls_token'}
    expected.attn_pool.load_state_dict(fresh, strict=False)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.attn_pool.cls_token, expected.attn_pool.cls_token)
    assert torch.equal(model(images), expected(images))


@pytest.mark.compiled
@pytest.mark.parametrize('tokens', ['one', 'class'])
def test_it_is_exported_for_any_batch_and_compiled(tokens):
    model, images, five = vit(pool_tokens=tokens), torch.randn(2, 3, 32, 64), torch.randn(5, 3, 32, 64)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},)).module()
    torch.testing.assert_close(exported(five), model(five))
    torch.testing.assert_close(torch.jit.trace(model, images)(five), model(five))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))
    torch.testing.assert_close(torch.compile(model, backend='aot_eager')(images), model(images))


@pytest.mark.parametrize('tokens', ['one', 'class'])
@pytest.mark.parametrize('classes', [0, 7])
def test_trained_pooling_is_read_for_other_classes(tokens, classes, tmp_path):
    model, images = vit(pool_tokens=tokens), torch.randn(2, 3, 32, 64)
    save_model(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=classes).eval()
    assert again(images).shape == (2, classes or 24)
    assert torch.equal(again.attn_pool.block.attn.q.weight, model.attn_pool.block.attn.q.weight)
    token, had = again.attn_pool.cls_token, model.attn_pool.cls_token
    assert token.shape[1] == (classes if tokens == 'class' and classes else 1)
    if tokens == 'one' or not classes:
        torch.testing.assert_close(token, had.mean(1, keepdim=True))


def test_a_classifier_that_cannot_be_leaves_the_model():
    model, images = vit(pool_tokens='class'), torch.randn(2, 3, 32, 64)
    before = model(images)
    with pytest.raises(UserError, match="num_classes must be two at least for pool_tokens='class'.*got num_classes=1"):
        model.reset_classifier(1)
    assert torch.equal(model(images), before) and model.num_classes == 5


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'pool_tokens': 'two'}, "pool_tokens must be one of one, class, got pool_tokens='two'"),
        ({'pool_tokens': 'class', 'num_classes': 1}, "num_classes must be two at least for pool_tokens='class'"),
        ({'pool_heads': 5}, 'pool_heads must divide embed_dim=24, got 5'),
        ({'pool_heads': 2.0}, 'pool_heads must be a positive integer, got pool_heads=2.0'),
        ({'pool_init': float('nan')}, 'pool_init must be a finite number, such as 1e-4, got pool_init=nan'),
        ({'pool_heads': '2', 'global_pool': 'avg'}, 'pool_heads must be a positive integer'),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        vit(**options)
