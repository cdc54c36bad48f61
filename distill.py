"""Module replacing and distillation: the losses, each under its equation, and one training loop.

Every way of training here is the same step with more or less in it:
    modules       paths are drawn; their modules train among the teacher's frozen layers, and the frame around them (the
                  bank's embedding, head, position tables, final norms); all four losses
    Theseus       one granularity, cross-entropy alone, a frozen frame, dropout (https://arxiv.org/abs/2002.02925)
    KD            a fixed smaller student, all of it trains, all four losses (https://arxiv.org/abs/1503.02531)
    SFT           shrink and fine-tune: the same student, cross-entropy alone (https://arxiv.org/abs/2010.13002)
    pseudo-labels SFT on the teacher's own outputs
    the teacher   fine-tuning or training from scratch: a "student" with all the layers and cross-entropy alone; then
                  self-distillation: KD with all the layers (https://arxiv.org/abs/1805.04770)

Before the first step, `calibrate` fits modules to their spans in closed form.

    pytest tests/test_distill.py
"""
import math
import os
import random
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from model import StackOutput, memory_for, new_file
from modules import (STACKS, by_granularity, evenly, realised_rate, replacement_rate, sample_path, systematic_sample,
                     with_layers)

WEIGHTS = {"ce": 1.0, "logits": 1.0, "hidden": 2.0, "attention": 0.1}  # so that all four are of like size
CE_ONLY = {"ce": 1.0}


# ---- the losses: N counts the real tokens that a loss looks at, targets but where a mask says so, V the vocabulary

def cross_entropy(student, targets):
    """L_ce = -1/N sum_n log p_student(y_n | y_<n, x).  log p (N, V), targets (N,) -> scalar."""
    return F.nll_loss(student, targets, reduction="sum") / over_processes(len(targets), student)


def logit_distillation(student, teacher):
    """L_kd = 1/N sum_n KL(p_teacher || p_student), both at temperature 1.  Two log p (N, V) -> scalar.

    The mean is over tokens. Of (B, T, V), as others have it, torch's "batchmean" would be the mean over sentences, and
    grow with their length.
    """
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / over_processes(len(student), student)


def hidden_distillation(student, teacher, mask):
    """L_hid = sum_n |s_n - t_n|^2 / sum_n |t_n|^2: the squared error as a share of the teacher's own size, so that
    early layers, whose states are small, count like late ones.

    Two (L, B, T, d_model), the states after L layers, mask (B, T) -> (L,). All at once: on a GPU a small operation
    takes as long as a large one."""
    student, teacher = (states.float().masked_fill(~mask[..., None], 0) for states in (student, teacher))
    return (student - teacher).square().sum((1, 2, 3)) / over_processes(teacher.square().sum((1, 2, 3)), teacher)


def attention_distillation(student, teacher, mask):
    """L_att = 1/(N H) sum_n,h KL(a_teacher || a_student) of the distributions over keys.

    Two (L, B, H, T, K), the probabilities in L layers, mask (B, T) of the N query tokens -> (L,). Keys that padding
    hides have probability 0 in both and add nothing; 1e-9 keeps the logarithm finite where only the student's
    underflows.
    """
    student, teacher = student.float(), teacher.float()
    each = mask[:, None, :, None] * teacher * ((teacher + 1e-9) / (student + 1e-9)).log()
    return each.sum((1, 2, 3, 4)) / (over_processes(mask.sum(), teacher) * teacher.size(2))


def processes():
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_processes(x, like):
    """The mean over all processes of a number or a tensor, element by element; x itself when there is one process.
    like: any tensor on the device that computes.

    Each process has its share of a batch. A loss there is its own sum over the *mean* count, so that the mean of the
    gradients is exactly the gradient of the whole batch, however unevenly the tokens fall.
    """
    if not dist.is_initialized():
        return x
    x = torch.as_tensor(x, dtype=torch.float32, device=like.device).clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


# ---- the step's loss

def shift_right(targets, config):
    """(B, T) targets -> the decoder's input: the start token, then the targets but the last."""
    start = targets.new_full((targets.size(0), 1), config.decoder_start_token_id)
    return torch.cat([start, targets[:, :-1]], dim=1)


def run_stacks(model, source, target, layers=None, probs=False):
    """All that a loss may look at, of a model that runs freely: its decoder reads its own memory, as it will alone.

    source (B, S) and target (B, T) are padded token ids; layers: {"encoder": list, "decoder": list} to run in place of
    the model's own. Returns {"encoder": StackOutput, "decoder": StackOutput, "log_probs": (N, V)}, of the real tokens
    alone, row by row: log p, always in float32, which two losses share.
    """
    layers, mask = layers or dict.fromkeys(STACKS), source != model.config.pad_token_id
    encoded = model.encode(source, layers["encoder"], probs)
    decoded = model.decode(shift_right(target, model.config), encoded.hidden, mask, layers["decoder"], probs)
    logits = model.logits(decoded.hidden[target != model.config.pad_token_id])
    return {"encoder": encoded, "decoder": decoded, "log_probs": F.log_softmax(logits.float(), -1)}


@torch.no_grad()
def run_teacher(teacher, source, target, weights):
    """`run_stacks`, without a gradient, with what those loss terms look at."""
    return run_stacks(teacher, source, target, probs="attention" in weights)


def some_rows(outputs, rows, real, paths):
    """What `run_stacks` gave, of the rows (ascending indices) alone, and of a layer only where a span of `paths` ends
    there. real (B, T): where the whole batch has tokens."""
    tokens, few = torch.zeros_like(real), {}
    tokens[rows] = True
    for stack in STACKS:
        hidden, states, probs = outputs[stack]
        ends = {stop - 1 for _, stop in paths[stack]}
        few[stack] = StackOutput(
            hidden[rows], [state[rows] if i in ends else None for i, state in enumerate(states)],
            [[p if p is None else p[rows] for p in layer] if i in ends else None for i, layer in enumerate(probs)])
    return {**few, "log_probs": outputs["log_probs"][tokens[real]]}


def losses(student, source, target, weights, theirs=None, layers=None, paths=None):
    """Those terms of one batch that `weights` names, unweighted: {"ce": scalar, "logits": ..., "hidden": ..., ...}.

    source, target, layers: as in `run_stacks`, for the student. theirs: what that gives for the teacher, or None.
    paths: {"encoder": path, "decoder": path}: layer i of the student stands for span i of the teacher, and is held
    against the state after the span's last layer and the attention within that layer. "hidden" and "attention" are the
    means over all of these in both stacks.
    """
    masks = {"encoder": source != student.config.pad_token_id, "decoder": target != student.config.pad_token_id}
    probs = "attention" in weights
    ours = run_stacks(student, source, target, layers, probs)
    terms = {"ce": cross_entropy(ours["log_probs"], target[masks["decoder"]])}
    if theirs is not None:
        terms["logits"] = logit_distillation(ours["log_probs"], theirs["log_probs"])
        hidden, attention = [], []
        for stack in STACKS:
            mine, last = ours[stack], [stop - 1 for _, stop in paths[stack]]
            states = torch.stack(mine.states), torch.stack([theirs[stack].states[i] for i in last])
            hidden.append(hidden_distillation(*states, masks[stack]))
            # Self-attention of all layers, then, in the decoder, cross-attention of all.
            for s, t in zip(zip(*mine.probs), zip(*(theirs[stack].probs[i] for i in last))) if probs else ():
                attention.append(attention_distillation(torch.stack(s), torch.stack(t), masks[stack]))
        terms["hidden"] = torch.cat(hidden).mean()
        if attention:
            terms["attention"] = torch.cat(attention).mean()
    return {term: value for term, value in terms.items() if term in weights}


@torch.no_grad()
def validation_loss(model, batches):
    """Cross-entropy of some (source, target) batches, in nats a token: has it converged, does it overfit?"""
    device, total, count = model.embedding.weight.device, 0.0, 0
    for source, target in batches:
        tokens = (target != model.config.pad_token_id).sum().item()
        ce = losses(model, source.to(device), target.to(device), CE_ONLY)["ce"]
        total, count = total + tokens * ce.item(), count + tokens
    return total / count


# ---- before the first step

@torch.no_grad()
def calibrate(teacher, bank, batches, rounds=3, ridge=0.1):
    """Fit the output matrices of each module to the teacher's hidden states in closed form, by ridge regression.

    What the sub-layers of a module add to the hidden state is W x: x (N, features) holds what their output matrices W
    read, the heads' mixed values and the feed-forward activations, side by side. On (source, target) batches a module
    gets the teacher's state before its span. Where its output falls short of the teacher's state after the span by r,
    token by token, W moves by
        D = argmin sum_n |r_n - D x_n|^2 + sum_j lambda_j |D_j|^2
          = (sum_n r_n x_n^T) (sum_n x_n x_n^T + diag(lambda))^-1
    D_j its column of feature j, and lambda_j the share `ridge` of sum_n x^2, the mean over the features of j's
    sub-layer. x changes with W, so it takes some rounds. All in float32: call it outside of autocast. Least squares to
    stand in for layers: https://arxiv.org/abs/2505.02819, which puts one matrix there.
    """
    teacher.eval(), bank.eval()
    device, pad = teacher.embedding.weight.device, teacher.config.pad_token_id
    runs = {stack: [] for stack in STACKS}  # for each batch: what runs layers, the teacher's states, where tokens are
    for source, target in batches:
        source, target = source.to(device), target.to(device)
        encode = partial(teacher.encode, source)
        encoded = encode()
        decode = partial(teacher.decode, shift_right(target, teacher.config), encoded.hidden, source != pad)
        runs["encoder"].append((encode, encoded.states, source != pad))
        runs["decoder"].append((decode, decode().states, target != pad))

    def observe(stack, start, stop, module, matrices):
        """sum_n x_n x_n^T (features, features) and sum_n r_n x_n^T (d_model, features) of all tokens."""
        read, xx, rx = {}, 0.0, 0.0
        hooks = [matrix.register_forward_pre_hook(lambda own, inputs: read.update({own: inputs[0]}))
                 for matrix in matrices]
        for run, states, mask in runs[stack]:
            layers = [lambda *_: (states[start - 1], ()), module] if start else [module]  # from the teacher's state on
            r = (states[stop - 1] - run(layers=layers).states[-1])[mask]
            x = torch.cat([read[matrix] for matrix in matrices], -1)[mask]
            xx, rx = xx + x.T @ x, rx + r.T @ x
        for hook in hooks:
            hook.remove()
        return xx, rx

    for stack in STACKS:
        for start, stop in bank.spans[stack]:
            module = bank.module(stack, (start, stop))
            matrices = [part for name, part in module.named_modules() if name.rpartition(".")[2] in ("o", "wo")]
            widths = [matrix.weight.size(1) for matrix in matrices]
            for _ in range(rounds):
                xx, rx = observe(stack, start, stop, module, matrices)
                squares = torch.cat([own.mean().expand(len(own)) for own in xx.diagonal().split(widths)])
                D = torch.linalg.solve(xx + (ridge * squares).clamp(min=1e-9).diag(), rx, left=False)
                for matrix, own in zip(matrices, D.split(widths, 1)):
                    matrix.weight += own
    for parameter in bank.parameters() if dist.is_initialized() else ():
        dist.broadcast(parameter, 0)  # the processes' last bits may differ


# ---- the two kinds of training

def train_modules(teacher, bank, batches, steps, seed=0, weights=WEIGHTS, rate_start=0.5, rate_rise=0.1, passes=2.0,
                  frame_lr=0.25, two_paths=False, dropout=False, **loop):
    """Module replacing: draw an encoder and a decoder path, run them, move the bank.

    Multi-grained: a step runs a path of each granularity g of the decoder, 1 (the teacher's own layers) to the largest.
    Together they run at most `passes` times as many rows as the batch has (and at least one each), drawn for each, in
    proportion to g but none twice: such a path has 1 / g of the layers, so that all cost about alike, and what stands
    for six layers has more to learn than what stands for two. The encoder's granularity is drawn for each, with chances
    in proportion to it: both are chosen apart later. On paths of mixed lengths, instead, a module stands beside others
    that it rarely meets again (README, "Ablations"). "ce" and the other terms are means over the paths.
    two_paths: a step runs at most `passes` paths, two, on all rows; a granularity is drawn as often as it would have
    rows. A module sees as many, in fewer, larger steps, at the full rate: for a GPU, where a path costs by its layers,
    not by its rows (README, "Two paths").
    All paths run in the bank's frame, which trains with the modules under distillation. The teacher is frozen but lets
    gradients through, and runs without dropout where its layers stand in a path.
    dropout: in the modules and the frame, at the teacher's rate. Theseus has it; among the granularities of a bank a
    module sees too few rows for it to pay (README, "What did not work").
    Modules that see a share s of the rows learn at sqrt(s) of the rate, as Adam's steps on smaller batches should
    (https://arxiv.org/abs/2205.10287); the frame at the share frame_lr of it: where it goes all modules have to follow,
    those too that were nearly the teacher's equals. **loop goes to `fit`. Raises ValueError for two_paths with passes
    below 1, which would draw none."""
    if two_paths and passes < 1:
        raise ValueError(f"passes is {passes}: two_paths needs at least 1")
    teacher.eval().requires_grad_(False)
    distilling = bool(set(weights) - set(CE_ONLY))
    bank.train(dropout)
    bank.frame.requires_grad_(distilling)  # Theseus freezes what is no module
    grains = {stack: by_granularity(bank.spans[stack]) for stack in STACKS}
    for stack in STACKS:
        if distilling or not grains[stack]:  # the teacher's own layers, which the frame must serve, too; or no module
            grains[stack][1] = []
    shares = {"decoder": {g: min(1.0, passes * g / sum(grains["decoder"])) for g in grains["decoder"]}}  # of the rows
    shares["encoder"] = {g: min(1.0, sum(shares["decoder"].values()) * g / sum(grains["encoder"]))
                         for g in grains["encoder"]}
    lr_factors = {parameter: 1.0 if two_paths else shares[stack][g] ** 0.5 for stack in STACKS
                  for g, spans in grains[stack].items() for span in spans
                  for parameter in bank.module(stack, span).parameters()}
    lr_factors.update(dict.fromkeys(bank.frame.parameters(), frame_lr))

    def step_loss(step, source, target):
        """Paths of some granularities of the decoder, and what they cost: terms by name, and the rates to log."""
        rng, rate = random.Random(f"{seed} {step}"), replacement_rate(step, steps, rate_start, rate_rise)
        rank, world = processes()
        whole = round(world * float(over_processes(len(source), source)))  # rows in all processes
        theirs = run_teacher(teacher, source, target, weights) if distilling else None
        total, rates = {}, {stack: [] for stack in STACKS}
        if two_paths:
            of_step = dict.fromkeys(systematic_sample(shares["decoder"], rng), whole)
        else:  # rounded up, so that each has a row; 1e-9, as what should be a whole number may be a last bit above it
            of_step = {g: math.ceil(whole * share - 1e-9) for g, share in shares["decoder"].items()}
        for g, n in of_step.items():
            drawn = set(rng.sample(range(whole), n))
            rows = [i for i, row in enumerate(range(rank, whole, world)) if row in drawn]  # those of this process
            rows = torch.tensor(rows, dtype=torch.long, device=source.device)
            encoder_g = rng.choices(list(grains["encoder"]), weights=list(grains["encoder"]))[0]
            spans = {"encoder": grains["encoder"][encoder_g], "decoder": grains["decoder"][g]}
            paths = {stack: sample_path(teacher.depths[stack], spans[stack], rate, rng) for stack in STACKS}
            few = theirs
            if distilling and n < whole:
                few = some_rows(theirs, rows, target != teacher.config.pad_token_id, paths)
            terms = losses(bank.frame, source[rows], target[rows], weights, few, bank.layers(teacher, paths), paths)
            for term, value in terms.items():
                total[term] = total.get(term, 0.0) + value / len(of_step)
            for stack in STACKS:
                if spans[stack] or not bank.spans[stack]:  # not where the teacher's own layers were drawn: no choice
                    rates[stack].append(realised_rate(paths[stack], spans[stack]))
        return total, {"rate": rate, **{f"rate_{stack}": sum(own) / len(own) if own else math.nan  # null in log.jsonl
                                        for stack, own in rates.items()}}

    fit(bank, step_loss, batches, steps, seed=seed, weights=weights, lr_factors=lr_factors, **loop)
    bank.eval()


def train_student(student, batches, steps, teacher=None, weights=None, dropout=True, **loop):
    """Train all of a plain T5. With a teacher: distillation, the student's layers spread evenly over the teacher's, or
    one for one where it distills itself. Without: shrink-and-fine-tune, pseudo-labels, or the teacher.
    weights: by default WEIGHTS with a teacher, else CE_ONLY. dropout: at the student's own rate, or none. **loop goes
    to `fit`. Raises ValueError for other terms without a teacher, and for a student that is deeper than it."""
    weights = weights or (WEIGHTS if teacher is not None else CE_ONLY)
    if teacher is None and set(weights) - set(CE_ONLY):
        raise ValueError(f"{', '.join(sorted(set(weights) - set(CE_ONLY)))}: a loss that needs a teacher")
    student.train(dropout).requires_grad_(True)
    paths = None
    if teacher is not None:
        teacher.eval().requires_grad_(False)
        paths = {stack: spread(teacher.depths[stack], student.depths[stack]) for stack in STACKS}

    def step_loss(step, source, target):
        """What the student costs, and nothing else to log."""
        theirs = run_teacher(teacher, source, target, weights) if teacher is not None else None
        return losses(student, source, target, weights, theirs, paths=paths), {}
    fit(student, step_loss, batches, steps, weights=weights, **loop)
    student.eval()


def spread(n, k):
    """k spans that tile n layers as evenly as can be: layer i of a static student stands for span i. Raises ValueError
    unless 1 <= k <= n."""
    if not 1 <= k <= n:
        raise ValueError(f"a student of {k} layers: its teacher has {n}, and each must stand for at least one of them")
    ends = [round(n * i / k) for i in range(k + 1)]
    return list(zip(ends, ends[1:]))


def shrink(teacher, encoder_layers, decoder_layers):
    """A smaller T5 whose layers are copies of the teacher's, evenly spaced from the first to the last (`evenly`).
    Raises ValueError for a depth beyond the teacher's or below 1."""
    layers = {}
    for stack, k in zip(STACKS, (encoder_layers, decoder_layers)):
        own = getattr(teacher, stack).layers
        if not 1 <= k <= len(own):
            raise ValueError(f"a student of {k} {stack} layers: the teacher has {len(own)}")
        layers[stack] = [own[i] for i in evenly(len(own), k)]
    return with_layers(teacher, layers)


# ---- the loop

def pick_dtype(name, device, d_model):
    """"float32", "bfloat16" or "float16" -> the torch dtype; "auto" -> bfloat16 on a GPU that has it, float16 on one
    that has not, on a CPU bfloat16 where it multiplies faster, found out by trying."""
    if name != "auto":
        return getattr(torch, name)
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):  # the question is about the current one
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if torch.device(device).type != "cpu":
        return torch.float32

    def timed(dtype):
        """One product each at several numbers of rows: the 16-bit kernels are built anew for every one of them."""
        start = time.perf_counter()
        for rows in range(1200, 2000, 100):
            torch.ones(rows, d_model, dtype=dtype) @ torch.ones(d_model, 4 * d_model, dtype=dtype)
        return time.perf_counter() - start
    return torch.bfloat16 if timed(torch.bfloat16) < 0.7 * timed(torch.float32) else torch.float32


def learning_rate(step, steps, peak):
    """Linear up to `peak` over the first 5 % of the steps, then linear towards 0."""
    rise = max(1, round(0.05 * steps))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def size(parameter):
    """The root mean square of a tensor, at least 1e-3, rounded to a power of two: the scale of its learning rate.

    Adafactor, section 8 (https://arxiv.org/abs/1804.04235): a step should be a share of what it moves. Adam's have one
    size, and T5's tensors differ in theirs by sqrt(d_model d_kv). Rounded, so that a few groups of parameters suffice.
    """
    return 2.0 ** round(math.log2(max(1e-3, parameter.detach().float().square().mean().sqrt().item())))


def fit(trained, step_loss, batches, steps, *, weights, lr, seed=0, lr_factors={}, dtype=torch.float32, name="",
        log=None, checkpoint=None, save_every=60.0):
    """Move the parameters of `trained` for `steps` steps of AdamW.

    step_loss(step, source, target) -> (terms, facts): unweighted loss terms by name, and numbers to log.
    batches[k] gives step k's (source, target), so all that a step does follows from (seed, step): a run that was cut
    off goes on from its last checkpoint as if nothing had happened, on a CPU bit for bit if the processes are as many.
    dtype: float32, or bfloat16 or float16 for autocast over float32 weights. lr is the peak (see `learning_rate`)
    as a share of each tensor's `size` at the start, times lr_factors[parameter] where that is given.
    log(record) receives a dict for the first step, the last, and every 1 % between; in float16 its "skipped" counts the
    steps since the last record whose gradients overflowed, which move nothing. checkpoint: a path, written every
    `save_every` seconds.
    Under torchrun every process takes its share of each batch's rows; the first alone logs and writes.
    Raises FloatingPointError, naming the step and the terms, for a loss or a gradient that is not finite, before it
    moves anything (in float16 for a gradient at any loss scale from 1 on); MemoryError, naming the step and the batch's
    shape; ValueError for a damaged checkpoint.
    """
    # cuDNN's attention makes NaN gradients of scores below -88 on some GPUs, and T5 does not scale its scores
    # (https://github.com/pytorch/pytorch/issues/196678); torch's own kernels do not.
    torch.backends.cuda.enable_cudnn_sdp(False)
    parameters = list(trained.parameters())
    device = parameters[0].device
    rank, world = processes()
    state = load_checkpoint(checkpoint, name)
    sizes = state["sizes"] if state else [size(parameter) * lr_factors.get(parameter, 1.0) for parameter in parameters]
    groups = [{"params": [p for p, own in zip(parameters, sizes) if own == each], "size": each}
              for each in sorted(set(sizes))]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    if state:
        for part, key in ((trained, "weights"), (optimizer, "optimizer"), (scaler, "scaler")):
            part.load_state_dict(state[key])
    first, skipped = (state["step"], state.get("skipped", 0)) if state else (0, 0)
    state = None  # its memory
    saved, started, tokens = time.perf_counter(), time.perf_counter(), 0
    for step in (bar := tqdm(range(first, steps), desc=name, initial=first, total=steps, disable=rank > 0 or None)):
        torch.manual_seed((seed * 1_000_003 + step) * world + rank)  # dropout
        source, target = (ids[rank::world].to(device, non_blocking=True) for ids in batches[step])
        B, S, T = *source.shape, target.size(1)
        with memory_for(f"{name}, step {step}: {B} x {S} source and {B} x {T} target tokens: lower --batch-tokens, or "
                        f"begin anew with a lower --max-length"):
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                terms, facts = step_loss(step, source, target)
            loss = sum(weights[term] * value for term, value in terms.items())
            norm = torch.zeros(())
            if moves := loss.requires_grad:  # not so where Theseus drew the teacher's own layers alone
                scaler.scale(loss).backward()
                if world > 1:
                    average_gradients(parameters)
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1  # a lower scale may bring float16 back
            whole = over_processes(loss.detach(), loss)  # so that all processes stop together
            if not torch.isfinite(whole if may_overflow else whole + norm):
                what = "gradient" if torch.isfinite(whole) else "loss"
                values = ", ".join(f"{term} {over_processes(value.detach(), value).item():.4g}"
                                   for term, value in terms.items())
                raise FloatingPointError(f"{name}: the {what} is not finite at step {step}: {values}; a lower "
                                         f"learning rate may help (--teacher-lr, --lr)")
            if moves:
                for group in optimizer.param_groups:
                    group["lr"] = group["size"] * learning_rate(step, steps, lr)
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                skipped += scaler.get_scale() < scale  # float16 overflowed: no step, and the next at half the scale
                optimizer.zero_grad(set_to_none=True)

        tokens += source.numel() + target.numel()
        if step == first or (step + 1) % max(1, steps // 100) == 0 or step + 1 == steps:
            speed = world * tokens / (time.perf_counter() - started)
            raw = {term: over_processes(value.detach(), value).item() for term, value in terms.items()}
            weighted = {f"{term}_weighted": weights[term] * value for term, value in raw.items()}
            total = sum(weighted.values())
            bar.set_postfix_str(f"loss {total:.3f}, {speed:,.0f} tokens/s", refresh=False)
            if scaler.is_enabled():
                facts, skipped = {**facts, "skipped": skipped}, 0
            if log and rank == 0:
                log({"stage": name, "step": step + 1, "steps": steps, "loss": total, **raw, **weighted, **facts,
                     "grad_norm": norm.item(), "lr": learning_rate(step, steps, lr), "tokens_per_s": speed})
        if checkpoint and rank == 0 and time.perf_counter() - saved > save_every and step + 1 < steps:
            save_checkpoint({"stage": name, "step": step + 1, "sizes": sizes, "weights": trained.state_dict(),
                             "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "skipped": skipped},
                            checkpoint)
            saved = time.perf_counter()


def average_gradients(parameters):
    """Replace every gradient by its mean over all processes. All of them draw the same paths, so a module that none of
    these paths used has no gradient anywhere: it stays out, and AdamW leaves it alone."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message, not hundreds
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / dist.get_world_size()).split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


def save_checkpoint(state, path):
    """Write what `load_checkpoint` reads. The old file stays until the new one is complete."""
    with new_file(path) as f:
        try:
            torch.save(state, f)
        except RuntimeError as error:  # torch's own, over what stopped the writing: a full disk, an interrupt
            raise error.__context__ or error from None


def load_checkpoint(path, *names):
    """The dict that `fit` wrote in a stage of these names, or None if there is none. Raises ValueError for a damaged
    file, MemoryError for one that is too large."""
    if path is None or not os.path.exists(path):
        return None
    try:
        with memory_for(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise  # not to be read, which does not make it damaged
    except Exception as error:  # whatever torch's parsers raise
        raise ValueError(f"{path}: damaged ({type(error).__name__}): remove it to begin this stage anew") from None
    if not (isinstance(state, dict) and {"stage", "step", "sizes", "weights", "optimizer", "scaler"} <= state.keys()):
        raise ValueError(f"{path}: of another version: remove it to begin this stage anew")
    return state if state["stage"] in names else None
