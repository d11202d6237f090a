"""Write docs/families.md: what happens to every MLA family of the installed transformers and to some others, and to every
decoder that a search of its sources finds, measured.

    python -m benchmarks.families

The models are tiny and of awkward sizes (tests/support/families.py, decoders.py). A test compares the tables with a fresh run.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tests.support.decoders import found_decoders, other_decoders
from tests.support.families import FAMILIES
from tests.support.family_run import Row, decoder_row, measured_row

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
_TEXT = """# Model families

Every family of transformers {version} whose configuration has a `kv_lora_rank` (MLA), and behind them some with
grouped-query attention (llama to mixtral; from gemma3 on with windows of 5, chunks of 5 or sinks; the last layers of gemma4 and
gemma3n read what earlier ones cache), as tiny models of awkward
sizes in float64 (`tests/support/families.py`), compiled as they are, gpt_oss and hy_v4 with `unmatched="keep"`: their experts stay whole. Made by `python -m benchmarks.families`; a test holds the table
to a fresh run.

- *sites* are what was rewritten, over all layers; *leaves* stay the model's own modules, whole on every rank.
- *cp 2*, *cp 4*: largest deviation of a logit from the unmodified model over the largest logit, over a ragged left-padded
  prompt and six steps of one or three tokens; the limit is 1e-10. Both sides run with the model's float32 islands (norms,
  router, linear attention) widened to float64. Greedy tokens are the same.
- "refused: heads": the heads don't divide over that many ranks.

{table}

## Decoders with a latent, an indexer, a compressor or a window

Every class of transformers {version} that a search finds (`tests/support/decoders.py`; a test fails where it finds one that is
not named here): a class of a `modeling_*.py` that names a GenerationMixin among its bases, in a folder where a configuration
has a field `kv_lora_rank`, `index_topk`, `index_n_heads`, `indexer_*`, `compress*`, `sliding_window*`, `attention_window*`,
`window_size`, `attention_chunk_size`, `local_attention*` or `*local_attn_chunk_length` (*found by*), or where the modeling has a
class called an indexer or a compressor, or asks for a sliding or chunked mask. So some are found by a window of their image
tower alone. Of the table above are: {above}.

The others, each as a tiny model of two layers (of each kind of layer one) with windows and chunks of 5 where
its configuration has them on, steps of text; models
for images and sound are run without these. What helix_compile says is said as it says it; *the rest kept*: with `unmatched="keep"`,
what is refused without it stays whole. *No padding*: blocks of that model fall on columns, padding counted, and a module that is
kept gets each row alone.

{decoders}

## Styles of writing MLA

The matcher reads dataflow, so a model of your own may be written in any of these ways (`tests/support/toy_mla.py` has
each; `tests/whole/test_styles.py` and `test_other_styles.py` hold them to 1e-10 in float64 at cp 1, 2 and 4):

- one linear for K and V, cut per head or as a whole, heads first or last, K joined by `cat` or written in place;
- W_UK and W_UV as linears of their own, or as parameters [H, D, R], [H, R, D] or [R, H * D], applied by einsum, matmul
  or bmm;
- attention as `scaled_dot_product_attention`, as matmul and softmax, or as DeepSeek's einsum chain with heads behind
  tokens;
- scores of two products, one over K's nope part and one over the shared rope part;
- absorbed already: W_UK on the query, scores over the cached latent plus scores over the cached rope part, W_UV on the
  result.

In all of them the mask is *added* to the scores (0 where a key is visible, a large negative number where not), or given to
`scaled_dot_product_attention`; scores masked by `masked_fill` or `where` are refused with that reason.

Windows, chunks, sinks and caches that layers share are read off the graph and the mask, in these ways (`tests/passes/match/test_mask.py`, `test_gqa.py`):

- a mask that shows a query the last W tokens of its row, or those of its chunk of C; W and C are learned by evaluating it;
- K and V of another layer, as its cache holds them, left by it in a mapping that the model hands to every layer;
- sinks as a column beside the scores (`cat([scores, sinks], -1)`, the maximum taken off or not, the column cut off behind the
  softmax), or as a factor `sigmoid(logsumexp(scores) - sinks)` of what attention returns.

A rank's part of W_UK and W_UV is a view of the parameter wherever the parameter has whole heads in one of these orders; rows
in another order are copied, from a linear only. Refused, with the reason: a rope part that differs per head, V from what
is not cached or from another position, scores scaled or biased per key, a softmax over another dim, a W_UV that is
computed (a cast, a flip of heads), a bias on W_UK or W_UV, dims that the graph does not keep as symbols.
"""


def format_page(rows: list[Row], decoders: list[Row]) -> str:
    """The page with these rows, and those of decoders that have no family's."""
    head, line = Row("family", "sites", "leaves", ("cp 2", "cp 4"), "refused with"), "|---" * 6 + "|"
    table = "\n".join([str(head), line, *map(str, rows)])
    found = found_decoders()
    others = [str(Row("class", "found by", "sites", ("leaves", "cp 2"), "refused with")), line]
    for row in decoders:
        by = ", ".join(f"`{has}`" for has in found[row.name].has)
        others.append(str(Row(row.name, by, row.sites, (row.leaves, *row.deviations), row.refused)))
    above = ", ".join(f"`{name}`" for name in found if name not in other_decoders())
    return _TEXT.format(version=transformers.__version__, table=table, above=above, decoders="\n".join(others))


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    names = [(n, v) for n, family in FAMILIES.items() for v in ("", *family.variants)]
    rows, decoders = [], []
    for name, variant in names:
        rows.append(measured_row(name, variant))
        print(rows[-1], flush=True)
    for name in other_decoders():
        decoders.append(decoder_row(name))
        print(decoders[-1], flush=True)
    PAGE.write_text(format_page(rows, decoders), encoding="utf-8")


if __name__ == "__main__":
    main()
