"""Writes a Qwen2 checkpoint of random weights: ``write_checkpoint.py FOLDER CONFIG_AS_JSON``."""

import json
import sys

import torch
import transformers

folder, config = sys.argv[1], json.loads(sys.argv[2])
torch.manual_seed(0)
transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).save_pretrained(folder)
