"""
model.py: parity with Hugging Face on random weights, the invariants of T5, checkpoints and their errors. About 10 s:

    python -m pytest tests/test_model.py

What Hugging Face answers is frozen in tests/fixtures by tests/make_fixtures.py, which also checks the way back (that
Hugging Face reads what save_t5 writes): the tests themselves do not need that library.
"""

import http.server
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import model as m  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("t5_tied", "t5_gated", "t5_asymmetric")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
TABLE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def load(name="t5_tied"):
    """(model, {key: tensor}) of a fixture."""
    with np.load(FIXTURES / name / "expected.npz") as file:
        return m.load_t5(FIXTURES / name), {key: torch.from_numpy(file[key]) for key in file.files}


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def tiny(**options):
    """A random model of 2 + 2 layers that is not in a file; its weights are larger than at initialisation."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "num_heads": 3, "d_ff": 32, "num_layers": 2,
             "num_decoder_layers": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    model = m.T5(m.T5Config(**sizes | options)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and "embedding" not in name:
                weight.copy_(torch.randn_like(weight) * 0.4)
    return model


def padded(rows):
    """[[id, ...], ...] -> (B, S), padded with 0."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


# ----------------------------------------------------------------------------- the same numbers as Hugging Face


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_are_hugging_faces(name):
    model, expected = load(name)
    tokens = expected["input_ids"] != 0
    hidden = model.encode(expected["input_ids"]).hidden
    assert relative(hidden[tokens], expected["encoder"][tokens]) <= 2e-5, "the encoder differs from Hugging Face's"
    logits = model(expected["input_ids"], expected["decoder_ids"])
    assert logits.shape == expected["logits"].shape, "logits are (B, T, vocab)"
    assert relative(logits, expected["logits"]) <= 2e-5, "the decoder or the head differs from Hugging Face's"


# ----------------------------------------------------------------------------- the parts, by hand


@pytest.mark.parametrize("bidirectional, pairs", [
    # 32 buckets, 16 a side: 8 exact ones, then 8 up to distance 128; keys to the right come second.
    (True, {0: 0, -1: 1, -7: 7, -8: 8, -9: 8, -16: 10, -127: 15, -128: 15, -1000: 15, 1: 17, 7: 23, 8: 24, 128: 31}),
    # 16 exact ones, then 16 up to 128; keys to the right are masked and share bucket 0.
    (False, {0: 0, -1: 1, -15: 15, -16: 16, -32: 21, -127: 31, -128: 31, -5000: 31, 1: 0, 100: 0})])
def test_buckets_by_hand(bidirectional, pairs):
    """Half of a direction's buckets hold one distance each, the others grow with its logarithm (T5, section 2.1)."""
    buckets = m.relative_position_bucket(torch.tensor(list(pairs)), bidirectional, 32, 128).tolist()
    stack = "encoder: 16 buckets a side, the right's from 16 on" if bidirectional else "decoder: to the right all 0"
    for (distance, expected), found in zip(pairs.items(), buckets):
        assert found == expected, \
            f"a key {abs(distance)} positions {'after' if distance > 0 else 'before'} the query falls in bucket " \
            f"{expected} of 32, not {found} ({stack}; half of a side exact, the rest log-spaced up to distance 128)"


def test_buckets_are_hugging_faces():
    with np.load(FIXTURES / "buckets.npz") as tables:
        for name in set(tables.files) - {"distance"}:
            kind, buckets, far = name.split("_")
            ours = m.relative_position_bucket(torch.from_numpy(tables["distance"]), kind == "both", int(buckets),
                                              int(far))
            assert ours.tolist() == tables[name].tolist(), f"{name}: buckets differ from Hugging Face's"


LARGE = {"vocab_size": 1024, "d_model": 64}  # a head of 2^16 numbers, the least that `quick_products` copies
needs_onednn = pytest.mark.skipif(not m.onednn_dtypes(), reason="this build of torch has no oneDNN")


def copies():
    """{weight: the copy that a block of quick_products has made}, None outside of one."""
    return getattr(m.QUICK, "copies", None)


@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float64, 1e-9)))
@pytest.mark.parametrize("tied", (True, False))
def test_quick_products(dtype, bound, tied):
    model = tiny(**LARGE, tie_word_embeddings=tied).to(dtype)
    weight, small = model.head.weight, model.decoder.layers[0].feed_forward.wo.weight
    with torch.no_grad(), m.quick_products():
        m.linear(torch.randn(1, 64, dtype=dtype), weight)  # the second use makes the copy
        for shape in ((64,), (1, 64), (1, 1, 64), (3, 1, 64), (2, 5, 64), (0, 64)):
            x = torch.randn(shape, dtype=dtype)
            torch.testing.assert_close(m.linear(x, weight), x @ weight.t(), rtol=bound, atol=bound, check_stride=False)
            m.linear(torch.randn(*shape[:-1], small.size(1), dtype=dtype), small)
        assert [id(key) for key, copy in copies().items() if copy is not None] == \
            [id(weight)] * (dtype in m.onednn_dtypes()), "large matrices, of types that oneDNN multiplies"
    assert copies() is None, "outside the block, products are torch's own: weights may change, or learn"


def test_quick_products_leave_training_and_autocast_alone():
    """They take torch's own product, in a block, too."""
    weight, x = torch.randn(1024, 64, requires_grad=True), torch.randn(3, 64)
    with m.quick_products():
        for _ in range(3):
            m.linear(x, weight).sum().backward()
            assert weight.grad is not None and not copies()
            weight.grad = None
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                assert m.linear(x, weight).dtype is torch.bfloat16 and not copies()


@needs_onednn
@torch.no_grad()
def test_quick_products_of_blocks_in_blocks():
    weight, x = torch.randn(1024, 64), torch.randn(1, 64)
    with m.quick_products():
        m.linear(x, weight)
        assert copies() == {weight: None}, "what is used once, as an encoder may be, is not copied"
        m.linear(x, weight)
        copy = copies()[weight]
        assert copy is not None
        with pytest.raises(KeyError), m.quick_products():
            m.linear(x, weight)
            assert copies()[weight] is copy, "an inner block uses the copies of the outer"
            raise KeyError
        assert copies()[weight] is copy, "after an error, too, the outer block goes on as before"
    assert copies() is None, "nothing may stay behind: the weights are about to change"


def test_quick_products_belong_to_their_thread():
    """A server may generate in several threads at once, and train in another."""
    model = tiny(**LARGE)
    sources = [padded([[i, i + 1, 7, 1]]) for i in range(2, 10)]
    expected, failed = [model.generate(source, 12) for source in sources], []

    def generate():
        for _ in range(2):
            for source, ids in zip(sources, expected):
                if not torch.equal(model.generate(source, 12), ids):
                    failed.append(source)
    threads = [threading.Thread(target=generate) for _ in range(3)]
    for thread in threads:
        thread.start()
    with m.quick_products():
        found = []
        thread = threading.Thread(target=lambda: found.append(copies()))
        thread.start(), thread.join()
    for thread in threads:
        thread.join()
    assert not failed, "one thread's copies must not be another's"
    assert found == [None], "a block in one thread does not reach another, whose weights may change"
    assert copies() is None


@needs_onednn
@pytest.mark.parametrize("beams", (1, 4))
@pytest.mark.parametrize("sources", ([[5, 6, 7, 1]], [[5, 6, 7, 1]] * 3 + [[8, 1]]))
def test_quick_products_change_no_output(monkeypatch, beams, sources):
    model, source, quick = tiny(**LARGE), padded(sources), []
    linear = m.linear

    def spy(x, weight):
        y = linear(x, weight)
        if weight is model.head.weight:
            quick.append(copies()[weight] is not None)
        return y
    monkeypatch.setattr(m, "linear", spy)
    found = model.generate(source, 12, beams)
    assert len(quick) > 1 and quick == [False] + [True] * (len(quick) - 1), "generation must take the quick way"
    monkeypatch.setattr(m, "linear", F.linear)
    assert torch.equal(found, model.generate(source, 12, beams))


def test_generation_that_is_interrupted_leaves_the_mode(monkeypatch):
    model = tiny().train()
    monkeypatch.setattr(model, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.generate(padded([[5, 1]]))
    assert model.training, "who goes on training does so with dropout"


def test_generation_leaves_every_part_in_its_mode():
    model = tiny().train()
    model.encoder.eval()  # frozen, say
    model.generate(padded([[5, 1]]), 2)
    assert model.training and model.decoder.layers[0].training, "who goes on training does so with dropout"
    assert not model.encoder.training and not model.encoder.layers[0].training, "and a frozen encoder without"


def test_rms_norm_by_hand():
    """y = x / sqrt(mean(x^2) + eps) * weight: no mean is subtracted, no bias added."""
    norm = m.RMSNorm(m.T5Config(d_model=2, layer_norm_epsilon=0.0))
    norm.weight.data = torch.tensor([1.0, 2.0])
    expected = torch.tensor([3 / math.sqrt(12.5), 2 * 4 / math.sqrt(12.5)])  # mean square of 3 and 4: 12.5
    found = norm(torch.tensor([3.0, 4.0]))
    assert torch.allclose(found, expected), \
        f"(3, 4) over the root of its mean square, 12.5, no mean subtracted, times the weight (1, 2), is " \
        f"{expected.tolist()}, not {found.tolist()}"
    norm.eps = 12.5
    assert torch.allclose(norm(torch.tensor([3.0, 4.0])), expected / math.sqrt(2)), \
        "epsilon is added to the mean square, under the root: here it doubles what is under it"
    rows = norm(torch.tensor([[3.0, 4.0], [30.0, 40.0]]))
    assert torch.allclose(rows[0], expected / math.sqrt(2)), "every position has a mean of its own, over d_model alone"


def test_rms_norm_takes_the_mean_in_float32():
    norm = m.RMSNorm(m.T5Config(d_model=4))
    out = norm(torch.full((4,), 300.0, dtype=torch.float16))
    assert torch.allclose(out.float(), torch.ones(4), atol=1e-3), "300^2 overflows float16: square it in float32"


@pytest.mark.parametrize("need_probs", (True, False))
def test_attention_is_not_scaled(need_probs):
    """softmax(q k^T + bias) v for every head, then the matrix o."""
    attention = m.Attention(m.T5Config(d_model=4, d_kv=4, num_heads=1, dropout_rate=0.0))
    for linear in (attention.q, attention.k, attention.v, attention.o):
        linear.weight.data = torch.eye(4)
    x = torch.tensor([[[1.0, 0, 0, 0], [0, 2.0, 0, 0]]])
    out, probs = attention(x, *attention.keys_values(x), torch.zeros(1, 1, 2, 2), need_probs)
    assert (probs is not None) is need_probs, "the probabilities are returned if they are asked for, else None"
    assert not need_probs or torch.allclose(probs.sum(-1), torch.ones(1, 1, 2)), \
        "the softmax goes over the keys, the last dimension: the probabilities of every query sum to 1"
    share = math.exp(4) / (math.exp(4) + 1)  # second query: its score with itself is 2 * 2, not 2 * 2 / sqrt(4)
    assert torch.allclose(out[0, 1], torch.tensor([1 - share, 2 * share, 0, 0])), \
        "T5 does not divide scores by sqrt(d_kv): the second query's scores are 0 and 2 * 2, its output softmax(0, 4) v"
    bias = torch.tensor([[[[0.0, 0.0], [4.0, 0.0]]]])
    out, _ = attention(x, *attention.keys_values(x), bias, need_probs)
    assert torch.allclose(out[0, 1], torch.tensor([0.5, 1.0, 0, 0])), \
        "the bias is added to the scores, before the softmax: 0 + 4 and 4 + 0 share evenly"


@pytest.mark.parametrize("grad", (True, False))
def test_attention_drops_probabilities(grad):
    """In training, as Hugging Face's T5: what mixes the values is dropped, what is returned is not."""
    torch.manual_seed(0)
    attention = m.Attention(m.T5Config(d_model=1, d_kv=1, num_heads=1, dropout_rate=0.5))
    attention.v.weight.data = attention.o.weight.data = torch.ones(1, 1)
    attention.q.weight.data = torch.zeros(1, 1)
    attention.k.weight.data = torch.zeros(1, 1)  # so that all keys count alike
    x, bias = torch.ones(1, 4, 1), torch.zeros(1, 1, 4, 4)
    with torch.set_grad_enabled(grad):
        outputs = torch.cat([attention(x, *attention.keys_values(x), bias, False)[0].flatten() for _ in range(500)])
        _, probs = attention(x, *attention.keys_values(x), bias, True)
        assert torch.equal(probs, torch.full((1, 1, 4, 4), 0.25)), "a loss compares probabilities without noise"
        assert set(outputs.tolist()) == {0.0, 0.5, 1.0, 1.5, 2.0}, "each of 4 keys has 0 or 2 quarters of the value"
        assert abs(outputs.mean().item() - 1.0) < 0.06, "the mean stays"
        attention.eval()
        assert attention(x, *attention.keys_values(x), bias, False)[0].flatten().tolist() == [1.0] * 4


def test_attention_has_heads():
    attention = m.Attention(m.T5Config(d_model=4, d_kv=2, num_heads=2))
    for linear in (attention.q, attention.k, attention.v, attention.o):
        linear.weight.data = torch.eye(4)
    x = torch.tensor([[[3.0, 0, 0, 3.0], [0, 3.0, 0, 3.0]]])
    _, probs = attention(x, *attention.keys_values(x), torch.zeros(1, 1, 2, 2), need_probs=True)
    share = math.exp(9) / (math.exp(9) + 1)
    expected = torch.tensor([[[[share, 1 - share], [1 - share, share]], [[0.5, 0.5], [0.5, 0.5]]]])
    assert torch.allclose(probs, expected), \
        "head 0 sees numbers 0 and 1 of each word, which differ, head 1 numbers 2 and 3, which are alike: (B, H, T, K)"


def test_attention_cache_by_hand():
    """`append` takes the new keys and values and returns the first `visible`, in order."""
    layer, memory = tiny().decoder.layers[0], torch.randn(2, 5, 16)
    cache = m.LayerCache(layer, memory, max_length=4, beams=1)
    keys = torch.arange(1, 2 * 3 * 4 * 4 + 1, dtype=torch.float32).view(2, 3, 4, 4)  # (B, H, T, d_kv)
    place = cache.keys.data_ptr(), cache.values.data_ptr()
    for start, stop in ((0, 1), (1, 2), (2, 4)):
        new = keys[:, :, start:stop], -keys[:, :, start:stop]
        for found, all_so_far in zip(cache.append(*new, torch.arange(start, stop), stop),
                                     (keys[:, :, :stop], -keys[:, :, :stop])):
            assert found.shape == all_so_far.shape and torch.equal(found, all_so_far), \
                f"after {stop} positions the cache returns all {stop}, each in its place"
    assert cache.append(*new, torch.arange(2, 4), 3)[1].shape == (2, 3, 3, 4), "of the 4 there, 3 are to be visible"
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == place, "written in place: a CUDA graph needs that"


@torch.no_grad()
def test_beams_share_the_memory():
    """What the cache holds of the memory has one row for a sentence, however many beams; ended ones leave."""
    model, x = tiny(), padded([[5, 6, 7, 1], [8, 1]])
    cache = m.Cache(model, model.encode(x).hidden, x != 0, 5, beams=3)
    cache.advance()
    hidden = model.decode(torch.zeros(6, 1, dtype=torch.long), None, None, cache=cache).hidden
    assert torch.allclose(hidden[:3], hidden[0].expand(3, -1, -1), atol=1e-6) and (hidden[2] != hidden[3]).any(), \
        "rows 0 to 2 are the first sentence's beams, rows 3 to 5 the second's"
    alone = m.Cache(model, model.encode(x).hidden, x != 0, 5)
    alone.advance()
    alone = model.decode(torch.zeros(2, 1, dtype=torch.long), None, None, cache=alone).hidden
    assert torch.allclose(hidden[::3], alone, atol=1e-6), "each attends to its own sentence, with its own padding"
    cache.select(torch.tensor([False, True]))
    for layer in cache.layers:
        assert (len(layer.cross[0]), len(layer.cross[1]), len(layer.keys), len(layer.values)) == (1, 1, 3, 3)


@torch.no_grad()
def test_attention_with_a_cache_is_the_one_without():
    model, x, y = tiny(), padded([[5, 6, 7, 1], [8, 1]]), padded([[2, 9, 4, 7, 5], [2, 3, 3, 6, 8]])
    memory = model.encode(x).hidden
    at_once = model.decode(y, memory, x != 0).hidden
    for visible in (None, 5):  # as on a CPU; as in a CUDA graph, whose steps all see the room for later keys, too
        cache = m.Cache(model, memory, x != 0, 5)
        for t in range(5):
            cache.advance()
            cache.visible = visible or cache.visible
            found = model.decode(y[:, t:t + 1], None, None, cache=cache).hidden
            assert torch.allclose(found[:, 0], at_once[:, t], atol=1e-5), \
                f"position {t}, with the earlier ones in the cache, must be what it is without a cache: it sees keys " \
                f"0 to {t}, each with the position bias of its distance from {t}"


def test_a_line_of_model_py_names_model_py(tmp_path, capsys):
    assert m.main([str(tmp_path / "none"), "a"]) == 2
    assert capsys.readouterr().err.startswith("model.py: "), "not the file of a decorator"


def test_the_caches_bias_is_a_row_of_the_stacks_and_takes_memory_by_the_length_alone():
    model, x = tiny(), torch.tensor([[5, 6, 1]])
    cache, bias = m.Cache(model, model.encode(x).hidden, x != 0, 200), model.decoder.position_bias(200)
    for position in range(200):
        cache.advance()
        row = bias[:, :, position:position + 1]
        assert torch.equal(cache.bias(), row[..., :position + 1]), "each with the position bias of its distance"
        cache.visible = 200  # as on a GPU, where keys to come are hidden by their bias
        assert torch.equal(cache.bias(), row)
    assert cache.bias_of.numel() < 2 * bias.size(1) * 200, "a row, not a square: 4,096 positions took 850 MB"


@pytest.mark.parametrize("beams", (1, 3))
def test_what_has_ended_leaves_the_batch(beams, monkeypatch):
    """On a CPU at once, so that it costs nothing; as on a GPU, when it halves the batch. The ids are the same."""
    model, expected = load("t5_gated")
    x, sizes, select, same = expected["input_ids"], [], m.Cache.select, "what has ended must not go on, nor change"
    monkeypatch.setattr(m.Cache, "select", lambda *args: sizes.append(args[1].tolist()) or select(*args))
    ids = trimmed(model.generate(x, 20, beams).tolist())
    ends = sorted({len(row) for row in ids} - {20})
    assert len(ends) > 1 and len(sizes) > 1 and all(0 < sum(size) < len(size) for size in sizes)
    sizes.clear()
    monkeypatch.setattr(m.Cache, "worth_selecting", lambda cache, running: running <= len(cache.memory_bias) // 2)
    assert trimmed(model.generate(x, 20, beams).tolist()) == ids, same
    assert sizes and all(sum(size) <= len(size) / 2 for size in sizes)
    monkeypatch.setattr(m.Cache, "worth_selecting", lambda cache, running: False)
    assert trimmed(model.generate(x, 20, beams).tolist()) == ids, same


def test_dropout_rate_and_mean():
    torch.manual_seed(0)
    x = torch.ones(1000, 401)  # no multiple of 8
    out = m.dropout(x, 0.1, training=True)
    rate, n = 26 / 256, x.numel()  # 0.1 rounded to 1/256
    sigma = math.sqrt(rate * (1 - rate) / n)
    assert abs((out == 0).float().mean().item() - rate) < 5 * sigma, "dropout must zero the asked share"
    assert set(out.unique().tolist()) == {0.0, torch.tensor(256 / 230).item()}, "what stays is scaled by 1 / (1 - rate)"
    assert (m.dropout(x, 0.1, training=True) != out).any(), "every call draws a new mask"
    assert m.dropout(x, 0.1, training=False) is x and m.dropout(x, 0.0, training=True) is x, "nothing to drop here"


def test_training_on_the_cpu_takes_the_plain_product(monkeypatch):
    """The fused kernel's backward pass is slow there; generation takes it."""
    model, x = tiny(), padded([[5, 6, 7, 1]])
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **options: (
        calls.append(1) or fused(*args, **options)))
    model(x, x)
    assert not calls, "with gradients the plain product is 1.4x as fast"
    with torch.no_grad():
        model(x, x)
    assert calls, "without them the fused kernel is faster"


def test_a_layer_gives_probabilities_only_when_asked():
    model, x = tiny(), torch.ones(1, 3, 16)
    bias = torch.zeros(1, 1, 3, 3)
    assert model.encoder.layers[0](x, bias)[1] == (None,)
    assert model.decoder.layers[0](x, bias, x, bias)[1] == (None, None)
    assert all(probs is not None for probs in model.decoder.layers[0](x, bias, x, bias, True)[1])


def test_dropout_keeps_the_mean_in_16_bit():
    x = torch.ones(1000, dtype=torch.bfloat16).fill_(230)  # 230 * 256 / 230 has no digit too many
    assert set(m.dropout(x, 0.1, training=True).tolist()) == {0.0, 256.0}, "the scale itself must not be rounded"


def test_dropout_of_nearly_all():
    out = m.dropout(torch.ones(100_000), 0.9999, training=True)  # rounded to 255/256, not to 1: the scale is finite
    assert set(out.unique().tolist()) == {0.0, 256.0} and 0 < (out > 0).float().mean() < 0.01


def test_dropout_is_off_in_eval_mode_only():
    model, x = tiny(dropout_rate=0.5), padded([[5, 6, 7, 1]])
    with torch.no_grad():
        assert torch.equal(model(x, x), model(x, x)), "eval mode has no randomness"
        model.train()
        assert not torch.equal(model(x, x), model(x, x)), "training mode must drop something"


def test_float16_feed_forward_does_not_overflow():
    feed_forward = m.FeedForward(m.T5Config(d_model=16, d_ff=32))
    feed_forward.wi.weight.data.fill_(1.0)
    feed_forward.wo.weight.data.fill_(1000.0)
    x = torch.ones(1, 1, 16)
    hidden = torch.full((1, 32), 16.0, dtype=torch.float16)
    assert F.linear(hidden, feed_forward.wo.weight.half()).isinf().all(), "the test needs a product above 65,504"
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        out = feed_forward.eval()(x).float()  # float, as in float16 512,000 is inf, which equals inf
    assert (out == 16 * 32 * 1000).all(), "float16: wo must be multiplied in float32"


@pytest.mark.parametrize("dtype, bound", ((torch.bfloat16, 0.1), (torch.float16, 0.02)))
@torch.no_grad()
def test_autocast_stays_close(dtype, bound):
    model, expected = load("t5_tied")  # t5_gated's sharp softmaxes make 0.14 of bfloat16's rounding
    with torch.autocast("cpu", dtype=dtype):
        logits = model(expected["input_ids"], expected["decoder_ids"])
        ids = model.generate(expected["input_ids"], 4, num_beams=2)
    error = (logits.float() - expected["logits"]).norm() / expected["logits"].norm()
    assert 0 < error < bound, f"{dtype}: 16 bit must only cost digits"
    assert ids.shape[0] == len(expected["input_ids"]), "generation must work under autocast"


@pytest.mark.parametrize("dtype, bound", ((torch.bfloat16, 0.1), (torch.float16, 0.02)))
@torch.no_grad()
def test_a_model_in_16_bit_stays_close(dtype, bound):
    model, expected = load("t5_tied")
    logits = model.to(dtype)(expected["input_ids"], expected["decoder_ids"])
    assert logits.dtype is dtype, "float32, where `wo` needs it, must not spread"
    error = (logits.float() - expected["logits"]).norm() / expected["logits"].norm()
    assert 0 < error < bound, f"{dtype}: 16 bit must only cost digits, not {error:.3f}"
    assert model.generate(expected["input_ids"], 4).shape[0] == len(expected["input_ids"])


@NEEDS_CUDA
@pytest.mark.parametrize("beams", (1, 3))
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graphs_generate_what_the_cpu_does(name, beams, monkeypatch):
    """Past 64 positions, where the graph sees more keys, with a batch that shrinks, and more than one call."""
    model, expected = load(name)
    x, replayed, replay = expected["input_ids"], [], m.Cache.replay

    def spy(cache, run, token):
        logits = replay(cache, run, token)
        if cache.graph:
            again = run(token)  # writes the same keys to the same places
            torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-4)
            replayed.append(cache.kind)
        return logits
    wanted = [model.generate(ids, 80, beams) for ids in (x, x[:2], x)]
    monkeypatch.setattr(m.Cache, "replay", spy)
    found = [model.cuda().generate(ids.cuda(), 80, beams).cpu() for ids in (x, x[:2], x)]
    assert trimmed(found[0].tolist()) == trimmed(found[2].tolist()) == trimmed(wanted[0].tolist())
    assert trimmed(found[1].tolist()) == trimmed(wanted[1].tolist())
    assert {visible for _, visible in replayed} == {64, 80} and len({rows for rows, _ in replayed}) > 1, \
        "most steps must be replayed, with room for 64 keys, then for 80, and fewer rows once half have ended"


@NEEDS_CUDA
def test_cuda_dropout_rate_and_mean():
    torch.manual_seed(0)
    x = torch.ones(1000, 1000, device="cuda")
    y = m.dropout(x, 0.1, training=True)
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=1e-3) and abs(y.mean().item() - 1) < 2e-3
    assert m.dropout(x, 0.1, training=False) is x and m.dropout(x, 0.0, training=True).equal(x)


@NEEDS_CUDA
def test_cuda_float16_survives_a_large_wo():
    """With T5's published weights `wo` passes 65,504, the largest float16: that product is taken in float32."""
    model, expected = load("t5_tied")
    for layer in model.decoder.layers:
        layer.feed_forward.wi.weight.data *= 100
        layer.feed_forward.wo.weight.data *= 1000
    model, x, y = model.cuda(), expected["input_ids"].cuda(), expected["decoder_ids"].cuda()
    with torch.no_grad():
        wanted, peak, first = model(x, y), [], model.decoder.layers[0].feed_forward
        hook = first.register_forward_hook(lambda *args: peak.append(args[2].abs().max()))
        with torch.autocast("cuda", torch.float16):
            found = model(x, y)
        hook.remove()
        half = model.half()(x, y)
    assert peak[0] > 65504, "the test needs a sub-layer whose output no float16 can hold"
    for logits in (found, half):
        error = (logits.float() - wanted).norm() / wanted.norm()
        assert logits.isfinite().all() and error < 0.05, f"float16 must stay finite, and close: {error:.3f}"


@NEEDS_CUDA
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cuda_computes_what_the_cpu_does(name):
    model, expected = load(name)
    model, x, y = model.cuda(), expected["input_ids"].cuda(), expected["decoder_ids"].cuda()
    assert relative(model(x, y).cpu(), expected["logits"]) <= 2e-4, "float32 logits on the GPU"
    assert model.generate(x, 20).cpu().tolist() == load(name)[0].generate(x.cpu(), 20).tolist(), "greedy ids on the GPU"
    for dtype, bound in ((torch.bfloat16, 0.3), (torch.float16, 0.05)):
        with torch.autocast("cuda", dtype=dtype):
            logits = model(x, y).float().cpu()
        assert (logits - expected["logits"]).norm() / expected["logits"].norm() < bound, f"{dtype} only costs digits"


# ----------------------------------------------------------------------------- masks, lists of layers, states


@torch.no_grad()
def test_attention_is_the_same_with_and_without_probabilities(monkeypatch):
    model, calls, kernel = tiny(), [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **names: calls.append(1) or kernel(*x, **names))
    x, y = padded([[5, 6, 7, 8, 9, 1], [8, 9, 1]]), padded([[0, 9, 4, 7], [0, 3, 3]])
    fused, plain = model.encode(x), model.encode(x, need_probs=True)
    assert torch.allclose(fused.hidden, plain.hidden, atol=1e-5), "both branches of attention must agree (encoder)"
    out = model.decode(y, fused.hidden, x != 0)
    with_probs = model.decode(y, fused.hidden, x != 0, need_probs=True)
    assert len(calls) == 2 + 4, "the fused kernel runs in all 6 attentions, or both branches were not compared here"
    assert torch.allclose(out.hidden, with_probs.hidden, atol=1e-5), "both branches must agree (decoder)"
    assert fused.probs == [(None,)] * 2 and out.probs == [(None, None)] * 2, "no probabilities unless asked for"
    (encoder,), (own, cross) = plain.probs[1], with_probs.probs[1]
    B, S, T, H = *x.shape, y.size(1), model.config.num_heads
    assert (encoder.shape, own.shape, cross.shape) == ((B, H, S, S), (B, H, T, T), (B, H, T, S))
    for probs in (encoder, own, cross):
        assert torch.allclose(probs.sum(-1), torch.ones(()), atol=1e-5), "probabilities sum to 1 over the keys"
    assert (own.triu(1) == 0).all(), "a decoder position must not see later ones"
    assert (cross.masked_select((x == 0)[:, None, None]) == 0).all(), "no attention to padding"


@torch.no_grad()
def test_padding_does_not_change_logits():
    model, expected = load("t5_asymmetric")
    x, y = expected["input_ids"][1:2, :5], expected["decoder_ids"][1:2]
    assert (x != 0).all(), "this row has 5 tokens"
    plain = model(x, y)
    assert torch.allclose(model(F.pad(x, (0, 7)), y), plain, atol=1e-5), "padding of the input must be masked"
    assert torch.allclose(model(x, F.pad(y, (0, 3)))[:, :y.size(1)], plain, atol=1e-5), \
        "later decoder positions must not change earlier logits"


@torch.no_grad()
def test_any_list_of_layers_runs_and_states_are_the_layers_outputs():
    model, x, y = tiny(), padded([[5, 6, 7, 1], [8, 1]]), padded([[0, 9, 4], [0, 3, 3]])
    a, b = model.encoder.layers
    out = model.encode(x, layers=[b, a, b])
    assert len(out.states) == 3, "one state for each layer that ran"
    bias = m.mask_out(model.encoder.position_bias(4), (x == 0)[:, None, None, :])
    state = model.embedding(x)
    for layer, expected in zip([b, a, b], out.states):
        state, _ = layer(state, bias)
        assert torch.equal(state, expected), "states are taken after each layer, before the final norm"
    assert torch.equal(out.hidden, model.encoder.norm(out.states[-1])), "hidden is the normed last state"
    own = model.encode(x)
    assert torch.equal(own.hidden, model.encode(x, layers=[a, b]).hidden), "None means the model's own layers"
    assert torch.equal(model.encode(x, layers=[a]).states[0], own.states[0]), "a layer does not know what follows"

    a, b = model.decoder.layers
    full, reverse = model.decode(y, own.hidden, x != 0), model.decode(y, own.hidden, x != 0, layers=[b, a])
    assert torch.equal(full.hidden, model.decoder.norm(full.states[-1])), "hidden is the normed last state"
    assert torch.equal(full.hidden, model.decode(y, own.hidden, x != 0, layers=iter([a, b])).hidden)
    assert not torch.allclose(full.hidden, reverse.hidden), "the order of the layers matters"
    assert torch.equal(model.logits(full.hidden), model(x, y)), "forward is encode, decode and the head"


@torch.no_grad()
def test_positions_belong_to_the_stack(tmp_path):
    model, expected = load("t5_tied")
    for stack in (model.encoder, model.decoder):
        stack.layers = stack.layers[1:]  # drop layer 0, whose checkpoint name carries the table
    model.config.num_layers = model.config.num_decoder_layers = 1
    before = model(expected["input_ids"], expected["decoder_ids"])
    m.save_t5(model, tmp_path)
    after = m.load_t5(tmp_path)(expected["input_ids"], expected["decoder_ids"])
    assert torch.equal(before, after), "without layer 0 the stack must keep its position table"


# ----------------------------------------------------------------------------- generation


@torch.no_grad()
def slow_search(model, row, n, beams, penalty=1.0):
    """Beam search as one would write it first: Python lists, one sentence, no cache. (S,) ids -> list of ids."""
    eos, running, finished = model.config.eos_token_id, [(0.0, [])], []
    for t in range(1, n + 1):
        prefixes = torch.tensor([[model.config.decoder_start_token_id, *ids] for _, ids in running])  # all of t tokens
        log_probs = model(row.expand(len(running), -1), prefixes)[:, -1].log_softmax(-1).tolist()
        candidates = [(score + log_prob, ids + [i]) for (score, ids), each in zip(running, log_probs)
                      for i, log_prob in enumerate(each)]
        running = []
        for rank, (score, ids) in enumerate(sorted(candidates, reverse=True)[:2 * beams]):
            if ids[-1] != eos and t < n:
                running.append((score, ids))
            elif rank < beams:
                finished.append((score / t ** penalty, ids))
        running, finished = running[:beams], sorted(finished, reverse=True)[:beams]
        if not running or len(finished) == beams and running[0][0] / t ** penalty <= finished[-1][0]:
            break
    return finished[0][1]


@torch.no_grad()
def slow_greedy(model, row, n):
    """Run everything anew for every token. (S,) ids -> list of ids."""
    ids = [model.config.decoder_start_token_id]
    while len(ids) <= n and (len(ids) == 1 or ids[-1] != model.config.eos_token_id):
        ids.append(model(row[None], torch.tensor([ids]))[0, -1].argmax().item())
    return ids[1:]


def trimmed(rows):
    """Lists without the padding at their ends."""
    return [row[:max((i + 1 for i, token in enumerate(row) if token != 0), default=0)] for row in rows]


def follow(model, table):
    """Make `model` a chain of words that can be worked out on paper: after token i the next one is j with probability
    table[i][j], whatever came before. Tokens are 0 (pad), 1 (eos), 2 (the start token) and up."""
    probs = torch.zeros(model.config.vocab_size, model.config.vocab_size)
    for i, row in table.items():
        for j, p in row.items():
            probs[i, j] = p

    def decode(ids, *_, **__):
        return m.StackOutput(F.one_hot(ids, len(probs)).float(), [], [])
    model.decode, model.logits = decode, lambda hidden: (hidden @ probs).log().clamp(min=-1e4)
    return model


@pytest.mark.parametrize("penalty, n, table, ids, rule", (
    (0.0, 6, {2: {1: 0.4, 3: 0.6}, 3: {1: 0.9, 4: 0.1}, 4: {1: 1.0}}, [3, 1],
     "go on while the best running prefix, here 3 with 0.6, beats the worst of the K finished: 0.6 * 0.9 beats 0.4"),
    (1.0, 6, {2: {3: 0.6, 4: 0.4}, 3: {5: 0.5, 6: 0.5}, 4: {7: 1.0}, 5: {1: 1.0}, 6: {1: 1.0}, 7: {1: 1.0}}, [4, 7, 1],
     "two beams keep both first words, 3 and 4 (expand one start, not two equal ones): 0.4 * 1 beats 0.6 * 0.5"),
    (0.0, 6, {2: {1: 0.4, 3: 0.6}, 3: {1: 0.5, 4: 0.5}, 4: {1: 1.0}}, [1],
     "at penalty 0 sums of log p are compared: the empty sentence, 0.4, beats 3, 0.6 * 0.5"),
    (1.0, 2, {2: {1: 0.4, 3: 0.6}, 3: {1: 0.3, **dict.fromkeys(range(10, 45), 0.02)}}, [3, 1],
     "the length counts eos and not the start token: log(0.6 * 0.3) / 2 = -0.86 beats log(0.4) / 1 = -0.92"),
    (1.0, 6, {2: {1: 0.45, 3: 0.35, 4: 0.2}, 3: dict.fromkeys(range(10, 35), 0.04), 4: {6: 1.0},
              **dict.fromkeys([6, *range(10, 35)], {1: 1.0})}, [4, 6, 1],
     "draw 2K candidates, as K of them may end: 1, eos, must not take the place of 4 among the K running prefixes")),
    ids=("when to stop", "K prefixes", "no penalty", "the length", "2K candidates"))
def test_beam_search_by_hand(penalty, n, table, ids, rule):
    """Keep the K best prefixes; a finished one scores its sum of log p over length ** length_penalty."""
    model = follow(tiny(decoder_start_token_id=2), table)
    options = {"length_penalty": penalty} if penalty != 1.0 else {}  # 1 is the default
    found = model.generate(padded([[5, 1]]), n, num_beams=2, **options).tolist()
    assert trimmed(found) == [ids], f"{rule}: {ids}, not {trimmed(found)[0]}"


@pytest.mark.parametrize("name", NAMES)
def test_cached_greedy_is_the_slow_one(name):
    model, expected = load(name)
    slow = [slow_greedy(model, row[row != 0], 12) for row in expected["input_ids"]]
    fast = model.generate(expected["input_ids"], max_new_tokens=12).tolist()
    assert trimmed(fast) == trimmed(slow), "a cache may only save time"


@pytest.mark.parametrize("beams, penalty", ((2, 1.0), (4, 0.6), (3, 0.0), (4, 2.0), (3, -1.0)))
def test_cached_beams_are_the_slow_ones(beams, penalty):
    model, expected = load("t5_gated")
    slow = [slow_search(model, row[row != 0], 9, beams, penalty) for row in expected["input_ids"]]
    fast = model.generate(expected["input_ids"], 9, num_beams=beams, length_penalty=penalty).tolist()
    assert trimmed(fast) == trimmed(slow), \
        "a cache and a batch may only save time: row i of the cache must follow the prefix that is now beam i"


@pytest.mark.parametrize("name", NAMES)
def test_greedy_ids_are_hugging_faces(name):
    model, expected = load(name)
    ids = model.generate(expected["input_ids"], max_new_tokens=20)
    assert ids.tolist() == expected["greedy"].tolist(), "greedy search must choose the same ids as Hugging Face's"


@pytest.mark.parametrize("penalty", (0.6, 1.0, 2.0))
@pytest.mark.parametrize("name", NAMES)
def test_beam_ids_are_hugging_faces(name, penalty):
    model, expected = load(name)
    ids = model.generate(expected["input_ids"], max_new_tokens=20, num_beams=4, length_penalty=penalty)
    assert ids.tolist() == expected[f"beam4_{penalty}"].tolist(), \
        f"{name}, penalty {penalty}: 4 beams must find the same ids as Hugging Face's"


def test_fixtures_tell_the_searches_apart():
    _, expected = load("t5_tied")
    lengths = {key: tuple((ids != 0).sum(1).tolist()) for key, ids in expected.items()
               if key == "greedy" or key.startswith("beam")}
    assert len(set(lengths.values())) == 4, "a fixture on which every search answers alike would test nothing"


@pytest.mark.parametrize("beams", (1, 4))
@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_batch(name, beams):
    model, expected = load(name)
    batch = model.generate(expected["input_ids"], 20, num_beams=beams).tolist()
    alone = [model.generate(row[row != 0][None], 20, num_beams=beams)[0].tolist() for row in expected["input_ids"]]
    assert trimmed(batch) == trimmed(alone), "a row's output must not depend on the rows beside it"
    order = [4, 2, 0, 5, 1, 3]
    shuffled = model.generate(expected["input_ids"][order], 20, num_beams=beams).tolist()
    assert trimmed(shuffled) == trimmed([batch[i] for i in order]), "nor on their order"


@pytest.mark.parametrize("beams", (1, 3))
def test_generated_shape(beams):
    model, expected = load("t5_gated")
    ids = model.generate(expected["input_ids"], max_new_tokens=7, num_beams=beams)
    assert ids.dtype == torch.long and ids.shape[0] == 6 and ids.shape[1] <= 7, "ids are (B, <= max_new_tokens)"
    for row in ids.tolist():
        assert 1 not in row or set(row[row.index(1) + 1:]) <= {0}, "only pad may follow eos"
    assert model.generate(expected["input_ids"], 1, num_beams=beams).shape == (6, 1), "one token when one is asked for"


def test_pad_before_eos_is_no_end():
    model, script = tiny(), [5, 0, 7, 1]

    def logits(hidden):
        step = model.steps = model.steps + 1
        return F.one_hot(torch.full(hidden.shape[:-1], script[step]), model.config.vocab_size) * 20.0

    model.logits = logits
    for beams in (1, 2):
        model.steps = -1
        ids = model.generate(padded([[4, 1]]), 4, num_beams=beams).tolist()
        assert ids == [script], "a model may emit pad: only what follows the last other token is cut off"


def test_generate_can_be_trained_on():
    model, x = tiny().train(), padded([[5, 6, 1]])
    ids = model.generate(x, 4)
    assert model.training and model.encoder.layers[0].training, "generate gives the mode back as it found it"
    model(x, ids).sum().backward()  # inference_mode would forbid this
    assert model.embedding.weight.grad is not None, "pseudo-labels are trained on"


def test_one_sentence_goes_on_when_the_other_has_ended(monkeypatch):
    model, steps = tiny(), [[1, 5], [6], [7], [1]]  # the argmax of each step, of the rows that still run
    monkeypatch.setattr(m.T5, "logits", lambda self, hidden: F.one_hot(torch.tensor(steps.pop(0)), 40).float())
    found = model.generate(padded([[5, 6, 1], [7, 8, 1]]), 9).tolist()
    assert found == [[1, 0, 0, 0], [5, 6, 7, 1]] and not steps, "all end when the last has ended, and no sooner"


def test_greedy_and_64_tokens_by_default(text_folder, capsys, monkeypatch):
    model = follow(tiny(decoder_start_token_id=2), {2: {3: 0.6, 4: 0.4}, 3: {3: 0.5, 5: 0.4}, 4: {4: 1.0}})
    assert model.generate(padded([[5, 1]])).tolist() == [[3] * 64], "the likeliest word each time, not the best 64"
    asked = []
    monkeypatch.setattr(m.T5, "generate", lambda self, ids, *options: asked.append(options) or ids)
    assert m.main([str(text_folder), "text"]) == 0 and asked == [(64, 1)], "on the command line, too"


@pytest.mark.parametrize("options", ({"max_new_tokens": 0}, {"num_beams": 0}, {"max_new_tokens": 1 << 61},
                                     {"num_beams": 10 ** 20}))
def test_generate_refuses_impossible_counts(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        tiny().generate(padded([[4, 1]]), **options)
    with pytest.raises(ValueError, match="sentences"):
        tiny().generate(torch.zeros(0, 2, dtype=torch.long))


# ----------------------------------------------------------------------------- checkpoints that work


def header_of(path):
    """{name: entry} of a safetensors file, parsed here so that reader and writer can not share a mistake."""
    raw = Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + length]), length, len(raw)


@pytest.fixture
def folder(tmp_path):
    """A copy of a fixture to change."""
    shutil.copytree(FIXTURES / "t5_tied", tmp_path / "t5")
    return tmp_path / "t5"


def change_config(folder, drop=(), **values):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | values
    config = {name: value for name, value in config.items() if name not in drop}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def change_weights(folder, function):
    """Rewrite the weight file after function(weights), which changes the dictionary."""
    weights = m.read_safetensors(folder / "model.safetensors")
    function(weights)
    m.write_safetensors(weights, folder / "model.safetensors")


def assert_same_logits(folder, name="t5_tied", tolerance=0.0):
    model, expected = load(name)
    x, y = expected["input_ids"], expected["decoder_ids"]
    with torch.no_grad():
        ours, theirs = m.load_t5(folder)(x, y), model(x, y)
    assert relative(ours, theirs) <= tolerance, "the same model in another file must give the same logits"


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    m.save_t5(m.load_t5(FIXTURES / name), tmp_path / "new" / "folder")
    assert_same_logits(tmp_path / "new" / "folder", name)
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text(encoding="utf-8"))
    layers = (config["num_layers"], config["num_decoder_layers"])
    assert layers == ((2, 3) if name == "t5_asymmetric" else (2, 2)), "write both counts: readers assume them equal"
    assert config["tie_word_embeddings"] is (name != "t5_gated") and config["model_type"] == "t5"
    assert config["is_encoder_decoder"] is True and config["architectures"] == ["T5ForConditionalGeneration"]
    generation = json.loads((tmp_path / "new" / "folder" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["decoder_start_token_id"] == (5 if name == "t5_asymmetric" else 0), "generation needs its start"


def test_checkpoint_name_by_hand():
    """Sub-layers are numbered in their order; the stack's position table is a tensor of block 0 in the files."""
    for ours, theirs in (
            ("embedding.weight", "shared.weight"),
            ("head.weight", "lm_head.weight"),
            ("encoder.norm.weight", "encoder.final_layer_norm.weight"),
            ("encoder.positions.weight", TABLE),
            ("decoder.positions.weight", TABLE.replace("encoder", "decoder")),
            ("encoder.layers.1.self_norm.weight", "encoder.block.1.layer.0.layer_norm.weight"),
            ("encoder.layers.11.self_attention.q.weight", "encoder.block.11.layer.0.SelfAttention.q.weight"),
            ("encoder.layers.1.feed_forward_norm.weight", "encoder.block.1.layer.1.layer_norm.weight"),
            ("encoder.layers.0.feed_forward.wi.weight", "encoder.block.0.layer.1.DenseReluDense.wi.weight"),
            ("decoder.layers.0.self_attention.o.weight", "decoder.block.0.layer.0.SelfAttention.o.weight"),
            ("decoder.layers.3.cross_norm.weight", "decoder.block.3.layer.1.layer_norm.weight"),
            ("decoder.layers.3.cross_attention.v.weight", "decoder.block.3.layer.1.EncDecAttention.v.weight"),
            ("decoder.layers.3.feed_forward_norm.weight", "decoder.block.3.layer.2.layer_norm.weight"),
            ("decoder.layers.3.feed_forward.wi_0.weight", "decoder.block.3.layer.2.DenseReluDense.wi_0.weight")):
        found = m.checkpoint_name(ours)
        assert found == theirs, f"our {ours} is {theirs} in a checkpoint, not {found}: sub-layers are numbered in " \
            f"their order (0 self, 1 cross in the decoder, then feed-forward), the stack's position table is in block 0"


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_name_of_every_parameter(name):
    header, _, _ = header_of(FIXTURES / name / "model.safetensors")
    with torch.device("meta"):  # shapes only
        model = m.T5(m.read_config(FIXTURES / name / "config.json"))
    found = {m.checkpoint_name(ours): list(weight.shape) for ours, weight in model.named_parameters()}
    expected = {theirs: entry["shape"] for theirs, entry in header.items() if theirs != "__metadata__"}
    for names in (found, expected):
        names.pop("lm_head.weight", None)  # whether there is one the file decides, when it is loaded
    assert found == expected, "our parameters are exactly the tensors of Hugging Face's file, names and shapes"


@pytest.mark.parametrize("tied, scaled", ((True, True), (False, False), (True, False), (False, True)))
def test_tied_head_by_hand(tied, scaled):
    """The logits of v1.0: h d_model^-0.5 E^T, with the embedding's own matrix E, as it has no other head."""
    model = tiny(tie_word_embeddings=tied, scale_decoder_outputs=scaled)  # d_model is 16
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    head = model.embedding.weight if tied else model.head.weight
    found, expected = model.logits(hidden), hidden @ head.t() * (0.25 if scaled else 1.0)
    assert found.shape == (2, 3, 50) and torch.allclose(found, expected, atol=1e-5), \
        f"{'the embedding is the head' if tied else 'the head has its own matrix'}; scale_decoder_outputs {scaled}: " \
        f"the decoder's output goes into it {'times d_model^-0.5, here 1/4, as in v1.0' if scaled else 'as it is'}"


@pytest.mark.parametrize("name", NAMES)
def test_saved_header(name, tmp_path):
    m.save_t5(m.load_t5(FIXTURES / name), tmp_path)
    header, length, size = header_of(tmp_path / "model.safetensors")
    assert header.pop("__metadata__") == {"format": "pt"}, "readers want to know that these are PyTorch tensors"
    theirs, _, _ = header_of(FIXTURES / name / "model.safetensors")
    shapes = {key: entry["shape"] for key, entry in theirs.items() if key != "__metadata__"}
    assert {key: entry["shape"] for key, entry in header.items()} == shapes, "names and shapes are Hugging Face's"
    assert length % 8 == 0, "the data starts aligned"
    end = 0
    for begin, stop in sorted(entry["data_offsets"] for entry in header.values()):
        assert begin == end, "tensors follow each other without a gap or an overlap"
        end = stop
    assert 8 + length + end == size, "the file ends with its last tensor"


@pytest.mark.parametrize("name, scale", (("t5_tied", False), ("t5_gated", True)))
def test_head_and_scale_are_independent(name, scale, tmp_path):
    model, expected = load(name)
    model.config.scale_decoder_outputs = scale
    m.save_t5(model, tmp_path)
    again = m.load_t5(tmp_path)
    assert again.config.scale_decoder_outputs is scale, "the scale must survive saving, whether or not the head is tied"
    assert (again.head is again.embedding) == (name == "t5_tied"), "so must the tie"
    with torch.no_grad():
        inputs = expected["input_ids"], expected["decoder_ids"]
        assert torch.equal(model(*inputs), again(*inputs)), "the same model in another file gives the same logits"
    if not scale:  # older readers know one flag
        change_config(tmp_path, drop=("scale_decoder_outputs",))
        assert m.load_t5(tmp_path).config.scale_decoder_outputs is False, "the tie must imply the scale"
        assert "lm_head.weight" in header_of(tmp_path / "model.safetensors")[0], "untied files have a head"


def test_defaults_are_hugging_faces():
    assert m.T5Config() == m.T5Config(32128, 512, 64, 2048, 8, 6, 6, 32, 128, 0.1, 1e-6, "relu", True, True, 0, 1, 0), \
        "what a config.json leaves out has Hugging Face's default, the value of t5-small"


def test_old_configs(folder):
    change_config(folder, drop=("scale_decoder_outputs", "tie_word_embeddings", "num_decoder_layers",
                                "feed_forward_proj"), task_specific_params={"summarization": {"min_length": 30}})
    assert_same_logits(folder)  # defaults of v1.0: tied, scaled, as many decoder layers, relu


def test_old_config_without_the_scale_takes_it_from_the_tie(tmp_path):
    shutil.copytree(FIXTURES / "t5_gated", tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, drop=("scale_decoder_outputs",), tie_word_embeddings=False, model_type="mt5")
    assert_same_logits(tmp_path, "t5_gated")


def test_the_file_decides_whether_the_head_is_tied(tmp_path):
    shutil.copytree(FIXTURES / "t5_gated", tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, tie_word_embeddings=True, scale_decoder_outputs=False)
    assert_same_logits(tmp_path, "t5_gated")


@pytest.mark.parametrize("number", range(1, 16))
def test_aliases_in_any_combination(folder, number):
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")

    def function(weights):
        embedding = weights.pop("shared.weight")
        weights.update({name: embedding for i, name in enumerate(names) if number >> i & 1})

    change_weights(folder, function)
    assert_same_logits(folder)
    model = m.load_t5(folder)
    assert model.head is model.embedding, "four names of one tensor make a tied model"


def test_leftover_of_old_files_is_ignored(folder):
    change_weights(folder, lambda weights: weights.update({m.LEFTOVER: torch.zeros(8, 4)}))
    assert_same_logits(folder)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("file", ("model.safetensors", "pytorch_model.bin"))
def test_other_dtypes_load_as_float32(folder, dtype, file):
    weights = m.read_safetensors(folder / "model.safetensors")
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    (folder / "model.safetensors").unlink()
    m.write_safetensors(cast, folder / file) if file.endswith("safetensors") else torch.save(cast, folder / file)
    model = m.load_t5(folder)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}, "models are loaded in float32"
    assert torch.equal(model.embedding.weight, cast["shared.weight"].float()), "and hold the file's values"
    assert all(weight.requires_grad for weight in model.parameters()) and not model.training


@pytest.mark.parametrize("spoil", (
    lambda x: x.to(torch.int8), lambda x: x.to(torch.complex64), lambda x: x.to_sparse(), lambda x: x.to("meta")))
def test_other_tensors_than_plain_numbers_are_refused(folder, spoil):
    weights = m.read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "encoder.final_layer_norm.weight"
    torch.save({**weights, name: spoil(weights[name])}, folder / "pytorch_model.bin")
    refused(folder, str(folder), name, "not plain floating-point numbers")


@pytest.mark.parametrize("name", m.ALIASES)
@pytest.mark.parametrize("other", (lambda x: x + 1, lambda x: x[:3]))
def test_two_embeddings_are_refused(folder, name, other):
    change_weights(folder, lambda weights: weights.update({name: other(weights["shared.weight"])}))
    refused(folder, str(folder), f"tensor {name} is another one than its alias")


def test_a_head_of_eight_bits(folder):
    weights = m.read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    head = weights["shared.weight"].to(torch.float8_e4m3fn)
    torch.save({**weights, "lm_head.weight": head}, folder / "pytorch_model.bin")
    assert torch.equal(m.load_t5(folder).head.weight, head.float())


@pytest.mark.parametrize("zipped", (True, False))
def test_pytorch_file(folder, zipped):
    weights = m.read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)  # False: as before 2020
    assert_same_logits(folder)


def shard(folder, name):
    """Replace the weight file by two shards and an index. Returns the index's path."""
    weights = list(m.read_safetensors(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    stem, suffix = name.split(".")
    weight_map = {}
    for i, part in enumerate((dict(weights[:7]), dict(weights[7:])), 1):
        file = f"{stem}-{i:05}-of-00002.{suffix}"
        m.write_safetensors(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return index


@pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin"))
def test_shards(folder, name):
    shard(folder, name)
    assert_same_logits(folder)


def test_read_safetensors_by_hand(tmp_path):
    """8 bytes of little-endian header length, the JSON header, then raw data; offsets count from the data's start."""
    header = {"second": {"dtype": "F32", "shape": [2, 1], "data_offsets": [4, 12]}, "__metadata__": {"a": "b"},
              "first": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}}
    header = json.dumps(header).encode()
    data = np.array([7, 258], "<i2").tobytes() + np.array([1.5, -2.0], "<f4").tobytes()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + data)
    try:
        tensors = m.read_safetensors(tmp_path / "file")
    except ValueError as error:
        pytest.fail(f"a good file: the first 8 bytes are the header's length, little-endian, the header names tensors "
                    f"in any order, offsets count from the header's end ({error})")
    assert sorted(tensors) == ["first", "second"], "one tensor for each name but __metadata__"
    for name, values, dtype in (("first", [7, 258], torch.int16), ("second", [[1.5], [-2.0]], torch.float32)):
        assert tensors[name].tolist() == values and tensors[name].dtype is dtype, \
            f"{name} is {values} in {dtype}, not {tensors[name]}: offsets count from the header's end, bytes are " \
            f"little-endian, dtype and shape are the header's"


def test_read_safetensors_of_every_dtype(tmp_path):
    tensors = {str(dtype): torch.tensor([[0, 1], [2, 3]]).to(dtype) for dtype in m.DTYPES.values()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).view(2, 3).T}
    m.write_safetensors(tensors, tmp_path / "file")
    again = m.read_safetensors(tmp_path / "file")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), \
            f"{name} must come back with its type, shape and values"


# ----------------------------------------------------------------------------- checkpoints that must be refused


def refused(folder, *words, error=(ValueError, OSError)):
    """load_t5 must raise one line that has all these words in it."""
    with pytest.raises(error) as caught:
        m.load_t5(folder)
    message = str(caught.value)
    assert type(caught.value) in (ValueError, FileNotFoundError), "a user's mistake is a ValueError or an OSError"
    for word in words:
        assert word in message, f"the message must name {word!r}: {message}"
    assert "\n" not in message, "one line"


@pytest.mark.parametrize("name", (
    "shared.weight", TABLE, "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.final_layer_norm.weight", "decoder.block.1.layer.1.EncDecAttention.k.weight",
    "encoder.block.1.layer.1.DenseReluDense.wo.weight"))
def test_missing_tensor(folder, name):
    change_weights(folder, lambda weights: weights.pop(name))
    refused(folder, str(folder), name, "missing")


def test_untied_head_does_not_stand_in_for_a_missing_embedding(tmp_path):
    shutil.copytree(FIXTURES / "t5_gated", tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, tie_word_embeddings=False)
    change_weights(tmp_path, lambda weights: weights.pop("shared.weight"))
    refused(tmp_path, "shared.weight", "missing")


@pytest.mark.parametrize("name", ("shared.weight", TABLE, "decoder.block.1.layer.2.DenseReluDense.wi.weight"))
def test_wrong_shape(folder, name):
    change_weights(folder, lambda weights: weights.update({name: weights[name][:-1]}))
    refused(folder, str(folder), name, "shape")


def test_head_of_wrong_shape(folder):
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["shared.weight"][:-1]}))
    refused(folder, "lm_head.weight", "shape")


@pytest.mark.parametrize("name", (
    "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "lm_head.bias",
    "encoder.block.2.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"))
def test_unexpected_tensor(folder, name):
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(3)}))
    refused(folder, str(folder), name, "unexpected")


def test_config_with_too_few_layers(folder):
    change_config(folder, num_decoder_layers=1)
    refused(folder, "unexpected", "decoder.block.1")


@pytest.mark.parametrize("values, words", (
    ({"model_type": "umt5"}, ("umt5", "UMT5")),
    ({"model_type": "bert"}, ("model_type", "bert")),
    ({"model_type": None}, ("model_type",)),
    ({"feed_forward_proj": "gated-silu"}, ("feed_forward_proj", "gated-silu")),
    ({"d_model": "16"}, ("d_model", "'16'")),
    ({"d_model": 0}, ("d_model", "0")),
    ({"num_layers": True}, ("num_layers",)),
    ({"pad_token_id": -1}, ("pad_token_id", "-1")),
    ({"eos_token_id": [1, 2]}, ("eos_token_id",)),
    ({"d_model": 10**30}, ("d_model", "1048576")),  # more than torch can count
    ({"num_layers": 10**9}, ("num_layers", "1024"))))  # days and terabytes before the first tensor is missed
def test_bad_config(folder, values, words):
    change_config(folder, **values)
    refused(folder, "config.json", *words, error=ValueError)


@pytest.mark.parametrize("good, bad", (
    ({"dropout_rate": 0}, {"dropout_rate": -0.1}), ({"dropout_rate": 0.99}, {"dropout_rate": 1}),
    ({"layer_norm_epsilon": 0}, {"layer_norm_epsilon": -1e-6}), ({}, {"layer_norm_epsilon": float("nan")}),
    ({"num_layers": 1}, {"num_layers": 0}), ({"num_layers": 1024}, {"num_layers": 1025}),
    ({"d_ff": 1 << 20}, {"d_ff": (1 << 20) + 1}), ({"pad_token_id": 98}, {"pad_token_id": 99}),  # of 99 words
    ({"relative_attention_num_buckets": 4}, {"relative_attention_num_buckets": 3}),
    ({"relative_attention_num_buckets": 8, "relative_attention_max_distance": 5},
     {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 4})))
def test_config_at_its_limits(folder, good, bad):
    change_config(folder, **good)
    config = m.read_config(folder / "config.json")
    assert good.items() <= vars(config).items(), f"{good} is possible"
    change_config(folder, **bad)
    with pytest.raises(ValueError, match=f"config.json.*{[*bad][-1]}|config.json: a token id lies outside"):
        m.read_config(folder / "config.json")


@pytest.mark.parametrize("text", (b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100000, b"1" * 5000))
def test_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_bytes(text)
    refused(folder, "config.json", error=ValueError)


@pytest.mark.parametrize("name", ("config.json", "model.safetensors"))
def test_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, str(folder), name, error=FileNotFoundError)


def test_read_safetensors_truncated(folder):
    path = folder / "model.safetensors"
    raw, (_, length, size) = path.read_bytes(), header_of(path)
    for cut in (0, 5, 8, 100, 8 + length - 1, 8 + length, 8 + length + 10, size - 1):
        path.write_bytes(raw[:cut])
        refused(folder, "model.safetensors", "truncated", error=ValueError)


@pytest.mark.parametrize("header", (
    b"not json", b"[]", b"[1]", b"3", b"\xff\xff", b'{"a": 1}', b'{"a": {}}', b"{" * 3000,
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [0, 99999999999999999999], "data_offsets": [0, 0]}}',
    b'{"__metadata__": {"a": "' + b"x" * 2**21 + b'"}}',  # larger than any header has reason to be
    b'{"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
    b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'))
def test_read_safetensors_with_a_bad_header(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    refused(folder, "model.safetensors", error=ValueError)


def test_a_dtype_that_is_not_known_is_named(folder):
    header = b'{"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(folder, "model.safetensors", "tensor a: dtype Q4 is not known here", error=ValueError)


def test_bytes_that_belong_to_no_tensor(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + bytes(4))
    refused(folder, "model.safetensors", "the tensors end at byte", error=ValueError)


@pytest.mark.parametrize("raw", (b"", b"not a weight file", b"PK\x03\x04", b"\x80\x02", b"\x00" * 4096))
def test_bin_that_is_no_weight_file(folder, raw):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(raw)
    refused(folder, "pytorch_model.bin", error=ValueError)


@pytest.mark.parametrize("value", ([1, 2], {"shared.weight": 3}, {"state_dict": {"a": torch.zeros(1)}}, torch.ones(2)))
def test_bin_without_tensors(folder, value):
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", error=ValueError)


@pytest.mark.parametrize("name, reader", (("model.safetensors", "empty"), ("pytorch_model.bin", "load")))
def test_weights_too_large_for_the_memory_are_not_damaged(folder, monkeypatch, name, reader):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1500000000 bytes.")
    if reader == "load":
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / name)
    monkeypatch.setattr(torch, reader, full)
    with pytest.raises(MemoryError, match=f"^out of memory: .*{name}$"):
        m.load_t5(folder)


class Code:
    """Pickled, this is a call of os.system."""
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"echo run > {self.file}",)


def test_code_in_a_bin_is_not_run(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": Code(tmp_path / "run")}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", error=ValueError)
    assert not (tmp_path / "run").exists(), "loading weights must not run code from the file"


def test_packed_bin_is_refused_unread(folder, monkeypatch):
    """Some kilobytes that would be gigabytes in memory."""
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": torch.zeros(100_000)}, folder / "loose.bin")
    with zipfile.ZipFile(folder / "loose.bin") as loose, \
            zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in loose.infolist():
            packed.writestr(entry.filename, loose.read(entry))
    monkeypatch.setattr(torch, "load", None)
    refused(folder, "pytorch_model.bin", "larger than the file", error=ValueError)


@pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin"))
def test_missing_shard(folder, name):
    index = shard(folder, name)
    missing = name.replace(".", "-00002-of-00002.")
    (folder / missing).unlink()
    refused(folder, missing, error=FileNotFoundError)
    assert index.exists()


@pytest.mark.parametrize("weight_map", (
    {},
    {"shared.weight": "../elsewhere.safetensors"}, {"shared.weight": "/etc/passwd"}, {"shared.weight": ".."},
    {"shared.weight": "sub/../../elsewhere.safetensors"}, {"shared.weight": "./elsewhere.safetensors"},
    {"shared.weight": "/elsewhere.safetensors"}, {"shared.weight": "a.safetensors/"},
    {"shared.weight": ""}, {"shared.weight": 3}, {"shared.weight": "config.json"}, {"shared.weight": ["a"]}, [1], None))
def test_index_that_points_elsewhere(folder, weight_map):
    shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    index = shard(folder, "model.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    refused(folder, index.name, error=ValueError)


def test_names_from_a_file_fit_on_one_line(folder):
    change_weights(folder, lambda weights: weights.update({"a\nb\x1b[2J": torch.zeros(0)}))
    with pytest.raises(ValueError) as caught:
        m.load_t5(folder)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value), "no name may write on the terminal"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, as Linux has")
def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(m, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    with pytest.raises(OSError, match="No space left on device: .*c.json"):
        m.write_json({"a": 1}, tmp_path / "c.json")
    with pytest.raises(OSError) as caught, m.naming("c.json"):
        raise OSError("an error of ours, with its own words")
    assert str(caught.value) == "an error of ours, with its own words", "an error that says all is left alone"


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = m.load_t5(FIXTURES / "t5_tied")

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(m.os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            m.save_t5(model, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == [], "a failed save leaves no part of a file"
    m.save_t5(model, tmp_path / "new")
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    model.decoder.norm.weight.data = model.decoder.norm.weight.data.to(torch.complex64)  # no such type in the format
    with pytest.raises(Exception):
        m.save_t5(model, tmp_path / "new")
    after = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert before == after, "a failed save leaves the old files as they were"


# ----------------------------------------------------------------------------- fetching by name


class Hub(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; of the file `server.cut` only half arrives, in one of two ways."""
    def do_GET(self):
        self.server.asked.append(self.path.rsplit("/", 1)[1])
        if self.server.cut != self.server.asked[-1]:
            return super().do_GET()
        raw = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        if self.server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            raw = b"%x\r\n" % len(raw) + raw
        else:
            self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw[:len(raw) // 2])
        self.close_connection = True

    def log_message(self, *_):
        pass


class ChunkedHub(Hub):
    protocol_version = "HTTP/1.1"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on the loopback with the model "me/tiny"; `hub.files` is its folder there."""
    files = tmp_path / "site" / "me" / "tiny" / "resolve" / "main"
    shutil.copytree(FIXTURES / "t5_tied", files)
    (files / "spiece.model").write_bytes(b"pieces")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: ChunkedHub(*args, directory=str(tmp_path / "site")))
    server.asked, server.cut, server.chunked, server.files = [], None, False, files
    server.cache = tmp_path / "cache" / "me" / "tiny"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("MODULAR_T5_HUB", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("MODULAR_T5_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def test_two_runs_may_fetch_at_once(hub, monkeypatch):
    """The other one, killed half-way, must leave nothing in what this one writes."""
    hub.cache.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (hub.cache / f"{name}.part").mkdir()  # writing there would fail
    fetched, replace = [], m.os.replace
    monkeypatch.setattr(m.os, "replace", lambda part, path: fetched.append(str(part)) or replace(part, path))
    assert_same_logits("me/tiny")
    assert len(fetched) == 3 and all(part.endswith(f".{os.getpid()}.part") for part in fetched)


def test_fetch_by_name_once(hub):
    assert_same_logits("me/tiny")
    assert {path.name for path in hub.cache.iterdir()} == {"config.json", "spiece.model", "model.safetensors"}
    asked = list(hub.asked)
    assert_same_logits("me/tiny")
    assert hub.asked == asked, "what is in the cache is not asked for again"


@pytest.mark.parametrize("name", ("pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json"))
def test_fetch_falls_back(hub, name, monkeypatch):
    if name == "pytorch_model.bin":
        torch.save(m.read_safetensors(hub.files / "model.safetensors"), hub.files / name)
        (hub.files / "model.safetensors").unlink()
    else:
        shard(hub.files, name.removesuffix(".index.json"))
    assert_same_logits("me/tiny")
    monkeypatch.setenv("MODULAR_T5_HUB", closed_address())
    assert_same_logits("me/tiny")  # what is in the cache works offline


@pytest.mark.parametrize("chunked", (False, True))
@pytest.mark.parametrize("name", ("config.json", "model.safetensors"))
def test_truncated_download_is_not_kept(hub, name, chunked):
    hub.cut, hub.chunked = name, chunked
    with pytest.raises(OSError, match="me/tiny"):
        m.load_t5("me/tiny")
    left = {path.name for path in hub.cache.iterdir()}
    assert left <= {"config.json", "spiece.model"} - {name}, "half a file must not look like a whole one"
    hub.cut = None
    assert_same_logits("me/tiny")


def closed_address():
    """The address of a port on which nothing listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def assert_offline_line(name, cache):
    with pytest.raises(OSError) as caught:
        m.load_t5(name)
    message = str(caught.value)
    for word in (name, "config.json", "spiece.model", "model.safetensors", str(cache)):
        assert word in message, f"offline, the user must read which files to put where: {message}"
    assert "\n" not in message, "one line"


def test_offline(hub, monkeypatch):
    monkeypatch.setenv("MODULAR_T5_HUB", closed_address())
    assert_offline_line("me/tiny", hub.cache)
    shutil.copytree(hub.files, hub.cache, dirs_exist_ok=True)  # what the line says
    assert_same_logits("me/tiny")


def test_no_such_model(hub):
    assert_offline_line("me/none", hub.cache.parent / "none")
    assert not (hub.cache.parent / "none").exists(), "no folder is left of a name that nobody has"
    (hub.files / "model.safetensors").unlink()
    assert_offline_line("me/tiny", hub.cache)


def test_the_cache_needs_no_home(monkeypatch, tmp_path):
    def none(*_):
        raise RuntimeError("no home")
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setenv("MODULAR_T5_HUB", closed_address())
    for cache in (str(tmp_path), ""):
        monkeypatch.setenv("MODULAR_T5_CACHE", cache)
        with pytest.raises(OSError, match=f"into {re.escape(cache or os.path.expanduser('~/.cache'))}"):
            m.find_t5("me/tiny")


@pytest.mark.parametrize("name", ("/no/such/folder", "a/b/c", "../up", "my model", "mod\u00e8le", ""))
def test_what_can_not_be_a_name_is_not_asked_for(hub, name):
    with pytest.raises(OSError):
        m.load_t5(name)
    assert hub.asked == [], "a path that is no model's name must not reach the network"


# ----------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A fixture with a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    shutil.copytree(FIXTURES / "t5_tied", folder, dirs_exist_ok=True)
    texts = [text for pair in data.toy_corpus(100, seed=0) for text in pair]
    data.train_tokenizer(texts, folder / "spiece.model", 60)
    return folder


TEXTS = ["one line", "", "an other line"]


def test_command_line_answers_each_text(text_folder, capsys):
    assert m.main([str(text_folder), *TEXTS, "--max-new-tokens", "5"]) == 0
    lines = capsys.readouterr().out.split("\n")
    model, tokenizer = m.load_t5(text_folder), data.Tokenizer(text_folder)
    ids = [model.generate(torch.tensor([tokenizer.encode(text)]), 5)[0].tolist() for text in TEXTS]
    assert lines == [*map(tokenizer.decode, ids), ""], "one line for each input, in its order"


def test_command_line_reads_standard_input(text_folder, capsys, monkeypatch):
    assert m.main([str(text_folder), *TEXTS, "--num-beams", "2"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode()), encoding="utf-8"))
    assert m.main([str(text_folder), "--num-beams", "2"]) == 0
    assert capsys.readouterr().out == expected, "a line of standard input is answered as the same argument is"
    assert m.main([str(text_folder), "--num-beams", "2", *TEXTS]) == 0
    assert capsys.readouterr().out == expected, "options may stand before the texts"


@pytest.mark.parametrize("options, words", (
    (["--num-beams", "0"], ["num_beams"]), (["--max-new-tokens", "0"], ["max_new_tokens"]),
    (["--device", "meta"], ["--device", "meta"])))
def test_command_line_refuses_options(text_folder, capsys, options, words):
    assert m.main([str(text_folder), "text", *options]) == 2, "a wrong option is exit status 2"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), "one line that names the option"


def test_command_line_names_the_input_that_is_not_text(text_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"fine\n\xff\n"), encoding="utf-8"))
    assert m.main([str(text_folder)]) == 2
    output = capsys.readouterr()
    assert output.out.count("\n") == 1 and "input 2: not valid UTF-8" in output.err


def test_command_line_refuses_a_token_without_a_row(text_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(text_folder, folder)
    model = tiny(vocab_size=len(data.Tokenizer(folder).pieces))  # no rows for sentinels
    m.save_t5(model, folder)
    assert m.main([str(folder), "one line"]) == 0, "as long as the text has none"
    assert m.main([str(folder), "<extra_id_0>"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "spiece.model" in error and f"vocab_size {model.config.vocab_size}" in error


@pytest.mark.parametrize("name, value", (("eos_token_id", 7), ("pad_token_id", 9)))
def test_command_line_refuses_another_ones_tokenizer(text_folder, tmp_path, capsys, name, value):
    folder = tmp_path / "model"
    shutil.copytree(text_folder, folder)
    m.write_json({**m.read_json(folder / "config.json"), name: value}, folder / "config.json")
    assert m.main([str(folder), "one line"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.json has pad_token_id" in error and "spiece.model 0 and 1" in error


def test_a_reader_may_go_away(text_folder):
    run = subprocess.Popen([sys.executable, str(ROOT / "model.py"), str(text_folder), *["one line"] * 30],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    run.stdout.close()  # as `| head -1` does
    assert (run.wait(timeout=60), run.stderr.read()) == (141, "")
    run.stderr.close()


@pytest.mark.parametrize("error, status, line", (
    (BrokenPipeError("gone"), 141, ""), (OSError("No space left"), 2, "test_model.py: No space left\n")))
@pytest.mark.parametrize("fault", (None, ValueError("wrong")))
def test_output_that_comes_out_with_the_end(monkeypatch, capsys, error, status, line, fault):
    """A short output stays in Python's buffer until then, if it goes to a file or a pipe."""
    class Gone(io.RawIOBase):
        def writable(self):
            return True

        def write(self, _):
            raise error

    def run(_):
        print("one line")
        if fault:
            raise fault
    nowhere = []
    monkeypatch.setattr(m.os, "dup2", lambda _, descriptor: nowhere.append(descriptor))
    out = io.TextIOWrapper(io.BufferedWriter(Gone()))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert m.command_line(run)([]) == (2 if fault else status)
    assert nowhere == [1], "nor shall Python's own end try again to write what is left"
    assert capsys.readouterr().err == ("test_model.py: wrong\n" if fault else line), "one line, of the first error"
    with pytest.raises(type(error)):
        out.close()


def test_command_line_names_the_bad_file(folder):
    (folder / "model.safetensors").write_bytes(b"x")
    run = subprocess.run([sys.executable, str(ROOT / "model.py"), str(folder), "text"], capture_output=True, text=True,
                         timeout=60)
    assert run.returncode == 2 and run.stdout == "", "a user's mistake is exit status 2"
    assert run.stderr.count("\n") == 1 and "model.safetensors" in run.stderr, "one line that names the file"


def test_of_many_processes_each_tries_its_own_gpu(monkeypatch):
    tried, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, device: tried.append(device) or zeros(n))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        m.Parser.device("cuda")
    m.Parser.device("cpu")
    assert tried == ["cuda:0", "cuda:1", "cuda", "cpu"], "the third has none: train.py says so"


def ends(error, context=None):
    """What a command line makes of an error: (exit status, or the error)."""
    def run(argv):
        try:
            if context:
                raise context
        finally:
            raise error
    try:
        return m.command_line(run)([])
    except BaseException as raised:
        return raised


@pytest.mark.parametrize("error, context, status, line", (
    (ValueError("a.tsv:3: bad\n\x1b[2J"), None, 2, "test_model.py: a.tsv:3: bad  [2J\n"),
    (MemoryError("a batch of 3 x 4"), None, 2, "test_model.py: a batch of 3 x 4\n"),
    (MemoryError(), None, 2, "test_model.py: out of memory\n"),
    (torch.OutOfMemoryError("CUDA out of memory."), None, 2, "test_model.py: CUDA out of memory.\n"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."), None, 2,
     "test_model.py: DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes.\n"),
    (FloatingPointError("step 3"), None, 2, "test_model.py: step 3\n"),
    (KeyboardInterrupt(), None, 130, "interrupted\n"),
    (RuntimeError("torch's own"), KeyboardInterrupt(), 130, "interrupted\n"),
    (ValueError("another library's"), KeyboardInterrupt(), 130, "interrupted\n")))
def test_one_line_and_a_status(error, context, status, line, capsys):
    assert ends(error, context) == status
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback(capsys):
    for error in (RuntimeError("a bug"), KeyError("a bug"), SystemExit(2)):
        assert ends(error) is error
    assert capsys.readouterr().err == ""


def test_developers_see_the_traceback_of_every_error():
    line = "import model; model.command_line(lambda argv: int('x'))([])"
    run = subprocess.run([sys.executable, "-X", "dev", "-c", line], cwd=ROOT, capture_output=True, text=True,
                         timeout=60)
    assert "Traceback" in run.stderr and "invalid literal" in run.stderr and run.returncode == 1


def test_output_is_utf_8_on_every_system(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # of a pipe on Windows
    monkeypatch.setattr(sys, "stdout", out)
    assert m.command_line(lambda argv: print("家", flush=True))([]) == 0
    assert out.buffer.getvalue().strip() == "家".encode()


def test_out_of_memory_says_for_what():
    with pytest.raises(MemoryError, match="out of memory: a large batch"), m.memory_for("a large batch"):
        torch.empty(10**15)  # the CPU's allocator
    with pytest.raises(MemoryError, match="a large batch"), m.memory_for("a large batch"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="illegal"), m.memory_for("a large batch"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
