"""What an installed gfast must do, away from its clone and without a compiler: python smoke.py BACKEND."""

import shutil
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gfast
from gfast import doctor
from gfast.data import Collator, QADataset, batches, bundled_authors, demo_tokenizer
from gfast.objectives import WGA
from gfast.ops import dispatch

assert not any(map(shutil.which, ("gcc", "g++", "cc", "c++", "clang", "nvcc"))), "a compiler is on PATH"
assert dispatch.select("unlearn_loss", "auto", "cpu") == sys.argv[1], doctor.report()
torch.manual_seed(0)
tokenizer = demo_tokenizer()
sizes = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
forget, retain = (batches(QADataset(rows[:4], tokenizer), Collator(tokenizer), 4) for rows in bundled_authors())
gfast.model_loss(model, forget[0], WGA(alpha=1.0)).loss.backward()
effect = gfast.g_effect(model, WGA(alpha=1.0), forget=forget, retain=retain)
assert effect.total("unlearn") < 0, effect
print(doctor.summary())
