"""Question/answer data for unlearning: TOFU, JSON lines, a bundled benchmark, tokenised data sets and collators."""

from gfast.data.bundled import bundled_authors, bundled_perturbed, refusals
from gfast.data.collate import Collator, ForgetRetainCollator, Reference, batches
from gfast.data.dataset import ForgetRetain, PreferenceDataset, QADataset, RefusalDataset, epoch_callback, fingerprint
from gfast.data.ids import check_vocabulary, token_pieces
from gfast.data.jsonl import iter_jsonl, load_jsonl
from gfast.data.tofu import load_tofu
from gfast.data.tokenizer import demo_tokenizer
from gfast.data.weights import top_tokens

__all__ = [
    "Collator",
    "ForgetRetain",
    "ForgetRetainCollator",
    "PreferenceDataset",
    "QADataset",
    "Reference",
    "RefusalDataset",
    "batches",
    "bundled_authors",
    "bundled_perturbed",
    "check_vocabulary",
    "demo_tokenizer",
    "epoch_callback",
    "fingerprint",
    "iter_jsonl",
    "load_jsonl",
    "load_tofu",
    "refusals",
    "token_pieces",
    "top_tokens",
]
