"""
Make the frozen reference outputs that the tests compare with. Needs the reference libraries, which the tests
do not: pip install sacrebleu==2.6.0 rouge-score==0.1.2 transformers==5.23.0. Run from the repository root:

    python tests/make_fixtures.py
"""

import json
from pathlib import Path

# Own sentences, chosen for what splits differently from one tokenizer to the next.
PAIRS = [  # (hypothesis, reference)
    ("The old bridge was closed, but nobody knew why.", "The old bridge was closed but nobody knew why."),
    ("It cost 1,000.5 crowns, i.e. 3.5% more than in 1999.",
     "It cost 1,000.5 crowns, i.e. 4.5 % more than in 1999."),
    ("a well-known 3-year-old, born in 2001-2002", "a well known 3-year old, born in 2001-02"),
    ('"Stop!" she said; \'never\' again (or so she hoped).',
     '"Stop", she said: \'never\' again [or so she hoped]!'),
    ("Salt &amp; pepper, 3 &lt; 4 &gt; 2, &quot;quoted&quot;", 'Salt & pepper, 3 < 4 > 2, "quoted"'),
    ("Der Bäcker verkauft süße Brötchen — für 2 €…", "Der Bäcker verkaufte süße Brötchen – für 2 €."),
    ("„Guten Morgen“, sagte die Äbtissin.", "\"Guten Morgen\", sagte die Äbtissin!"),
    ("", "An empty answer counts against the system."),
    ("nothing whatsoever shared here", "Completely different words, alas."),
    ("THE CAT SAT ON THE MAT", "the cat sat on the mat"),
    ("the the the the the the", "the cat is on the mat"),
    ("mail me at a.b@c-d.org/~x_y or $5+5=10 {now}", "mail me at a.b@c-d.org/~x_y , or $5 + 5=10 {now}"),
    ("A line\nbroken in two, hyphen-\nated <skipped> twice   and spaced ",
     "A line broken in two, hyphenated twice and spaced"),
    ("U.S. troops, No. 7, left at 10:30.", "U.S. troops ( No.7 ) left at 10.30 ."),
    ("one\u2028two\u00a0three\u0085four İstanbul", "one two three four istanbul"),
    (" ".join(f"word{i % 17} of chapter {i % 5}" for i in range(40)),
     " ".join(f"word{i % 13} of chapter {i % 7}" for i in range(38))),
    ("two", "two"),
    ("the rope ends in a dash -\n", "the rope ends in a dash -"),
    ("in the morning the dogs run to the river", "the dogs run in the morning to the far river"),
]
SUBSETS = {  # name: numbers of the pairs that make the corpus
    "all": list(range(len(PAIRS))),
    "no overlap": [8],
    "no fourgram": [2, 10],
    "no bigram either": [13, 8, 9],
    "no more than a word": [16],
    "empty": [7],
    "punctuation": [0, 1, 2, 3, 4],
    "unicode": [5, 6, 14],
    "longer than the reference": [15, 12],
    **{f"pair {i}": [i] for i in range(len(PAIRS))},
}


def metrics(folder):
    """folder/metrics.json: sacreBLEU's corpus BLEU and rouge-score's mean F1 of some small corpora."""
    import sacrebleu
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    corpora = []
    for name, numbers in SUBSETS.items():
        hypotheses, references = map(list, zip(*(PAIRS[i] for i in numbers)))
        scores = list(map(scorer.score, references, hypotheses))
        rouge = {key: 100 * sum(score[key].fmeasure for score in scores) / len(scores) for key in scores[0]}
        corpora.append({"name": name, "hypotheses": hypotheses, "references": references, "rouge": rouge,
                        "bleu": sacrebleu.corpus_bleu(hypotheses, [references]).score})
    text = json.dumps(corpora, indent=1, ensure_ascii=True)
    Path(folder, "metrics.json").write_text(text + "\n", encoding="utf-8")


SIZES = {"vocab_size": 99, "d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 32, "num_layers": 2,
         "num_decoder_layers": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
MODELS = {
    "t5_tied": {"feed_forward_proj": "relu"},
    "t5_gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5_asymmetric": {"feed_forward_proj": "relu", "num_decoder_layers": 3, "d_kv": 5, "num_heads": 3,
                      "decoder_start_token_id": 5},
}
LENGTHS = (9, 5, 13, 2, 7, 11)  # of the inputs of one batch
MAX_NEW_TOKENS = 20
PENALTIES = (0.6, 1.0, 2.0)


def random_t5(seed, **options):
    """A Hugging Face T5 with random weights, sharper than at initialisation: its answers differ in length."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**SIZES | {"decoder_start_token_id": 0} | options)).eval()
    if options.get("tie_word_embeddings") is False:  # transformers 5 ties in any case
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            elif "relative_attention_bias" in name:
                weight.copy_(2 * torch.randn_like(weight))
            elif "block" in name:
                weight.mul_(3.0 if "Attention" in name else 2.0)
        model.lm_head.weight[1] *= 2.0  # eos is often the likeliest or the unlikeliest token
    return model


def generate(model, inputs, **options):
    """Ids of Hugging Face's search, without the start token, pad after eos (HF's beam search fills with eos)."""
    # use_cache=False: 5.23 sizes the cache by the encoder's layers, and fails where the decoder has more.
    ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, use_cache=False, **options)[:, 1:]
    ids = ids.masked_fill((ids == 1).cumsum(1) - (ids == 1).long() > 0, 0)
    return ids[:, :int((ids != 0).any(0).nonzero().max()) + 1]


def answers(model, inputs):
    """{"greedy": ids, "beam4_P": ids for each length penalty P}."""
    beams = {f"beam4_{p}": generate(model, inputs, num_beams=4, early_stopping=False, length_penalty=p)
             for p in PENALTIES}
    return {"greedy": generate(model, inputs), **beams}


def telling(model, inputs, found):
    """Whether ids answer in several lengths, and are not so near a tie that another machine may choose otherwise."""
    import torch

    for name, ids in found.items():
        if len(set((ids != 0).sum(1).tolist())) < (2 if name == "beam4_2.0" else 3):
            return False
    exact = answers(model.double(), inputs)
    model.float()
    return all(torch.equal(found[name], exact[name]) for name in found)


def models(folder):
    """folder/t5_*: random T5s as save_pretrained writes them, and what they answer in expected.npz.

    folder/buckets.npz: Hugging Face's relative position buckets.
    """
    import numpy as np
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    for name, options in MODELS.items():
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
        for row, length in zip(input_ids, LENGTHS):
            row[:length] = torch.randint(2, SIZES["vocab_size"], (length,), generator=generator)
            row[length - 1] = 1
        decoder_ids = torch.randint(2, SIZES["vocab_size"], (len(LENGTHS), 8), generator=generator)
        decoder_ids[:, 0] = options.get("decoder_start_token_id", 0)
        inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}
        for seed in range(1000):
            model = random_t5(seed, **options)
            found = answers(model, inputs)
            if telling(model, inputs, found):
                break
        else:
            raise SystemExit(f"{name}: no seed gives outputs that tell")
        with torch.no_grad():
            output = model(**inputs, decoder_input_ids=decoder_ids)
        lengths = {key: (ids != 0).sum(1).tolist() for key, ids in found.items()}
        print(f"{name}: seed {seed}, tokens other than pad {lengths}")
        model.save_pretrained(Path(folder, name))
        arrays = {"input_ids": input_ids, "decoder_ids": decoder_ids, "logits": output.logits,
                  "encoder": output.encoder_last_hidden_state, **found}
        np.savez_compressed(Path(folder, name, "expected.npz"), **{k: v.numpy() for k, v in arrays.items()})

    distance = torch.arange(-200, 201)
    tables = {f"{kind}_{buckets}_{far}": T5Attention._relative_position_bucket(distance, kind == "both", buckets, far)
              for kind in ("both", "causal") for buckets, far in ((32, 128), (8, 12), (16, 50))}
    np.savez_compressed(Path(folder, "buckets.npz"), distance=distance.numpy(),
                        **{k: v.numpy() for k, v in tables.items()})


def check_export(folder):
    """What save_t5 writes gives the same logits in Hugging Face. Not in the suite, which has no transformers."""
    import sys
    import tempfile
    import torch
    from transformers import T5ForConditionalGeneration

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from model import load_t5, save_t5

    torch.manual_seed(0)
    x, y = torch.randint(2, SIZES["vocab_size"], (4, 9)), torch.randint(2, SIZES["vocab_size"], (4, 6))
    x[1:, 6:] = 0
    for name, scale in [(name, None) for name in MODELS] + [("t5_tied", False), ("t5_gated", True)]:
        model = load_t5(Path(folder, name))
        if scale is not None:  # a head tied but not scaled, and the other way round
            model.config.scale_decoder_outputs = scale
        with tempfile.TemporaryDirectory() as export, torch.no_grad():
            save_t5(model, export)
            theirs = T5ForConditionalGeneration.from_pretrained(export).eval()
            theirs = theirs(input_ids=x, attention_mask=(x != 0).long(), decoder_input_ids=y).logits
            difference = ((theirs - model(x, y)).abs().max() / theirs.abs().max()).item()
        print(f"{name}, scale_decoder_outputs {scale}: relative difference of the logits {difference:.1e}")
        assert difference <= 2e-5, "Hugging Face computes something else from what save_t5 wrote"


if __name__ == "__main__":
    fixtures = Path(__file__).parent / "fixtures"
    fixtures.mkdir(exist_ok=True)
    metrics(fixtures)
    models(fixtures)
    check_export(fixtures)
