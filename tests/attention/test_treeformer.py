"""Treeformer's two attentions against their definitions: paths as masks, and every pair of tokens compared."""

import copy
import json
import pickle
import warnings

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

import vit_efficient
from recipes.benchmarks.operators import measure, on_a_gpu
from vit_efficient import PatchGrid, count_flops, create_attention
from vit_efficient.attention import swap_attention
from vit_efficient.attention.treeformer import reads, trees
from vit_efficient.attention.treeformer import tf as treeformer_tf
from vit_efficient.benchmark.layers import Candidate
from vit_efficient.utils.compat import attend_varlen
from vit_efficient.utils.device import as_hosts

from .test_compressed import EVERYTHING, assert_same, randomised
from .test_window import OnImage

SMALL = dict(embed_dim=32, depth=3, num_heads=2, num_classes=5, img_size=64, patch_size=8)
NAMES = ('treeformer_tc', 'treeformer_tf')


# --- references: an image and a head at a time, a node at a time --------------------------------------------------


def way_to(level, number):
    """The nodes on the way to node `number` of a level, and whether the way goes right there."""
    decisions = [bool(number >> (level - 1 - i) & 1) for i in range(level)]
    node, way = 0, []
    for right in decisions:
        way.append((node, right))
        node = 2 * node + (2 if right else 1)
    return way


def memberships(z, weight, bias, level):
    """Of tokens (N, D) in the nodes of a level: hard, and the product of sigmoids; (N, 2^level) both."""
    scores = z @ weight.T + bias
    hard, soft = [], []
    for number in range(2**level):
        inside, product = torch.ones_like(z[:, 0]), torch.ones_like(z[:, 0])
        for node, right in way_to(level, number):
            s = scores[:, node]
            inside = inside * ((s >= 0) if right else (s < 0))
            product = product * torch.sigmoid(s if right else -s)
        hard.append(inside)
        soft.append(product)
    return torch.stack(hard, 1).detach(), torch.stack(soft, 1)


def straight_through(z, weight, bias, level):
    hard, soft = memberships(z, weight, bias, level)
    return hard + soft - soft.detach()


def softmax_rows(q, k, v, log_weights=0.0):
    scores = q @ k.T / q.shape[1] ** 0.5 + log_weights
    return scores.softmax(dim=1) @ v


def tc_head(attention, head, q, k, v, prefix):
    """out = Σ_l α_l Σ_node m_node(q) · mean_node; with the masks m of each level written out."""
    weight, bias, alpha = attention.tree.weight[head], attention.tree.bias[head], attention.level_weight[head]
    out, means = 0, None
    for level in range(attention.tree.height + 1):
        mask_q, mask_k = (straight_through(z[prefix:], weight, bias, level) for z in (q, k))
        next_means = []
        for node in range(2**level):
            sums = (mask_k[:, node, None] * v[prefix:]).sum(0) + v[:prefix].sum(0)
            count = mask_k[:, node].sum() + prefix
            if round(count.item()) == 0:  # the parent's mean stands in for the missing key
                sums, count = sums + means[node // 2], count + 1
            next_means.append(sums / count)
        means = torch.stack(next_means)
        out = out + alpha[level] * mask_q @ means
    return torch.cat([softmax_rows(q[:prefix], k, v), out])


def leaves_of_query(hard, soft, n):
    own = hard.argmax().item()
    others = sorted((leaf for leaf in range(len(soft)) if leaf != own), key=lambda leaf: -soft[leaf].item())
    return {own, *others[: n - 1]}


def tf_head(attention, head, q, k, v, prefix):
    """N × N scores under a mask; the logarithm of memberships, zero by value, carries the predicates' gradient."""
    weight, bias, height = attention.tree.weight[head], attention.tree.bias[head], attention.tree.height
    hard_q, soft_q = memberships(q[prefix:].detach(), weight, bias, height)
    m_q = 1 + soft_q - soft_q.detach()  # in the leaves that a query reads
    m_k = straight_through(k[prefix:].detach(), weight, bias, height)
    leaf_k = memberships(k[prefix:], weight, bias, height)[0].argmax(1).tolist()
    rows = []
    for i in range(len(hard_q)):
        leaves = leaves_of_query(hard_q[i], soft_q[i], attention.num_leaves)
        up, seen = 0, list(leaves)
        while not prefix and not any(leaf >> up in seen for leaf in leaf_k):
            up, seen = up + 1, [leaf >> (up + 1) for leaf in leaves]
        log_weights = [torch.zeros((), dtype=q.dtype)] * prefix
        for j, leaf in enumerate(leaf_k):
            if leaf >> up not in seen:
                log_weights.append(torch.tensor(-torch.inf, dtype=q.dtype))
            else:
                log_weights.append(torch.log((m_q[i, leaf] if leaf in leaves else 1) * m_k[j, leaf]))
        rows.append(softmax_rows(q[prefix + i :][:1], k, v, torch.stack(log_weights)))
    return torch.cat([softmax_rows(q[:prefix], k, v), *rows])


def reference(attention, x, grid):
    head_output = tc_head if attention.mechanism == 'treeformer_tc' else tf_head
    dim, images = attention.head_dim, []
    for image in x:
        qkv, heads = attention.qkv(image), []
        for head in range(attention.num_heads):
            q, k, v = (qkv[:, (part * attention.num_heads + head) * dim :][:, :dim] for part in range(3))
            heads.append(head_output(attention, head, attention.q_norm(q), attention.k_norm(k), v, grid.prefix))
        y = attention.norm(torch.cat(heads, dim=1))
        if attention.gate is not None:
            y = y * torch.sigmoid(attention.gate(image))
        images.append(attention.proj(y))
    return torch.stack(images)


def build(name, fused=True, **options):
    attention = randomised(create_attention(name, 12, 3, dtype=torch.float64, **{'qkv_bias': True, **options}))
    attention.fused_attn = fused
    return attention


def occupancy(attention, x, grid, part=1):
    """Keys (or, `part` 0, queries) in each leaf: (B, H, L)"""
    with torch.no_grad():
        z = attention.qkv(x[:, grid.prefix :]).unflatten(-1, (3, 3, -1))[:, :, part].transpose(1, 2)
        z = (attention.q_norm, attention.k_norm)[part](z)
        leaf = trees.route(z, attention.tree.weight, attention.tree.bias)
    return nn.functional.one_hot(leaf, 2**attention.tree.height).sum(2)


def check(attention, grid, batch=1):
    x = torch.randn(batch, grid.num_tokens, 12, dtype=torch.float64, requires_grad=True)
    y, expected = attention(x, grid), reference(attention, x, grid)
    assert (y - expected).abs().max() <= 1e-9
    attention.eval()
    with torch.no_grad():
        assert (attention(x, grid) - expected).abs().max() <= 1e-9
    assert_same(y, expected, [x, *(p for p in attention.parameters() if p.numel())], 1e-9)
    return x


VARIANTS = [
    ('treeformer_tc', dict(tree_height=3)),
    ('treeformer_tf', dict(tree_height=3)),
    ('treeformer_tf', dict(tree_height=3, num_leaves=3)),
]


@pytest.fixture(params=VARIANTS, ids=lambda v: '-'.join([v[0], *map(str, v[1].values())]))
def variant(request):
    return request.param


class TestAgainstDefinition:
    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('grid', ((7, 13), (1, 9)))
    def test_plain(self, variant, grid, prefix):
        name, options = variant
        check(build(name, **options), PatchGrid(*grid, prefix))

    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize(
        'extra', [EVERYTHING, dict(proj_bias=False, qkv_bias=False), dict(gated=True), dict(attn_head_dim=6)], ids=str
    )
    def test_options_of_timm(self, variant, extra, fused):
        name, options = variant
        check(build(name, fused, **options, **extra), PatchGrid(3, 7, 2))

    def test_batch(self, variant):
        name, options = variant
        check(build(name, **options), PatchGrid(3, 7, 1), batch=3)

    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('name', NAMES)
    def test_more_leaves_than_tokens(self, name, prefix):
        attention, grid = build(name, tree_height=5), PatchGrid(3, 7, prefix)
        x = check(attention, grid)
        keys, queries = (occupancy(attention, x, grid, part) for part in (1, 0))
        assert ((keys == 0) & (queries > 0)).any()

    @pytest.mark.parametrize('num_leaves', (1, 2, 8))
    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('name', NAMES)
    def test_queries_where_no_keys_are(self, name, prefix, num_leaves):
        options = dict(num_leaves=num_leaves) if name == 'treeformer_tf' else {}
        attention, grid = build(name, tree_height=3, **options), PatchGrid(3, 7, prefix)
        with torch.no_grad():
            attention.qkv.bias[:12], attention.qkv.bias[12:24] = 3, -3
        x = check(attention, grid)
        assert ((occupancy(attention, x, grid, 1) == 0) & (occupancy(attention, x, grid, 0) > 0)).any()

    @pytest.mark.parametrize('right', [True, False])
    @pytest.mark.parametrize('prefix', (0, 5))
    def test_every_token_in_one_leaf(self, variant, prefix, right):
        name, options = variant
        attention, grid = build(name, **options), PatchGrid(3, 7, prefix)
        with torch.no_grad():
            attention.tree.weight *= 0.01
            attention.tree.bias.fill_(1.0 if right else -1.0)
        x = check(attention, grid)
        assert (occupancy(attention, x, grid)[..., 7 if right else 0] == 21).all()
        if name == 'treeformer_tf':
            exact = swap_attention(attention, 'full')
            assert (attention(x, grid) - exact(x, grid)).abs().max() <= 1e-9

    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('name', NAMES)
    def test_a_single_leaf(self, name, prefix):
        attention, grid = build(name, tree_height=0), PatchGrid(7, 13, prefix)
        x = check(attention, grid, batch=2)
        exact = swap_attention(attention, 'full')
        y, expected = attention(x, grid), exact(x, grid)
        if name == 'treeformer_tc':  # the mean; prefix tokens compare
            with torch.no_grad():
                attention.level_weight.fill_(1)
            mean = attention.qkv(x)[..., 24:].mean(dim=1, keepdim=True)
            expected = torch.cat([expected[:, :prefix], attention.proj(mean).expand(-1, 91, -1)], dim=1)
            y = attention(x, grid)
        assert (y - expected).abs().max() <= 1e-9

    def test_all_leaves_are_exact_attention(self):
        attention, grid = build('treeformer_tf', tree_height=3, num_leaves=8), PatchGrid(7, 13, 1)
        check(attention, PatchGrid(3, 7, 1))
        x = torch.randn(2, 92, 12, dtype=torch.float64)
        assert (attention(x, grid) - swap_attention(attention, 'full')(x, grid)).abs().max() <= 1e-9

    @pytest.mark.parametrize('name', NAMES)
    def test_chunks(self, name, monkeypatch):
        """Of tokens, in the routing and its gradient; the last one may be smaller."""
        monkeypatch.setattr(trees, 'CHUNK', 8)
        monkeypatch.setattr(treeformer_tf, 'CHUNK', 8)
        check(build(name, False, tree_height=2), PatchGrid(3, 7, 1), batch=2)

    @pytest.mark.parametrize('fused', (False, True))
    @pytest.mark.parametrize('num_leaves', (1, 3))
    @pytest.mark.parametrize('prefix', (0, 1))
    def test_groups_one_after_the_other(self, prefix, num_leaves, fused, monkeypatch):
        """As large ones are; the other tests have small ones, which are padded."""
        monkeypatch.setattr(treeformer_tf, 'PADDED', 0)
        monkeypatch.setattr(treeformer_tf, '_attend_padded', None)
        check(build('treeformer_tf', fused, tree_height=4, num_leaves=num_leaves), PatchGrid(3, 7, prefix), batch=2)

    @pytest.mark.parametrize('name', NAMES)
    def test_an_empty_batch(self, name):
        attention, grid = build(name), PatchGrid(3, 7, 1)
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                y = attention(torch.zeros(0, 22, 12, dtype=torch.float64), grid)
            assert y.shape == (0, 22, 12)

    def test_large_leaves_in_half_precision(self):
        """The sum of a leaf is beyond what float16 holds; its mean is not."""
        attention, grid = create_attention('treeformer_tc', 12, 3, tree_height=1).half().eval(), PatchGrid(128, 128)
        x = torch.randn(1, 128 * 128, 12)
        x[..., 0] += 8
        with torch.no_grad():
            y = attention(x.half(), grid)
        assert y.isfinite().all()
        assert (y - attention(x.half(), grid)).abs().max() < 0.05

    @pytest.mark.parametrize('name', NAMES)
    def test_a_bias_is_trained_alone(self, name):
        attention, grid = build(name), PatchGrid(3, 7)
        attention.tree.weight.requires_grad_(False)
        attention(torch.randn(1, 21, 12, dtype=torch.float64), grid).square().sum().backward()
        assert attention.tree.bias.grad.abs().max() > 0


class TestTrees:
    def test_ties_go_right(self):
        z = torch.randn(1, 3, 9, 4)
        assert (trees.route(z, torch.zeros(3, 7, 4), torch.zeros(3, 7)) == 7).all()
        assert (trees.route(z, torch.zeros(3, 7, 4), -torch.zeros(3, 7)) == 7).all()

    def test_leaves_by_hand(self):
        weight = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
        z = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])[None, None]
        assert trees.route(z, weight, torch.zeros(1, 3)).tolist() == [[[0, 1, 2, 3]]]
        assert trees.route(z, weight, torch.tensor([[0.0, 5.0, -5.0]])).tolist() == [[[1, 1, 2, 2]]]

    def test_best_leaves_by_hand(self):
        """The root is undecided and goes right, where both leaves are as likely; the left side is sure of one."""
        weight, bias = torch.zeros(1, 3, 2), torch.tensor([[0.1, 4.0, 1.0]])
        z = torch.randn(1, 1, 1, 2)
        assert [trees.best_leaves(z, weight, bias, n).tolist()[0][0][0] for n in (1, 2, 3)] == [[3], [1, 3], [1, 2, 3]]

    @pytest.mark.parametrize('prefix', (0, 1))
    @pytest.mark.parametrize('height', (1, 4, 6))
    def test_every_predicate_has_a_gradient_under_tc(self, height, prefix):
        """From a random start, in float32, on a batch of two."""
        attention = create_attention('treeformer_tc', 48, 3, tree_height=height)
        grid = PatchGrid(14, 14, prefix)
        attention(torch.randn(2, grid.num_tokens, 48), grid).square().sum().backward()
        assert attention.tree.weight.grad.abs().amin() > 0 and attention.tree.bias.grad.abs().amin() > 0
        assert attention.level_weight.grad.abs().amin() > 0 and attention.qkv.weight.grad.abs().amin() > 0

    def test_every_predicate_of_a_model_has_a_gradient_under_tc(self):
        """The class token of the last block reads no leaf, so patches must be what the head sees."""
        model = timm.create_model('vit_treeformer_tc_tiny', global_pool='avg', **SMALL)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
            for block in model.blocks:
                assert block.attn.tree.weight.grad.abs().amin() > 0 and block.attn.tree.bias.grad.abs().amin() > 0
            optimizer.step()

    def test_gradient_of_sure_decisions(self):
        """Far from a predicate its gradient is small, and not lost to rounding: 1 − σ(30) is 0 in float32."""
        weight, bias = torch.zeros(1, 1, 2, requires_grad=True), torch.full((1, 1), 30.0, requires_grad=True)
        table = torch.tensor([[[[0.0], [1.0]]]])
        trees.LeafReads.apply(torch.zeros(1, 1, 1, 2), table, weight, bias).sum().backward()
        assert torch.allclose(bias.grad, torch.tensor(-30.0).exp(), rtol=1e-5)

    def test_dense_gradient_reaches_off_the_path(self):
        """All keys and queries are right of the root; the nodes on its left have a gradient all the same."""
        attention, grid = build('treeformer_tc', tree_height=3), PatchGrid(3, 7)
        with torch.no_grad():
            attention.tree.bias[:, 0] = 2.0
            attention.tree.weight[:, 0] = 0
            attention.qkv.bias[:12] = 2.0  # queries differ from keys, so that some read what no key is in
        x = torch.randn(1, 21, 12, dtype=torch.float64)
        assert not occupancy(attention, x, grid)[..., :4].any()
        attention(x, grid).square().sum().backward()
        assert (attention.tree.bias.grad[:, [0, 2]].abs() > 0).all()


class TestHandOver:
    """The trees of one attention are those of the other."""

    @pytest.mark.parametrize(('first', 'second'), [NAMES, NAMES[::-1]])
    def test_swap_keeps_trees(self, first, second):
        old = build(first, tree_height=3)
        new = swap_attention(old, second, tree_height=3)
        assert new.tree.weight is old.tree.weight and new.tree.bias is old.tree.bias
        assert new.mechanism == second and old.mechanism == first
        again = swap_attention(new, second, tree_height=3)
        assert again.tree.weight is old.tree.weight

    def test_another_height_begins_anew(self):
        old = build('treeformer_tc', tree_height=3)
        new = swap_attention(old, 'treeformer_tf', tree_height=2)
        assert new.tree.weight.shape == (3, 3, 4) and old.tree.weight.shape == (3, 7, 4)
        assert not hasattr(swap_attention(new, 'full'), 'tree')

    def test_load_state_dict(self):
        old = build('treeformer_tc', tree_height=3)
        new = build('treeformer_tf', tree_height=3)
        missing, unexpected = new.load_state_dict(old.state_dict(), strict=False)
        assert not missing and unexpected == ['level_weight'] and torch.equal(new.tree.weight, old.tree.weight)

    def test_convert(self):
        model = timm.create_model('vit_full_tiny', **SMALL)
        vit_efficient.convert(model, 'treeformer_tc', layers=[-1], tree_height=2)
        last = model.blocks[-1].attn.tree.weight
        vit_efficient.convert(model, 'treeformer_tc', tree_height=2)
        assert model.blocks[-1].attn.tree.weight is last
        before = [block.attn.tree.weight for block in model.blocks]
        vit_efficient.convert(model, 'treeformer_tf', tree_height=2, num_leaves=2)
        assert all(block.attn.tree.weight is kept for block, kept in zip(model.blocks, before, strict=True))
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


class TestModule:
    grid = PatchGrid(7, 13, 1)
    x = torch.randn(2, 92, 12, generator=torch.Generator().manual_seed(0))

    def test_parameters_are_shared_and_left_alone(self, variant):
        exact = Attention(12, 3, qkv_bias=True)
        attention = swap_attention(exact, variant[0], **variant[1])
        shapes = {key: tuple(value.shape) for key, value in attention.added_state().items()}
        tc = {'level_weight': (3, 4)} if variant[0] == 'treeformer_tc' else {}
        assert shapes == {'tree.weight': (3, 7, 4), 'tree.bias': (3, 7), **tc}
        assert attention.qkv.weight is exact.qkv.weight
        back = swap_attention(attention, 'full')
        assert list(back.state_dict()) == list(exact.state_dict()) and not hasattr(back, 'num_leaves')

    def test_copies(self, variant):
        attention = create_attention(variant[0], 12, 3, **variant[1])
        for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
            assert torch.equal(copied(self.x, self.grid), attention(self.x, self.grid))

    def test_options_and_repr_tell_the_truth(self, variant):
        attention = create_attention(variant[0], 12, 3, **variant[1])
        default = dict(num_leaves=1) if variant[0] == 'treeformer_tf' else {}
        assert json.loads(json.dumps(attention.options)) == {**default, **variant[1]}
        assert create_attention(variant[0], 12, 3, **attention.options).options == attention.options
        assert ', '.join(f'{key}={value}' for key, value in attention.options.items()) in repr(attention)

    @pytest.mark.parametrize('prefix', (0, 1))
    def test_bfloat16(self, variant, prefix):
        """A token near a predicate may change its leaf, and others with it; most do not."""
        attention = create_attention(variant[0], 48, 3, qkv_bias=True, **variant[1]).eval()
        grid = PatchGrid(14, 14, prefix)
        x = torch.randn(2, grid.num_tokens, 48)
        with torch.no_grad():
            expected = attention(x, grid)
            with torch.autocast('cpu', torch.bfloat16):
                autocast = attention(x, grid)
            whole = attention.to(torch.bfloat16)(x.bfloat16(), grid)
        for y in (autocast, whole):
            assert y.dtype == torch.bfloat16
            error = (y - expected).abs().amax(dim=2) / expected.abs().max()
            assert y.isfinite().all() and error.median() <= 2e-2

    @pytest.mark.compiled
    def test_folded_graphs(self):
        """Compiled and exported without gradients: the projections go through the tree there too."""
        attention = create_attention('treeformer_tc', 12, 3, tree_height=3).eval()
        torch.compiler.reset()
        with torch.no_grad():
            expected = attention(self.x, self.grid)
            compiled = torch.compile(attention, fullgraph=True, backend='aot_eager')(self.x, self.grid)
            model = OnImage(attention)
            image = torch.randn(2, 7, 13, 12)
            exported = torch.export.export(model, (image,)).module()(image)
            assert torch.allclose(exported, model(image), atol=1e-5)
        for y in (compiled, attention(self.x, self.grid)):
            assert torch.allclose(y, expected, atol=1e-5)

    def test_num_attended(self):
        assert create_attention('treeformer_tc', 12, 3).num_attended(self.grid) == 92
        for options, expected in ((dict(tree_height=3), 1 + 12), (dict(tree_height=3, num_leaves=8), 92)):
            assert create_attention('treeformer_tf', 12, 3, **options).num_attended(self.grid) == expected

    def test_weights_after_to_empty(self):
        with torch.device('meta'):
            model = timm.create_model('vit_treeformer_tc_tiny', **SMALL)
        model.to_empty(device='cpu')
        model.init_weights()
        for block in model.blocks:
            assert 0.8 < block.attn.tree.weight.std() * 4 < 1.2 and not block.attn.tree.bias.any()
            assert (block.attn.level_weight == 1 / 5).all()

    @pytest.mark.parametrize(
        ('name', 'options', 'message'),
        [
            ('treeformer_tc', dict(tree_height=-1), 'tree_height=-1'),
            ('treeformer_tc', dict(tree_height=17), 'from 0 to 16, got tree_height=17'),
            ('treeformer_tc', dict(tree_height=2.5), r'tree_height=2\.5'),
            ('treeformer_tf', dict(tree_height=True), 'tree_height=True'),
            ('treeformer_tf', dict(num_leaves=0), 'num_leaves=0'),
            ('treeformer_tf', dict(num_leaves=3, tree_height=1), 'num_leaves=3, tree_height=1'),
            ('treeformer_tf', dict(num_leaves=True), 'num_leaves=True'),
            (
                'treeformer_tc',
                dict(num_leaves=2),
                r"'treeformer_tc' has no option 'num_leaves' \(it has tree_height\)",
            ),
        ],
        ids=str,
    )
    def test_bad_options(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            create_attention(name, 12, 3, **options)


class TestFlops:
    """Models of one block, H = 2 heads of D = 16, 64 patches and a class token."""

    n, p, c, heads, leaves = 64, 1, 32, 2, 8

    def model(self, name, **options):
        return timm.create_model(f'vit_{name}_tiny', attention_kwargs=options, **{**SMALL, 'depth': 1}).eval()

    def count(self, name, **options):
        return count_flops(self.model(name, **options), (3, 64, 64))

    def test_tc_folded(self):
        """Each patch passes 7 predicates twice; the class token attends to all, and sums x for each head apart. All
        project queries and keys; leaves, and the class token, values (the latter twice) and outputs."""
        n, p, c, heads, leaves = self.n, self.p, self.c, self.heads, self.leaves
        count = self.count('treeformer_tc', tree_height=3)
        routing, of_class_token = 2 * n * (leaves - 1) * c, p * (n + p) * c * (1 + heads)
        assert count.by_role['attention products'] == routing + of_class_token
        assert count.by_role['attention projections'] == ((n + p) * 2 + leaves * 2 + p * 3) * c * c
        assert count.by_operator['scatter_add_'] == n * heads
        assert count.by_operator['embedding_bag'] == 2 * n * heads * c

    def test_tc_with_more_leaves_than_patches(self):
        n, p, c = self.n, self.p, self.c
        count = self.count('treeformer_tc', tree_height=6)
        assert count.by_role['attention products'] == 2 * n * 63 * c + 2 * p * (n + p) * c
        assert count.by_role['attention projections'] == 4 * (n + p) * c * c
        assert count.by_operator['scatter_add_'] == n * (c + self.heads)

    def test_tc_against_exact_attention(self):
        """Issue: 30 × fewer at 4,096 tokens, with 128 leaves."""
        for size in (1024, 2048):
            attention = {}
            for name, options in (('full', {}), ('treeformer_tc', dict(tree_height=7))):
                model = timm.create_model(
                    f'vit_{name}_base', depth=1, img_size=size, attention_kwargs=options, device='meta'
                )
                attention[name] = count_flops(model, (3, size, size)).by_role['attention products']
            assert attention['full'] >= 30 * attention['treeformer_tc']

    @pytest.mark.parametrize('num_leaves', (1, 3))
    def test_tf_in_expectation(self, num_leaves):
        n, p, c = self.n, self.p, self.c
        count = self.count('treeformer_tf', tree_height=3, num_leaves=num_leaves)
        routing = 2 * n * (self.leaves - 1) * c
        pairs = n * n * num_leaves // self.leaves + n * p + p * (n + p)
        assert count.by_role['attention products'] == routing + 2 * pairs * c
        assert count.by_role['attention projections'] == 4 * (n + p) * c * c

    @pytest.mark.parametrize('name', NAMES)
    def test_of_a_batch(self, name):
        """TC costs what it costs; TF what the sizes of its leaves say."""
        model, images = self.model(name, tree_height=3), torch.randn(2, 3, 64, 64)
        of_batch = count_flops(model, images=images)
        expected = count_flops(model, (3, 64, 64), batch_size=2)
        assert of_batch.by_role['attention projections'] == expected.by_role['attention projections']
        if name == 'treeformer_tc':
            assert of_batch == expected
            return
        attention, inputs = model.blocks[0].attn, []
        attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model(images)
        with torch.no_grad():
            q, k = attention.qkv(inputs[0][:, 1:]).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)[:2]
            sizes = [
                nn.functional.one_hot(trees.route(z, attention.tree.weight, attention.tree.bias), 8).sum(2)
                for z in (q, k)
            ]
        n, p, c = self.n, self.p, self.c
        pairs = (sizes[0] * (sizes[1] + p)).sum().item() + 2 * 2 * p * (n + p)
        assert of_batch.by_role['attention products'] == 2 * 2 * n * (self.leaves - 1) * c + 2 * pairs * 16

    def test_bad_images(self):
        with pytest.raises(ValueError, match='images must be a tensor'):
            count_flops(self.model('treeformer_tf'), images=(3, 64, 64))


class TestWaysOfAGpu:
    """What GPUs run, on the CPU: sums as products, all tokens routed at once, groups that are packed."""

    @pytest.fixture(autouse=True)
    def _on_a_gpu(self):
        with on_a_gpu():
            yield

    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('grid', ((7, 13), (1, 9)))
    def test_plain(self, variant, grid, prefix):
        name, options = variant
        check(build(name, **options), PatchGrid(*grid, prefix))

    @pytest.mark.parametrize('extra', [EVERYTHING, dict(qkv_bias=False, proj_bias=False), dict(gated=True)], ids=str)
    def test_options_of_timm(self, variant, extra):
        name, options = variant
        check(build(name, **options, **extra), PatchGrid(3, 7, 2), batch=2)

    def test_not_fused(self, variant):
        name, options = variant
        check(build(name, False, **options), PatchGrid(3, 7, 2))

    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('height', (0, 1, 5))
    @pytest.mark.parametrize('name', NAMES)
    def test_heights(self, name, height, prefix):
        check(build(name, tree_height=height), PatchGrid(3, 7, prefix), batch=2)

    @pytest.mark.parametrize('num_leaves', (1, 2, 8))
    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('name', NAMES)
    def test_queries_where_no_keys_are(self, name, prefix, num_leaves):
        options = dict(num_leaves=num_leaves) if name == 'treeformer_tf' else {}
        attention, grid = build(name, tree_height=3, **options), PatchGrid(7, 13, prefix)
        with torch.no_grad():
            attention.qkv.bias[:12], attention.qkv.bias[12:24] = 3, -3
        x = check(attention, grid)
        assert ((occupancy(attention, x, grid, 1) == 0) & (occupancy(attention, x, grid, 0) > 0)).any()

    @pytest.mark.parametrize('num_leaves', (1, 3))
    @pytest.mark.parametrize('prefix', (0, 1))
    def test_more_groups_than_a_kernel_takes(self, prefix, num_leaves, monkeypatch):
        monkeypatch.setattr(reads, 'MOST_GROUPS', 5)
        check(build('treeformer_tf', tree_height=4, num_leaves=num_leaves), PatchGrid(3, 7, prefix), batch=2)

    @pytest.mark.parametrize('name', NAMES)
    def test_chunks(self, name, monkeypatch):
        monkeypatch.setattr(trees, 'CHUNK_BYTES', 2 * 3 * 4 * 8 * 4)
        check(build(name, tree_height=2), PatchGrid(3, 7, 1), batch=2)

    @pytest.mark.parametrize('name', NAMES)
    def test_an_empty_batch(self, name):
        attention, grid = build(name), PatchGrid(3, 7, 1)
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                assert attention(torch.zeros(0, 22, 12, dtype=torch.float64), grid).shape == (0, 22, 12)

    def test_dropout(self):
        attention, grid = build('treeformer_tf', attn_drop=0.5), PatchGrid(3, 7, 1)
        x = torch.randn(1, 22, 12, dtype=torch.float64, requires_grad=True)
        assert not torch.equal(attention(x, grid), attention(x, grid))
        attention(x, grid).sum().backward()

    def test_what_kernels_are_given(self, variant, monkeypatch):
        """No group has queries without keys, nor keys without queries, and `most` is the largest."""
        name, options = variant
        if name == 'treeformer_tc':
            pytest.skip('calls no such kernel')
        real, calls = treeformer_tf.packed, []

        def packed(q, k, v, ends, *more):
            calls.append((len(q), len(k), ends, *more[:2]))
            return real(q, k, v, ends, *more)

        monkeypatch.setattr(treeformer_tf, 'packed', packed)
        for prefix in (0, 2):
            build(name, **options)(torch.randn(2, 21 + prefix, 12, dtype=torch.float64), PatchGrid(3, 7, prefix))
        for num_queries, num_keys, ends, most_queries, most_keys in calls:
            assert ends.dtype == torch.int32 and ends[:, -1].tolist() == [num_queries, num_keys]
            assert ends.diff().amax(dim=1).tolist() == [most_queries, most_keys]
            assert torch.equal(*(ends.diff() > 0))

    @pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
    def test_half_precision(self, variant, dtype):
        attention = create_attention(variant[0], 48, 3, qkv_bias=True, **variant[1]).to(dtype)
        grid, x = PatchGrid(14, 14, 1), torch.randn(2, 197, 48).to(dtype)
        for mode in (attention.train(), attention.eval()):
            with torch.set_grad_enabled(mode.training):
                y = mode(x, grid)
            error = (y - attention.float()(x.float(), grid)).abs().amax(dim=2) / y.abs().max()
            assert y.dtype == dtype and error.median() <= (2e-2 if dtype == torch.bfloat16 else 1e-5)
            attention.to(dtype)

    def test_counts_of_images_are_those_of_the_cpu(self):
        flops = TestFlops()
        for name in NAMES:
            model, images = flops.model(name, tree_height=3), torch.randn(1, 3, 64, 64)
            counted = count_flops(model, images=images)
            with as_hosts('cpu'):
                assert count_flops(model, images=images) == counted
            if name == 'treeformer_tc':
                assert count_flops(model, (3, 64, 64)) == counted


class TestOperators:
    """Targets that hold at any number of tokens; ViT-B's widths."""

    @pytest.mark.parametrize('tokens', (16384, 65536))
    def test_tc(self, tokens):
        for height, inference, both in ((4, 120, 360), (7, 190, 560)):
            row = measure(Candidate('treeformer_tc', {'tree_height': height}), tokens)
            assert row['forward'] <= inference and row['both'] <= both and not row['both_waits']

    def test_tf(self):
        """One wait."""
        row = measure(Candidate('treeformer_tf', {'tree_height': 7}), 16384)
        assert row['forward'] <= 80 and row['both'] <= 210
        assert row['forward_waits'] == row['both_waits'] == 1


class TestFakeGpu:
    """On tensors of a GPU that need not be there: no devices are mixed, and kernels are called as they are declared."""

    @pytest.mark.parametrize('training', (False, True))
    @pytest.mark.parametrize('prefix', (0, 1))
    @pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize('dropout', (0.0, 0.5))
    def test_all(self, variant, dtype, prefix, training, dropout, monkeypatch):
        name, options = variant
        grid = PatchGrid(7, 13, prefix)
        tokens = 2 * 3 * 91
        # Queries, keys, and the most of both: as if no key were read twice.
        sizes = [tokens, tokens + 2 * 3 * 8 * prefix, 40, 40]
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            monkeypatch.setattr(FakeTensor, 'tolist', lambda _: sizes)
            attention = create_attention(name, 36, 3, attn_drop=dropout, **options, device='cuda', dtype=dtype)
            attention.train(training)
            x = torch.randn(2, grid.num_tokens, 36, device='cuda', dtype=dtype)
            with torch.set_grad_enabled(training):
                y = attention(x, grid)
            assert y.shape == x.shape and y.dtype == dtype and y.device.type == 'cuda' and mode is not None

    @pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize('dim', (12, 64, 300))
    @pytest.mark.parametrize('dropout', (0.0, 0.5))
    def test_kernels_have_gradients(self, dtype, dim, dropout):
        """As declared for tensors without data, where `_efficient_attention_backward` has another signature."""
        q, k, v = (torch.zeros(n, dim, device='meta', dtype=dtype, requires_grad=True) for n in (9, 5, 5))
        ends = torch.zeros(2, 4, device='meta', dtype=torch.int32)
        y = attend_varlen(q, k, v, *ends, 7, 4, 0.3, dropout)
        assert y.shape == q.shape and y.dtype == dtype and y.requires_grad
        if dtype == torch.float32 or dim == 300 or dropout:
            return
        y.sum().backward()
        assert all(t.grad.shape == t.shape for t in (q, k, v))


@pytest.mark.cuda
class TestGpu:
    @pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float16))
    @pytest.mark.parametrize('dim', (12, 64, 72))
    def test_kernels(self, dtype, dim):
        counts = torch.tensor([[3, 0, 200, 1, 0, 65], [7, 0, 1, 300, 0, 64]])
        ends = nn.functional.pad(counts.cumsum(1, dtype=torch.int32), (1, 0))
        q, k, v = (torch.randn(n, dim).to(dtype) for n in (269, 372, 372))
        results = []
        for kind, device in ((torch.float64, 'cpu'), (dtype, 'cuda')):
            given = [t.to(device, kind).requires_grad_() for t in (q, k, v)]
            y = treeformer_tf.packed(*given, ends.to(device), 200, 300, 0.3, 0.0)
            results.append([y, *torch.autograd.grad(y.square().sum(), given)])
        for expected, found in zip(*results, strict=True):
            error = (found.cpu().double() - expected).norm() / expected.norm()
            assert error <= (1e-4 if dtype == torch.float32 else 2e-2)

    @pytest.mark.parametrize('prefix', (0, 5))
    def test_equals_the_cpu(self, variant, prefix):
        name, options = variant
        grid, results = PatchGrid(7, 13, prefix), []
        x = torch.randn(2, grid.num_tokens, 12)
        attention = build(name, **options)
        for device, dtype in (('cpu', torch.float64), ('cuda', torch.float64), ('cuda', torch.float32)):
            attention.to(device, dtype).zero_grad()
            given = x.to(device, dtype).requires_grad_()
            y = attention.train()(given, grid)
            y.square().sum().backward()
            with torch.no_grad():
                inferred = attention.eval()(given, grid)
            results.append([y, inferred, given.grad, attention.tree.weight.grad, attention.qkv.weight.grad])
            results[-1] = [t.detach().double().cpu() for t in results[-1]]
        for limit, found in ((1e-9, results[1]), (1e-3, results[2])):
            assert all((a - b).norm() <= limit * b.norm() for a, b in zip(found, results[0], strict=True))

    def test_waits(self):
        """TC-Attention for nothing; TF-Attention for the sizes of its largest groups."""
        grid, x = PatchGrid(32, 32), torch.randn(1, 1024, 192, device='cuda', requires_grad=True)
        for name, waits in (('treeformer_tc', 0), ('treeformer_tf', 1)):
            attention = create_attention(name, 192, 3, device='cuda')
            attention(x, grid).sum().backward()
            torch.cuda.set_sync_debug_mode('warn')
            try:
                with warnings.catch_warnings(record=True) as found:
                    warnings.simplefilter('always')
                    attention(x, grid).sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode('default')
            assert len([w for w in found if 'synchroniz' in str(w.message)]) == waits, name

    def test_tc_is_the_same_every_time(self):
        attention, grid = create_attention('treeformer_tc', 192, 3, device='cuda'), PatchGrid(64, 64)
        x, runs = torch.randn(2, 4096, 192, device='cuda', requires_grad=True), []
        for _ in range(2):
            y = attention(x, grid)
            runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
