"""T5, an encoder-decoder Transformer, by hand (Raffel et al. 2020, https://arxiv.org/abs/1910.10683).

What differs from the textbook Transformer: no biases in linear layers; RMSNorm *before* each sub-layer;
attention scores are not divided by sqrt(d); positions enter as one learned bias per head and distance bucket,
shared by all layers of a stack. The *stack* owns that table and the final norm, a layer owns nothing but its own
weights: that is what lets `encode` and `decode` run any list of layers, which is all that this project needs.

Read it downwards: config, norm, positions, attention, layers, stack, T5, generation, checkpoints.
    python model.py DIR_OR_NAME "translate English to German: The house is wonderful."
    pytest tests/test_model.py
"""
import argparse
import functools
import inspect
import io
import json
import math
import os
import re
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


@dataclass
class T5Config:
    """The fields of a Hugging Face `config.json` that change the computation, under their names there."""
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64                         # width of one head; num_heads * d_kv need not be d_model
    d_ff: int = 2048
    num_heads: int = 8
    num_layers: int = 6                    # of the encoder
    num_decoder_layers: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"        # "relu" (v1.0) or "gated-gelu" (v1.1, Flan, mT5)
    tie_word_embeddings: bool = True       # the head is the embedding
    scale_decoder_outputs: bool = True     # multiply the decoder's output by d_model**-0.5 before the head (v1.0)
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0


# ---- the parts of a layer

class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (https://arxiv.org/abs/1910.07467).

    No mean is subtracted and no bias added. The mean square is taken in float32: in 16 bit it loses digits. y has the
    weight's dtype: in a float16 model x is float32 from the first `wo` on (see `FeedForward`). On a GPU torch has one
    kernel for it, in place of seven, which take longer to launch than to run; tests check that they agree.
    """
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x):
        """(..., d_model) -> the same shape."""
        x32 = x.float()
        if x.is_cuda:
            y = F.rms_norm(x32, self.weight.shape, self.weight.float(), self.eps).to(self.weight.dtype)
        else:
            y = self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(self.weight.dtype)
        # Under autocast several matrices read y: rounded here it is rounded once, not once for each of them.
        return y.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else y


def dropout(x, rate, training):
    """Zero a share `rate` of x and scale up the rest, so that the expectation stays.

    On a CPU one random byte an element, not one float: the usual mask costs a third of a small model's training step
    there. The rate is rounded to 1/256, and the scale is that of the rounded rate. Elsewhere torch has one kernel for
    it.
    """
    if not x.is_cpu:
        return F.dropout(x, rate, training)
    cut = min(255, round(rate * 256))
    if not training or cut == 0:
        return x
    words = torch.empty(x.numel() // 8 + 1, dtype=torch.int64)
    noise = words.random_(-2**63, None).view(torch.uint8)[:x.numel()].view(x.shape)
    return x * (noise >= cut).to(x.dtype) * (256 / (256 - cut))  # two products: in 16 bit the scale would be rounded


def relative_position_bucket(distance, bidirectional, num_buckets, max_distance):
    """Map key position - query position (any integer tensor) to buckets 0 ... num_buckets-1, same shape.

    T5, section 2.1: half of the buckets hold one exact distance each, the other half grow logarithmically up to
    max_distance, beyond which all distances share the last. With n buckets for a direction, the first e = n / 2 exact,
    a distance d >= e has bucket e + floor(log(d / e) / log(max_distance / e) * (n - e)), at most n - 1. The encoder
    (bidirectional) spends the second half of all buckets on keys to the right; the decoder never looks right, there
    those have bucket 0.
    """
    bucket = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    log_ratio = torch.log(distance.float().clamp(min=1) / exact) / math.log(max_distance / exact)
    far = exact + (log_ratio * (num_buckets - exact)).long()
    return bucket + torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


QUICK = threading.local()  # .copies, in a block of `quick_products` of this thread: {weight: its copy, None at first}


def linear(x, weight):
    """x W^T: (..., n) and (m, n) -> (..., m). In a block of `quick_products`, which says why, with a copy of W: not of
    small ones, which are fast anyway, nor where something learns, whose gradient a copy would hide, nor under autocast,
    which chooses the type."""
    copies = getattr(QUICK, "copies", None)
    if (copies is None or weight.numel() < 1 << 16 or weight.device.type != "cpu" or weight.dtype not in onednn_dtypes()
            or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
        return F.linear(x, weight)
    if weight not in copies:
        copies[weight] = None
        return F.linear(x, weight)
    if copies[weight] is None:
        copies[weight] = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return torch.ops.mkldnn._linear_pointwise(x, copies[weight], None, "none", [], "")


@functools.cache
def onednn_dtypes():
    """What torch lets oneDNN multiply on this processor: float32, and bfloat16, on x86 where it has AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


@contextmanager
def quick_products():
    """In the block, products with large matrices are two to three times as fast on a CPU.

    Generation reads all weights for every token, and torch's own products are far from the memory's speed: where it
    gives 70 GB/s (2 cores, AMD), they read float32 weights at 17 for one row and at 6 for 32, bfloat16 weights at 24
    and 13. From copies in its own format oneDNN reads them at 48 and 14, bfloat16 at 68 and 22. torch.compile calls the
    same two functions of it; they have no public name, so torch's version is pinned. A copy is made when a matrix is
    used for the second time (an encoder's is used once a sentence) and kept to the end of the block: as much memory as
    the weights, and the time of some tokens. `generate` is a block of its own; whoever calls it many times puts one
    around all calls, `with quick_products():`, or `@quick_products()` for a whole function. In a block the weights must
    not change.
    """
    before = getattr(QUICK, "copies", None)
    QUICK.copies = {} if before is None else before
    try:
        yield
    finally:
        QUICK.copies = before


class Linear(nn.Module):
    """A matrix, without a bias: T5 has none. Its values come from `T5.initialise` or a checkpoint."""
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x):
        """(..., inputs) -> (..., outputs)."""
        return linear(x, self.weight)


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T + bias) v: T5 does not divide by sqrt(d_kv), its init takes care of it."""
    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.d_kv, self.rate = config.d_kv, config.dropout_rate
        self.q = Linear(config.d_model, inner)
        self.k = Linear(config.d_model, inner)
        self.v = Linear(config.d_model, inner)
        self.o = Linear(inner, config.d_model)

    def heads(self, x):
        """(B, T, H * d_kv) -> (B, H, T, d_kv)."""
        return x.unflatten(-1, (-1, self.d_kv)).transpose(1, 2)

    def keys_values(self, x):
        """(B, K, d_model) -> two (B, H, K, d_kv)."""
        return self.heads(self.k(x)), self.heads(self.v(x))

    def forward(self, x, keys, values, bias, need_probs):
        """x (B, T, d_model), keys and values (B, H, K, d_kv), bias broadcastable to (B, H, T, K).

        Returns (B, T, d_model) and, if asked, the probabilities (B, H, T, K) in float32, else None. In training they
        have dropout where they mix the values, not where they are returned. The fused kernel cannot return them; tests
        check that both branches agree.
        """
        queries, probs = self.heads(self.q(x)), None
        # The CPU's fused kernel has a slow backward pass: on short sentences the plain product trains 1.4x faster. In
        # 16 bit it is slow for several sentences forward, too.
        slow = x.device.type == "cpu" and (torch.is_grad_enabled() or len(x) > 1 and x.itemsize == 2)
        if need_probs or slow:
            probs = torch.softmax((queries @ keys.transpose(-1, -2)).float() + bias, dim=-1)
            mixed = dropout(probs, self.rate, self.training).to(values.dtype) @ values
        else:
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias.to(queries.dtype), scale=1.0,
                                                   dropout_p=self.rate if self.training else 0.0)
        return self.o(mixed.transpose(1, 2).flatten(2)), probs if need_probs else None


class FeedForward(nn.Module):
    """v1.0: relu(x wi) wo.  v1.1: (gelu(x wi_0) * x wi_1) wo (https://arxiv.org/abs/2002.05202)."""
    def __init__(self, config):
        super().__init__()
        self.gated, self.rate = config.feed_forward_proj == "gated-gelu", config.dropout_rate
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, Linear(config.d_model, config.d_ff))
        self.wo = Linear(config.d_ff, config.d_model)

    def forward(self, x):
        """(B, T, d_model) -> the same shape."""
        h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x) if self.gated else F.relu(self.wi(x))
        h = dropout(h, self.rate, self.training)
        if h.dtype == torch.float16:  # wo's output passes 65,504 in published T5 weights: keep this product in float32
            with torch.autocast(h.device.type, enabled=False):
                return F.linear(h.float(), self.wo.weight.float())
        return self.wo(h)


class EncoderLayer(nn.Module):
    """x + SelfAttention(norm(x)), then x + FeedForward(norm(x))."""
    def __init__(self, config):
        super().__init__()
        self.rate = config.dropout_rate
        self.self_norm, self.self_attention = RMSNorm(config), Attention(config)
        self.feed_forward_norm, self.feed_forward = RMSNorm(config), FeedForward(config)

    def forward(self, x, bias, need_probs=False):
        """x (B, S, d_model), bias (B or 1, H, S, S) -> x, (self-attention probabilities or None,)."""
        h = self.self_norm(x)
        h, probs = self.self_attention(h, *self.self_attention.keys_values(h), bias, need_probs)
        x = x + dropout(h, self.rate, self.training)
        x = x + dropout(self.feed_forward(self.feed_forward_norm(x)), self.rate, self.training)
        return x, (probs,)


class DecoderLayer(EncoderLayer):
    """An encoder layer with attention to the encoder's output, the memory, in the middle."""
    def __init__(self, config):
        super().__init__(config)
        self.cross_norm, self.cross_attention = RMSNorm(config), Attention(config)

    def forward(self, x, bias, memory, memory_bias, need_probs=False, cache=None):
        """x (B, T, d_model), bias (1, H, T, K), memory (B, S, d_model), memory_bias (B, 1, 1, S), cache: None, or
        (LayerCache, positions (T,) of x, K).

        Returns x and the (self, cross) attention probabilities, None where not asked for. With a cache, x holds only
        the new positions, K counts the others too, and memory is not read: its keys are in the cache, once for all
        beams of a sentence, whose queries stand side by side.
        """
        h = self.self_norm(x)
        keys, values = self.self_attention.keys_values(h)
        if cache is not None:
            own, positions, visible = cache
            keys, values = own.append(keys, values, positions, visible)
        h, self_probs = self.self_attention(h, keys, values, bias, need_probs)
        x = x + dropout(h, self.rate, self.training)
        h = self.cross_norm(x)
        if cache is None:
            keys, values = self.cross_attention.keys_values(memory)
        else:
            keys, values = own.cross
            h = h.view(len(keys), -1, h.size(-1))  # (B / beams, beams T, d_model)
        h, cross_probs = self.cross_attention(h, keys, values, memory_bias, need_probs)
        x = x + dropout(h.view(x.shape), self.rate, self.training)
        x = x + dropout(self.feed_forward(self.feed_forward_norm(x)), self.rate, self.training)
        return x, (self_probs, cross_probs)


# ---- the model

class Stack(nn.Module):
    """What a list of layers shares: the position table before the first, the norm after the last."""
    def __init__(self, config, layers, bidirectional):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.positions = table(config.relative_attention_num_buckets, config.num_heads)
        self.norm = RMSNorm(config)
        self.rate, self.bidirectional = config.dropout_rate, bidirectional
        self.max_distance = config.relative_attention_max_distance

    def position_bias(self, length):
        """(1, H, length, length) for attention scores; a decoder's has the causal mask in it."""
        position = torch.arange(length, device=self.positions.weight.device)
        return self.bias_at(position[None, :] - position[:, None])

    def bias_at(self, distance):
        """The same for any (Q, K) distances, key minus query: (1, H, Q, K)."""
        bucket = relative_position_bucket(distance, self.bidirectional, self.positions.num_embeddings,
                                          self.max_distance)
        bias = self.positions(bucket).permute(2, 0, 1)[None]
        return bias if self.bidirectional else mask_out(bias, distance > 0)

    def run(self, x, layers, *inputs, need_probs=False, cache=None):
        """x (B, T, d_model) through `layers`, or the stack's own for None, then the norm -> StackOutput. inputs: what
        each layer takes behind x, the position bias and, in a decoder, the memory and its bias."""
        states, probs = [], []
        for i, layer in enumerate(self.layers if layers is None else layers):
            own = [(cache.layers[i], cache.positions, cache.visible)] if cache else []
            x, p = layer(x, *inputs, need_probs, *own)
            states.append(x)
            probs.append(p)
        return StackOutput(dropout(self.norm(x), self.rate, self.training), states, probs)


def mask_out(bias, hidden):
    """bias where `hidden` (bool, broadcastable) is False, else -30,000: nothing after a softmax, finite in float16.
    With -inf a row that is masked everywhere would be NaN."""
    return bias.masked_fill(hidden, -3e4)


class StackOutput(NamedTuple):
    """What `encode` and `decode` return. `states` and `probs` have one entry per layer that was run."""
    hidden: torch.Tensor  # (B, T, d_model), after the stack's final norm
    states: list          # (B, T, d_model) after each layer, before the final norm
    probs: list           # per layer (self,) or (self, cross) attention probabilities (B, H, T, K), or None; cross ones
                          # of a cache of several beams: (sentences, H, beams T, S)


class LayerCache:
    """Keys and values of one decoder layer: its own, put in step by step, of `beams` rows for each of the memory's,
    and the memory's, computed once. memory (B, S, d_model); max_length: positions to make room for."""
    def __init__(self, layer, memory, max_length, beams):
        self.cross = layer.cross_attention.keys_values(memory)
        B, H, _, d_kv = self.cross[0].shape
        self.keys = self.cross[0].new_zeros(B * beams, H, max_length, d_kv)  # 0, not NaN: `advance`
        self.values = torch.zeros_like(self.keys)

    def append(self, keys, values, positions, visible):
        """Put (B, H, T, d_kv) new keys and values at `positions` (T,), return those of the first `visible`, (B, H,
        visible, d_kv)."""
        self.keys.index_copy_(2, positions, keys)
        self.values.index_copy_(2, positions, values)
        return self.keys[:, :, :visible], self.values[:, :, :visible]


class Cache:
    """What decoding one more position needs of the earlier ones and of the memory: each layer's keys and values, and
    the memory's bias, which stays the same. There are `length` positions by now; `positions` (1,) is the last of them,
    the present one, on the device. memory (B, S, d_model), memory_mask (B, S), True where a token is."""
    def __init__(self, model, memory, memory_mask, max_length, beams=1):
        self.layers = [LayerCache(layer, memory, max_length, beams) for layer in model.decoder.layers]
        self.beams, self.max_length = beams, max_length
        self.length = self.visible = 0
        self.positions = torch.zeros(1, dtype=torch.long, device=memory.device)
        self.kind = self.graph = None  # (rows, visible keys) of a step, and its CUDA graph
        distance = torch.arange(1 - max_length, max_length, device=memory.device)  # all that there can be
        self.bias_of = model.decoder.bias_at(distance[None])
        self.places = distance[max_length - 1:] + (max_length - 1)  # in it, of each key, seen from position 0
        self.memory_bias = mask_out(memory.new_zeros(()), ~memory_mask[:, None, None, :])

    def advance(self):
        """Move on by a position. A step reads the first `visible` keys: all so far. On a GPU 64, 128, 256, ..., as a
        graph needs equal shapes in many steps: the bias hides those to come, which count 0 times what is there."""
        self.positions.fill_(self.length)  # in place: a CUDA graph reads it there
        self.length += 1
        self.visible = self.length
        if self.positions.is_cuda:
            self.visible = min(self.max_length, max(64, 1 << (self.length - 1).bit_length()))

    def bias(self):
        """(1, H, 1, visible): the row of `Stack.position_bias` for the present position."""
        return self.bias_of[..., self.places[:self.visible] - self.positions]

    def replay(self, run, token):
        """run(token), by a CUDA graph: at the second step of a kind its kernels are recorded, and from then on replayed
        in one call. There are some 40 in a layer, each of a few microseconds; Python takes longer to launch them. One
        thread at a time: torch records whatever the process does.

        A graph repeats the same kernels at the same addresses. So token and result have fixed places (the next step
        overwrites the result), `advance` and `reorder` write in place, and another batch, or another number of visible
        keys, is another kind. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
        """
        if self.kind != (len(token), self.visible):  # the first of its kind loads the kernels; recording must not
            self.kind, self.graph = (len(token), self.visible), None
            return run(token)
        if self.graph is None:
            self.graph, self.token = torch.cuda.CUDAGraph(), token.clone()
            with torch.cuda.device(token.device), torch.cuda.graph(self.graph):
                self.logits = run(self.token)
        self.token.copy_(token)
        self.graph.replay()
        return self.logits

    def reorder(self, rows):
        """Row i continues what row rows[i] began: beams that overtake each other within one sentence."""
        for layer in self.layers:
            layer.keys[:, :, :self.length] = layer.keys[rows, :, :self.length]
            layer.values[:, :, :self.length] = layer.values[rows, :, :self.length]

    def worth_selecting(self, running):
        """Should those that have ended leave the batch now that `running` sentences are left? On a CPU always; on a
        GPU, where each batch needs a graph of its own and a smaller one is hardly faster, when that halves it."""
        batch = len(self.memory_bias)
        return running <= batch // 2 if self.positions.is_cuda else running < batch

    def select(self, running):
        """Keep only these sentences, a bool each: the others have ended."""
        self.kind = self.graph = None  # it reads the old tensors
        self.memory_bias = self.memory_bias[running]
        rows = running.repeat_interleave(self.beams)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            layer.cross = layer.cross[0][running], layer.cross[1][running]


def table(rows, width):
    """An nn.Embedding. On "meta", where there are shapes alone, torch would import its compiler to draw weights that
    are not there: two seconds."""
    if torch.empty(0).is_meta:
        return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
    return nn.Embedding(rows, width)


class T5(nn.Module):
    """The whole model. `layers=None` runs the model's own layers; any other list of layers of the same shape works."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = table(config.vocab_size, config.d_model)
        self.encoder = Stack(config, [EncoderLayer(config) for _ in range(config.num_layers)], bidirectional=True)
        self.decoder = Stack(config, [DecoderLayer(config) for _ in range(config.num_decoder_layers)],
                             bidirectional=False)
        self.head = self.embedding  # tied: one tensor under two names
        if not config.tie_word_embeddings:
            self.head = Linear(config.d_model, config.vocab_size)
        if not self.embedding.weight.is_meta:  # on "meta" there are shapes alone, to be filled by a checkpoint
            self.initialise()

    @property
    def depths(self):
        """{"encoder": number of layers, "decoder": number of layers}."""
        return {"encoder": len(self.encoder.layers), "decoder": len(self.decoder.layers)}

    @torch.no_grad()
    def initialise(self):
        """Draw the weights anew at T5's own scales: matrices so that variance is kept, the embedding with std 1, so
        that a word is not drowned by the vectors of like size that the layers add to it.

        The scales differ by sqrt(d_model d_kv), 222 in T5-base: q is drawn small in place of the division by
        sqrt(d_kv). That suits Adafactor, T5's optimizer, whose steps are relative to a tensor's size
        (https://arxiv.org/abs/1804.04235, section 8). Adam's have one size, the learning rate: what is right for q
        hardly moves the embedding, which is why T5 learns slowly from scratch with plain AdamW. `distill.fit` gives
        each tensor a rate of its own size.
        """
        c = self.config
        std = {"q": (c.d_model * c.d_kv) ** -0.5, "o": (c.num_heads * c.d_kv) ** -0.5, "wo": c.d_ff ** -0.5,
               "embedding": 1.0}
        for name, weight in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(weight, std=std.get(name.split(".")[-2], c.d_model ** -0.5))

    def forward(self, input_ids, decoder_input_ids):
        """(B, S), (B, T) token ids -> logits (B, T, vocab_size)."""
        mask = input_ids != self.config.pad_token_id
        memory = self.encode(input_ids).hidden
        return self.logits(self.decode(decoder_input_ids, memory, mask).hidden)

    def encode(self, input_ids, layers=None, need_probs=False):
        """(B, S) token ids, pad where there is none -> StackOutput, whose `hidden` is the decoder's memory."""
        x = dropout(self.embedding(input_ids), self.config.dropout_rate, self.training)
        padding = (input_ids == self.config.pad_token_id)[:, None, None, :]
        bias = mask_out(self.encoder.position_bias(input_ids.size(1)), padding)
        return self.encoder.run(x, layers, bias, need_probs=need_probs)

    def decode(self, decoder_input_ids, memory, memory_mask, layers=None, need_probs=False, cache=None):
        """(B, T) token ids, memory (B, S, d_model), memory_mask (B, S), True where a token is -> StackOutput.

        Padding on this side needs no mask: it comes after the tokens, and the mask is causal. With a `Cache` of the
        model's own layers, moved on by `advance`, T is 1, and memory and memory_mask are not read.
        """
        x = dropout(self.embedding(decoder_input_ids), self.config.dropout_rate, self.training)
        if cache is None:
            bias = self.decoder.position_bias(decoder_input_ids.size(1))
            memory_bias = mask_out(x.new_zeros(()), ~memory_mask[:, None, None, :])
        else:
            bias, memory_bias = cache.bias(), cache.memory_bias
        return self.decoder.run(x, layers, bias, memory, memory_bias, need_probs=need_probs, cache=cache)

    def logits(self, hidden):
        """(..., d_model) decoder output h -> (..., vocab_size), h W^T with the head's W.

        v1.0 first multiplies h by d_model^-0.5: its W is the embedding, drawn with std 1 where a head of its own has
        d_model^-0.5.
        """
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model ** -0.5
        return linear(hidden, self.head.weight)

    # ---- generation

    @torch.no_grad()  # not inference_mode: its ids could not be trained on, as pseudo-labels are
    @quick_products()
    def generate(self, input_ids, max_new_tokens=64, num_beams=1, length_penalty=1.0):
        """(B, S) token ids -> (B, <= max_new_tokens) ids without the start token, pad after eos.

        Greedy for one beam, else beam search with Hugging Face's semantics. Sentences that have ended leave the
        batch (`Cache.worth_selecting` says when), and no row reads another's, so a row's output does not depend on its
        batch (exactly in float32 but for ties: the order of a sum changes with the batch's shape). Raises ValueError
        for counts below 1, B among them, or beyond all reason.
        """
        if min(len(input_ids), max_new_tokens, num_beams) < 1 or max(max_new_tokens, num_beams) > 1 << 20:
            raise ValueError(f"sentences ({len(input_ids)}), max_new_tokens ({max_new_tokens}) and num_beams "
                             f"({num_beams}) must be at least 1, and the last two at most {1 << 20}")
        mask, modes = input_ids != self.config.pad_token_id, [(part, part.training) for part in self.modules()]
        self.eval()
        try:
            memory = self.encode(input_ids).hidden
            if num_beams == 1:
                output = self._greedy(memory, mask, max_new_tokens)
            else:
                output = self._beam_search(memory, mask, max_new_tokens, num_beams, length_penalty)
        finally:
            for part, training in modes:  # each its own: one may be frozen
                part.training = training
        used = (output != self.config.pad_token_id).any(0)  # columns: a model may emit pad before its eos, too
        return output[:, :(used * torch.arange(1, max_new_tokens + 1, device=used.device)).max()]

    def next_logits(self, token, cache):
        """(B,) ids of the next position -> (B, vocab_size) logits of the one after. Moves the cache on."""
        cache.advance()

        def run(token):
            """What a step computes."""
            return self.logits(self.decode(token[:, None], None, None, cache=cache).hidden[:, 0])
        return cache.replay(run, token) if token.is_cuda else run(token)

    def _greedy(self, memory, mask, n):
        """The likeliest token at every position. memory (B, S, d_model), mask (B, S), True where a token is -> (B, n)
        ids, pad after eos."""
        c, cache = self.config, Cache(self, memory, mask, n)
        rows = torch.arange(memory.size(0), device=memory.device)  # the sentences in the batch
        running = torch.ones_like(rows, dtype=torch.bool)          # those that have not ended
        output = torch.full((len(rows), n), c.pad_token_id, device=memory.device)
        token = torch.full((len(rows),), c.decoder_start_token_id, device=memory.device)
        for t in range(n):
            token = self.next_logits(token, cache).argmax(-1).where(running, c.pad_token_id)
            output[rows, t] = token
            running = running & (token != c.eos_token_id)
            left = running.sum().item()
            if left == 0:
                break
            if cache.worth_selecting(left):
                cache.select(running)
                rows, token, running = rows[running], token[running], running[running]  # all True
        return output

    def _beam_search(self, memory, mask, n, K, length_penalty):
        """As `_greedy`, but keep the K best prefixes. A sum of log probabilities is compared with finished ones only
        after division by length ** length_penalty, the length counting eos. 2K candidates are drawn, as K of them may
        end; only those among the best K count as finished. A sentence is done when its best prefix, at the present
        length, cannot beat its worst finished hypothesis (`early_stopping=False`), or when n tokens are reached; it
        stays as it is then, until the cache finds it worth to leave the batch."""
        c, B, low = self.config, memory.size(0), -1e9
        cache = Cache(self, memory, mask, n, K)
        rows = torch.arange(B, device=memory.device)
        output = torch.full((B, n), c.pad_token_id, device=memory.device)
        prefix = output[:, None].repeat(1, K, 1)                   # (B, K, n)
        finished, finished_score = prefix.clone(), torch.full((B, K), low, device=memory.device)
        score = torch.full((B, K), low, device=memory.device)
        score[:, 0] = 0.0                                          # all K prefixes are equal: expand one of them
        token = torch.full((B, K), c.decoder_start_token_id, device=memory.device)
        running = torch.ones_like(rows, dtype=torch.bool)          # sentences that are not done
        for t in range(n):
            B = len(rows)
            log_probs = F.log_softmax(self.next_logits(token.flatten(), cache).float(), dim=-1).view(B, K, -1)
            best, index = (log_probs + score[..., None]).flatten(1).topk(2 * K)       # (B, 2K), sorted
            beam, token = index // log_probs.size(-1), index % log_probs.size(-1)
            candidate = prefix.gather(1, beam[..., None].expand(-1, -1, n))           # (B, 2K, n)
            candidate[:, :, t] = token
            ended = token == c.eos_token_id if t < n - 1 else torch.ones_like(token, dtype=torch.bool)

            newly = best[:, :K] / (t + 1) ** length_penalty + ~(ended[:, :K] & running[:, None]) * low
            finished_score, keep = torch.cat([finished_score, newly], 1).topk(K)
            finished = torch.cat([finished, candidate[:, :K]], 1).gather(1, keep[..., None].expand(-1, -1, n))

            score, keep = (best + ended * low).topk(K)
            prefix = candidate.gather(1, keep[..., None].expand(-1, -1, n))
            token, beam = token.gather(1, keep), beam.gather(1, keep)
            cache.reorder((torch.arange(B, device=rows.device)[:, None] * K + beam).flatten())

            running = running & (score[:, 0] / (t + 1) ** length_penalty > finished_score[:, -1])
            output[rows] = finished[:, 0]
            left = running.sum().item()
            if t == n - 1 or left == 0:
                break
            if cache.worth_selecting(left):
                cache.select(running)
                rows, token, score, prefix = rows[running], token[running], score[running], prefix[running]
                finished, finished_score = finished[running], finished_score[running]
                running = running[running]  # all True
        return output


# ---- checkpoints in the Hugging Face layout

# Our module -> its name in a checkpoint.
STACK_NAMES = {"norm": "final_layer_norm",
               "positions": "block.0.layer.0.SelfAttention.relative_attention_bias"}  # lives in block 0 *there*
LAYER_NAMES = {"encoder": {"self_norm": "layer.0.layer_norm", "self_attention": "layer.0.SelfAttention",
                           "feed_forward_norm": "layer.1.layer_norm", "feed_forward": "layer.1.DenseReluDense"},
               "decoder": {"self_norm": "layer.0.layer_norm", "self_attention": "layer.0.SelfAttention",
                           "cross_norm": "layer.1.layer_norm", "cross_attention": "layer.1.EncDecAttention",
                           "feed_forward_norm": "layer.2.layer_norm", "feed_forward": "layer.2.DenseReluDense"}}
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of shared.weight
LEFTOVER = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # of old files, never used
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
MAX_HEADER = 1 << 21  # bytes, for some 17,000 tensors: parsed, JSON may take 30 times its size
HUB = "https://huggingface.co"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def checkpoint_name(name):
    """Our parameter's name -> its name in a checkpoint: "decoder.layers.3.cross_norm.weight" ->
    "decoder.block.3.layer.1.layer_norm.weight", of the second sub-layer. The tables above have the names."""
    stack, *rest = name.split(".")
    if stack == "embedding":
        return "shared.weight"
    if stack == "head":
        return "lm_head.weight"
    if rest[0] == "layers":
        _, i, module, *tail = rest
        return ".".join([stack, "block", i, LAYER_NAMES[stack][module], *tail])
    return ".".join([stack, STACK_NAMES[rest[0]], *rest[1:]])


def read_safetensors(path):
    """Read a file: 8 bytes little-endian header length, a JSON header {name: dtype, shape, data_offsets}, raw data
    (https://github.com/huggingface/safetensors#format). Offsets (begin, end) count from the end of the header; tensors
    follow each other without a gap, their names in the header stand in any order, beside an optional "__metadata__".
    Returns {name: tensor}; raises ValueError, "FILE: truncated or not a safetensors file: ...", or MemoryError."""
    tensors, size, end_of_data = {}, Path(path).stat().st_size, 0
    with open(path, "rb") as f:
        try:
            length = int.from_bytes(f.read(8), "little")
            if length > min(size - 8, MAX_HEADER):
                raise ValueError(f"the header ends at byte {8 + length} of {size}, {8 + MAX_HEADER} at most")
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"tensor {name}: dtype {entry['dtype']} is not known here")
                shape, (begin, end), dtype = entry["shape"], entry["data_offsets"], DTYPES[entry["dtype"]]
                if begin != end_of_data or end - begin != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"tensor {name}: bytes {begin} to {end} do not hold {dtype} of shape {shape}")
                if 8 + length + end > size:
                    raise ValueError(f"tensor {name} ends at byte {8 + length + end} of {size}")
                with memory_for(path):  # not the file's fault: no tensor is larger than it
                    tensors[name], end_of_data = torch.empty(shape, dtype=dtype), end
                f.readinto(tensors[name].flatten().view(torch.uint8).numpy())
            if 8 + length + end_of_data != size:
                raise ValueError(f"the tensors end at byte {8 + length + end_of_data} of {size}")
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path}: truncated or not a safetensors file: {reason}") from None
    return tensors


@contextmanager
def naming(path):
    """An OSError in the block names the file: a full disk does not say by itself which one it is about."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextmanager
def new_file(path, part=None):
    """`with new_file(path) as f`: a binary file that appears at `path` only when the block ends without an error. Until
    then it is at `part`, by default PATH.part."""
    part = Path(part or f"{path}.part")
    try:
        with naming(path), open(part, "wb") as f:
            yield f
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_safetensors(tensors, path):
    """Write {name: tensor} to `path`, which appears only when complete."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # readers want the data aligned
    with new_file(path) as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            f.write(tensor.flatten().view(torch.uint8).numpy())


def write_json(value, path, indent=2):
    """Write `value` to `path`, which appears only when complete. indent=None: many numbers, in a line."""
    with new_file(path) as f:
        f.write((json.dumps(value, indent=indent) + "\n").encode())


def read_json(path):
    """The JSON object in `path`. Raises ValueError naming the file when it holds something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def read_config(path):
    """A folder's `config.json` -> T5Config. Raises ValueError naming the file and the field."""
    raw = read_json(path)
    if raw.get("model_type") not in ("t5", "mt5"):
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}, not 't5' or 'mt5'"
                         + (": UMT5 keeps one position table per layer" if raw.get("model_type") == "umt5" else ""))
    known = {f.name: f.type for f in fields(T5Config)}
    values = {name: value for name, value in raw.items() if name in known and value is not None}
    values.setdefault("num_decoder_layers", values.get("num_layers", T5Config.num_layers))
    values.setdefault("tie_word_embeddings", True)
    # Newer files have this as a field of its own, in older ones the tie implies it.
    values.setdefault("scale_decoder_outputs", values["tie_word_embeddings"])
    for name, value in values.items():
        if type(value) is not known[name] and not (known[name] is float and type(value) is int):
            raise ValueError(f"{path}: {name} is {value!r}, not {known[name].__name__}")
        least, most = 0 if name.endswith("_id") else 1, 1 << (10 if name.endswith("layers") else 20)
        if known[name] is int and not least <= value <= most:
            raise ValueError(f"{path}: {name} is {value}, not from {least} to {most}")
    config = T5Config(**values)
    if config.feed_forward_proj not in ("relu", "gated-gelu"):
        raise ValueError(f"{path}: feed_forward_proj is {config.feed_forward_proj!r}, not 'relu' or 'gated-gelu'")
    if config.relative_attention_num_buckets < 4 or \
            config.relative_attention_max_distance <= config.relative_attention_num_buckets // 2:
        raise ValueError(f"{path}: relative_attention_num_buckets must be at least 4, and "
                         f"relative_attention_max_distance more than half of it")
    if max(config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) >= config.vocab_size:
        raise ValueError(f"{path}: a token id lies outside vocab_size {config.vocab_size}")
    for name in ("dropout_rate", "layer_norm_epsilon"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{path}: {name} is {getattr(config, name)}, not from 0 to 1")
    return config


def read_shards(index):
    """The file names in an index, {"weight_map": {tensor: file}}. Raises ValueError naming it."""
    weight_map = read_json(index).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) and weight_map else [weight_map]
    for shard in shards:
        if Path(str(shard)).name != shard or Path(shard).suffix not in (".safetensors", ".bin"):
            raise ValueError(f"{index}: {shard!r} is not the name of a weight file in this folder")
    return sorted(set(shards))


def read_bin(path):
    """A PyTorch weight file -> {name: tensor}; no pickled code is run. Raises ValueError naming the file, or
    MemoryError."""
    try:
        if zipfile.is_zipfile(path):  # torch stores tensors as they are; packed, a small file could fill the memory
            with zipfile.ZipFile(path) as entries:
                if sum(entry.file_size for entry in entries.infolist()) > Path(path).stat().st_size:
                    raise ValueError("its entries are larger than the file")
        with memory_for(path):
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # whatever torch's parsers raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a PyTorch weight file: {reason}") from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f"{path}: not a PyTorch weight file: no {{name: tensor}} in it")
    return weights


def read_weights(folder):
    """{name: tensor} from the weight file in `folder`, or from the shards of its index. Raises FileNotFoundError, and
    as `read_shards`, `read_safetensors` and `read_bin`."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        files = [name] if (folder / name).exists() else read_shards(index) if index.exists() else []
        if files:
            readers = {".safetensors": read_safetensors, ".bin": read_bin}
            return {name: tensor for file in files
                    for name, tensor in readers[Path(file).suffix](folder / file).items()}
    raise FileNotFoundError(f"{folder}: neither {' nor '.join(WEIGHT_FILES)}, nor an index of shards")


def load_t5(path):
    """A T5 folder, or a name such as "t5-small" to fetch -> T5 in float32 on the CPU, in eval mode.

    Raises ValueError or OSError naming the file and the tensor that is missing, unexpected, misshapen, of no plain
    floating-point numbers, or another one than its alias; MemoryError naming the file.
    """
    folder = find_t5(path)
    config, weights = read_config(folder / "config.json"), read_weights(folder)
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
            raise ValueError(f"{folder}: tensor {name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}: not "
                             f"plain floating-point numbers")
    aliases = ("shared.weight", *ALIASES) + ("lm_head.weight",) * config.tie_word_embeddings
    embedding = next((weights[name] for name in aliases if name in weights), None)
    head = weights.get("lm_head.weight", embedding)

    def same(a, b):
        """Have they the same numbers, of whatever dtypes?"""
        return a is b or torch.equal(a.float(), b.float())
    for name in ("shared.weight", *ALIASES):
        if name in weights and not same(weights[name], embedding):
            raise ValueError(f"{folder}: tensor {name} is another one than its alias: this T5 has one embedding")
    if embedding is not None:
        weights["shared.weight"] = embedding
    # The file decides whether the head is a tensor of its own: the flag may say one thing and the file another.
    config.tie_word_embeddings = embedding is None or same(head, embedding)
    with torch.device("meta"):  # shapes only: the file's tensors become the parameters
        model = T5(config)
    used, state = set(), {}
    for name, parameter in model.named_parameters():
        theirs = checkpoint_name(name)
        if theirs not in weights:
            raise ValueError(f"{folder}: tensor {theirs} is missing")
        if weights[theirs].shape != parameter.shape:
            raise ValueError(f"{folder}: tensor {theirs} has shape {list(weights[theirs].shape)}, "
                             f"config.json asks for {list(parameter.shape)}")
        used.add(theirs)
        state[name] = weights[theirs].float()
    unexpected = sorted(set(weights) - used - {*ALIASES, "lm_head.weight", LEFTOVER})
    if unexpected:
        raise ValueError(f"{folder}: unexpected tensor {unexpected[0]!r} ({len(unexpected)} in all)")
    if config.tie_word_embeddings:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_ids(folder, config, tokenizer):
    """Raise ValueError if a folder's config.json and spiece.model mean other ids by pad and eos."""
    if (config.pad_token_id, config.eos_token_id) != (tokenizer.pad_id, tokenizer.eos_id):
        raise ValueError(f"{folder}: config.json has pad_token_id {config.pad_token_id} and eos_token_id "
                         f"{config.eos_token_id}, spiece.model {tokenizer.pad_id} and {tokenizer.eos_id}")


def save_t5(model, path):
    """Write `model` to the folder `path` (made if need be): config.json, generation_config.json, model.safetensors.

    `load_t5` and Hugging Face's T5ForConditionalGeneration read it and give the same logits (transformers 4 does not
    know `scale_decoder_outputs`: where the head is both untied and scaled its logits are others).
    """
    path, c = Path(path), model.config
    path.mkdir(parents=True, exist_ok=True)
    weights = {checkpoint_name(name): tensor for name, tensor in model.named_parameters()}
    # A reader without `scale_decoder_outputs` takes the scale from the tie: only where both agree may the head be left
    # out, else it is written as a tensor of its own.
    tied = c.tie_word_embeddings and c.scale_decoder_outputs
    if not tied:
        weights["lm_head.weight"] = model.head.weight
    ids = {name: getattr(c, name) for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")}
    write_safetensors(weights, path / "model.safetensors")
    write_json(ids, path / "generation_config.json")
    write_json({**asdict(c), "tie_word_embeddings": tied, "model_type": "t5", "is_encoder_decoder": True,
                "architectures": ["T5ForConditionalGeneration"]}, path / "config.json")


def find_t5(path):
    """`path` if it is a folder, else, for a str, the cache folder of the model with that name, fetched on first use.

    MODULAR_T5_CACHE moves the cache, MODULAR_T5_HUB replaces the base address. Raises OSError if it cannot be had.
    """
    if Path(path).is_dir():
        return Path(path)
    if isinstance(path, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path, re.ASCII):
        raise FileNotFoundError(f"{path}: no such folder, nor the name of a model")
    cache = os.environ.get("MODULAR_T5_CACHE") or os.path.expanduser("~/.cache/modular-transformers")
    folder = Path(cache) / path
    base = f"{os.environ.get('MODULAR_T5_HUB', HUB).rstrip('/')}/{path}/resolve/main"
    try:
        for name in ("config.json", "spiece.model"):
            fetch(base, folder / name)
        fetch_weights(base, folder)
    except (OSError, HTTPException) as error:
        raise OSError(f"{path}: no such folder, and fetching it failed ({error}); offline, put config.json, "
                      f"spiece.model and model.safetensors into {folder}") from None
    return folder


def fetch_weights(base, folder):
    """Fetch the first of WEIGHT_FILES that exists there, or the shards of its index; what is here already, first.
    Raises OSError, FileNotFoundError if there are none."""
    names = [name + suffix for name in WEIGHT_FILES for suffix in ("", ".index.json")]
    for name in sorted(names, key=lambda name: not (folder / name).exists()):
        try:
            fetch(base, folder / name)
        except FileNotFoundError:
            continue
        for shard in read_shards(folder / name) if name.endswith(".json") else ():
            fetch(base, folder / shard)
        return
    raise FileNotFoundError(f"{base}: no weights there")


def fetch(base, path):
    """Download base/NAME to `path`, which appears only when complete. FileNotFoundError for 404, else OSError."""
    if path.exists():
        return
    url = f"{base}/{path.name}"
    try:
        part = f"{path}.{os.getpid()}.part"  # its own, as another run may fetch the same
        with urllib.request.urlopen(url, timeout=30) as reply:
            path.parent.mkdir(parents=True, exist_ok=True)  # only now: a name that nobody has leaves no folder
            total = int(reply.headers.get("Content-Length") or 0)
            with new_file(path, part) as f, tqdm(total=total or None, unit="B", unit_scale=True, desc=path.name,
                                                 disable=None) as bar:
                while chunk := reply.read(1 << 20):
                    f.write(chunk)
                    bar.update(len(chunk))
                if total and f.tell() != total:
                    raise OSError(f"{url}: {f.tell()} of {total} bytes came")
    except urllib.error.HTTPError as error:
        raise (FileNotFoundError if error.code == 404 else OSError)(f"{url}: {error.code} {error.reason}") from None


# ---- the command line

def command_line(run):
    """Make `main(argv=None) -> exit status` of run(argv): what the user got wrong, a ValueError or OSError (or a loss
    that left the finite numbers, or memory that ran out), is one line on stderr and status 2, an interrupt is 130, a
    reader of the output that went away, such as `| head`, 141, the rest is a bug. `python -X dev` shows every error's
    traceback."""
    @functools.wraps(run)
    def main(argv=None):
        """`run`, its errors turned into an exit status."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # else a pipe on Windows takes the letters of one language alone
            sys.stdout.reconfigure(encoding="utf-8")
        try:
            run(argv)
            print(end="", flush=True)  # what fails here would fail as Python ends, which catches nothing
        except BaseException as error:
            try:
                print(end="", flush=True)
            except OSError:  # the output is gone: nor shall Python try again as it ends
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), 1)
            cause = error
            while cause and not isinstance(cause, KeyboardInterrupt):  # a library may have made another error of it
                cause = cause.__context__
            if cause:
                print("interrupted", file=sys.stderr)
                return 130
            if isinstance(error, BrokenPipeError):
                return 141
            users = (ValueError, OSError, FloatingPointError, MemoryError)
            if sys.flags.dev_mode or not (isinstance(error, users) or out_of_memory(error)):
                raise
            text = str(error) or "out of memory"  # Python's own MemoryError says nothing
            line = "".join(c if c.isprintable() else " " for c in text)  # it may quote a file from anywhere
            print(f"{Path(inspect.unwrap(run).__code__.co_filename).name}: {line}", file=sys.stderr)
            return 2
        return 0
    return main


def out_of_memory(error):
    """Is it that, Python's or torch's? torch.OutOfMemoryError on a GPU; on a CPU torch has no class of its own."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(re.search("out of memory|tried to allocate", str(error))))


@contextmanager
def memory_for(what):
    """Running out of memory in the block is a MemoryError that says what the memory was for."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(f"out of memory: {what}") from None


class Parser(argparse.ArgumentParser):
    """argparse, but for its error: a ValueError instead of several lines and an exit."""
    def error(self, message):
        """What argparse calls for a bad option. Raises ValueError."""
        raise ValueError(message)

    def add_device(self):
        """Add --device, by default a GPU if there is one."""
        self.add_argument("--device", type=self.device, default="cuda" if torch.cuda.is_available() else "cpu")

    @staticmethod
    def device(name):
        """A device's name, checked by putting a number there and reading it. Raises ArgumentTypeError."""
        own = int(os.environ.get("LOCAL_RANK", 0))  # of torchrun: not that all processes try the first GPU
        if name == "cuda" and own < torch.cuda.device_count():
            name = f"cuda:{own}"
        try:
            number = torch.zeros(1, device=name)
            number.item()  # "meta" has shapes alone
            return str(number.device)
        except (RuntimeError, AssertionError, ImportError) as error:  # the last: "hpu"
            reason = str(error).partition("\n")[0]
            raise argparse.ArgumentTypeError(f"{name}: {reason}") from None


@command_line
@quick_products()  # one block for all lines
def main(argv):
    """One output line per input."""
    parser = Parser(description="Generate with a T5 folder.")
    parser.add_argument("model", help="a T5 folder, or a name such as t5-small to fetch")
    parser.add_argument("text", nargs="*", help="inputs; without any, lines from standard input")
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_device()
    args = parser.parse_intermixed_args(argv)  # options may come before the text
    from data import Tokenizer  # here alone: the model itself knows no text
    folder = find_t5(args.model)
    model, tokenizer = load_t5(folder).to(args.device), Tokenizer(folder)
    check_ids(folder, model.config, tokenizer)
    for n, line in enumerate(args.text or sys.stdin.buffer, start=1):
        try:
            ids = tokenizer.encode((line if args.text else line.decode()).rstrip("\r\n"))  # UTF-8 on every system
        except UnicodeError:
            raise ValueError(f"input {n}: not valid UTF-8") from None
        if max(ids) >= model.config.vocab_size:
            raise ValueError(f"{folder}: spiece.model has a token {max(ids)}, in input {n}; config.json has vocab_size "
                             f"{model.config.vocab_size}")
        ids = torch.tensor([ids], device=args.device)
        output = model.generate(ids, args.max_new_tokens, args.num_beams)
        print(tokenizer.decode(output[0].tolist()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
